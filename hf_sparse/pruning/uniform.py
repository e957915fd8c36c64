"""Pruning of as many whole units in every block: checked before any work."""

from __future__ import annotations

from typing import Any

from torch import nn

from hf_sparse.patterns import Head
from hf_sparse.pruning.methods import Recipe
from hf_sparse.structure.own_config import check_expressible
from hf_sparse.structure.parts import BlockSize
from hf_sparse.structure.targets import Targets
from hf_sparse.structure.units import find_units


def check_uniform(model: nn.Module, targets: Targets, recipe: Recipe) -> None:
    """Refuse `uniform=True` where blocks would differ, or the family's config cannot tell the size.

    Args:
        model: that is to be pruned.
        targets: of its config; nothing is checked if that does not ask for uniform blocks.
        recipe: how it is to be pruned.

    Raises:
        ValueError: targets or ignored layers are named; units of different blocks compete; the blocks
            have different sizes already; or the family's config has no place for the size.
    """
    config = targets.config
    if not config.uniform:
        return
    if not targets.whole_units or config.ignore:
        raise ValueError(
            "uniform=True means as many whole heads or neurons of every block, and targets or ignore "
            "name layers. Leave them out: the pattern tells which layers they are."
        )
    options: dict[str, Any] = recipe.all_options
    wanted = {"scope": "layer", "allocation": "uniform"}
    for name, value in wanted.items():
        if options.get(name, value) != value:
            raise ValueError(
                f"uniform=True takes as many units of every block, and with {name}={options[name]!r} "
                f"blocks take different shares. Use {name}={value!r}, or leave uniform=True out."
            )
    sizes = {units.size for units in find_units(model)}
    if len(sizes) > 1:
        raise ValueError(
            f"the blocks of this {type(model).__name__} have {len(sizes)} different sizes already, and "
            "uniform=True takes as many units of each. Leave it out here, and call "
            "hf_sparse.shrink_(model, uniform=True) at the end."
        )
    check_expressible(model, _left(sizes.pop(), targets))


def _left(size: BlockSize, targets: Targets) -> BlockSize:
    """The size of a block that has lost its units."""
    config, weight = targets.config, targets.layers[0].weight
    units = config.pattern.num_units(*weight.shape)
    share = 1 - round(config.sparsity * units) / units
    if isinstance(config.pattern, Head):
        heads, key_heads = round(size.heads * share), round(size.key_heads * share)
        return BlockSize(heads, key_heads, size.neurons)
    return BlockSize(size.heads, size.key_heads, round(size.neurons * share))
