"""A model's blocks, packed: the weights of the whole stack and the numbers that describe it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_sparse.arguments import check_finite
from hf_sparse.runtime.kernels.weight_types import WEIGHT_TYPES
from hf_sparse.runtime.model.families import ACTIVATION_NAMES, COMPILED, Blocks, family_of
from hf_sparse.runtime.weights.damage import require
from hf_sparse.runtime.weights.linear import Linear, pack_linear
from hf_sparse.runtime.weights.memory import Shelf
from hf_sparse.runtime.weights.panels import CHUNK_ROWS
from hf_sparse.runtime.weights.rates import Rates
from hf_sparse.runtime.weights.stack import NO_WINDOW, Block, Norm, Stack
from hf_sparse.structure.families import base_type
from hf_sparse.structure.layers import is_conv1d


def why_not_compiled(config: Any) -> str | None:
    """Why the stack of a model with this config cannot be compiled as a whole, or None."""
    family = family_of(config)
    if family is None:
        return f"family '{config.model_type}' is not one of {', '.join(COMPILED)}"
    for name, values in family.supported.items():
        value = getattr(config, name, values[0])
        if value not in values:
            return f"its config has {name}={value!r}"
    window = getattr(config, "sliding_window", None) if family.windows else None
    if window is not None and (not isinstance(window, int) or window < 1):
        return f"its config has sliding_window={window!r}"
    if family.windows and not getattr(config, "is_causal", True):
        windows = [window_of(config, family, i) for i in range(config.num_hidden_layers)]
        if min(windows) != NO_WINDOW:
            return "its config has is_causal=False with sliding windows"
    activation = getattr(config, family.activation, None)
    if activation not in ACTIVATION_NAMES:
        return f"activation {activation!r} is not one of {', '.join(ACTIVATION_NAMES)}"
    if _sizes(config)[2] % 4:
        return f"heads of size {_sizes(config)[2]} are no multiple of 4"
    return None


def find_blocks(base: PreTrainedModel, family: Blocks) -> tuple[nn.Module, str, list[nn.Module]]:
    """The module that owns the list of blocks, the list's name, and the blocks as they run."""
    *path, name = family.stack.split(".")
    owner = base.get_submodule(".".join(path))
    listed: list[Any] = list(getattr(owner, name))
    if not hasattr(listed[0], "albert_layers"):
        return owner, name, listed
    layers, groups = base.config.num_hidden_layers, len(listed)
    order = [listed[int(i / (layers / groups))] for i in range(layers)]
    return owner, name, [inner for group in order for inner in group.albert_layers]


def pack_blocks(
    config: Any, family: Blocks, modules: list[nn.Module], prefix: str, rates: Rates
) -> Stack:
    """Pack the weights of all blocks. The modules are read, not kept."""
    packed: dict[int, Block] = {}
    rows_shelf = Shelf() if family.causal else None
    packer = _Packer(family, _common_type(modules), Shelf(), rows_shelf, rates)
    blocks = []
    for index, module in enumerate(modules):
        if id(module) not in packed:
            window = window_of(config, family, index)
            packed[id(module)] = packer.block(module, f"{prefix}.{index}", window)
        blocks.append(packed[id(module)])
    stack = Stack(
        blocks=tuple(blocks),
        intermediate=max(block.up.rows for block in blocks),
        **numbers_of(config, family),
    )
    check_stack(stack)
    return stack


def numbers_of(config: Any, family: Blocks) -> dict[str, Any]:
    """The fields of a stack that its config holds: all but the weights and the perceptron's size."""
    heads, key_heads, head_dim = _sizes(config)
    first = family.norm_first
    return {
        "hidden": config.hidden_size,
        "heads": heads,
        "key_heads": key_heads,
        "head_dim": head_dim,
        "scale": head_dim**-0.5,
        "norm": family.norm,
        "norm_first": bool(getattr(config, first)) if isinstance(first, str) else first,
        "causal": family.causal and getattr(config, "is_causal", True),
        "rotary": family.rotary,
        "activation": ACTIVATION_NAMES[getattr(config, family.activation)],
    }


def _sizes(config: Any) -> tuple[int, int, int]:
    """Heads, heads of keys, and the size of a head."""
    heads = config.num_attention_heads
    keys = getattr(config, "num_key_value_heads", None) or heads
    return heads, keys, getattr(config, "head_dim", None) or config.hidden_size // heads


def window_of(config: Any, family: Blocks, index: int) -> int:
    """How many tokens back block `index` sees; kernels count them in 32 bits."""
    if not family.windows:
        return NO_WINDOW
    kinds = getattr(config, "layer_types", None)
    sliding = kinds[index] == "sliding_attention" if kinds else True
    window = getattr(config, "sliding_window", None) if sliding else None
    return NO_WINDOW if window is None else min(window, NO_WINDOW)


def _common_type(modules: list[nn.Module]) -> torch.dtype:
    """The type of all matrices, if kernels can read it; else, or if they differ, float32."""
    found = {p.dtype for module in modules for p in module.parameters() if p.ndim > 1}
    common = next(iter(found))
    return common if len(found) == 1 and common in WEIGHT_TYPES else torch.float32


@dataclass(frozen=True)
class _Packer:
    """Packs the blocks of one model.

    Attributes:
        family: where a block's parts are.
        dtype: of all weights.
        shelf: where they are put.
        rows_shelf: where those for single tokens are put, if there are any.
        rates: speed of the kernels.
    """

    family: Blocks
    dtype: torch.dtype
    shelf: Shelf
    rows_shelf: Shelf | None
    rates: Rates

    def block(self, module: nn.Module, name: str, window: int) -> Block:
        """Pack one block, which is called `name`."""
        family = self.family
        qkv = self._joined(module, name, family.qkv)
        gate = None if family.gate is None else self._linear(module, name, family.gate)
        heads = family.head_norms
        return Block(
            qkv=qkv,
            out=self._linear(module, name, family.out),
            up=self._linear(module, name, family.up),
            down=self._linear(module, name, family.down, CHUNK_ROWS),
            gate=gate,
            norms=_norms(module, name, family.norms),
            head_norms=None if heads is None else _norms(module, name, heads),
            window=window,
        )

    def _weight(self, module: nn.Module, name: str, path: str) -> tuple[Tensor, Tensor | None]:
        """Weight `(out_features, in_features)` and bias of a layer."""
        layer: Any = module.get_submodule(path)
        if type(layer) is not nn.Linear and not is_conv1d(layer):
            raise ValueError(
                f"{name}.{path} is a {type(layer).__name__}; wanted a plain Linear. Merge adapters, "
                "and remove parametrizations, before compiling."
            )
        weight = layer.weight.detach().to(self.dtype)
        return (weight.T if is_conv1d(layer) else weight), layer.bias

    def _linear(
        self, module: nn.Module, name: str, path: str, column_chunk: int | None = None
    ) -> Linear:
        weight, bias = self._weight(module, name, path)
        return self._pack(f"{name}.{path}", weight, bias, column_chunk)

    def _joined(self, module: nn.Module, name: str, paths: tuple[str, ...]) -> Linear:
        """Layers that read the same features, as one."""
        parts = [self._weight(module, name, path) for path in paths]
        biased = any(bias is not None for _, bias in parts)
        filled = [weight.new_zeros(len(weight)) if bias is None else bias for weight, bias in parts]
        joined = "+".join([paths[0], *(path.split(".")[-1] for path in paths[1:])])
        weight = torch.cat([weight for weight, _ in parts])
        return self._pack(f"{name}.{joined}", weight, torch.cat(filled) if biased else None)

    def _pack(
        self, name: str, weight: Tensor, bias: Tensor | None, column_chunk: int | None = None
    ) -> Linear:
        return pack_linear(
            name,
            weight,
            bias,
            column_chunk=column_chunk,
            rows_shelf=self.rows_shelf,
            shelf=self.shelf,
            rates=self.rates,
        )


def _norms(module: nn.Module, name: str, paths: tuple[str, str]) -> tuple[Norm, Norm]:
    first, second = (_norm(module.get_submodule(path), f"{name}.{path}") for path in paths)
    return first, second


def _norm(layer: Any, name: str) -> Norm:
    weight = layer.weight
    if weight is None:  # LayerNorm without an affine map
        weight = torch.ones(layer.normalized_shape)
    bias = getattr(layer, "bias", None)
    for tensor in (weight, bias):
        if tensor is not None:
            check_finite(name, tensor)
    epsilon = layer.eps if hasattr(layer, "eps") else layer.variance_epsilon
    return Norm(
        weight.detach().float().contiguous().clone(),
        torch.zeros(len(weight)) if bias is None else bias.detach().float().clone(),
        float(epsilon),
    )


def check_config(stack: Stack, config: Any) -> None:
    """Check that a stack is one of a model with this config.

    Raises:
        ValueError: a number, a part, or the order of its blocks differs; the message names it.
    """
    family = COMPILED[base_type(config.model_type)]
    order = run_order(config)
    if len(stack.blocks) != len(order):
        raise ValueError(f"there are {len(stack.blocks)} blocks, the config has {len(order)}")
    places: dict[int, int] = {}
    found = [places.setdefault(id(block), len(places)) for block in stack.blocks]
    if found != order:
        raise ValueError(f"the blocks run in the order {found}, the config's family in {order}")
    for name, value in numbers_of(config, family).items():
        if getattr(stack, name) != value:
            raise ValueError(f"the blocks have {name}={getattr(stack, name)}, the config {value}")
    epsilon = family.epsilon
    if isinstance(epsilon, str):
        epsilon = getattr(config, epsilon)
    for index, block in enumerate(stack.blocks):
        expected = family.gate is not None, family.head_norms is not None
        if (block.gate is not None, block.head_norms is not None) != expected:
            raise ValueError(f"block {index} has other parts than its family's")
        window = window_of(config, family, index)
        if block.window != window:
            raise ValueError(f"block {index} has window={block.window}, the config {window}")
        for norm in (*block.norms, *(block.head_norms or ())):
            if norm.epsilon != epsilon:
                raise ValueError(
                    f"block {index} has a norm with epsilon={norm.epsilon}, the config {epsilon}"
                )


def run_order(config: Any) -> list[int]:
    """The block that runs at each place: each its own, but for ALBERT's, which repeat."""
    layers, groups = config.num_hidden_layers, getattr(config, "num_hidden_groups", None)
    if groups is None:
        return list(range(layers))
    inner, places = config.inner_group_num, dict[int, int]()
    listed = [int(i / (layers / groups)) * inner + j for i in range(layers) for j in range(inner)]
    return [places.setdefault(place, len(places)) for place in listed]


def check_stack(stack: Stack) -> None:
    """The sizes of all weights and norms against those that programs rely on."""
    hidden = stack.hidden
    require(bool(stack.blocks), "stack", "it has no blocks")
    positive = (hidden, stack.heads, stack.key_heads, stack.head_dim, stack.intermediate)
    require(all(isinstance(size, int) and size > 0 for size in positive), "stack", "a size")
    require(not stack.head_dim % 4 and not stack.heads % stack.key_heads, "stack", "its heads")
    for number, block in enumerate(stack.blocks):
        place = f"blocks.{number}"
        heads, key_heads = stack.heads_of(block)
        fits = 1 <= heads <= stack.heads and 1 <= key_heads <= stack.key_heads
        require(fits, place, f"{heads} heads, {key_heads} of keys")
        require(1 <= block.up.rows <= stack.intermediate, place, f"{block.up.rows} neurons")
        queries, keys = stack.rows_of(block)
        wanted = {
            "qkv": (queries + 2 * keys, hidden),
            "out": (hidden, queries),
            "up": (block.up.rows, hidden),
            "gate": (block.up.rows, hidden),
            "down": (hidden, block.up.rows),
        }
        for name, shape in wanted.items():
            linear: Linear | None = getattr(block, name)
            if linear is None:
                continue
            same = linear.dtype == stack.weight_type.dtype
            require(same, f"{place}.{name}", f"its weight is {linear.dtype}")
            found = (linear.rows, linear.columns)
            require(found == shape, f"{place}.{name}", f"its shape is {found}, not {shape}")
        require(not heads % key_heads, place, f"{heads} heads, {key_heads} of keys")
        opening = block.gate or block.up
        chunks = [last - first for first, last in opening.chunk_rows]
        fits = max(chunks) <= CHUNK_ROWS and block.up.chunk_rows == opening.chunk_rows
        require(fits, place, "the chunks of its perceptron")
        edges = [first for first, _ in opening.chunk_rows] + [opening.rows]
        require(list(block.down.edges) == edges, place, "the parts of its perceptron")
        first = stack.blocks[0]
        alike = all(
            (getattr(block, part) is None) == (getattr(first, part) is None)
            for part in ("gate", "head_norms")
        )
        require(alike, place, "it has other parts than the first block")
        for norms, size in ((block.norms, hidden), (block.head_norms or (), stack.head_dim)):
            for norm in norms:
                require(0 <= norm.epsilon < 1, f"{place}.norms", f"epsilon {norm.epsilon}")
                require_floats(norm.weight, f"{place}.norms", size)
                require_floats(norm.bias, f"{place}.norms", size)


def require_floats(tensor: Tensor, place: str, size: int) -> None:
    """Raise a ValueError unless a tensor has `size` float32 numbers, all finite."""
    fits = tensor.dtype == torch.float32 and tensor.ndim == 1 and len(tensor) >= size
    require(fits and tensor.is_contiguous(), place, f"{tensor.dtype} {tuple(tensor.shape)}")
    check_finite(place, tensor)
