"""`hf_sparse.drop_experts_`: whole experts of a mixture are removed, those that it uses least.

| by          | an expert's score                                                          |
|-------------|----------------------------------------------------------------------------|
| `reap`      | mean over its tokens of the router's weight times the norm of its output   |
| `frequency` | how many tokens it gets                                                    |
| `magnitude` | the norm of its weights: needs no data                                     |

In each block the experts of lowest score go, with their rows of the router.

Sources: Lasby et al., "REAP the Experts: Why Pruning Prevails for One-Shot MoE compression",
https://arxiv.org/abs/2510.13999. Departures: padding does not count; an expert that gets no token has
score 0; a router whose families put experts into groups loses as many of each group.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from hf_sparse.arguments import check_finite, check_kinds, check_model
from hf_sparse.calibration.expert_scores import ExpertUse, expert_use
from hf_sparse.calibration.modes import switched
from hf_sparse.calibration.windows import checked_batches, fingerprint
from hf_sparse.counts import format_table
from hf_sparse.dropping.counts import number_of
from hf_sparse.provenance.record import record_
from hf_sparse.provenance.values import Calibration, Step
from hf_sparse.structure.changeable import check_changeable
from hf_sparse.structure.expert_merging import merge_, nearest
from hf_sparse.structure.layers import num_parameters, promised_config
from hf_sparse.structure.mixtures import Mixture, Mixtures
from hf_sparse.structure.targets import Targets, renew_promise_
from hf_sparse.suggestions import check_name

# Whether a way to choose looks at data.
METHODS = {"reap": True, "frequency": True, "magnitude": False}


@dataclass(frozen=True)
class ExpertReport:
    """Which experts `drop_experts_` removed.

    Attributes:
        names: of the modules that hold the experts.
        by: how they were chosen.
        merged: whether what went was averaged into what stays.
        removed: for each mixture the numbers of those that went, as they were.
        scores: for each mixture those of all its experts.
        tokens: for each mixture how many each of its experts got; None where no data was looked at.
        experts: in each mixture, before and after.
        parameters: weights in the whole model, before and after.
    """

    names: tuple[str, ...]
    by: str
    merged: bool
    removed: tuple[tuple[int, ...], ...]
    scores: tuple[tuple[float, ...], ...]
    tokens: tuple[tuple[int, ...], ...] | None
    experts: tuple[int, int]
    parameters: tuple[int, int]

    @property
    def method(self) -> str:
        """The name of the step on the model card."""
        return "drop_experts"

    @property
    def options(self) -> dict[str, Any]:
        """What the card tells of it."""
        kept = {"by": self.by, "experts": f"{self.experts[1]} of {self.experts[0]}"}
        return {**kept, "merge": True} if self.merged else kept

    def to_json(self) -> str:
        """All of it as JSON text."""
        return json.dumps(asdict(self), indent=2)

    def summary(self) -> str:
        """The totals in a few lines."""
        went = "were merged into the others" if self.merged else "went"
        return "\n".join(
            [
                f"{self.experts[1]} of {self.experts[0]} experts are left in each of "
                f"{len(self.names)} blocks: the others {went}, by {self.by}",
                f"whole model: {self.parameters[1]:,} of {self.parameters[0]:,} weights",
            ]
        )

    def __repr__(self) -> str:
        return f"<ExpertReport: {' '.join(self.summary().splitlines())}>"

    def __str__(self) -> str:
        return self.table()

    def table(self) -> str:
        """A row for each mixture, and the totals."""
        rows = []
        for name, gone, scores in zip(self.names, self.removed, self.scores, strict=True):
            stay = [score for number, score in enumerate(scores) if number not in gone]
            went = [scores[number] for number in gone]
            rows.append((name, ", ".join(map(str, gone)), f"{max(went):.4g}", f"{min(stay):.4g}"))
        head = ("experts", "removed", "their highest score", "lowest that stays")
        return f"{format_table(head, rows)}\n{self.summary()}"


@torch.no_grad()
def drop_experts_(
    model: PreTrainedModel,
    count: int | float,
    batches: Iterable[Mapping[str, Tensor] | Tensor] | None = None,
    *,
    by: str = "reap",
    merge: bool = False,
) -> ExpertReport:
    """Remove whole experts of a mixture, in place: of each block those that it uses least.

    What is left is a plain model of its family with fewer experts: its config is changed with it, so
    that transformers loads it alone. A token still gets as many experts as before; shared experts
    stay. Zeros of what stays are kept. Train it afterwards, best with the whole model as teacher
    (`hf_sparse.Distillation`). Make optimizers after this.

    Args:
        model: a mixture whose experts are stacked in 3-D parameters, as many in each block.
        count: how many go of each block: a number, or a fraction of them, in `(0, 1)`, which is
            rounded.
        batches: calibration inputs, as for `hf_sparse.prune_`; none for `"magnitude"`, unless experts
            are merged.
        by: `"reap"`, `"frequency"`, or `"magnitude"`, see the module.
        merge: average each expert that goes into the one that stays and is routed to most alike,
            weighted by their tokens: a baseline to compare with.

    Returns:
        Which experts went, and the scores of all.

    Memory: the model, the activations of one batch, and one stack of experts.

    Raises:
        ValueError: another `by` or count; the model is no mixture; fewer experts than a token is given
            would be left, or a group of them too small; the config cannot tell the number; the model is
            compiled, quantized or sharded, or has adapters or weights without values; there is no
            calibration data, or data that nothing looks at; scores are not finite; merging is asked of
            a model whose zeros are promised. Nothing has changed then.
    """
    check_model(model, "drop_experts_", PreTrainedModel)
    check_kinds(drop_experts_, locals())
    check_name(by, METHODS, "by", "ways to choose")
    check_changeable(model, "drop_experts_", "drop experts")
    mixtures = Mixtures.of(model)
    left = mixtures.number - number_of_experts(count, mixtures)
    mixtures.check(left)
    routers = _routers(model, mixtures) if merge else None
    inputs = _data(model, batches, by, merge)
    scores, use = _scores(mixtures, inputs, by)
    kept = [_kept(own, left, mixtures.routing.groups) for own in scores]
    promised, before = _promised(model), num_parameters(model)
    if routers is not None and use is not None:
        for mixture, rows, own, seen in zip(mixtures.mixtures, routers, kept, use, strict=True):
            merge_(mixture.stack, nearest(rows, own), seen.tokens)
    mixtures.keep_(kept)
    _renew_promise_(mixtures, promised, kept)
    every = range(mixtures.number)
    report = ExpertReport(
        tuple(mixture.name for mixture in mixtures.mixtures),
        by,
        merge,
        tuple(tuple(number for number in every if number not in own) for own in kept),
        tuple(tuple(own.tolist()) for own in scores),
        None if use is None else tuple(tuple(seen.tokens.tolist()) for seen in use),
        (mixtures.number, left),
        (before, num_parameters(model)),
    )
    data = Calibration.of(inputs, fingerprint(inputs)) if inputs else None
    record_(model, Step.of(report.method, report.options, calibration=data))
    return report


def number_of_experts(count: int | float, mixtures: Mixtures) -> int:
    """How many experts of each block a number or a fraction of them means.

    Raises:
        ValueError: none of them, or more than can go.
    """
    total, needed = mixtures.number, mixtures.routing.per_token
    most = (
        f"at most {total - needed} of the {total} experts of a block, or a fraction of them in (0, 1): "
        f"each token is given {needed}"
    )
    found = number_of(count, total, "experts", most)
    if found < 1:
        raise ValueError(
            f"count is {count}, which is no expert of {total}; wanted {most}. The smallest fraction "
            f"that is an expert is {1 / total:.4g}."
        )
    if found > total - needed:
        raise ValueError(f"count is {count}, which leaves {total - found} experts; wanted {most}.")
    return found


def _data(model: PreTrainedModel, batches: Any, by: str, merge: bool) -> list[dict[str, Any]]:
    """The calibration data, as the model takes them; none where none is looked at."""
    if METHODS[by] or merge:
        return checked_batches(batches, model, by if METHODS[by] else "merge=True")
    if batches is not None:
        raise ValueError(
            f"batches are for {', '.join(name for name, looks in METHODS.items() if looks)} and for "
            f"merging; leave them out. by='{by}' looks at weights alone."
        )
    return []


# The matrices that a promise of zeros is about: the module, the parameter, the number of the expert.
_Promised = set[tuple[int, str, int]]


def _promised(model: PreTrainedModel) -> _Promised | None:
    """What a model's promise of zeros is about; None: it has none."""
    config = promised_config(model)
    if config is None:
        return None
    try:
        layers = Targets.of(model, config).layers
    except ValueError:  # of layers that are gone
        return set()
    return {(id(layer.module), layer.attribute, layer.expert) for layer in layers}


def _renew_promise_(
    mixtures: Mixtures, before: _Promised | None, kept: Sequence[Sequence[int]]
) -> None:
    """Forget a promise that names experts by number, where it names others now."""
    if before is None:
        return
    places = {
        id(mixture.stack.module): {number: place for place, number in enumerate(own)}
        for mixture, own in zip(mixtures.mixtures, kept, strict=True)
    }
    wanted = {
        (module, name, places[module][expert] if module in places else expert)
        for module, name, expert in before
        if module not in places or expert in places[module]
    }
    if _promised(mixtures.model) != wanted:
        renew_promise_(mixtures.model, set())


def _routers(model: PreTrainedModel, mixtures: Mixtures) -> list[Tensor]:
    """The rows of each router.

    Raises:
        ValueError: a router has no rows for experts, or the zeros of the experts are promised.
    """
    promised = promised_config(model)
    if promised is not None:
        raise ValueError(
            f"merge=True averages experts, which fills zeros, and this {type(model).__name__} promises "
            f"zeros of pattern '{promised.pattern}'. Merge first, then prune; or leave merge out."
        )
    found: list[Tensor] = []
    for mixture in mixtures.mixtures:
        rows = mixtures.router(mixture)
        if rows is None:
            raise ValueError(
                f"the router of {mixture.name} is not one matrix with a row for each expert, by which "
                "the nearest could be found. Leave merge=True out."
            )
        found.append(rows.detach())
    return found


def _scores(
    mixtures: Mixtures, batches: Sequence[Mapping[str, Any]], by: str
) -> tuple[list[Tensor], list[ExpertUse] | None]:
    """The scores of each mixture's experts, fp64, and what they do on the data, if there is any."""
    model, stacks = mixtures.model, [mixture.stack for mixture in mixtures.mixtures]
    use = None
    if batches:
        with switched(model, training=False, use_cache=False):
            use = expert_use(model, stacks, batches, outputs=by == "reap")
    if by == "magnitude":
        return [_magnitudes(mixture) for mixture in mixtures.mixtures], use
    assert use is not None
    found = [seen.mean_added if by == "reap" else seen.tokens.double() for seen in use]
    for mixture, scores, seen in zip(mixtures.mixtures, found, use, strict=True):
        if not all(map(math.isfinite, scores.tolist())):
            raise ValueError(
                f"outputs of {mixture.name} are not finite on the calibration data. Load the model in "
                "float32, or look at the data."
            )
        if not seen.tokens.any():
            raise ValueError(
                f"no token of the calibration data reaches {mixture.name}: give longer texts."
            )
    return found, use


def _magnitudes(mixture: Mixture) -> Tensor:
    """The norm of all matrices of each expert, fp64."""
    squares = torch.zeros(mixture.stack.number, dtype=torch.float64)
    for name in mixture.stack.parameters:
        held = getattr(mixture.stack.module, name).detach()
        check_finite(f"{mixture.name}.{name}", held)
        squares += torch.stack([matrix.double().square().sum() for matrix in held]).cpu()
    return squares.sqrt()


def _kept(scores: Tensor, count: int, groups: int) -> list[int]:
    """The experts of highest score, as many of each group; of equal ones the first. Ascending."""
    size = len(scores) // groups
    kept: list[int] = []
    for group in range(groups):
        own = scores[group * size : (group + 1) * size]
        best = own.argsort(descending=True, stable=True)[: count // groups]
        kept += sorted(group * size + int(number) for number in best)
    return kept
