"""Which weights of a model a config puts on a grid of few bits, and whether they are on it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from torch import nn
from torch.distributed.tensor import DTensor

from hf_sparse.configuration_sparse import SparsityConfig
from hf_sparse.quantization import Grid, OffGridError, codes_of, lies_on
from hf_sparse.structure.layers import TargetLayer, promised_config
from hf_sparse.structure.targets import Targets

# A weight, and what it is to lie on.
Gridded = tuple[TargetLayer, Grid]


def embedding_layers(model: nn.Module) -> list[TargetLayer]:
    """The input embeddings and the output head, each weight once, as far as they are matrices."""
    names = {id(module): name for name, module in model.named_modules()}
    found: dict[int, TargetLayer] = {}
    for get in ("get_input_embeddings", "get_output_embeddings"):
        try:
            module: Any = getattr(model, get)()
        except (AttributeError, NotImplementedError):  # of a model of other inputs than tokens
            continue
        weight = getattr(module, "weight", None)
        if id(module) in names and isinstance(weight, nn.Parameter) and weight.ndim == 2:
            found.setdefault(id(weight), TargetLayer(names[id(module)], module))
    return list(found.values())


def gridded(model: nn.Module, config: SparsityConfig | Targets) -> list[Gridded]:
    """The weights that a config puts on a grid, each once; none if it tells no bits.

    The targets lie on the grid of `bits`, if it is given; the input embeddings and the output head on
    that of `embedding_bits`, unless they are targets on the other one.

    Args:
        model: any model; also on the meta device.
        config: a config, or its targets in the model.

    Raises:
        ValueError: the config has no targets in the model; there are no embeddings; or the group size
            does not divide the inputs of a weight, which the message names.
    """
    targets = config if isinstance(config, Targets) else None
    asked = targets.config if targets is not None else config
    assert isinstance(asked, SparsityConfig)
    found: list[Gridded] = []
    if asked.grid is not None:
        targets = Targets.of(model, asked) if targets is None else targets
        found += [(layer, asked.grid) for layer in targets.layers]
    if asked.embedding_grid is not None:
        layers = embedding_layers(model)
        if not layers:
            raise ValueError(
                f"embedding_bits={asked.embedding_bits}, and a {type(model).__name__} has no matrix of "
                "input embeddings. Leave embedding_bits out."
            )
        known = {id(layer.parameter) for layer, _ in found}
        found += [
            (layer, asked.embedding_grid) for layer in layers if id(layer.parameter) not in known
        ]
    for layer, grid in found:
        check_groups(layer, grid)
    return found


def check_groups(layer: TargetLayer, grid: Grid) -> None:
    """Refuse a layer whose inputs the groups of a grid do not divide.

    Raises:
        ValueError: the message names the layer; or it is one of experts that lie one below the other.
    """
    if layer.stack is not None and layer.stack.below:
        raise ValueError(
            f"{layer.weight_name} is one of {layer.stack.number} experts that lie one below the other "
            "in a 2-D parameter, and codes are stored for a matrix or for stacked ones. Leave the "
            "experts out: SparsityConfig(..., ignore=['experts.*'])."
        )
    try:
        grid.columns_per_scale(layer.weight.shape[1])
    except ValueError as error:
        raise ValueError(
            f"{layer.weight_name}: {error} Or leave the layer out: SparsityConfig(..., ignore=[...])."
        ) from error


def check_whole_weights(layers: Iterable[Gridded]) -> None:
    """Refuse weights that are cut into shards: scales are those of whole weights.

    Raises:
        ValueError: the message names one.
    """
    for layer, _ in layers:
        if isinstance(layer.parameter, DTensor):
            raise ValueError(
                f"{layer.weight_name} is cut into shards by FSDP, and rounding works on whole weights. "
                "Quantise the model before it is sharded."
            )


def is_on_grid(layer: TargetLayer, grid: Grid) -> bool:
    """Whether a weight lies on a grid."""
    return lies_on(layer.weight, grid)


def check_grid(model: nn.Module, config: SparsityConfig | Targets) -> None:
    """Raise an OffGridError unless the weights of a model lie on the grids that a config promises.

    Args:
        model: any model, with its weights.
        config: what is promised, or its targets in the model; without bits nothing is.

    Memory: see `codes_of`.

    Raises:
        OffGridError: how many weights are off the grid, of which layers.
        ValueError: see `gridded`.
    """
    off: list[str] = []
    weights = 0
    first = ""
    pairs = gridded(model, config)
    for layer, grid in pairs:
        try:
            codes_of(layer.weight, grid)
        except OffGridError as error:
            first = first or f"{layer.weight_name}: {error}"
            off.append(layer.weight_name)
            weights += error.weights
    if off:
        more = (
            f" In all {weights:,} weights of {len(off)} of {len(pairs)} layers are off their grids."
        )
        raise OffGridError(first + (more if len(off) > 1 else ""), weights)


def check_not_on_another(model: nn.Module, asked: SparsityConfig) -> None:
    """Refuse weights that lie on a grid that was promised, and are to be rounded to another one.

    Args:
        model: that is to be quantised.
        asked: what it is to be quantised to.

    Raises:
        ValueError: see there; the message names a layer.
    """
    promised = promised_config(model)
    if promised is None or not (promised.bits or promised.embedding_bits):
        return
    new = {id(layer.parameter): grid for layer, grid in gridded(model, asked)}
    try:
        old = gridded(model, promised)
    except ValueError:  # of layers that are gone
        return
    for layer, grid in old:
        other = new.get(id(layer.parameter), grid)
        if other != grid and is_on_grid(layer, grid):
            raise ValueError(
                f"{layer.weight_name} is quantised already ({grid}), and {other} was asked for: the "
                "errors of both would add up. Load the model as it was before, and quantise that; or "
                "ask for the same grid."
            )


def with_kept_grid(model: nn.Module, config: SparsityConfig) -> SparsityConfig:
    """A config with the bits that a model was promised before, as far as its weights still hold them.

    Args:
        model: that was changed to what `config` tells; without bits of its own, it may have kept them.
        config: what it is now.
    """
    before = promised_config(model)
    if before is None or config.bits or config.embedding_bits:
        return config
    for names in (("bits", "embedding_bits"), ("bits",), ("embedding_bits",)):
        bits = {name: getattr(before, name) for name in names}
        if not any(bits.values()):
            continue
        kept = replace(config, **bits, group_size=before.group_size, symmetric=before.symmetric)
        try:
            check_grid(model, kept)
        except ValueError:
            continue
        return kept
    return config
