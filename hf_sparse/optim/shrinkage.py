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

`alpha_i` is 1 but for reweighted l1, where every `reweight_every` steps
`alpha_i = eps / (|w_i| + eps)`: RPP's weights times the constant `eps`, so that `lam` has the size it
has for l1. `eps` is the median |w| of each tensor unless given.

The prox is a step hook: it runs where the optimizer steps, and nowhere else, so a step that the
fp16 GradScaler skips shrinks nothing. All settings live in the param groups, and so in
`state_dict`; parameters are looked up at every step, never kept.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from hf_sparse.optim.penalties import PENALTIES, SCALES, default_penalty
from hf_sparse.optim.sharding import check_shardable, local_part
from hf_sparse.patterns import GroupPattern, Pattern, Unstructured

Group = dict[str, Any]

# What a param group holds beside the optimizer's own settings.
SETTINGS: dict[str, Any] = {
    "lam": 0.0,
    "penalty": None,  # by pattern: see default_penalty
    "scale": "lr",
    "pattern": "unstructured",
    "transposed": False,
    "frozen": False,
    "reweight_every": 100,
    "reweight_eps": None,
    "shrink_steps": 0,
}
# What a saved state must agree on with the optimizer that reads it.
_FIXED = ("penalty", "scale", "pattern", "transposed")
_ATTACHED = "_hf_sparse_attached"
_KEPT = "_hf_sparse_kept"
_ALL = slice(None)
# Weights that are shrunk together: few enough for their temporaries to stay in the cache.
_CHUNK = 1 << 17


def add_shrinkage(optimizer: Optimizer, **settings: Any) -> Optimizer:
    """Give any torch optimizer a shrinkage step: Lion, Muon, 8-bit Adam and the like.

    Args:
        optimizer: changed in place; its `step()` stays as it is, a step hook is added to it.
        **settings: `lam`, `penalty`, `scale`, `pattern`, ... as in `SparseAdamW`, for the groups that
            do not set their own. `scale="adaptive"` needs Adam's `exp_avg_sq`.

    Returns:
        The optimizer.

    Raises:
        ValueError: an unknown setting, a value outside what is allowed, or a parameter that the
            pattern cannot divide.
    """
    if unknown := sorted(set(settings) - set(SETTINGS)):
        raise ValueError(
            f"unknown shrinkage settings {', '.join(unknown)}. Known: {', '.join(SETTINGS)}."
        )
    optimizer.defaults.update({**SETTINGS, **settings})
    for group in optimizer.param_groups:
        for name in SETTINGS:
            group.setdefault(name, optimizer.defaults[name])
        check_group(group)
    attach(optimizer)
    return optimizer


def attach(optimizer: Optimizer) -> None:
    """Register the step hooks, once. Copies and unpickled optimizers lose them and need this."""
    if _ATTACHED in vars(optimizer):
        return
    vars(optimizer)[_ATTACHED] = True
    optimizer.register_step_pre_hook(_remember_mask)
    optimizer.register_step_post_hook(_shrink)
    optimizer.register_load_state_dict_pre_hook(_check_resumed)


@dataclass(frozen=True)
class SparseParameter:
    """A parameter of a sparse group, with what its shrinkage needs."""

    name: str
    group: Group
    parameter: Tensor
    state: Mapping[str, Any]

    @property
    def weight(self) -> Tensor:
        """The values of this process as `(out_features, in_features)`; writes reach the model."""
        return self.view(self.parameter.detach())

    def view(self, tensor: Tensor) -> Tensor:
        """A tensor of the parameter's shape as `weight` is seen; a scalar as a vector."""
        tensor = local_part(tensor)
        return tensor.T if self.group["transposed"] else torch.atleast_1d(tensor)

    def metric(self, rows: slice = _ALL) -> Tensor | None:
        """The diagonal of Adam's metric, `sqrt(v) + eps`, for scale `adaptive`; else None."""
        if self.group["scale"] != "adaptive":
            return None
        moments = self.state.get("max_exp_avg_sq", self.state.get("exp_avg_sq"))
        if moments is None:
            raise ValueError(
                f"{self.name}: scale='adaptive' needs Adam's second moments (exp_avg_sq), which this "
                "optimizer does not keep in its state. Use scale='lr' or 'constant'."
            )
        correction = 1 - self.group["betas"][1] ** float(self.state["step"])
        part = self.view(moments)[rows]
        root = (part if part.element_size() >= 4 else part.float()).sqrt()
        return root.mul_(1 / math.sqrt(correction)).add_(self.group["eps"])

    def alpha(self, rows: slice = _ALL) -> Tensor | None:
        """The factors of reweighted l1, once they are set; else None."""
        return self.view(self.state["alpha"])[rows] if "alpha" in self.state else None


def sparse_groups(optimizer: Optimizer) -> list[Group]:
    """The param groups that are to be sparse: those with a pattern."""
    return [group for group in optimizer.param_groups if group.get("pattern") is not None]


def sparse_parameters(
    optimizer: Optimizer, groups: Iterable[Group] | None = None
) -> Iterator[SparseParameter]:
    """The parameters of the sparse groups, as they are now."""
    for number, group in enumerate(sparse_groups(optimizer) if groups is None else groups):
        names = group.get("param_names")
        pattern = Pattern.parse(group["pattern"])
        for index, parameter in enumerate(group["params"]):
            name = names[index] if names else f"parameter {index} of group {number}"
            check_shardable(name, parameter, pattern)  # FSDP2 replaces parameters after __init__
            state = optimizer.state[parameter]
            yield SparseParameter(name, group, parameter, state)


def check_group(group: Group) -> None:
    """Check the settings of a param group and that the pattern fits its parameters.

    Raises:
        ValueError: what was found, and what was wanted.
    """
    if group["pattern"] is None:
        return
    pattern = Pattern.parse(group["pattern"])
    group["pattern"] = str(pattern)
    group["penalty"] = group["penalty"] or default_penalty(pattern)
    lam = group["lam"]
    if isinstance(lam, bool) or not isinstance(lam, int | float) or not 0 <= lam < math.inf:
        raise ValueError(f"lam is {lam!r}; wanted a finite number >= 0.")
    for name, allowed in (("penalty", tuple(PENALTIES)), ("scale", SCALES)):
        if group[name] not in allowed:
            raise ValueError(f"unknown {name} {group[name]!r}; wanted one of {', '.join(allowed)}.")
    penalty = PENALTIES[group["penalty"]]
    penalty.check_pattern(group["penalty"], pattern)
    if group["scale"] == "adaptive" and not penalty.adaptive:
        raise ValueError(
            f"penalty '{group['penalty']}' has no closed form in Adam's metric. Use scale='lr' or "
            "'constant', or penalty='l0'."
        )
    every, eps = group["reweight_every"], group["reweight_eps"]
    if not isinstance(every, int) or every < 1:
        raise ValueError(f"reweight_every is {every!r}; wanted a number of steps >= 1.")
    if eps is not None and not 0 < eps < math.inf:
        raise ValueError(
            f"reweight_eps is {eps!r}; wanted a number > 0, or None for the median |w|."
        )
    names = group.get("param_names")
    for index, parameter in enumerate(group["params"]):
        name = names[index] if names else f"parameter {index}"
        _check_parameter(name, parameter, pattern, group["transposed"])


def _check_parameter(name: str, parameter: Tensor, pattern: Pattern, transposed: bool) -> None:
    if hasattr(parameter, "ds_id") or hasattr(parameter, "ds_tensor"):
        raise ValueError(
            f"{name} is partitioned by DeepSpeed ZeRO, which flattens parameters: their matrices "
            "cannot be shrunk. Train with DDP or FSDP2 instead."
        )
    if not isinstance(pattern, Unstructured):
        if parameter.ndim != 2:
            raise ValueError(
                f"{name} has shape {tuple(parameter.shape)}; pattern '{pattern}' wants matrices "
                "(out_features, in_features). Put it into a group with pattern=None, as "
                "hf_sparse.sparse_param_groups does."
            )
        rows, columns = reversed(parameter.shape) if transposed else parameter.shape
        try:
            pattern.check_shape(rows, columns)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
    check_shardable(name, parameter, pattern)


def _check_resumed(optimizer: Optimizer, saved: dict[str, Any]) -> None:
    groups = saved["param_groups"]
    if len(groups) != len(optimizer.param_groups):
        return  # torch says it better
    for number, (old, new) in enumerate(zip(groups, optimizer.param_groups, strict=True)):
        for name in _FIXED:
            if name not in old:
                raise ValueError(
                    f"param group {number} was saved by an optimizer without shrinkage (it has no "
                    f"{name!r}). Start a new run from the saved model instead of resuming."
                )
            if old[name] != new[name]:
                raise ValueError(
                    f"param group {number} was saved with {name}={old[name]!r}, the optimizer that "
                    f"resumes has {name}={new[name]!r}. Resume with the settings of the first run, "
                    "or start a new one."
                )


def _remember_mask(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    """Before a step: note which weights of frozen groups are not zero."""
    vars(optimizer)[_KEPT] = [
        sparse.weight != 0 for sparse in sparse_parameters(optimizer) if sparse.group["frozen"]
    ]


@torch.no_grad()
def _shrink(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    """After a step: shrink the sparse groups, and clear what grew in frozen ones."""
    kept = iter(vars(optimizer).pop(_KEPT))
    if was_skipped(optimizer):
        return
    for group in sparse_groups(optimizer):
        members = list(sparse_parameters(optimizer, [group]))
        stepped = [sparse for sparse in members if sparse.parameter.grad is not None]
        if group["frozen"]:
            for sparse in members:
                sparse.weight.mul_(next(kept))
        elif group["lam"] > 0 and stepped:
            if PENALTIES[group["penalty"]].reweighted:
                _reweight(optimizer, group, stepped)
            _shrink_group(group, stepped)
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
    height = pattern.group_shape(*shape)[0] if isinstance(pattern, GroupPattern) else 1
    step = max(_CHUNK // max(shape[1:].numel(), 1) // height, 1) * height
    for start in range(0, rows, step):
        yield slice(start, start + step)


def unit_strength(group: Group) -> float:
    """The strength of the penalty in one step at `lam = 1`."""
    return 1.0 if group["scale"] == "constant" else float(group["lr"])


def _reweight(optimizer: Optimizer, group: Group, stepped: list[SparseParameter]) -> None:
    """Set `alpha = eps / (|w| + eps)` where a new round begins."""
    for sparse in stepped:
        if group["shrink_steps"] % group["reweight_every"] and "alpha" in sparse.state:
            continue
        size = sparse.parameter.detach().abs()
        eps = group["reweight_eps"] or float(local_part(size).float().median())
        tiny = torch.finfo(size.dtype).tiny  # a tensor of zeros has median 0
        optimizer.state[sparse.parameter]["alpha"] = (max(eps, tiny)) / (size + max(eps, tiny))


def set_strength(optimizer: Optimizer, lam: float) -> None:
    """Set `lam` of all sparse groups."""
    for group in sparse_groups(optimizer):
        group["lam"] = lam


def freeze_zeros(optimizer: Optimizer) -> None:
    """From now on the zeros of the sparse groups stay zero, and nothing is shrunk.

    Fine-tunes a sparse model without filling its zeros. The zeros that the weights have at each
    step are kept, whatever made them.

    Args:
        optimizer: with sparse groups: a `SparseAdamW` or `SparseSGD`, or after `add_shrinkage`.
    """
    for group in sparse_groups(optimizer):
        group["frozen"] = True
