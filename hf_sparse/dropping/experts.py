"""`hf_sparse.drop_experts_`: whole experts of a mixture are removed, those that it uses least.

In each block the experts of lowest score go, with their rows of the router. The scores, `reap`,
`frequency` and `magnitude`, and their sources stand in `hf_sparse.calibration.expert_scores`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from hf_sparse.arguments import check_kinds, check_model
from hf_sparse.calibration.expert_scores import METHODS, kept_in_block, scores_of
from hf_sparse.calibration.windows import checked_batches, fingerprint
from hf_sparse.dropping.counts import number_of
from hf_sparse.dropping.expert_report import ExpertReport
from hf_sparse.provenance.record import record_
from hf_sparse.provenance.values import Calibration, Step
from hf_sparse.structure.changeable import check_changeable
from hf_sparse.structure.expert_merging import merge_, nearest
from hf_sparse.structure.layers import num_parameters, promised_config
from hf_sparse.structure.mixtures import Mixtures
from hf_sparse.structure.targets import Targets, renew_promise_
from hf_sparse.suggestions import check_name


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
        by: `"reap"`, `"frequency"`, or `"magnitude"`, see `hf_sparse.calibration.expert_scores`.
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
    scores, use = scores_of(mixtures, inputs, by)
    kept = [kept_in_block(own, left, mixtures.routing.groups) for own in scores]
    promised, before = promised_experts(model), num_parameters(model)
    if routers is not None and use is not None:
        for mixture, rows, own, seen in zip(mixtures.mixtures, routers, kept, use, strict=True):
            merge_(mixture.stack, nearest(rows, own), seen.tokens)
    mixtures.keep_(kept)
    renew_promise_of_experts_(mixtures, promised, kept)
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
    number = number_of(count, total, "experts", most)
    if number < 1:
        raise ValueError(
            f"count is {count}, which is no expert of {total}; wanted {most}. The smallest fraction "
            f"that is an expert is {1 / total:.4g}."
        )
    if number > total - needed:
        raise ValueError(f"count is {count}, which leaves {total - number} experts; wanted {most}.")
    return number


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


def promised_experts(model: PreTrainedModel) -> _Promised | None:
    """What a model's promise of zeros is about; None: it has none."""
    config = promised_config(model)
    if config is None:
        return None
    try:
        layers = Targets.of(model, config).layers
    except ValueError:  # of layers that are gone
        return set()
    return {(id(layer.module), layer.attribute, layer.expert) for layer in layers}


def renew_promise_of_experts_(
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
    if promised_experts(mixtures.model) != wanted:
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
