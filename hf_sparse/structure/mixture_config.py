"""What a config tells of a mixture: how many experts there are, how many a token gets, and groups."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from torch import nn

from hf_sparse.structure.built import configs_in

# Settings that tell how many experts there are have this word, and none of these.
_COUNT = re.compile(r"experts?")
_OTHER = re.compile(r"per_tok|shared|top_?k|_k$|size|period|offset|layer|group|selected|factor")
# What families call the number of experts that a token gets, in configs and in routers.
_CHOSEN = (
    *("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_top_k", "moe_k"),
    *("num_selected_experts", "top_k_experts", "top_k"),
)
# What they call the groups that a token's experts are taken from, and how many of these it gets.
_GROUPS = ("n_group", "num_expert_group", "num_group")
_GROUPS_CHOSEN = "topk_group"
# The way to choose that does not look at groups, though the config has them.
_WITHOUT_GROUPS = "greedy"


@dataclass(frozen=True)
class Routing:
    """How experts are chosen.

    Attributes:
        per_token: experts that a token gets.
        groups: that the experts are divided into, in order; 1: none.
        groups_per_token: of the groups, those that a token's experts come from.
        number: of experts.
    """

    per_token: int
    groups: int
    groups_per_token: int
    number: int

    def refusal(self, count: int) -> str | None:
        """Why not as few experts can be left; None if they can."""
        if count < self.per_token:
            return f"each token is given {self.per_token} of them"
        if count % self.groups:
            return f"they are in {self.groups} groups of equal size"
        size = count // self.groups
        if self.groups > 1 and size < min(2, self.number // self.groups):
            return f"a group of the {self.groups} is chosen by its two best, and would have {size}"
        if self.groups > 1 and size * self.groups_per_token < self.per_token:
            return (
                f"each token is given {self.per_token} of {self.groups_per_token} groups, which would "
                f"have {size} each"
            )
        return None


def told_counts(config: Any, number: int) -> set[str]:
    """The names of the settings that tell this number of experts, in a config and its parts."""
    return {
        name
        for part in configs_in(config)
        for name, value in vars(part).items()
        if type(value) is int
        and value == number
        and _COUNT.search(name)
        and not _OTHER.search(name)
    }


def routing_of(model: nn.Module, around: str) -> Routing:
    """How the experts of a model are chosen.

    Args:
        model: with a mixture.
        around: the name of the module that routes to its experts.

    Raises:
        ValueError: neither config nor router tells how many a token gets.
    """
    config: Any = model.config
    modules = list(model.get_submodule(around).modules())
    holders = [*configs_in(config), *modules]
    per_token = _first(holders, _CHOSEN)
    if per_token is None:
        raise ValueError(
            f"the config of this {type(model).__name__} does not tell how many experts a token gets; "
            f"wanted one of {', '.join(_CHOSEN)}."
        )
    counts = [len(p) for module in modules for p in module.parameters(recurse=False) if p.ndim == 3]
    grouped = all(getattr(part, "topk_method", None) != _WITHOUT_GROUPS for part in holders)
    groups = (_first(holders, _GROUPS) or 1) if grouped else 1
    chosen = _first(holders, (_GROUPS_CHOSEN,)) or groups
    return Routing(per_token, groups, chosen, counts[0])


def _first(holders: list[Any], names: tuple[str, ...]) -> int | None:
    """The first whole number of one of these names."""
    values = (vars(holder).get(name) for name in names for holder in holders)
    return next((value for value in values if type(value) is int and value > 0), None)
