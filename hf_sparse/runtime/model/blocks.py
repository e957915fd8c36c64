"""A model's blocks, packed: the weights of the whole stack and the numbers that describe it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_sparse.arguments import check_finite
from hf_sparse.runtime.kernels.weight_types import WEIGHT_TYPES
from hf_sparse.runtime.model.coding import ModelCoding
from hf_sparse.runtime.model.configured import (
    multiplier_of,
    numbers_of,
    routing_of,
    sizes_of,
    window_of,
)
from hf_sparse.runtime.model.description import Blocks, CrossParts
from hf_sparse.runtime.model.stack_shapes import check_stack
from hf_sparse.runtime.weights.linear import Linear, pack_linear
from hf_sparse.runtime.weights.memory import Shelf
from hf_sparse.runtime.weights.panels import CHUNK_ROWS
from hf_sparse.runtime.weights.rates import Rates
from hf_sparse.runtime.weights.stack import Block, Cross, Expert, Mixture, Norm, Stack
from hf_sparse.structure.layers import is_conv1d

_AS_IT_IS = ModelCoding()


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
    config: Any,
    family: Blocks,
    modules: list[nn.Module],
    prefix: str,
    rates: Rates,
    coding: ModelCoding = _AS_IT_IS,
) -> Stack:
    """Pack the weights of all blocks, or their codes. The modules are read, not kept.

    Args:
        config: as the stack sees it (`families.seen_by`).
        family: describes the blocks.
        modules: the blocks as they run.
        prefix: of the layers' names.
        rates: speed of the kernels.
        coding: which weights become codes.
    """
    packed: dict[int, Block] = {}
    rows_shelf = Shelf() if family.causal else None
    packer = _Packer(
        family,
        _common_type(modules),
        Shelf(),
        rows_shelf,
        rates,
        sizes_of(config)[2],
        multiplier_of(config, family),
        *routing_of(config, family),
        coding,
    )
    blocks = []
    distances: Tensor | None = None
    for index, module in enumerate(modules):
        if id(module) not in packed:
            window = window_of(config, family, index)
            rotation = family.rotation(config, index)
            block = packer.block(module, f"{prefix}.{index}", index, window, rotation)
            if family.distances is not None:
                distances = distances_of(module, family.distances, config, distances)
            packed[id(module)] = replace(block, distances=distances)
        blocks.append(packed[id(module)])
    stack = Stack(
        blocks=tuple(blocks),
        intermediate=max(block.up.rows for block in blocks),
        **numbers_of(config, family),
    )
    check_stack(stack)
    return stack


def _common_type(modules: list[nn.Module]) -> torch.dtype:
    """The type of all matrices, if kernels can read it; else, or if they differ, float32."""
    dtypes = {p.dtype for module in modules for p in module.parameters() if p.ndim > 1}
    common = next(iter(dtypes))
    return common if len(dtypes) == 1 and common in WEIGHT_TYPES else torch.float32


@dataclass(frozen=True)
class _Packer:
    """Packs the blocks of one model.

    Attributes:
        family: where a block's parts are.
        dtype: of all weights.
        shelf: where they are put.
        rows_shelf: where those for single tokens are put, if there are any.
        rates: speed of the kernels.
        head_dim: features of a head.
        chosen, normalised: of a mixture's experts.
        multiplier: by which the residual that norms see is divided.
        coding: which weights become codes; routers do not.
    """

    family: Blocks
    dtype: torch.dtype
    shelf: Shelf
    rows_shelf: Shelf | None
    rates: Rates
    head_dim: int
    multiplier: float
    chosen: int
    normalised: bool
    coding: ModelCoding

    def block(
        self, module: nn.Module, name: str, index: int, window: int, rotation: int | None
    ) -> Block:
        """Pack one block, which is called `name`."""
        family = self.family
        mixture = None if family.router is None else self._mixture(module, name, family.router)
        gate, up, down = self._perceptron(module, name, mixture)
        first, second = family.norm_paths(index)
        heads, added = family.head_norms, family.added_norms
        return Block(
            qkv=self._joined(module, name, family.qkv),
            out=self._linear(module, name, family.out),
            up=up,
            down=down,
            gate=gate,
            norms=(self._norm(module, name, first), self._norm(module, name, second)),
            head_norms=None if heads is None else self._norms(module, name, heads),
            window=window,
            added_norms=None if added is None else self._norms(module, name, added),
            rotation=rotation,
            mixture=mixture,
            cross=None if family.cross is None else self._cross(module, name, family.cross),
        )

    def _cross(self, module: nn.Module, name: str, parts: CrossParts) -> Cross:
        """Attention to an encoder's states; its keys are never those of single tokens."""
        norm = self._norm(module, name, parts.norm)
        assert norm is not None
        return Cross(
            query=self._linear(module, name, parts.query),
            keys=replace(self, rows_shelf=None)._joined(module, name, parts.keys),
            out=self._linear(module, name, parts.out),
            norm=norm,
        )

    def _perceptron(
        self, module: nn.Module, name: str, mixture: Mixture | None
    ) -> tuple[Linear | None, Linear, Linear]:
        """Gate, `up` and `down`; those of the first expert, if there are several."""
        if mixture is not None:
            first = mixture.experts[0]
            return first.gate, first.up, first.down
        gate, up = self._opening(module, name)
        return gate, up, self._linear(module, name, self.family.down, CHUNK_ROWS)

    def _mixture(self, module: nn.Module, name: str, router: str) -> Mixture:
        """The router, and each expert's own layers."""
        family = self.family
        path, _, last = family.down.rpartition(".")
        experts: Any = module.get_submodule(path)
        of = [getattr(experts, family.up.rpartition(".")[2]), getattr(experts, last)]
        entry, ending = (parameter.detach().to(self.dtype) for parameter in of)
        found = []
        for number, (both, down) in enumerate(zip(entry, ending, strict=True)):
            place = f"{name}.{path}.{number}"
            gate, up = both.chunk(2)
            found.append(
                Expert(
                    self._pack(f"{place}.gate", gate, None, of=of[:1]),
                    self._pack(f"{place}.up", up, None, of=of[:1]),
                    self._pack(f"{place}.down", down, None, CHUNK_ROWS, of=of[1:]),
                )
            )
        weight: Any = module.get_submodule(router).weight
        return Mixture(
            self._pack(f"{name}.{router}", weight.detach().to(self.dtype), None, of=()),
            tuple(found),
            self.chosen,
            self.normalised,
        )

    def _opening(self, module: nn.Module, name: str) -> tuple[Linear | None, Linear]:
        """The gate, if the family has one, and `up`; both are halves of one layer if so described."""
        gate, up = self.family.gate, self.family.up
        if gate is None:
            return None, self._linear(module, name, up)
        if gate != up:
            return self._linear(module, name, gate), self._linear(module, name, up)
        weight, bias = self._weight(module, name, up)
        weights = weight.chunk(2)
        biases = (None, None) if bias is None else bias.chunk(2)
        first, second = (
            self._pack(f"{name}.{up} ({half})", one, other, of=_parameters(module, up))
            for half, one, other in zip(("gate", "up"), weights, biases, strict=True)
        )
        return first, second

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
        return self._pack(
            f"{name}.{path}", weight, bias, column_chunk, of=_parameters(module, path)
        )

    def _joined(self, module: nn.Module, name: str, paths: tuple[str, ...]) -> Linear:
        """Layers that read the same features, as one."""
        parts = [self._weight(module, name, path) for path in paths]
        if self.family.interleaved:
            parts = [self._by_kind(*part) for part in parts]
        biased = any(bias is not None for _, bias in parts)
        filled = [weight.new_zeros(len(weight)) if bias is None else bias for weight, bias in parts]
        joined = "+".join([paths[0], *(path.split(".")[-1] for path in paths[1:])])
        weight = torch.cat([weight for weight, _ in parts])
        bias = torch.cat(filled) if biased else None
        return self._pack(f"{name}.{joined}", weight, bias, of=_parameters(module, *paths))

    def _by_kind(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """All queries before all keys and all values, which lie head by head."""
        rows = torch.arange(len(weight)).view(-1, 3, self.head_dim).transpose(0, 1).flatten()
        return weight[rows], None if bias is None else bias[rows]

    def _norms(self, module: nn.Module, name: str, paths: tuple[str, str]) -> tuple[Norm, Norm]:
        first, second = (self._norm(module, name, path) for path in paths)
        assert first is not None
        assert second is not None
        return first, second

    def _norm(self, module: nn.Module, name: str, path: str | None) -> Norm | None:
        if path is None:
            return None
        layer = module.get_submodule(path)
        return _normed(layer, f"{name}.{path}", self.family.norm_offset, self.multiplier)

    def _pack(
        self,
        name: str,
        weight: Tensor,
        bias: Tensor | None,
        column_chunk: int | None = None,
        *,
        of: Sequence[Tensor],
    ) -> Linear:
        """Pack a weight, made of some parameters of the model; of none that may become codes if ()."""
        only = self.coding.only
        coded = bool(of) and (only is None or all(id(parameter) in only for parameter in of))
        return pack_linear(
            name,
            weight,
            bias,
            column_chunk=column_chunk,
            rows_shelf=self.rows_shelf,
            shelf=self.shelf,
            rates=self.rates,
            coding=self.coding.blocks if coded else None,
        )


def distances_of(module: nn.Module, path: str, config: Any, before: Tensor | None) -> Tensor | None:
    """`Block.distances` of a block, by its own function; those of the block before if it has none."""
    attention: Any = module.get_submodule(path)
    if not hasattr(attention, "relative_attention_bias"):
        return before
    check_finite(path, attention.relative_attention_bias.weight)
    furthest = config.relative_attention_max_distance
    with torch.no_grad():
        # Of the first query to all keys, and of all queries to the first key.
        behind = attention.compute_bias(furthest + 1, 1)[0, :, :, 0]
        ahead = attention.compute_bias(1, furthest + 1)[0, :, 0, 1:]
    return torch.cat([ahead.flip(-1), behind], dim=1).float().contiguous()


def _parameters(module: nn.Module, *paths: str) -> list[Tensor]:
    """The weights of some layers of a block."""
    layers: list[Any] = [module.get_submodule(path) for path in paths]
    return [layer.weight for layer in layers]


def _normed(layer: Any, name: str, offset: float, divisor: float) -> Norm:
    """A norm of what was divided by `divisor`, whose weights are kept less `offset`."""
    weight = layer.weight
    if weight is None:  # LayerNorm without an affine map
        weight = torch.ones(layer.normalized_shape)
    bias = getattr(layer, "bias", None)
    for tensor in (weight, bias):
        if tensor is not None:
            check_finite(name, tensor)
    epsilon = layer.eps if hasattr(layer, "eps") else layer.variance_epsilon
    return Norm(
        (weight.detach().float() + offset).contiguous(),
        torch.zeros(len(weight)) if bias is None else bias.detach().float().clone(),
        float(epsilon) / divisor**2,
    )
