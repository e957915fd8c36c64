"""Which weights of a model a config puts on a grid of few bits."""

from __future__ import annotations

from typing import Any

from torch import nn

from hf_sparse.configuration_sparse import SparsityConfig
from hf_sparse.quantization import Grid
from hf_sparse.structure.layers import TargetLayer
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
        ValueError: the message names the layer.
    """
    try:
        grid.columns_per_scale(layer.weight.shape[1])
    except ValueError as error:
        raise ValueError(
            f"{layer.weight_name}: {error} Or leave the layer out: SparsityConfig(..., ignore=[...])."
        ) from error
