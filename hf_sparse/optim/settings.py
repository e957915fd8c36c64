"""The settings of shrinkage in an optimizer's param groups, and their checks."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from hf_sparse.optim.deepspeed import SHRINKING, check_whole_parameters
from hf_sparse.optim.parameters import Group, sparse_groups
from hf_sparse.optim.penalties import PENALTIES, SCALES, default_penalty
from hf_sparse.optim.sharding import check_shardable
from hf_sparse.patterns import Pattern
from hf_sparse.structure.layers import check_divides
from hf_sparse.structure.weights import check_floats
from hf_sparse.suggestions import check_name

# What a param group holds beside the optimizer's own settings.
SETTINGS: dict[str, Any] = {
    "lam": None,  # 0 until somebody sets it: see `is_unsteered`
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
# What an optimizer keeps of each weight, of its shape.
_OF_WEIGHTS = (
    *("exp_avg", "exp_avg_sq", "max_exp_avg_sq", "momentum_buffer", "alpha"),
    *("admm_copy", "admm_dual"),
)
_FIXED = ("penalty", "scale", "pattern", "transposed")


def check_settings(optimizer: Optimizer) -> None:
    """Raise a ValueError if the optimizer does not shrink: it was never given to add_shrinkage_."""
    if not all(set(SETTINGS) <= set(group) for group in optimizer.param_groups):
        raise ValueError(
            f"{type(optimizer).__name__} has no shrinkage. Use SparseAdamW or SparseSGD, or call "
            "hf_sparse.add_shrinkage_(optimizer) first."
        )


def is_unsteered(optimizer: Optimizer) -> bool:
    """Whether there is something to shrink, and no strength is set.

    A given `lam` (0, too), a `Sparsifier` and `freeze_zeros_` set one.
    """
    groups = sparse_groups(optimizer)
    return bool(groups) and all(group["lam"] is None and not group["frozen"] for group in groups)


def check_strength(group: Group) -> None:
    """Refuse a `lam` that no penalty can have; None: nobody has set it so far.

    Raises:
        ValueError: what was found, and what was wanted.
    """
    lam = group["lam"]
    number = isinstance(lam, int | float) and not isinstance(lam, bool)
    if lam is not None and not (number and 0 <= lam < math.inf):
        raise ValueError(f"lam is {lam!r}; wanted a finite number >= 0.")


def check_group(group: Group) -> None:
    """Check the settings of a param group and that the pattern fits its parameters.

    Raises:
        ValueError: what was found, and what was wanted.
    """
    if group["pattern"] is None:
        return
    pattern = Pattern.parse(group["pattern"])
    if pattern.whole_matrices:
        raise ValueError(
            f"pattern '{pattern}' takes whole experts, which no optimizer chooses: their matrices "
            "would be shrunk apart. Use hf_sparse.drop_experts_, then train what is left."
        )
    group["pattern"] = str(pattern)
    group["penalty"] = group["penalty"] or default_penalty(pattern)
    check_strength(group)
    for name, kinds, allowed in (("penalty", "penalties", PENALTIES), ("scale", "scales", SCALES)):
        check_name(group[name], allowed, name, kinds)
    penalty = PENALTIES[group["penalty"]]
    penalty.check_pattern(group["penalty"], pattern)
    if group["scale"] == "adaptive" and not penalty.adaptive:
        raise ValueError(
            f"penalty '{group['penalty']}' has no closed form in Adam's metric. Use scale='lr' or "
            "'constant', or penalty='l0'."
        )
    if group["scale"] == "adaptive" and "betas" not in group:
        raise ValueError(
            "scale='adaptive' is Adam's metric (exp_avg_sq), which this optimizer does not have. Use "
            "scale='lr' or 'constant'."
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
        _check_parameter(name, parameter, pattern, group)


def _check_parameter(name: str, parameter: Tensor, pattern: Pattern, group: Group) -> None:
    check_whole_parameters(SHRINKING, [(name, parameter)])
    if parameter.device.type != "meta":
        check_floats(name, parameter.detach())
    if not pattern.elementwise:
        if parameter.ndim != (3 if group.get("stacked", False) else 2):
            raise ValueError(
                f"{name} has shape {tuple(parameter.shape)}; pattern '{pattern}' wants matrices "
                "(out_features, in_features). Put it into a group with pattern=None, as "
                "hf_sparse.sparse_param_groups does."
            )
        rows, columns = parameter.shape[-2:]
        rows, columns = (columns, rows) if group["transposed"] else (rows, columns)
        check_divides(pattern, name, rows, columns)
    check_shardable(name, parameter, pattern, transposed=group["transposed"])


def check_resumed(optimizer: Optimizer, saved: dict[str, Any]) -> None:
    """A hook of `load_state_dict`: refuse the state of another kind of run.

    Raises:
        ValueError: another penalty, scale or pattern, weights of other shapes, or an optimizer without
            shrinkage.
    """
    groups = saved["param_groups"]
    same = len(groups) == len(optimizer.param_groups)
    if not same and all("penalty" in group for group in groups):
        return  # torch says it better
    for number, (old, new) in enumerate(zip(groups, optimizer.param_groups, strict=False)):
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
        for index, parameter in zip(old["params"], new["params"], strict=False):
            for name, value in saved["state"].get(index, {}).items():
                fits = not isinstance(value, Tensor) or value.shape == parameter.shape
                if name in _OF_WEIGHTS and not fits:
                    raise ValueError(
                        f"param group {number}: {name} was saved for a weight of the shape "
                        f"{tuple(value.shape)}, the optimizer that resumes has one of "
                        f"{tuple(parameter.shape)}. Resume with the model of the first run, or start "
                        "a new one."
                    )
