"""COMPILED: how the blocks of each family are built that is compiled as a whole."""

from __future__ import annotations

from typing import Any

from torch import nn

from hf_sparse.runtime.model.decoders import DECODERS
from hf_sparse.runtime.model.description import Blocks
from hf_sparse.runtime.model.encoders import ENCODERS
from hf_sparse.runtime.model.pairs import PAIRS
from hf_sparse.structure.families import base_type

# Families with one stack of blocks; those with two are in `pairs.PAIRS`.
COMPILED = {**ENCODERS, **DECODERS}
NAMES = (*COMPILED, *PAIRS)


def families_of(config: Any) -> tuple[Blocks, ...]:
    """The entries for a config, of an encoder before those of a decoder; none if there are none."""
    name = base_type(config.model_type)
    if name in PAIRS:
        return PAIRS[name](config)
    return (COMPILED[name],) if name in COMPILED else ()


def families_in(base: nn.Module) -> list[Blocks]:
    """The entries of the stacks that a base model has: one of a pair may be missing."""
    config: Any = base.config
    known = {name for name, _ in base.named_modules()}
    every = families_of(config)
    return [one for one in every if len(every) == 1 or one.stack in known]


class StackConfig:
    """A config as one stack sees it: what the family calls otherwise has its usual name."""

    def __init__(self, config: Any, names: dict[str, str]) -> None:
        self._config, self._names = config, names

    def __getattr__(self, name: str) -> Any:
        return getattr(self._config, self._names.get(name, name))


def seen_by(config: Any, family: Blocks) -> Any:
    """A config as a family's stack sees it."""
    return StackConfig(config, family.names) if family.names else config
