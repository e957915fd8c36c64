"""Ways to recover a pruned model, and one of them with all its settings: what is trained, and how.

A plain loop for causal language models: AdamW without decay, a warm-up and a cosine, gradients
clipped to norm 1.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from hf_sparse.adapters.loading import get_peft_model
from hf_sparse.adapters.merging import merge_
from hf_sparse.adapters.on_layers import adapter_on, shira_rank
from hf_sparse.calibration.losses import fast_autocast
from hf_sparse.calibration.modes import switched
from hf_sparse.calibration.progress import steps
from hf_sparse.optim.keep_zeros import FrozenMask
from hf_sparse.optim.straight_through import StraightThrough
from hf_sparse.structure.grids import Gridded
from hf_sparse.structure.layers import TargetLayer
from hf_sparse.upstream.peft_by_name import has_adapters

_WARM_UP = 0.1
_CLIP = 1.0


@dataclass(frozen=True)
class RecoveryMethod:
    """A way to recover.

    Attributes:
        summary: what is trained.
        lr: the peak learning rate, unless given.
        r: the rank, or ShiRA's measure of as many weights; None: all weights are trained.
    """

    summary: str
    lr: float
    r: int | None = None


RECOVERIES = {
    "finetune": RecoveryMethod("all weights, the zeros frozen", 3e-4),
    "lora": RecoveryMethod("masked LoRA, merged at the end", 2e-3, 16),
    "shira": RecoveryMethod("single kept weights (ShiRA), merged at the end", 5e-3, 16),
}


@dataclass(frozen=True)
class Recovery:
    """A method and its settings, with nothing left open.

    Attributes:
        method: a key of `RECOVERIES`.
        lr: the peak learning rate.
        r: the rank of the adapter; None: all weights are trained.
        epochs: passes over the batches.
        accumulate: batches in an optimizer step.
        seed: of the order of the batches and the start of adapters.
    """

    method: str
    lr: float
    r: int | None
    epochs: int
    accumulate: int
    seed: int

    @classmethod
    def of(
        cls,
        method: str,
        layers: Sequence[TargetLayer],
        lr: float | None,
        r: int | None,
        **settings: int,
    ) -> Recovery:
        """The recovery of a model's sparse layers; None stands for the method's own value."""
        default = RECOVERIES[method]
        if r is None and default.r is not None:
            r = shira_rank(default.r, layers) if method == "shira" else default.r
        return cls(method, lr or default.lr, r, **settings)

    @property
    def options(self) -> dict[str, Any]:
        """The settings that the report and the model card name."""
        rank = {} if self.r is None else {"r": self.r}
        return {"epochs": self.epochs, "lr": self.lr, **rank}

    @contextmanager
    def prepared(self, model: Any, layers: Sequence[TargetLayer]) -> Iterator[nn.Module]:
        """What is to be trained in a model: the model itself, or the model with an adapter.

        The adapter is merged at the end. Behind an error it is taken off, and the model is as before.
        """
        if self.r is None:
            with switched(model, trained=list(model.parameters())):
                yield model
            return
        flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
        trained = get_peft_model(model, adapter_on(self.method, self.r, layers, self.seed))
        try:
            with switched(model):
                yield trained
            merge_(trained)
        finally:
            if has_adapters(model):
                trained.unload()
            for parameter, flag in flags:
                parameter.requires_grad_(flag)

    def run(
        self,
        trained: nn.Module,
        batches: Sequence[dict[str, Any]],
        *,
        freeze: bool,
        grids: Sequence[Gridded] = (),
    ) -> list[float]:
        """Train what has gradients in what `prepared` gave.

        Args:
            trained: the model, or the model with an adapter.
            batches: with labels.
            freeze: whether a mask keeps the zeros; an adapter keeps them by itself.
            grids: weights that lie on grids, and are trained to stay there.

        Returns:
            The mean loss of each step.
        """
        parameters = [parameter for parameter in trained.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(parameters, lr=self.lr, weight_decay=0.0)
        frozen = FrozenMask(optimizer, trained) if freeze else None
        on_grids = StraightThrough(grids)
        groups = self._order(len(batches))
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: _share(step, len(groups))
        )
        trained.train()
        losses: list[float] = []
        for group in steps(groups, "Recovering"):
            total = 0.0
            on_grids.round_()
            for index in group:
                with fast_autocast(next(trained.parameters())):
                    loss = trained(**batches[index]).loss
                (loss / len(group)).backward()
                total += float(loss.detach()) / len(group)
            if not math.isfinite(total):
                raise ValueError(
                    f"the loss is {total} after {len(losses)} steps. Load the model again, and take a "
                    f"lower learning rate than {self.lr}."
                )
            on_grids.restore_()
            nn.utils.clip_grad_norm_(parameters, _CLIP)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad(set_to_none=True)
            losses.append(total)
        if frozen is not None:
            frozen.check()
        on_grids.round_()
        return losses

    def _order(self, count: int) -> list[list[int]]:
        """The batches of each optimizer step, in a random order in each epoch."""
        generator = torch.Generator().manual_seed(self.seed)
        order = [
            index
            for _ in range(self.epochs)
            for index in torch.randperm(count, generator=generator).tolist()
        ]
        return [order[i : i + self.accumulate] for i in range(0, len(order), self.accumulate)]


def _share(step: int, steps: int) -> float:
    """Share of the peak rate in a step: a warm-up, then a cosine down to nothing."""
    warm = max(1, round(_WARM_UP * steps))
    if step < warm:
        return (step + 1) / warm
    return 0.5 * (1 + math.cos(math.pi * (step - warm) / max(steps - warm, 1)))
