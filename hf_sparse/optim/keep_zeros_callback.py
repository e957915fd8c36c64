"""The frozen mask in transformers' Trainer, as a callback."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from hf_sparse.configuration_sparse import SparsityConfig, check_config
from hf_sparse.optim.deepspeed import KEEPING, check_training
from hf_sparse.optim.keep_zeros import FrozenMask, keep_zeros_
from hf_sparse.optim.notes import fine_tuning
from hf_sparse.provenance.record import record_optimizer_


class KeepZeros(TrainerCallback):
    """Keeps the zeros of the sparse model that a Trainer fine-tunes, with any optimizer.

    >>> trainer = Trainer(model, args, ..., callbacks=[hf_sparse.KeepZeros()])   # doctest: +SKIP

    After each checkpoint and at the end it checks that the zeros are those of the start, and so
    that everything written has them. Resumed runs need nothing more.

    Args:
        config: which layers; None as for `keep_zeros_`.

    Raises:
        ValueError: when training begins: no zeros to keep, DeepSpeed. When a checkpoint was written,
            or at the end: something else changed the zeros.
    """

    def __init__(self, config: SparsityConfig | None = None) -> None:
        if config is not None:
            check_config(config)
        self.config = config
        self.mask: FrozenMask | None = None

    def __repr__(self) -> str:
        return f"KeepZeros({'' if self.config is None else repr(self.config)})"

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Freeze the zeros of a new run or a resumed one."""
        check_training(KEEPING, args)
        self.mask = keep_zeros_(kwargs["optimizer"], kwargs["model"], self.config)

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Check the zeros that were just written."""
        assert self.mask is not None
        self.mask.check()

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Check the zeros, take the hooks off the optimizer, and note the step for the model card."""
        assert self.mask is not None
        self.mask.check()
        self.mask.remove()
        optimizer = getattr(kwargs["optimizer"], "optimizer", kwargs["optimizer"])
        step = fine_tuning(optimizer, steps=state.global_step, seed=args.seed)
        record_optimizer_(optimizer, step, kwargs["model"])
