"""A model's blocks, packed: the weights of the whole stack and the numbers that describe it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_sparse.runtime.families import ACTIVATION_NAMES, COMPILED, Blocks, family_of
from hf_sparse.runtime.latency import NOMINAL, Rates
from hf_sparse.runtime.linear import Linear, pack_linear
from hf_sparse.runtime.memory import Shelf
from hf_sparse.runtime.packing import CHUNK_ROWS
from hf_sparse.structure import is_conv1d

# No window: further back than any position.
NO_WINDOW = 1 << 30


@dataclass(frozen=True, eq=False)
class Norm:
    """Weight and bias of a norm; `bias` is zeros for RMSNorm."""

    weight: Tensor
    bias: Tensor
    epsilon: float


@dataclass(frozen=True, eq=False)
class Block:
    """One block. `gate` and `head_norms` are None where the family has none."""

    qkv: Linear
    out: Linear
    up: Linear
    down: Linear
    gate: Linear | None
    norms: tuple[Norm, Norm]
    head_norms: tuple[Norm, Norm] | None
    window: int

    @property
    def linears(self) -> list[Linear]:
        """The packed weights, in the order of their use."""
        gate = [] if self.gate is None else [self.gate]
        return [self.qkv, self.out, *gate, self.up, self.down]


@dataclass(frozen=True, eq=False)
class Stack:
    """All blocks of a model.

    Attributes:
        blocks: in the order in which they run; a shared block (ALBERT) is there several times.
        hidden, heads, key_heads, head_dim, intermediate: sizes.
        scale: what scores are multiplied by.
        norm, norm_first, causal, rotary, activation: see `families.Blocks`.
    """

    blocks: tuple[Block, ...]
    hidden: int
    heads: int
    key_heads: int
    head_dim: int
    intermediate: int
    scale: float
    norm: str
    norm_first: bool
    causal: bool
    rotary: bool
    activation: str

    @property
    def query_rows(self) -> int:
        """Rows of all heads' queries."""
        return self.heads * self.head_dim

    @property
    def key_rows(self) -> int:
        """Rows of all heads' keys; as many of values."""
        return self.key_heads * self.head_dim

    @property
    def nbytes(self) -> int:
        """Bytes of the packed weights, shared ones once."""
        linears = {id(x): x for block in self.blocks for x in block.linears}
        return sum(linear.nbytes for linear in linears.values())


def why_not_compiled(config: Any) -> str | None:
    """Why the stack of a model with this config cannot be compiled as a whole, or None."""
    family = family_of(config)
    if family is None:
        return f"family '{config.model_type}' is not one of {', '.join(COMPILED)}"
    for name, values in family.supported.items():
        value = getattr(config, name, values[0])
        if value not in values:
            return f"its config has {name}={value!r}"
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
    config: Any, family: Blocks, modules: list[nn.Module], prefix: str, rates: Rates = NOMINAL
) -> Stack:
    """Pack the weights of all blocks. The modules are read, not kept."""
    heads, key_heads, head_dim = _sizes(config)
    packed: dict[int, Block] = {}
    shelves = Shelf(), Shelf() if family.causal else None
    blocks = []
    for index, module in enumerate(modules):
        if id(module) not in packed:
            window = _window(config, index)
            name = f"{prefix}.{index}"
            packed[id(module)] = _pack_block(family, module, name, window, shelves, rates)
        blocks.append(packed[id(module)])
    first = family.norm_first
    return Stack(
        blocks=tuple(blocks),
        hidden=config.hidden_size,
        heads=heads,
        key_heads=key_heads,
        head_dim=head_dim,
        intermediate=blocks[0].up.rows,
        scale=head_dim**-0.5,
        norm=family.norm,
        norm_first=bool(getattr(config, first)) if isinstance(first, str) else first,
        causal=family.causal and getattr(config, "is_causal", True),
        rotary=family.rotary,
        activation=ACTIVATION_NAMES[getattr(config, family.activation)],
    )


def _sizes(config: Any) -> tuple[int, int, int]:
    """Heads, heads of keys, and the size of a head."""
    heads = config.num_attention_heads
    keys = getattr(config, "num_key_value_heads", None) or heads
    return heads, keys, getattr(config, "head_dim", None) or config.hidden_size // heads


def _window(config: Any, index: int) -> int:
    kinds = getattr(config, "layer_types", None)
    sliding = kinds[index] == "sliding_attention" if kinds else True
    window = getattr(config, "sliding_window", None) if sliding else None
    return window or NO_WINDOW


def _pack_block(
    family: Blocks,
    module: nn.Module,
    name: str,
    window: int,
    shelves: tuple[Shelf, Shelf | None],
    rates: Rates,
) -> Block:
    shelf, single = shelves

    def weight_of(path: str) -> tuple[Tensor, Tensor | None]:
        layer: Any = module.get_submodule(path)
        weight = layer.weight.detach().float()
        return (weight.T if is_conv1d(layer) else weight), layer.bias

    def linear(path: str, column_chunk: int | None = None) -> Linear:
        return pack_linear(
            f"{name}.{path}",
            *weight_of(path),
            column_chunk=column_chunk,
            single=single,
            shelf=shelf,
            rates=rates,
        )

    def norm(path: str) -> Norm:
        layer: Any = module.get_submodule(path)
        weight = layer.weight
        if weight is None:  # LayerNorm without an affine map
            weight = torch.ones(layer.normalized_shape)
        bias = getattr(layer, "bias", None)
        epsilon = getattr(layer, "eps", None) or layer.variance_epsilon
        return Norm(
            weight.detach().float().contiguous().clone(),
            torch.zeros(len(weight)) if bias is None else bias.detach().float().clone(),
            epsilon,
        )

    parts = [weight_of(path) for path in family.qkv]
    biases = [bias for _, bias in parts]
    joined = "+".join([family.qkv[0], *(path.split(".")[-1] for path in family.qkv[1:])])
    qkv = pack_linear(
        f"{name}.{joined}",
        torch.cat([weight for weight, _ in parts]),
        None if biases[0] is None else torch.cat([b for b in biases if b is not None]),
        single=single,
        shelf=shelf,
        rates=rates,
    )
    gate = None if family.gate is None else linear(family.gate)
    heads = family.head_norms
    return Block(
        qkv=qkv,
        out=linear(family.out),
        up=linear(family.up),
        down=linear(family.down, CHUNK_ROWS),
        gate=gate,
        norms=(norm(family.norms[0]), norm(family.norms[1])),
        head_norms=None if heads is None else (norm(heads[0]), norm(heads[1])),
        window=window,
    )
