"""Soft movement pruning: weights that move away from zero stay.

Source: Sanh et al., "Movement Pruning: Adaptive Sparsity by Fine-Tuning",
https://arxiv.org/abs/2005.07683.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim import Optimizer

from hf_sparse.arguments import Bound
from hf_sparse.optim.parameters import (
    Group,
    SparseParameter,
    set_strength,
    sparse_groups,
    sparse_parameters,
    whole_parameters,
)
from hf_sparse.optim.projection import magnitude, measured_sparsity, pattern_of, project_
from hf_sparse.optim.sharding import processes_of
from hf_sparse.optim.shrinkage import was_skipped
from hf_sparse.upstream.torch import adamw_step

_HOOK = "_hf_sparse_movement"
_STRONGEST = 1e6


class SoftMovement:
    """Soft movement pruning: learned scores, kept where they move away from zero.

        weights used   W * M,  M = [sigmoid(S) > threshold]
        dL/dS          dL/d(W * M) * W + strength * sigmoid'(S)      (straight through M)

    S starts at 0 and is trained by Adam. Departures from the paper: the strength of the penalty is
    relative to the root mean square of `dL/d(W M) * W` and is steered (integral control on its
    logarithm) so that the sparsity follows the schedule; the run ends with the top scores, so that
    the sparsity is exact; in N:M groups the top N scores of a growing share of groups stay, since
    a threshold cannot give them. Groups share one score.

    Memory: four tensors per weight in the optimizer's state: S, its two moments, the dense values.
    """

    bounds: ClassVar[dict[str, Bound]] = {
        "score_lr": (lambda value: 0 < value < math.inf, "a finite number > 0"),
        "threshold": (lambda value: 0 < value < 0.5, "a number in (0, 0.5)"),
        "gain": (lambda value: 0 < value < math.inf, "a finite number > 0"),
    }

    def __init__(
        self,
        optimizer: Optimizer,
        *,
        score_lr: float = 1e-2,
        threshold: float = 0.1,
        gain: float = 2.0,
    ) -> None:
        self._optimizer = optimizer
        set_strength(optimizer, 0.0)
        self._pattern = pattern_of(optimizer)
        # A threshold cannot give each group its share: the top scores of the group stay.
        self._by_rank = self._pattern.implied_sparsity is not None
        self._score_lr = score_lr
        self._logit = math.log(threshold / (1 - threshold))
        self._gain = gain
        if former := vars(optimizer).get(_HOOK):
            former.remove()
        self._hook = optimizer.register_step_post_hook(self._after_step)
        vars(optimizer)[_HOOK] = self._hook

    def approach(self, share: float, steps: int) -> None:
        groups = sparse_groups(self._optimizer)
        if processes_of(sparse.parameter for sparse in sparse_parameters(self._optimizer)).size > 1:
            raise ValueError(
                "movement pruning does not work on sharded parameters. Train with DDP, or use "
                "method='proximal' or 'magnitude' under FSDP2."
            )
        factor = math.exp(self._gain * (share - measured_sparsity(self._optimizer)))
        for group in groups:
            group["movement_share"] = share
            strength = group.get("movement_strength", 1.0) * factor
            group["movement_strength"] = min(strength, _STRONGEST)

    def release(self) -> None:
        pass

    def finish(self, share: float) -> None:
        self._restore()
        project_(self._optimizer, share, _movement_score)
        self._hook.remove()
        for sparse in sparse_parameters(self._optimizer):
            for name in _MOVEMENT:
                self._optimizer.state[sparse.parameter].pop(name, None)

    @torch.no_grad()
    def _restore(self) -> None:
        """Give the weights their dense values back."""
        for sparse in sparse_parameters(self._optimizer):
            if "movement_dense" in sparse.state:
                sparse.weight.copy_(sparse.view(sparse.state["movement_dense"]))

    @torch.no_grad()
    def _after_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        if was_skipped(optimizer):
            return
        for group in sparse_groups(optimizer):
            if "movement_share" not in group or group["frozen"]:
                continue
            for sparse in whole_parameters(optimizer, [group]):
                if sparse.parameter.grad is not None:
                    self._learn(group, sparse)
        if self._by_rank:
            self._mask_groups()

    def _learn(self, group: Group, sparse: SparseParameter) -> None:
        """One step on the scores of a parameter, whose own step is done."""
        parameter, state = sparse.parameter, self._optimizer.state[sparse.parameter]
        if "movement_scores" not in state:
            for name in _MOVEMENT[:3]:
                state[name] = torch.zeros_like(parameter)
            state["movement_dense"] = parameter.detach().clone()
            state["movement_step"] = torch.zeros(())
        scores, dense = state["movement_scores"], state["movement_dense"]
        kept = parameter != 0 if self._by_rank else scores > self._logit
        gradient = self._shared(sparse, parameter.grad * dense)
        dense.copy_(torch.where(kept, parameter.detach(), dense))
        size = gradient.square().mean().sqrt()
        chance = scores.sigmoid()
        gradient += group["movement_strength"] * size * chance * (1 - chance)
        adamw_step(
            [scores], [gradient], [state["movement_exp_avg"]], [state["movement_exp_avg_sq"]], [],
            [state["movement_step"]], foreach=False, amsgrad=False, beta1=0.9, beta2=0.999,
            lr=self._score_lr, weight_decay=0.0, eps=1e-12, maximize=False,
        )  # fmt: skip
        if not self._by_rank:
            parameter.copy_(dense * (scores > self._logit))

    def _shared(self, sparse: SparseParameter, gradient: Tensor) -> Tensor:
        """The gradient of the scores: each group's mean, for its weights share a score."""
        for matrix in sparse.matrices():
            own = matrix.view(gradient)
            own.copy_(self._pattern.spread(self._pattern.means(own), own.shape))
        return gradient

    def _mask_groups(self) -> None:
        """Keep the top N scores of the groups that are due, and all of the others."""
        self._restore()
        share = max(group.get("movement_share", 0.0) for group in sparse_groups(self._optimizer))
        project_(self._optimizer, share, _movement_score)


def _movement_score(sparse: SparseParameter) -> Tensor:
    """The chance to stay, `sigmoid(S)`, fp32; |w| where nothing was learned."""
    if "movement_scores" not in sparse.state:
        return magnitude(sparse)
    return sparse.view(sparse.state["movement_scores"]).float().sigmoid()


_MOVEMENT = (
    "movement_scores",
    "movement_exp_avg",
    "movement_exp_avg_sq",
    "movement_dense",
    "movement_step",
)
