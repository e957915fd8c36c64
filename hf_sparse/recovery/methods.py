"""Ways to recover a pruned model, and one of them with all its settings: what is trained."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import nn

from hf_sparse.adapters.loading import get_peft_model
from hf_sparse.adapters.merging import merge_
from hf_sparse.adapters.on_layers import adapter_on, shira_rank
from hf_sparse.calibration.modes import switched
from hf_sparse.structure.layers import TargetLayer
from hf_sparse.upstream.peft_by_name import has_adapters


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
        lr: float | str | None,
        r: int | None,
        **settings: int,
    ) -> Recovery:
        """The recovery of a model's sparse layers; None stands for the method's own value.

        A word in the place of the rate does so, too: it is to be searched.
        """
        default = RECOVERIES[method]
        if r is None and default.r is not None:
            r = shira_rank(default.r, layers) if method == "shira" else default.r
        rate = lr if isinstance(lr, float | int) else default.lr
        return cls(method, rate, r, **settings)

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
