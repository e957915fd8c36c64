"""The embedded shrinkage operator: a proximal step inside the `step()` of any torch optimizer.

Source: SparseOptimizer, https://arxiv.org/abs/2306.15656, after RPP, https://arxiv.org/abs/1909.12486.
To minimise `f(w) + R(w)` the optimizer steps along the gradient of `f` alone, and the closed-form
prox of the penalty follows:

    w~ = optimizer step on w
    w  = prox_{tau R}(w~)

| scale      | tau_i                                    | meaning                                   |
|------------|------------------------------------------|-------------------------------------------|
| `lr`       | `lr * lam * alpha_i`                     | follows the learning rate; biased in Adam |
| `adaptive` | `lr * lam * alpha_i / (sqrt(v_i) + eps)` | the exact prox in Adam's metric           |
| `constant` | `lam * alpha_i`                          | keeps shrinking while the rate decays     |

At a learning rate of 0 nothing is shrunk, whatever the scale.

`alpha_i` is 1 but for reweighted l1, where every `reweight_every` steps
`alpha_i = eps / (|w_i| + eps)`: RPP's weights times the constant `eps`, so that `lam` has the size it
has for l1. `eps` is the median |w| of each tensor unless given.

The prox is a step hook: it runs where the optimizer steps, and nowhere else, so a step that the
fp16 GradScaler skips shrinks nothing. All settings live in the param groups, and so in
`state_dict`; parameters are looked up at every step, never kept.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch.optim import Optimizer

from hf_sparse.arguments import check_has_value, check_optimizer
from hf_sparse.optim.notes import note_fine_tuning_
from hf_sparse.optim.parameters import (
    Group,
    SparseParameter,
    sparse_groups,
    sparse_parameters,
    take_over,
    unit_strength,
    whole_parameters,
)
from hf_sparse.optim.penalties import PENALTIES
from hf_sparse.optim.settings import (
    SETTINGS,
    check_group,
    check_resumed,
    check_settings,
    check_strength,
    is_unsteered,
)
from hf_sparse.optim.sharding import local_part
from hf_sparse.optim.step_mask import StepMask
from hf_sparse.patterns import Pattern
from hf_sparse.suggestions import deprecated_name, did_you_mean

_ATTACHED = "_hf_sparse_attached"
_KEPT = "_hf_sparse_kept"
_UNSTEERED = (
    "{} shrinks nothing: it was given no lam, and no Sparsifier steers it. Give it a strength "
    "(lam=...), or let hf_sparse.Sparsifier(optimizer, config, total_steps) find the one for a "
    "sparsity; lam=0 says that dense training is meant."
)
_ALL = slice(None)
# Weights that are shrunk together: few enough for their temporaries to stay in the cache.
_CHUNK = 1 << 17


def add_shrinkage_(optimizer: Optimizer, **settings: Any) -> Optimizer:
    """Give a torch optimizer that takes param groups a shrinkage step.

    Args:
        optimizer: changed in place; its `step()` stays as it is, a step hook is added to it.
        **settings: `lam`, `penalty`, `scale`, `pattern`, ... as in `SparseAdamW`, for the groups that
            do not set their own. `scale="adaptive"` needs Adam's `exp_avg_sq`.

    Returns:
        The optimizer. A copy or a pickle of it has no hooks: call this again on it.

    Raises:
        ValueError: an unknown setting, a value outside what is allowed, or a parameter that the
            pattern cannot divide.
    """
    check_optimizer(optimizer, "add_shrinkage_")
    if unknown := sorted(set(settings) - set(SETTINGS)):
        raise ValueError(
            f"unknown shrinkage settings {', '.join(unknown)}. Known: {', '.join(SETTINGS)}."
            f"{did_you_mean(unknown[0], SETTINGS)}"
        )
    optimizer.defaults.update({**SETTINGS, **settings})
    for group in optimizer.param_groups:
        for name in SETTINGS:
            group.setdefault(name, optimizer.defaults[name])
        check_group(group)
    attach(optimizer)
    return optimizer


add_shrinkage = deprecated_name("add_shrinkage", add_shrinkage_)


def attach(optimizer: Optimizer) -> None:
    """Register the step hooks, once. Copies and unpickled optimizers lose them and need this."""
    if _ATTACHED in vars(optimizer):
        return
    vars(optimizer)[_ATTACHED] = True
    optimizer.register_step_pre_hook(_remember_mask)
    optimizer.register_step_post_hook(_shrink)
    optimizer.register_load_state_dict_pre_hook(check_resumed)


def _remember_mask(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    """Before a step: check the strengths, and note which weights of frozen groups are not zero."""
    for group in sparse_groups(optimizer):
        if group["penalty"] is None:  # added to a plain optimizer after add_shrinkage_
            check_group(group)
        check_strength(group)  # whoever has set it since
    vars(optimizer)[_KEPT] = mask = StepMask()
    for sparse in whole_parameters(optimizer):
        if sparse.group["frozen"]:
            mask.remember(id(sparse.parameter), sparse.parameter)


@torch.no_grad()
def _shrink(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    """After a step: shrink the sparse groups, and keep the zeros of frozen ones."""
    mask: StepMask = vars(optimizer).pop(_KEPT)
    if was_skipped(optimizer):
        return
    if is_unsteered(optimizer):
        warnings.warn(_UNSTEERED.format(type(optimizer).__name__), stacklevel=4)
    take_over(optimizer)
    for group in sparse_groups(optimizer):
        members = list(whole_parameters(optimizer, [group]))
        stepped = [sparse for sparse in members if sparse.parameter.grad is not None]
        if group["frozen"]:
            for sparse in members:
                mask.restore_(id(sparse.parameter), sparse.parameter)
        elif group["lam"] > 0 and group["lr"] > 0 and stepped:
            if PENALTIES[group["penalty"]].reweighted:
                _reweight(optimizer, group, stepped)
            _shrink_group(group, [part for sparse in stepped for part in sparse.matrices()])
            group["shrink_steps"] += 1


def was_skipped(optimizer: Optimizer) -> bool:
    """Whether a fused optimizer has just ignored its step, since a GradScaler found infinities."""
    found = getattr(optimizer, "found_inf", None)
    return found is not None and float(found) > 0


def _shrink_group(group: Group, stepped: list[SparseParameter]) -> None:
    pattern = Pattern.parse(group["pattern"])
    if stepped[0].parameter.is_cuda and group.get("foreach") is not False:
        _shrink_parts(group, pattern, [(sparse, _ALL) for sparse in stepped], foreach=True)
        return
    for sparse in stepped:
        for rows in _chunks(sparse.weight.shape, pattern):
            _shrink_parts(group, pattern, [(sparse, rows)], foreach=False)


def _shrink_parts(
    group: Group, pattern: Pattern, parts: list[tuple[SparseParameter, slice]], foreach: bool
) -> None:
    """Shrink some rows of some weights."""
    strength = unit_strength(group) * group["lam"]
    metrics = [sparse.metric(rows) for sparse, rows in parts]
    alphas = [sparse.alpha(rows) for sparse, rows in parts]
    PENALTIES[group["penalty"]].shrink(
        [sparse.weight[rows] for sparse, rows in parts],
        strength if alphas[0] is None else [alpha * strength for alpha in alphas],
        None if metrics[0] is None else metrics,
        pattern,
        foreach,
    )


def _chunks(shape: torch.Size, pattern: Pattern) -> Iterator[slice]:
    """Cut a weight into runs of rows that no group of the pattern crosses."""
    rows = shape[0] if shape else 1
    span = pattern.least_span(shape)
    step = max(_CHUNK // max(shape[1:].numel(), 1) // span, 1) * span
    for start in range(0, rows, step):
        yield slice(start, start + step)


def _reweight(optimizer: Optimizer, group: Group, stepped: list[SparseParameter]) -> None:
    """Set `alpha = eps / (|w| + eps)` where a new round begins."""
    for sparse in stepped:
        if group["shrink_steps"] % group["reweight_every"] and "alpha" in sparse.state:
            continue
        size = sparse.parameter.detach().abs()
        eps = group["reweight_eps"] or float(local_part(size).float().median())
        tiny = torch.finfo(size.dtype).tiny  # a tensor of zeros has median 0
        optimizer.state[sparse.parameter]["alpha"] = (max(eps, tiny)) / (size + max(eps, tiny))


def freeze_zeros_(optimizer: Optimizer) -> None:
    """From now on the zeros of the sparse groups stay zero, and nothing is shrunk.

    Fine-tunes a sparse model without filling its zeros. The zeros that the weights have at each
    step are kept, whatever made them, and no others come: as with `keep_zeros_`, a weight that lands
    on exactly 0 becomes the least normal number, and may move away from 0 again.

    Args:
        optimizer: with sparse groups: a `SparseAdamW` or `SparseSGD`, or after `add_shrinkage_`.

    Raises:
        ValueError: an optimizer without shrinkage, or weights without zeros.
    """
    check_optimizer(optimizer, "freeze_zeros_")
    check_settings(optimizer)
    for sparse in sparse_parameters(optimizer):
        instead = " Make the optimizer from its parameters then."
        check_has_value(sparse.name, sparse.parameter, "freeze_zeros_", instead)
    if not any(bool((sparse.weight == 0).any()) for sparse in sparse_parameters(optimizer)):
        raise ValueError(
            "the optimizer's sparse groups have no zeros to keep. Is it made for the sparse model?"
        )
    freeze_groups(optimizer)
    note_fine_tuning_(optimizer)


freeze_zeros = deprecated_name("freeze_zeros", freeze_zeros_)


def freeze_groups(optimizer: Optimizer) -> None:
    """Freeze the sparse groups, with or without zeros in them."""
    attach(optimizer)
    for group in sparse_groups(optimizer):
        group["frozen"] = True
