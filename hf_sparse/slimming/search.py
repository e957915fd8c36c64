"""`hf_sparse.plan_slim` and `hf_sparse.slim_`: one budget, and the best mix of axes within it.

| axis    | what goes                                                 | which                         |
|---------|-----------------------------------------------------------|-------------------------------|
| `depth` | whole blocks                                              | as `drop_blocks_` by the loss |
| `width` | heads with their keys, and neurons, as many in each block | least by `slimming/width.py`  |

For some numbers of blocks, from none to as many as keep to the budget alone, and some numbers of heads,
blocks keep as many neurons as the budget allows; without what goes the loss on calibration data is
measured, by hooks, and the mix of least loss is taken. What is left is a plain model of its family.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from hf_sparse.arguments import check_kinds, check_model
from hf_sparse.calibration.block_scores import Batches
from hf_sparse.calibration.losses import check_labels
from hf_sparse.calibration.modes import switched
from hf_sparse.calibration.windows import checked_batches, fingerprint
from hf_sparse.provenance.record import record_
from hf_sparse.provenance.values import Calibration, Step
from hf_sparse.slimming.budget import Budget
from hf_sparse.slimming.plan import SlimPlan, SlimReport
from hf_sparse.slimming.space import Space
from hf_sparse.structure.changeable import check_changeable
from hf_sparse.structure.layers import num_parameters

AXES = {"depth": "whole blocks", "width": "heads and neurons, as many in each block"}


def plan_slim(
    model: PreTrainedModel,
    batches: Iterable[Mapping[str, Tensor] | Tensor],
    *,
    params: float | int | None = None,
    ms: str | float | None = None,
    mb: float | int | None = None,
    axes: Sequence[str] = ("depth", "width"),
) -> SlimPlan:
    """Search the mix of fewer and smaller blocks that a model misses least, for one budget.

    >>> plan = hf_sparse.plan_slim(model, batches, params=0.7)     # doctest: +SKIP
    >>> print(plan)                                                # doctest: +SKIP
    >>> hf_sparse.slim_(model, plan=plan)                          # doctest: +SKIP

    Args:
        model: of a family whose units are known, with weights of its own in each block; it stays as
            it is.
        batches: calibration inputs, as for `hf_sparse.drop_blocks_` by the loss.
        params: a share of the model's weights, in `(0, 1)`, or a number of them.
        ms: milliseconds of a forward pass of the first sequence of the batches in plain torch, or a
            share of what the whole model takes: `"0.6x"`. Predicted from smaller models of the family,
            which are built and timed.
        mb: megabytes of weights, in the model's type.
        axes: keys of `AXES`.

    Returns:
        All mixes that were tried, and the best one.

    Memory: the model, and the activations of one batch; for `ms` up to four models of its size.

    Raises:
        ValueError: not one budget; one that is met already, or that no mix keeps to (the message tells
            the nearest that can be kept); an axis that the model lacks; and as `drop_blocks_`.
    """
    check_model(model, "plan_slim", PreTrainedModel)
    check_kinds(plan_slim, locals())
    budget = Budget.of(params=params, ms=ms, mb=mb)
    _check_axes(axes)
    check_changeable(model, "plan_slim", "plan")
    search = Space.of(model, axes)
    inputs: Batches = checked_batches(batches, model, "slim")
    check_labels("slim", None, model, inputs)
    with torch.no_grad(), switched(model, training=False, use_cache=False):
        costs = search.costs(budget.unit, inputs)
        limit = budget.limit(costs.of((), search.size))
        search.check_possible(budget, limit, costs)
        loss, ranking, choices = search.run(limit, costs, inputs)
    return SlimPlan(
        type(model).__name__,
        budget.told,
        tuple(axes),
        budget.unit,
        limit,
        costs.of((), search.size),
        loss,
        search.count,
        search.size,
        tuple(choices),
        Calibration.of(inputs, fingerprint(inputs)),
        ranking,
    )


@torch.no_grad()
def slim_(
    model: PreTrainedModel,
    batches: Iterable[Mapping[str, Tensor] | Tensor] | None = None,
    *,
    params: float | int | None = None,
    ms: str | float | None = None,
    mb: float | int | None = None,
    axes: Sequence[str] = ("depth", "width"),
    plan: SlimPlan | None = None,
) -> SlimReport:
    """Make a model smaller, in place, by the mix of fewer and smaller blocks that it misses least.

    What is left is a plain model of its family, which transformers loads alone. Train it afterwards
    with the whole model as teacher: `hf_sparse.recover_(model, batches, teacher=...)`. Make optimizers
    after this.

    Args:
        model: as for `plan_slim`.
        batches, params, ms, mb, axes: as for `plan_slim`, which is called with them.
        plan: what `plan_slim` found for this model, instead of all these.

    Raises:
        ValueError: as `plan_slim`; a plan and other arguments, or a plan for another model. Nothing has
            changed then.
    """
    check_model(model, "slim_", PreTrainedModel)
    if plan is None:
        if batches is None:
            raise ValueError(
                "slim_ got neither batches nor a plan. Give calibration data and a budget, or "
                "plan=hf_sparse.plan_slim(...)."
            )
        plan = plan_slim(model, batches, params=params, ms=ms, mb=mb, axes=axes)
    elif not isinstance(plan, SlimPlan) or any(v is not None for v in (batches, params, ms, mb)):
        raise ValueError(
            f"plan is a {type(plan).__name__}, beside other arguments or none; wanted what plan_slim "
            "gave, and then no batches and no budget."
        )
    check_changeable(model, "slim_", "slim it")
    search = Space.of(model, plan.axes)
    if (type(model).__name__, search.count, search.size) != (plan.kind, plan.blocks, plan.size):
        raise ValueError(
            f"the plan is for a {plan.kind} of {plan.blocks} blocks, {plan.size}; this "
            f"{type(model).__name__} has {search.count}, {search.size}. Plan for this model."
        )
    before = num_parameters(model)
    search.apply(plan)
    report = SlimReport(plan, (before, num_parameters(model)))
    record_(model, Step.of(report.method, report.options, calibration=plan.calibration))
    return report


def _check_axes(axes: Sequence[str]) -> None:
    known = ", ".join(f"'{name}' ({what})" for name, what in AXES.items())
    if isinstance(axes, str) or not axes or any(axis not in AXES for axis in axes):
        raise ValueError(f"axes is {axes!r}; wanted a tuple of some of {known}.")
    if len(set(axes)) < len(axes):
        raise ValueError(f"axes is {axes!r}: one is named twice.")
