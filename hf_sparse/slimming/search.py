"""`hf_sparse.plan_slim` and `hf_sparse.slim_`: one budget, and the best mix of axes within it.

| axis      | what goes                                                 | which                        |
|-----------|-----------------------------------------------------------|------------------------------|
| `depth`   | whole blocks                                              | as `drop_blocks_` by loss    |
| `width`   | heads with their keys, and neurons, as many in each block | least by `slimming/width.py` |
| `experts` | experts of a mixture, as many in each block               | as `drop_experts_` by REAP   |

For some numbers of blocks, from none to as many as keep to the budget alone, and some numbers of heads,
blocks keep as many neurons as the budget allows, or as many experts; without what goes the loss on
calibration data is measured, and the mix of least loss is taken. What is left is a plain model of its
family.
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
from hf_sparse.structure.experts import ExpertStack
from hf_sparse.structure.layers import num_parameters

AXES = {
    "depth": "whole blocks",
    "width": "heads and neurons, as many in each block",
    "experts": "experts of a mixture, as many in each block",
}
# Those that are open by default: of a mixture, of other models.
_OF_MIXTURES = ("depth", "experts")
_OF_OTHERS = ("depth", "width")


def plan_slim(
    model: PreTrainedModel,
    batches: Iterable[Mapping[str, Tensor] | Tensor],
    *,
    params: float | int | None = None,
    ms: str | float | None = None,
    mb: float | int | None = None,
    axes: Sequence[str] | None = None,
) -> SlimPlan:
    """Search the mix of fewer blocks, smaller blocks and fewer experts with the least loss.

    >>> plan = hf_sparse.plan_slim(model, batches, params=0.7)     # doctest: +SKIP
    >>> print(plan)                                                # doctest: +SKIP
    >>> hf_sparse.slim_(model, plan=plan)                          # doctest: +SKIP

    Args:
        model: of a family whose units are known, or a mixture, with weights of its own in each block;
            it stays as it is.
        batches: calibration inputs, as for `hf_sparse.drop_blocks_` by the loss.
        params: a share of the model's weights, in `(0, 1)`, or a number of them.
        ms: milliseconds of a forward pass of the first sequence of the batches in plain torch, or a
            share of what the whole model takes: `"0.6x"`. Predicted from smaller models of the family,
            which are built and timed.
        mb: megabytes of weights, in the model's type.
        axes: keys of `AXES`; None: `("depth", "experts")` of a mixture, else `("depth", "width")`.

    Returns:
        All mixes that were tried, and the best one.

    Memory: the model, and the activations of one batch; of a mixture, the experts that stay once more;
    for `ms` up to four models of its size.

    Raises:
        ValueError: not one budget; one that is met already, or that no mix keeps to (the message tells
            the nearest that can be kept); an axis that the model lacks; and as `drop_blocks_`.
    """
    check_model(model, "plan_slim", PreTrainedModel)
    check_kinds(plan_slim, locals())
    budget = Budget.of(params=params, ms=ms, mb=mb)
    axes = _axes_of(model, axes)
    check_changeable(model, "plan_slim", "plan")
    search = Space.of(model, axes)
    search.check_values()
    inputs: Batches = checked_batches(batches, model, "slim")
    check_labels("slim", None, model, inputs)
    with torch.no_grad(), switched(model, training=False, use_cache=False):
        costs = search.costs(budget.unit, inputs)
        limit = budget.limit(costs.of((), search.size))
        search.check_possible(budget, limit, costs)
        loss, (ranking, expert_ranking), choices = search.run(limit, costs, inputs)
    return SlimPlan(
        type(model).__name__,
        budget.told,
        axes,
        budget.unit,
        limit,
        costs.of((), search.size),
        loss,
        search.count,
        search.size,
        tuple(choices),
        Calibration.of(inputs, fingerprint(inputs)),
        ranking,
        search.experts,
        expert_ranking,
    )


def check_budget(
    model: PreTrainedModel,
    *,
    params: float | int | None = None,
    mb: float | int | None = None,
    ms: str | float | None = None,
    axes: Sequence[str] | None = None,
) -> None:
    """Refuse a budget that no mix keeps to, from a model that may be without values.

    Times are not looked at, only what of them is no amount.

    Raises:
        ValueError: as `plan_slim`.
    """
    budget = Budget.of(params=params, ms=ms, mb=mb)
    search = Space.of(model, _axes_of(model, axes))
    if budget.unit != "ms":
        costs = search.costs(budget.unit, [])
        search.check_possible(budget, budget.limit(costs.of((), search.size)), costs)


@torch.no_grad()
def slim_(
    model: PreTrainedModel,
    batches: Iterable[Mapping[str, Tensor] | Tensor] | None = None,
    *,
    params: float | int | None = None,
    ms: str | float | None = None,
    mb: float | int | None = None,
    axes: Sequence[str] | None = None,
    plan: SlimPlan | None = None,
) -> SlimReport:
    """Make a model smaller, in place, by the mix with the least loss that `plan_slim` finds.

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
    search.check_values()
    planned = (plan.kind, plan.blocks, plan.size, plan.experts)
    if (type(model).__name__, search.count, search.size, search.experts) != planned:
        raise ValueError(
            f"the plan is for a {plan.kind} of {_told(plan.blocks, plan.size, plan.experts)}; this "
            f"{type(model).__name__} has {_told(search.count, search.size, search.experts)}. Plan for "
            "this model."
        )
    before = num_parameters(model)
    search.apply(plan)
    report = SlimReport(plan, (before, num_parameters(model)))
    record_(model, Step.of(report.method, report.options, calibration=plan.calibration))
    return report


def _axes_of(model: PreTrainedModel, axes: Sequence[str] | None) -> tuple[str, ...]:
    """The axes that are open.

    Raises:
        ValueError: they are none of those that there are.
    """
    if axes is None:
        stacks = filter(None, map(ExpertStack.of, model.modules()))
        is_mixture = any(stack.can_go for stack in stacks)
        return _OF_MIXTURES if is_mixture else _OF_OTHERS
    known = ", ".join(f"'{name}' ({what})" for name, what in AXES.items())
    if isinstance(axes, str) or not axes or any(axis not in AXES for axis in axes):
        raise ValueError(f"axes is {axes!r}; wanted a tuple of some of {known}.")
    if len(set(axes)) < len(axes):
        raise ValueError(f"axes is {axes!r}: one is named twice.")
    return tuple(axes)


def _told(blocks: int, size: object, experts: int | None) -> str:
    parts = (f", {size}" if size else "", f" of {experts} experts" if experts else "")
    return f"{blocks} blocks{''.join(parts)}"
