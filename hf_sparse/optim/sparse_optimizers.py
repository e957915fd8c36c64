"""SparseAdamW and SparseSGD: torch's optimizers with the shrinkage operator inside `step()`.

Source: SparseOptimizer, https://arxiv.org/abs/2306.15656. The formulas stand in `shrinkage.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from hf_sparse.arguments import check_kinds
from hf_sparse.optim.settings import SETTINGS, check_group
from hf_sparse.optim.shrinkage import add_shrinkage_, attach
from hf_sparse.upstream.torch import ParamsT


class SparseMixin(torch.optim.Optimizer):
    """What the sparse optimizers add to torch's: settings in the groups, and the step hooks."""

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        if set(SETTINGS) <= set(self.defaults):  # else __init__ is not done, and will check
            check_group(self.param_groups[-1])

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        attach(self)  # copies and pickles come without hooks


class SparseAdamW(SparseMixin, torch.optim.AdamW):
    """AdamW that makes its weights sparse: each step ends with the prox of a penalty.

    With `lam=0` it is `torch.optim.AdamW`, bit for bit.

    Args:
        params: as for any torch optimizer. A group shrinks all of its parameters, unless it has
            `pattern=None`; `hf_sparse.sparse_param_groups(model, config)` sorts a model.
        lr, betas, eps, weight_decay, **kwargs: of `torch.optim.AdamW` (`foreach`, `fused`, ...).
        lam: strength of the penalty, `>= 0`. None: a `Sparsifier` or `SparsityCallback` sets it to
            reach a wanted sparsity; without one nothing is shrunk, and the first step warns.
        penalty: a key of `hf_sparse.optim.penalties.PENALTIES`. None takes the lasso of the pattern,
            for which a fixed `lam` has a meaning: `"l1"`, `"group_l2"` (blocks, rows, columns, heads)
            or `"nm"` (N:M). The others are `"reweighted_l1"` and `"l0"`, which did best where `lam`
            is steered: there `trainer_optimizer` takes it, with scale `"adaptive"`.
        scale: what the penalty's strength follows: `"lr"`, `"adaptive"` (Adam's metric; l1 and l0) or
            `"constant"`. See `hf_sparse.optim.shrinkage`.
        pattern: the pattern that the zeros form.
        reweight_every: steps of one round of reweighted l1.
        reweight_eps: its `eps`; None: the median |w| of each tensor.

    Every setting from `lam` on can be set per param group.

    Memory: nothing beside AdamW's moments, but `alpha` (one tensor per weight) for reweighted l1; and
    one tensor's temporaries during the step (those of all tensors with `foreach=True`; one byte per
    weight while frozen).

    Raises:
        ValueError: a setting outside what is allowed, or a parameter that the pattern cannot divide.

    Source: https://arxiv.org/abs/2306.15656
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        lam: float | None = None,
        penalty: str | None = None,
        scale: str = "lr",
        pattern: str = "unstructured",
        reweight_every: int = 100,
        reweight_eps: float | None = None,
        **kwargs: Any,
    ) -> None:
        _check_numbers(SparseAdamW, locals())
        super().__init__(params, lr, betas, eps, weight_decay, **kwargs)
        add_shrinkage_(self, **_shrinkage_of(locals()))


class SparseSGD(SparseMixin, torch.optim.SGD):
    """SGD that makes its weights sparse: each step ends with the prox of a penalty.

    Args:
        params: as for `SparseAdamW`.
        lr, momentum, dampening, weight_decay, **kwargs: of `torch.optim.SGD`.
        lam, penalty, pattern, reweight_every, reweight_eps: as for `SparseAdamW`.
        scale: `"lr"` (the proximal gradient method) or `"constant"`.

    Raises:
        ValueError: as for `SparseAdamW`; `scale="adaptive"`, since SGD has no metric.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-3,
        momentum: float = 0.0,
        dampening: float = 0.0,
        weight_decay: float = 0.0,
        *,
        lam: float | None = None,
        penalty: str | None = None,
        scale: str = "lr",
        pattern: str = "unstructured",
        reweight_every: int = 100,
        reweight_eps: float | None = None,
        **kwargs: Any,
    ) -> None:
        if scale == "adaptive":
            raise ValueError("scale='adaptive' is Adam's metric, SGD has none. Use scale='lr'.")
        _check_numbers(SparseSGD, locals())
        super().__init__(params, lr, momentum, dampening, weight_decay, **kwargs)
        add_shrinkage_(self, **_shrinkage_of(locals()))


def _shrinkage_of(values: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of shrinkage among an optimizer's arguments."""
    return {name: values[name] for name in SETTINGS if name in values}


def _check_numbers(kind: type[SparseMixin], values: Mapping[str, Any]) -> None:
    """Check the kinds of an optimizer's settings; a tensor, which torch allows, passes as a number."""
    if isinstance(params := values["params"], nn.Module | Mapping):
        raise TypeError(
            f"{kind.__name__} got a {type(params).__name__}; wanted its parameters. Use "
            f"{kind.__name__}(hf_sparse.sparse_param_groups(model, config), lr=...), which shrinks the "
            "target weights alone, or model.parameters()."
        )
    check_kinds(kind, {k: value for k, value in values.items() if not isinstance(value, Tensor)})
