"""Heads and neurons: the units of a block that can be removed whole, without a trace in its outputs.

A head of queries has rows in the projection to queries and columns in the one behind attention; with
the other heads of its group it shares a head of keys and values. A neuron has a row in `up` (and
`gate`) and a column in `down`. Where these layers are, `hf_sparse.structure.parts` tells.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from hf_sparse.arguments import check_finite, check_has_value
from hf_sparse.structure.anatomy import FAMILIES, derived_parts, is_derived
from hf_sparse.structure.layers import (
    TargetLayer,
    check_has_weights,
    is_conv1d,
    is_matrix,
)
from hf_sparse.structure.parts import PARTS, BlockSize, Parts, full_size, head_size, parts_of


@dataclass(frozen=True)
class BlockUnits:
    """A block and its units.

    Attributes:
        name: of the block in the model.
        block: the block.
        parts: where its layers are.
        head_dim: features of one head.
    """

    name: str
    block: nn.Module
    parts: Parts
    head_dim: int

    def layer(self, path: str) -> TargetLayer:
        """The layer at a path inside the block."""
        return TargetLayer(f"{self.name}.{path}", self.block.get_submodule(path))

    @property
    def out(self) -> TargetLayer:
        """The projection behind attention: heads are its columns."""
        return self.layer(self.parts.out)

    @property
    def down(self) -> TargetLayer:
        """The layer behind the activation: neurons are its columns."""
        return self.layer(self.parts.down)

    @property
    def entries(self) -> list[TargetLayer]:
        """`up`, and `gate` where there is one: neurons are their rows."""
        paths = (self.parts.up, self.parts.gate)
        return [self.layer(path) for path in paths if path is not None]

    @property
    def projections(self) -> list[TargetLayer]:
        """To queries, keys and values: three layers, or one with the rows of all."""
        return [self.layer(path) for path in self.parts.qkv]

    @property
    def layers(self) -> list[TargetLayer]:
        """All of them."""
        return [*self.projections, self.out, *self.entries, self.down]

    @property
    def activation(self) -> Any:
        """The network's activation, a module or a function."""
        found: Any = self.block
        for name in self.parts.act.split("."):
            found = getattr(found, name)
        return found

    @property
    def size(self) -> BlockSize:
        """How many units there are now."""
        heads = _shape(self.out)[1] // self.head_dim
        projections = self.projections
        if self.parts.layout == "heads":
            key_heads = heads
        elif len(projections) > 1:
            key_heads = _shape(projections[1])[0] // self.head_dim
        else:
            key_heads = (_shape(projections[0])[0] // self.head_dim - heads) // 2
        return BlockSize(heads, key_heads, _shape(self.down)[1])

    def rows(self, heads: Tensor, key_heads: Tensor) -> list[Tensor]:
        """The rows that belong to some heads, for each of the projections."""
        if self.parts.layout == "heads":
            width = 3 * self.head_dim
            return [(heads[:, None] * width + torch.arange(width)).flatten()]
        queries, keys = self.features(heads), self.features(key_heads)
        if len(self.parts.qkv) > 1:
            return [queries, keys, keys]
        size = self.size
        behind = size.heads * self.head_dim
        parts = [queries, behind + keys, behind + size.key_heads * self.head_dim + keys]
        return [torch.cat(parts)]

    def entry_rows(self, neurons: Tensor) -> Tensor:
        """The rows that belong to some neurons, in each of the entries."""
        if not self.parts.joined:
            return neurons
        return torch.cat([neurons, _shape(self.down)[1] + neurons])

    def value_rows(self) -> Tensor:
        """The rows of the last projection that give values, in the order of the heads of keys."""
        heads, size = torch.arange(self.size.key_heads), self.head_dim
        if self.parts.layout == "heads":
            return ((3 * heads[:, None] + 2) * size + torch.arange(size)).flatten()
        values = self.features(heads)
        return values + _shape(self.projections[-1])[0] - len(values)

    def features(self, heads: Tensor) -> Tensor:
        """The features of some heads, in order."""
        return (heads[:, None] * self.head_dim + torch.arange(self.head_dim)).flatten()

    def keep_(self, heads: Tensor, key_heads: Tensor, neurons: Tensor) -> None:
        """Remove all units but those whose numbers are given, in ascending order."""
        for layer, rows in zip(self.projections, self.rows(heads, key_heads), strict=True):
            _select_(layer, rows=rows)
        _select_(self.out, columns=self.features(heads))
        for layer in self.entries:
            _select_(layer, rows=self.entry_rows(neurons))
        _select_(self.down, columns=neurons)
        self._set_sizes_(len(heads), len(key_heads), len(neurons))

    def _set_sizes_(self, heads: int, key_heads: int, neurons: int) -> None:
        """Set the attributes of the modules that hold their sizes, as the families name them."""
        attention = {
            "num_attention_heads": heads,
            "num_heads": heads,
            "all_head_size": heads * self.head_dim,
            "split_size": heads * self.head_dim,
            "num_key_value_groups": heads // key_heads,
        }
        network = {"intermediate_size": neurons}
        for path, sizes in ((self.parts.qkv[0], attention), (self.parts.up, network)):
            module = self.block.get_submodule(path.rpartition(".")[0])
            for name, value in sizes.items():
                if hasattr(module, name):
                    setattr(module, name, value)


def find_units(model: Any) -> list[BlockUnits]:
    """The blocks of a model of a known family, shared ones once.

    Raises:
        ValueError: the family is in neither `PARTS` nor `FAMILIES`, or a layer is no plain Linear or
            Conv1D.
    """
    check_has_weights(model)
    if is_derived(getattr(model, "config", None)):
        head_dim = head_size(model.config)
        derived = [BlockUnits(*placed, head_dim) for placed in derived_parts(model)]
        for units in derived:
            _check_plain(model, units)
        return derived
    parts = parts_of(getattr(model, "config", None))
    if parts is None or getattr(model, "base_model", None) is None:
        raise ValueError(
            f"where the heads and neurons of a {type(model).__name__} are is not known. Known "
            f"families: {', '.join((*PARTS, *FAMILIES))}."
        )
    prefix = next((f"{n}." for n, m in model.named_modules() if m is model.base_model and n), "")
    found: list[BlockUnits] = []
    stack = _stack_in(model.base_model, parts.stack)
    for index, block in enumerate(model.base_model.get_submodule(stack)):
        inner = getattr(block, "albert_layers", None)  # ALBERT's items are groups of blocks
        listed = [("", block)] if inner is None else list(inner.named_children())
        for number, item in listed:
            name = f"{prefix}{stack}.{index}"
            name = f"{name}.albert_layers.{number}" if number else name
            found.append(BlockUnits(name, item, parts, head_size(model.config)))
    for units in found:
        _check_plain(model, units)
    return found


def _stack_in(base: nn.Module, path: str) -> str:
    """The path of the blocks in a model of a family, or in a part of it, such as its decoder.

    Raises:
        ValueError: they are not there.
    """
    known = {name for name, _ in base.named_modules()}
    steps = path.split(".")
    tails = [".".join(steps[first:]) for first in range(len(steps))]
    found = next((tail for tail in tails if tail in known), None)
    if found is None:
        raise ValueError(
            f"this {type(base).__name__} has no blocks at {path}, where its family has them; wanted a "
            "model whose modules are as transformers makes them."
        )
    return found


def sizes_of(model: Any) -> list[BlockSize] | None:
    """The sizes of a model's blocks as its layers are; None where `find_units` does not know them."""
    try:
        return [units.size for units in find_units(model)]
    except ValueError:
        return None


def shrunk_sizes(model: Any) -> list[BlockSize] | None:
    """The sizes of a model's blocks, if units were removed from any of them.

    Of families that are not in `PARTS` the config tells the sizes always.
    """
    sizes = sizes_of(model)
    if (
        sizes is None
        or parts_of(model.config) is None
        or all(size == full_size(model.config) for size in sizes)
    ):
        return None
    return sizes


def resize_(model: Any, sizes: Sequence[BlockSize]) -> None:
    """Make the blocks of a new model as small as those of a shrunk one: it keeps the first units.

    Raises:
        ValueError: there are more or fewer sizes than blocks.
    """
    blocks_found = find_units(model)
    if len(blocks_found) != len(sizes):
        raise ValueError(
            f"block_sizes in the config: {len(sizes)} sizes for the {len(blocks_found)} blocks of "
            f"{type(model).__name__}. The file is damaged or was changed by hand: save the model again."
        )
    for units, size in zip(blocks_found, sizes, strict=True):
        numbers = (size.heads, size.key_heads, size.neurons)
        units.keep_(*(torch.arange(number) for number in numbers))


@torch.no_grad()
def clear_unused_(blocks: Iterable[BlockUnits]) -> None:
    """Zero the rows that feed zero columns: heads and neurons whose outputs are not used.

    The model's outputs stay the same.
    """
    for units in blocks:
        size, unused = units.size, unused_heads(units)
        groups = unused.view(size.key_heads, -1)
        rows = units.rows(unused.nonzero()[:, 0], groups.all(dim=1).nonzero()[:, 0])
        neurons = units.entry_rows(unused_neurons(units).nonzero()[:, 0])
        pairs = [*zip(units.projections, rows, strict=True), *((e, neurons) for e in units.entries)]
        for layer, chosen in pairs:
            bias: Any = layer.module.bias
            layer.weight[chosen.to(layer.weight.device)] = 0
            if bias is not None:
                bias[chosen.to(bias.device)] = 0


def unused_heads(units: BlockUnits) -> Tensor:
    """Which heads of queries have nothing but zero columns in the projection behind attention."""
    zero = (units.out.weight == 0).all(dim=0)
    return zero.view(-1, units.head_dim).all(dim=1).cpu()


def unused_neurons(units: BlockUnits) -> Tensor:
    """Which neurons have a zero column in `down`."""
    return (units.down.weight == 0).all(dim=0).cpu()


def check_whole(layers: Iterable[TargetLayer]) -> None:
    """Refuse weights that cannot be cut: those that are not here as a whole, or are no finite floats.

    Raises:
        ValueError: a weight is sharded, on the meta device, or quantized; it or a bias is not finite,
            which would be lost without a trace.
    """
    for layer in layers:
        weight = layer.parameter
        if isinstance(weight, DTensor):
            raise ValueError(
                f"{layer.weight_name} is cut into shards by FSDP, and shrinking works on whole "
                "weights. Shrink the model before it is sharded."
            )
        check_has_value(layer.weight_name, weight, "shrinking")
        if not weight.is_floating_point():
            raise ValueError(
                f"{layer.weight_name} is {weight.dtype}: the model is quantized. Shrink it before, or "
                "call model.dequantize() first."
            )
        for name, parameter in layer.module.named_parameters(layer.name):
            check_finite(name, parameter.detach())


def _check_plain(model: nn.Module, units: BlockUnits) -> None:
    for path in (*units.parts.qkv, units.parts.out, units.parts.up, units.parts.down):
        try:
            layer: Any = units.block.get_submodule(path)
        except AttributeError as error:
            raise ValueError(
                f"the blocks of this {type(model).__name__} are not its own: {units.name} has no "
                f"{path}. Wanted a model whose modules are as transformers makes them."
            ) from error
        if path == units.parts.out and is_matrix(layer) and _shape(units.out)[1] % units.head_dim:
            raise ValueError(
                f"{units.out.name} has {_shape(units.out)[1]} columns, which heads of {units.head_dim} "
                "features do not divide. The config is of another model."
            )
        if not is_matrix(layer):
            raise ValueError(
                f"{units.name}.{path} is a {type(layer).__name__}; wanted a plain Linear. Merge "
                "adapters (hf_sparse.merge_adapters_), and load the model without quantization."
            )


def _shape(layer: TargetLayer) -> tuple[int, int]:
    stored: Any = layer.module.weight
    rows, columns = stored.shape
    return (columns, rows) if layer.transposed else (rows, columns)


def _select_(
    layer: TargetLayer, *, rows: Tensor | None = None, columns: Tensor | None = None
) -> None:
    """Give a layer a smaller weight: some rows, with their biases, or some columns of the old one."""
    module: Any = layer.module
    chosen, dim = (rows, 0) if rows is not None else (columns, 1)
    assert chosen is not None
    stored = 1 - dim if layer.transposed else dim
    module.weight = _selected(module.weight, chosen, stored)
    if dim == 0 and module.bias is not None:
        module.bias = _selected(module.bias, chosen, 0)
    if is_conv1d(module):
        module.nx, module.nf = module.weight.shape
    else:
        module.out_features, module.in_features = module.weight.shape


def _selected(parameter: nn.Parameter, chosen: Tensor, dim: int) -> nn.Parameter:
    value = parameter.data.index_select(dim, chosen.to(parameter.device))
    return nn.Parameter(value, requires_grad=parameter.requires_grad)
