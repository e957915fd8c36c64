"""The sizes of a stack's weights and norms: those that programs rely on."""

from __future__ import annotations

from itertools import chain

import torch
from torch import Tensor

from hf_sparse.arguments import check_finite
from hf_sparse.runtime.weights.damage import require
from hf_sparse.runtime.weights.linear import Linear
from hf_sparse.runtime.weights.panels import CHUNK_ROWS
from hf_sparse.runtime.weights.stack import Block, Cross, Expert, Mixture, Norm, Stack


def check_stack(stack: Stack) -> None:
    """The sizes of all weights and norms against those that programs rely on.

    Raises:
        ValueError: one does not fit; the message names it.
    """
    hidden = stack.hidden
    require(bool(stack.blocks), "stack", "it has no blocks")
    positive = (hidden, stack.heads, stack.key_heads, stack.head_dim, stack.intermediate)
    require(all(isinstance(size, int) and size > 0 for size in positive), "stack", "a size")
    require(not stack.head_dim % 4 and not stack.heads % stack.key_heads, "stack", "its heads")
    turned = stack.rotated
    fits = type(turned) is int and 0 <= turned < stack.head_dim and not turned % 2
    require(fits, "stack", f"{turned} features of a head are rotated")
    require(stack.norm_first or not stack.parallel, "stack", "its norms behind parallel parts")
    limits = stack.softcap >= 0 and 0 < stack.multiplier < float("inf")
    require(limits and stack.softcap < float("inf"), "stack", "its softcap or multiplier")
    for number, block in enumerate(stack.blocks):
        place = f"blocks.{number}"
        _check_sizes(stack, block, place)
        first = stack.blocks[0]
        alike = all(
            (getattr(block, part) is None) == (getattr(first, part) is None)
            for part in ("gate", "head_norms", "added_norms", "mixture", "cross", "distances")
        )
        require(alike, place, "it has other parts than the first block")
        whole = stack.norm_first or None not in block.norms
        require(whole, place, "a norm behind the residual is missing")
        lone = block.added_norms is None or (stack.norm_first and not stack.parallel)
        require(lone, place, "it norms what it adds, and the residual")
        which = block.rotation
        fits = which is None or (type(which) is int and 0 <= which < len(stack.blocks))
        require(fits, place, f"the rotation {which}")
        if block.cross is not None:
            _check_cross(stack, block.cross, place)
        if block.distances is not None:
            require(stack.biased, place, "biases by distance, and scores without any")
            _check_distances(stack, block.distances, place)
        for norm, size in norm_sizes(stack, block):
            require(0 <= norm.epsilon < 1, f"{place}.norms", f"epsilon {norm.epsilon}")
            require_floats(norm.weight, f"{place}.norms", size)
            require_floats(norm.bias, f"{place}.norms", size)


def _check_sizes(stack: Stack, block: Block, place: str) -> None:
    """The shapes of a block's weights, and the chunks of its perceptron."""
    hidden = stack.hidden
    heads, key_heads = stack.heads_of(block)
    fits = 1 <= heads <= stack.heads and 1 <= key_heads <= stack.key_heads
    require(fits, place, f"{heads} heads, {key_heads} of keys")
    require(heads == stack.heads or not stack.biased, place, f"{heads} heads with biases")
    require(1 <= block.up.rows <= stack.intermediate, place, f"{block.up.rows} neurons")
    queries, keys = stack.rows_of(block)
    _check_linear(stack, block.qkv, (queries + 2 * keys, hidden), f"{place}.qkv")
    _check_linear(stack, block.out, (hidden, queries), f"{place}.out")
    require(not heads % key_heads, place, f"{heads} heads, {key_heads} of keys")
    if block.mixture is None:
        _check_perceptron(stack, block, block, place)
    else:
        _check_mixture(stack, block, block.mixture, place)


def _check_cross(stack: Stack, cross: Cross, place: str) -> None:
    """The shapes of attention to an encoder's states, whose features are all blocks' the same."""
    heads, key_heads = stack.cross_heads(cross)
    fits = key_heads >= 1 and heads >= 1 and not heads % key_heads
    require(fits and stack.causal, place, f"{heads} heads, {key_heads} of an encoder's keys")
    require(not stack.parallel, place, "an encoder's states beside parallel parts")
    first = stack.blocks[0].cross
    columns = cross.keys.columns if first is None else first.keys.columns
    queries, keys = heads * stack.head_dim, key_heads * stack.head_dim
    _check_linear(stack, cross.query, (queries, stack.hidden), f"{place}.cross.query")
    _check_linear(stack, cross.keys, (2 * keys, columns), f"{place}.cross.keys")
    _check_linear(stack, cross.out, (stack.hidden, queries), f"{place}.cross.out")


def _check_distances(stack: Stack, distances: Tensor, place: str) -> None:
    fits = distances.ndim == 2 and distances.shape[0] == stack.heads and distances.shape[1] % 2 == 1
    fits = fits and distances.dtype == torch.float32 and distances.is_contiguous()
    require(fits, place, f"biases by distance {distances.dtype} {tuple(distances.shape)}")
    check_finite(f"{place}.distances", distances)


def _check_mixture(stack: Stack, block: Block, mixture: Mixture, place: str) -> None:
    """The shapes of all experts and of the router, and what programs rely on beside them."""
    count = len(mixture.experts)
    require(1 <= mixture.chosen <= count, place, f"{mixture.chosen} of {count} experts")
    _check_linear(stack, mixture.router, (count, stack.hidden), f"{place}.router")
    for number, expert in enumerate(mixture.experts):
        _check_perceptron(stack, block, expert, f"{place}.experts.{number}")
    first = vars(mixture.experts[0])
    own = all(getattr(block, name) is one for name, one in first.items())
    require(own and type(mixture.normalised) is bool, place, "its first expert")
    alone = stack.norm_first and not stack.parallel and block.added_norms is None
    require(alone and block.norms[1] is not None, place, "norms of a mixture")


def _check_perceptron(stack: Stack, block: Block, layers: Block | Expert, place: str) -> None:
    """The shapes of a perceptron's weights, which all experts have, and its chunks."""
    rows, hidden = block.up.rows, stack.hidden
    for name, linear, shape in (
        ("gate", layers.gate, (rows, hidden)),
        ("up", layers.up, (rows, hidden)),
        ("down", layers.down, (hidden, rows)),
    ):
        if linear is not None:
            _check_linear(stack, linear, shape, f"{place}.{name}")
    opening = layers.gate or layers.up
    chunks = [last - first for first, last in opening.chunk_rows]
    fits = max(chunks) <= CHUNK_ROWS and layers.up.chunk_rows == opening.chunk_rows
    require(fits, place, "the chunks of its perceptron")
    edges = [first for first, _ in opening.chunk_rows] + [opening.rows]
    require(list(layers.down.edges) == edges, place, "the parts of its perceptron")


def _check_linear(stack: Stack, linear: Linear, shape: tuple[int, int], place: str) -> None:
    same = linear.dtype == stack.weight_type.dtype
    require(same, place, f"its weight is {linear.dtype}")
    found = (linear.rows, linear.columns)
    require(found == shape, place, f"its shape is {found}, not {shape}")


def norm_sizes(stack: Stack, block: Block) -> list[tuple[Norm, int]]:
    """A block's norms, and how many features each of them is for."""
    crossing = () if block.cross is None else (block.cross.norm,)
    every = chain(block.norms, block.added_norms or (), crossing)
    wide = [norm for norm in every if norm is not None]
    sized = [(norm, stack.hidden) for norm in wide]
    if block.head_norms is None:
        return sized
    sizes = (stack.head_dim, stack.head_dim)
    if len(block.head_norms[0].weight) != stack.head_dim:
        sizes = stack.rows_of(block)
    return [*sized, *zip(block.head_norms, sizes, strict=True)]


def require_floats(tensor: Tensor, place: str, size: int) -> None:
    """Raise a ValueError unless a tensor has `size` float32 numbers, all finite."""
    fits = tensor.dtype == torch.float32 and tensor.ndim == 1 and len(tensor) >= size
    require(fits and tensor.is_contiguous(), place, f"{tensor.dtype} {tuple(tensor.shape)}")
    check_finite(place, tensor)
