"""Experts of a mixture whose matrices are stacked, as transformers 5 holds them.

| parameter                     | shape                                    | enters, leaves            |
|-------------------------------|------------------------------------------|---------------------------|
| `gate_up_proj`, or `up_proj`  | `(experts, 2 * intermediate, hidden)`    | hidden, intermediate      |
| `down_proj`                   | `(experts, hidden, intermediate)`        | intermediate, hidden      |

JetMoE has a module for each product, with a `weight` of `(experts, out_features, in_features)`.

LongCat Flash has experts that give back what they get, behind the others: rows of `gate_up_proj` that
nothing is multiplied by.

Inkling has shared experts, `gate_proj`, `up_proj` and `down_proj`: every token goes to all of them, and
what enters the last product is multiplied by the router's weight.

DBRX has 2-D parameters `w1` (the gate), `v1` and `w2`, `(experts * intermediate, hidden)`: the experts'
matrices one below the other, those of `w2` the other way round. The module around it is called.

Some families (GPT-OSS, Llama 4) hold each matrix the other way round, `(experts, in_features,
out_features)`. Which way it is, modules tell that transformers runs by its `ExpertsInterface`; of
others with a gate the shapes do. A module of another kind has no stack that is known here.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor, nn

from hf_sparse.upstream.torch import children_of

# The parameter that tokens enter: of gated experts, of plain ones.
_ENTRIES = ("gate_up_proj", "up_proj")
_EXIT = "down_proj"
# The parameter of a module that has one product alone.
_ALONE = "weight"
_SHARED = ("gate_proj", "up_proj", "down_proj")
# One below the other, and the name of their module in the one that is called.
_BELOW = ("w1", "v1", "w2")
_HOLDER = "mlp"
# What chooses among experts: never sparse unless it is named. Other modules are called gates, too.
_ROUTER = "router"
_GATES = ("gate", "shared_expert_gate")


# How the names of all these parameters end.
ENDINGS = ("gate_proj", "up_proj", "down_proj", *(f"{_HOLDER}.{name}" for name in _BELOW))


@dataclass(frozen=True)
class ExpertStack:
    """The experts that a module holds in stacked parameters.

    Attributes:
        module: that holds them.
        entries: the names of the parameters that tokens enter.
        exits: those of what follows: one, or none if the module multiplies by its entry and no more.
        gated: whether there is a gate: half of what leaves the entry, or the first of two entries.
        turned: the names of parameters whose matrices are `(in_features, out_features)`.
        number: how many experts there are.
        below: whether their matrices lie one below the other in 2-D parameters.
        shared: whether every token goes to all of them.
        around: the module that is called with tokens, if that is another.
    """

    module: nn.Module
    entries: tuple[str, ...]
    exits: tuple[str, ...]
    gated: bool
    turned: frozenset[str]
    number: int
    below: bool = False
    shared: bool = False
    around: nn.Module | None = field(default=None, repr=False)

    @classmethod
    def of(cls, module: nn.Module) -> ExpertStack | None:
        """The experts in a module; None if it has no stack of a known kind."""
        own = dict(module.named_parameters(recurse=False))
        none: frozenset[str] = frozenset()
        if _multiplies_alone(module, own):
            return cls(module, (_ALONE,), (), False, none, len(own[_ALONE]))
        if (number := _number_below(module, own)) is not None:
            *entries, last = _BELOW
            return cls(module, tuple(entries), (last,), True, frozenset({last}), number, below=True)
        if _are_shared(own):
            *entries, last = _SHARED
            return cls(module, tuple(entries), (last,), True, none, len(own[last]), shared=True)
        entry = next((name for name in _ENTRIES if name in own), None)
        if entry is None or _EXIT not in own or own[entry].ndim != 3 or own[_EXIT].ndim != 3:
            return None
        gated = entry == _ENTRIES[0]
        given = getattr(module, "is_transposed", None)
        orders = [bool(given)] if given is not None else [False, True] if gated else []
        known = [turned for turned in orders if _fit(own[entry], own[_EXIT], gated, turned)]
        if len(known) != 1:
            return None
        turned = frozenset({entry, _EXIT}) if known[0] else none
        return cls(module, (entry,), (_EXIT,), gated, turned, len(own[_EXIT]))

    @classmethod
    def called(cls, module: nn.Module) -> ExpertStack | None:
        """The experts to which tokens go when a module is called: its own, or of the one inside."""
        own = cls.of(module)
        holder = children_of(module).get(_HOLDER)
        if own is not None or holder is None:
            return own
        inside = cls.of(holder)
        if inside is None or not inside.below:
            return None
        return replace(inside, around=module)

    @property
    def parameters(self) -> tuple[str, ...]:
        """The names of the parameters, in the order in which tokens go through them."""
        return (*self.entries, *self.exits)

    @property
    def caller(self) -> nn.Module:
        """The module that is called with tokens."""
        return self.module if self.around is None else self.around

    @property
    def path(self) -> str:
        """The name of the module that holds them in the one that is called; empty: it is the same."""
        return "" if self.around is None else _HOLDER

    @property
    def can_go(self) -> bool:
        """Whether single experts can be taken out."""
        return not (self.below or self.shared)

    def own(self, tensor: Tensor, expert: int) -> Tensor:
        """What belongs to an expert in a tensor like a parameter, as it is stored; a view."""
        return tensor.unflatten(0, (self.number, -1))[expert] if self.below else tensor[expert]

    def matrix(self, name: str, expert: int) -> Tensor:
        """An expert's matrix in the parameter of a name, `(out_features, in_features)`; a view."""
        own = self.own(getattr(self.module, name), expert)
        return own.T if name in self.turned else own

    def bias(self, name: str, expert: int) -> Tensor | None:
        """What is added to the outputs of that matrix."""
        biases = getattr(self.module, f"{name}_bias", None)
        return None if biases is None else biases[expert]


def _number_below(module: nn.Module, own: dict[str, nn.Parameter]) -> int | None:
    """How many experts lie one below the other, if they do."""
    sizes = [
        getattr(module, n, None) for n in ("moe_num_experts", "ffn_hidden_size", "hidden_size")
    ]
    if own.keys() != set(_BELOW) or not all(isinstance(size, int) for size in sizes):
        return None
    number, inner, hidden = sizes
    wanted = (number * inner, hidden)  # type: ignore[operator]
    return number if all(tuple(own[name].shape) == wanted for name in _BELOW) else None


def _are_shared(own: dict[str, nn.Parameter]) -> bool:
    """Whether a module holds gate, up and down of experts in a parameter each."""
    if own.keys() != set(_SHARED) or any(own[name].ndim != 3 for name in _SHARED):
        return False
    gate, up, down = (tuple(own[name].shape) for name in _SHARED)
    return gate == up == (down[0], down[2], down[1])


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
