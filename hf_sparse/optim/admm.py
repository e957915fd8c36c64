"""ADMM: dense weights are pulled to a sparse copy of themselves, which moves until both agree.

Source: Boyd et al., "Distributed Optimization and Statistical Learning via the Alternating Direction
Method of Multipliers", 2011; for language models at high sparsity ELSA, https://arxiv.org/abs/2510.01650.
To minimise the loss `f(w)` over sparse `w`, with a copy `z`, a dual variable `u` and `P` the projection
on the pattern and the sparsity that is due:

    each step       w~ = optimizer step on w
                    w  = (w~ + lr rho (z - u)) / (1 + lr rho)        the prox of rho/2 |w - z + u|²
    each interval   z  = P(w + u),  u <- u + w - z
    at the end      w  = P(w + u), and its zeros are frozen

The mask may move as long as it runs, of N:M patterns too.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim import Optimizer

from hf_sparse.arguments import Bound
from hf_sparse.optim.parameters import (
    SparseParameter,
    set_strength,
    sparse_parameters,
    whole_parameters,
)
from hf_sparse.optim.projection import magnitude, pattern_of, project_
from hf_sparse.optim.sharding import processes_of
from hf_sparse.optim.shrinkage import was_skipped
from hf_sparse.selection import global_masks

_HOOK = "_hf_sparse_admm"
_COPY, _DUAL = "admm_copy", "admm_dual"


class Admm:
    """ADMM with the gradient steps of any optimizer, and a projection at every interval.

    The projection compares weights as the prox of l0 does: by `|w + u|`, under scale `adaptive` in
    Adam's metric. `rho` is in units of the inverse learning rate: a step pulls a weight `lr * rho` of
    the way.

    Memory: two tensors per weight in the optimizer's state, the copy and the dual variable.
    """

    bounds: ClassVar[dict[str, Bound]] = {
        "rho": (lambda value: 0 < value < math.inf, "a finite number > 0"),
    }

    def __init__(self, optimizer: Optimizer, *, rho: float = 100.0) -> None:
        self._optimizer, self._rho = optimizer, rho
        self._stepped: set[int] = set()  # parameters whose state the optimizer has made by now
        set_strength(optimizer, 0.0)
        pattern_of(optimizer)
        if former := vars(optimizer).get(_HOOK):
            former.remove()
        self._hook = optimizer.register_step_post_hook(self._pull)
        vars(optimizer)[_HOOK] = self._hook

    @torch.no_grad()
    def approach(self, share: float, steps: int) -> None:
        parameters = list(sparse_parameters(self._optimizer))
        processes = processes_of(sparse.parameter for sparse in parameters)
        if processes.size > 1:
            raise ValueError(
                "ADMM does not work on sharded parameters. Train with DDP, or use method='proximal' or "
                "'magnitude' under FSDP2."
            )
        for sparse in whole_parameters(self._optimizer):
            state = self._optimizer.state[sparse.parameter]
            if _DUAL not in state and id(sparse.parameter) in self._stepped:
                state[_DUAL] = torch.zeros_like(sparse.parameter)
                state[_COPY] = torch.zeros_like(sparse.parameter)
        masks = global_masks(
            lambda: (_score(sparse) for sparse in parameters),
            pattern_of(self._optimizer),
            share,
            processes,
        )
        for sparse, pruned in zip(parameters, masks, strict=True):
            if _DUAL not in sparse.state:
                continue  # it has had no gradient so far
            dual, copy = (sparse.view(sparse.state[name]) for name in (_DUAL, _COPY))
            dual += sparse.weight
            copy.copy_(dual.masked_fill(pruned, 0.0))
            dual -= copy

    def release(self) -> None:
        pass

    def finish(self, share: float) -> None:
        project_(self._optimizer, share, _score)
        self._hook.remove()
        for sparse in whole_parameters(self._optimizer):
            for name in (_COPY, _DUAL):
                self._optimizer.state[sparse.parameter].pop(name, None)

    @torch.no_grad()
    def _pull(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        """After a step: pull the weights to the copy."""
        if was_skipped(optimizer):
            return
        for sparse in sparse_parameters(optimizer):
            if sparse.parameter.grad is not None:
                self._stepped.add(id(sparse.parameter))
            if sparse.group["frozen"] or _DUAL not in sparse.state:
                continue
            strength = float(sparse.group["lr"]) * self._rho
            wanted = sparse.view(sparse.state[_COPY]) - sparse.view(sparse.state[_DUAL])
            sparse.weight.lerp_(wanted, strength / (1 + strength))


def _score(sparse: SparseParameter) -> Tensor:
    """`|w + u|` in the optimizer's metric, fp32; `|w|` before the dual variable is there."""
    if _DUAL not in sparse.state:
        return magnitude(sparse)
    moved = (sparse.weight + sparse.view(sparse.state[_DUAL])).abs().float()
    metric = sparse.metric() if sparse.state.get("step") is not None else None
    return moved if metric is None else moved * metric.sqrt()
