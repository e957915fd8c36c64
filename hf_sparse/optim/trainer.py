"""Sparse training in transformers' Trainer: the optimizer's factory and the callback."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable
from typing import Any

from torch import nn
from torch.optim import Optimizer
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from hf_sparse.arguments import check_kinds
from hf_sparse.configuration_sparse import SparsityConfig, check_config
from hf_sparse.counts import SparsityReport
from hf_sparse.optim.deepspeed import SHRINKING, check_training
from hf_sparse.optim.groups import sparse_param_groups
from hf_sparse.optim.methods import check_method
from hf_sparse.optim.notes import note_fine_tuning_, note_shrinking_
from hf_sparse.optim.parameters import sparse_parameters
from hf_sparse.optim.penalties import PENALTIES
from hf_sparse.optim.schedules import Schedule
from hf_sparse.optim.settings import SETTINGS, is_unsteered
from hf_sparse.optim.shrinkage import add_shrinkage_, freeze_zeros_
from hf_sparse.optim.sparse_optimizers import SparseAdamW, SparseMixin
from hf_sparse.optim.sparsifier import Sparsifier
from hf_sparse.optim.straight_through import StraightThrough
from hf_sparse.structure.grids import check_whole_weights, gridded
from hf_sparse.structure.layers import PRUNED_WITH
from hf_sparse.structure.targets import Targets
from hf_sparse.suggestions import check_name, shortened

# Settings of shrinkage that are not for trainer_optimizer to give.
_OWNED = {"pattern", "transposed", "frozen", "shrink_steps"}

OptimizerFactory = Callable[[], Callable[..., Optimizer]]


def trainer_optimizer(
    config: SparsityConfig,
    *,
    lr: float,
    optimizer_cls: Callable[..., Optimizer] = SparseAdamW,
    weight_decay: float | None = None,
    keep_zeros: bool = False,
    penalty: str = "l0",
    scale: str | None = None,
    **kwargs: Any,
) -> tuple[OptimizerFactory, dict[str, Any]]:
    """The value for `Trainer(optimizer_cls_and_kwargs=...)`.

    A factory, since only it sees the model: so just the config's targets are shrunk.

    Args:
        config: pattern and targets.
        optimizer_cls: `SparseAdamW`, `SparseSGD`, or any other torch optimizer: that one gets the
            shrinkage as step hooks.
        lr: learning rate; Trainer's own arguments do not reach a factory.
        weight_decay: of matrices; None is the optimizer's own default.
        keep_zeros: freeze the zeros that the model has, for fine-tuning a sparse model without a
            `SparsityCallback`.
        penalty: as for `SparseAdamW`; l0 is what did best (see docs/results.md).
        scale: None is `"adaptive"` where optimizer and penalty have it, else `"lr"`.
        **kwargs: `lam`, `betas`, ... of the optimizer and of `SparseAdamW`.

    Returns:
        The factory and its keyword arguments.

    Raises:
        ValueError: when Trainer makes the optimizer: a setting outside what is allowed, targets that
            match nothing, DeepSpeed ZeRO. At the first step: neither a `SparsityCallback` nor `lam`
            nor `keep_zeros` was given, so that nothing would become zero.
    """
    check_config(config)
    check_kinds(trainer_optimizer, locals())
    if owned := sorted(_OWNED & set(kwargs)):
        raise ValueError(
            f"{', '.join(owned)} cannot be given to trainer_optimizer: the config tells the pattern, "
            "and keep_zeros freezes."
        )
    if not callable(optimizer_cls):
        raise ValueError(
            f"optimizer_cls is {shortened(optimizer_cls)}; wanted a class, such as SparseAdamW."
        )
    check_name(penalty, PENALTIES, "penalty", "penalties")
    if scale is None:
        maker = getattr(optimizer_cls, "func", optimizer_cls)  # of a functools.partial
        adam = isinstance(maker, type) and issubclass(maker, SparseAdamW)
        fitting = adam and PENALTIES[penalty].adaptive
        scale = "adaptive" if fitting else "lr"

    def factory() -> Callable[..., Optimizer]:
        def make(model: nn.Module, **arguments: Any) -> Optimizer:
            check_training(SHRINKING)
            shrinking = {name: arguments.pop(name) for name in SETTINGS if name in arguments}
            groups = sparse_param_groups(model, config, weight_decay=weight_decay)
            for group in groups:
                group.update(penalty=penalty, scale=scale, **shrinking)
            optimizer = optimizer_cls(groups, **arguments)
            if not isinstance(optimizer, SparseMixin):
                add_shrinkage_(optimizer)
            if keep_zeros:
                freeze_zeros_(optimizer)
                note_fine_tuning_(optimizer, model)
            else:
                note_shrinking_(optimizer, model, config)
            optimizer.register_step_pre_hook(_refuse_unsteered)
            return optimizer

        return make

    return factory, {"lr": lr, **kwargs}


def _refuse_unsteered(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    """Before a step: refuse to train on where nothing will become sparse."""
    if is_unsteered(optimizer):
        raise ValueError(
            "the Trainer has an optimizer of trainer_optimizer, and nothing that steers it: no weight "
            "would become zero. Give it callbacks=[SparsityCallback(config)] too; or a fixed strength, "
            "trainer_optimizer(config, lam=...); or keep_zeros=True for a model that is sparse already."
        )


class SparsityCallback(TrainerCallback):
    """Brings the model that a Trainer trains to the sparsity of a config.

    It drives a `Sparsifier` with the Trainer's steps, logs `sparsity` and `lam`, keeps the Trainer from
    taking a checkpoint of before the end of the schedule for the best one, and checks at the end
    that the promised zeros are there. Training resumes from checkpoints without further ado.

    With `bits` in the config training is quantisation-aware from the end of the schedule on: the
    weights lie on the grid whenever the model runs, and the optimizer moves unrounded ones
    (straight-through). Checkpoints hold the rounded ones, with which a resumed run goes on.

    >>> sparsity = SparsityCallback(config)                                   # doctest: +SKIP
    >>> trainer = Trainer(..., callbacks=[sparsity],                          # doctest: +SKIP
    ...     optimizer_cls_and_kwargs=trainer_optimizer(config, lr=2e-4))

    Args:
        config: the wanted pattern, sparsity and targets; the same as `trainer_optimizer` got.
        method: `"proximal"`, `"admm"`, `"magnitude"` (gradual) or `"movement"` (soft).
        schedule: a `Schedule`, or its shape: `"cubic"`, `"linear"`, `"constant"`.
        interval: steps between two adjustments.
        **options: the method's own: of `"movement"` `score_lr=0.01`, `threshold=0.1` and `gain=2.0`;
            of `"admm"` `rho=100.0`.

    Attributes:
        report: after training, exact counts with method, options and time; None under FSDP2.
            `save_pretrained` needs no report: the model remembers how it was trained.

    Raises:
        ValueError: when training begins: an optimizer without sparse groups or with another pattern,
            DeepSpeed. When it ends: the promised sparsity is not there.
    """

    def __init__(
        self,
        config: SparsityConfig,
        *,
        method: str = "proximal",
        schedule: Schedule | str = "cubic",
        interval: int = 10,
        **options: Any,
    ) -> None:
        check_config(config)
        check_kinds(SparsityCallback, locals())
        self.config = config
        self.schedule = Schedule(schedule) if isinstance(schedule, str) else schedule
        check_method(method, options)
        self._arguments = {"method": method, "interval": interval, **options}
        self.sparsifier: Sparsifier | None = None
        self.report: SparsityReport | None = None
        self._start = 0.0
        self._on_grid: StraightThrough | None = None

    def __repr__(self) -> str:
        options = "".join(f", {name}={value!r}" for name, value in self._arguments.items())
        return f"SparsityCallback({self.config!r}, schedule={self.schedule!r}{options})"

    def log_through(self, trainer: Any) -> None:
        """Let all of a Trainer's loggers see sparsity and lam.

        Trainer puts its loggers (TensorBoard, W&B, ...) before a user's callbacks, and values are
        handed on in that order; this puts the callback first. Without it they are in the
        progress output and in `log_history` alone.
        """
        callbacks = trainer.callback_handler.callbacks
        if self not in callbacks:
            raise ValueError(
                "this trainer does not have the callback; wanted callbacks=[sparsity]."
            )
        callbacks.remove(self)
        callbacks.insert(0, self)

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: Any = None,
        optimizer: Any = None,
        **kwargs: Any,
    ) -> None:
        """Set up the Sparsifier, for a new run or a resumed one."""
        check_training(SHRINKING, args)
        check_whole_weights(gridded(model, self.config))
        self._on_grid = None
        self._start = time.perf_counter()
        self.sparsifier = Sparsifier(
            optimizer, self.config, state.max_steps, schedule=self.schedule, **self._arguments
        )
        self._check_targets(model)
        if self.sparsifier.steps > state.global_step == 0:
            raise ValueError(
                f"the Trainer's optimizer has already taken {self.sparsifier.steps} steps of a "
                "sparsity schedule. Make a new Trainer for a new run."
            )
        if self.sparsifier.steps != state.global_step:
            raise ValueError(
                f"the optimizer's state has seen {self.sparsifier.steps} steps of the sparsity "
                f"schedule, the Trainer {state.global_step}. Resume from a checkpoint that has "
                "its optimizer.pt (save_only_model=False), or start a new run."
            )

    def _check_targets(self, model: nn.Module) -> None:
        """The optimizer must shrink what the config promises: no more and no less."""
        assert self.sparsifier is not None
        shrunk = {
            id(sparse.parameter): sparse.name
            for sparse in sparse_parameters(self.sparsifier.optimizer)
        }
        layers = Targets.of(model, self.config).layers
        wanted = {id(layer.parameter): layer.weight_name for layer in layers}
        if set(shrunk) != set(wanted):
            extra = [name for key, name in shrunk.items() if key not in wanted]
            missing = [name for key, name in wanted.items() if key not in shrunk]
            raise ValueError(
                f"the optimizer shrinks {len(shrunk)} weights, the callback's config has "
                f"{len(wanted)} targets; they differ in {(extra + missing)[0]}. Give the same "
                "SparsityConfig to trainer_optimizer and SparsityCallback."
            )

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Give the optimizer the weights that it moves, of which the model ran with rounded ones."""
        if self._on_grid is not None:
            self._on_grid.restore_()

    def _round(self, model: nn.Module) -> None:
        """Once the zeros are frozen, put the weights on the grid of the config, if it tells bits."""
        assert self.sparsifier is not None
        if not self.sparsifier.finished:
            return
        if self._on_grid is None:
            self._on_grid = StraightThrough(gridded(model, self.config), fit=True)
        self._on_grid.round_()

    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: Any = None,
        **kwargs: Any,
    ) -> None:
        """Follow one optimizer step."""
        assert self.sparsifier is not None
        finished = self.sparsifier.finished
        self.sparsifier.step()
        if not finished:
            # A model with too few zeros is not a candidate for the best one.
            state.best_metric = state.best_model_checkpoint = state.best_global_step = None
        self._round(model)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Add sparsity and lam to what is logged."""
        if self.sparsifier is None or logs is None or "loss" not in logs:
            return
        values = {"sparsity": self.sparsifier.sparsity, "lam": self.sparsifier.lam}
        logs.update(values)
        state.log_history[-1].update(values)

    def on_train_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: Any = None,
        **kwargs: Any,
    ) -> None:
        """Finish early if training was stopped early; check the promise."""
        assert self.sparsifier is not None
        if not self.sparsifier.finished:
            warnings.warn(
                f"training ended at step {state.global_step} of {state.max_steps}, before the sparsity "
                f"schedule: {self.sparsifier.sparsity:.3f} of the weights were zero, now "
                f"{self.config.sparsity} are, without recovery.",
                UserWarning,
                stacklevel=2,
            )
            self.sparsifier.finish()
        self._on_grid = None  # the best model may have been loaded
        self._round(model)
        self._on_grid = None
        self.sparsifier.check()
        self.sparsifier.record(model, args.seed)
        vars(model)[PRUNED_WITH] = self.config
        if not self.sparsifier.is_sharded:  # else the weights are not all here to be counted
            self.report = self.sparsifier.report(model, time.perf_counter() - self._start)
