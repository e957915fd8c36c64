"""Experts of a mixture that are stacked in 3-D parameters, as transformers 5 holds them.

| parameter                     | shape                                    | enters, leaves            |
|-------------------------------|------------------------------------------|---------------------------|
| `gate_up_proj`, or `up_proj`  | `(experts, 2 * intermediate, hidden)`    | hidden, intermediate      |
| `down_proj`                   | `(experts, hidden, intermediate)`        | intermediate, hidden      |

JetMoE has a module for each product, with a `weight` of `(experts, out_features, in_features)`.

LongCat Flash has experts that give back what they get, behind the others: rows of `gate_up_proj` that
nothing is multiplied by.

Some families (GPT-OSS, Llama 4) hold each matrix the other way round, `(experts, in_features,
out_features)`. Which way it is, modules tell that transformers runs by its `ExpertsInterface`; of
others with a gate the shapes do. A module of another kind has no stack that is known here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from hf_sparse.upstream.torch import children_of

# The parameter that tokens enter: of gated experts, of plain ones.
_ENTRIES = ("gate_up_proj", "up_proj")
_EXIT = "down_proj"
# The parameter of a module that has one product alone.
_ALONE = "weight"
# What chooses among experts: never sparse unless it is named. Other modules are called gates, too.
_ROUTER = "router"
_GATES = ("gate", "shared_expert_gate")


# How the names of all these parameters end.
ENDINGS = ("up_proj", "down_proj")


@dataclass(frozen=True)
class ExpertStack:
    """The experts that a module holds in 3-D parameters.

    Attributes:
        module: that holds them.
        entry: the name of the parameter that tokens enter.
        gated: whether half of what leaves it is a gate.
        transposed: whether each matrix is `(in_features, out_features)`.
        alone: whether the module multiplies by that parameter and no more.
    """

    module: nn.Module
    entry: str
    gated: bool
    transposed: bool
    alone: bool = False

    @classmethod
    def of(cls, module: nn.Module) -> ExpertStack | None:
        """The experts in a module; None if it has no stack of a known kind."""
        own = dict(module.named_parameters(recurse=False))
        if _multiplies_alone(module, own):
            return cls(module, _ALONE, gated=False, transposed=False, alone=True)
        entry = next((name for name in _ENTRIES if name in own), None)
        if entry is None or _EXIT not in own or own[entry].ndim != 3 or own[_EXIT].ndim != 3:
            return None
        gated = entry == _ENTRIES[0]
        given = getattr(module, "is_transposed", None)
        orders = [bool(given)] if given is not None else [False, True] if gated else []
        known = [turned for turned in orders if _fit(own[entry], own[_EXIT], gated, turned)]
        return cls(module, entry, gated, known[0]) if len(known) == 1 else None

    @property
    def parameters(self) -> tuple[str, ...]:
        """The names of the parameters, in the order in which tokens go through them."""
        return (self.entry,) if self.alone else (self.entry, _EXIT)

    @property
    def number(self) -> int:
        """How many experts there are."""
        return len(getattr(self.module, self.parameters[-1]))


def _multiplies_alone(module: nn.Module, own: dict[str, nn.Parameter]) -> bool:
    """Whether a module holds one matrix for each expert, and tells their number and size."""
    sizes = tuple(
        getattr(module, name, None) for name in ("num_experts", "output_size", "input_size")
    )
    return own.keys() == {_ALONE} and tuple(own[_ALONE].shape) == sizes


def _fit(entry: Any, down: Any, gated: bool, transposed: bool) -> bool:
    """Whether two stacks have the shapes of one network, if they are stored so."""
    wide, hidden = (entry.shape[2], entry.shape[1]) if transposed else entry.shape[1:]
    out, inner = (down.shape[2], down.shape[1]) if transposed else down.shape[1:]
    fits = hidden == out and wide == inner * (2 if gated else 1)
    return fits and len(entry) >= len(down)


def routes(name: str, module: nn.Module) -> bool:
    """Whether a path inside a module goes through what chooses among experts.

    That is what has `router` in its name, or a `gate` beside `experts`.
    """
    parent = module
    for part in name.split("."):
        if _ROUTER in part or (part in _GATES and "experts" in children_of(parent)):
            return True
        parent = parent.get_submodule(part) if part in children_of(parent) else parent
    return False
