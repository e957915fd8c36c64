"""Sparsifier: brings a model in training to an exact sparsity, then freezes its zeros."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import nn
from torch.optim import Optimizer

from hf_sparse.arguments import check_finite, check_kinds, check_optimizer
from hf_sparse.configuration_sparse import SparsityConfig, check_config
from hf_sparse.counts import SparsityReport, measure_sparsity
from hf_sparse.optim.methods import TRAINING_METHODS, check_method
from hf_sparse.optim.notes import shrinking
from hf_sparse.optim.parameters import sparse_groups, sparse_parameters, take_over
from hf_sparse.optim.projection import count_zero_units, measured_sparsity, pattern_of
from hf_sparse.optim.schedules import Schedule
from hf_sparse.optim.settings import check_settings
from hf_sparse.optim.sharding import processes_of
from hf_sparse.optim.shrinkage import attach, freeze_groups
from hf_sparse.provenance.optimizers import learning_rate
from hf_sparse.provenance.record import record_optimizer_
from hf_sparse.provenance.values import Step

# The least number of adjustments over a schedule.
_ADJUSTMENTS = 10


class Sparsifier:
    """Drives the sparse groups of an optimizer to the sparsity of a config.

    Call `step()` after each optimizer step, as for a learning rate scheduler:

    >>> optimizer = SparseAdamW(sparse_param_groups(model, config), lr=5e-5)   # doctest: +SKIP
    >>> sparsifier = Sparsifier(optimizer, config, total_steps=1000)           # doctest: +SKIP
    >>> loss.backward(); optimizer.step(); sparsifier.step()                   # doctest: +SKIP

    Three phases follow each other: nothing until `schedule.begin`; rising sparsity until
    `schedule.end`, where the wanted number of zeros is made exact; recovery with frozen zeros until
    `total_steps`.

    All units of all targets compete: by one `lam`, and by one threshold at the end.

    Args:
        optimizer: with sparse groups (`sparse_param_groups`); wrapped by Accelerate is fine.
        config: the wanted pattern and sparsity.
        total_steps: optimizer steps of the whole run.
        method: a key of `hf_sparse.optim.methods.TRAINING_METHODS`: `"proximal"`, `"admm"`, or the
            baselines `"magnitude"` and `"movement"`; `lam` and `penalty` have a meaning for the first.
        schedule: a `Schedule`, or its shape.
        interval: steps between two adjustments; fewer where the schedule has not ten of them.
        **options: the method's own: of `"movement"` `score_lr=0.01`, `threshold=0.1` and `gain=2.0`;
            of `"admm"` `rho=100.0`.

    What it has to remember is kept in the optimizer's param groups, and so in its `state_dict`. A loop
    that stops before `total_steps` calls `finish()`.

    Raises:
        ValueError: an unknown method or schedule, no sparse groups, or groups of another pattern.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        config: SparsityConfig,
        total_steps: int,
        *,
        method: str = "proximal",
        schedule: Schedule | str = "cubic",
        interval: int = 10,
        **options: Any,
    ) -> None:
        check_optimizer(optimizer, "Sparsifier")
        check_config(config)
        check_method(method, options)
        check_kinds(Sparsifier, locals())
        for name, value in (("total_steps", total_steps), ("interval", interval)):
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} is {value!r}; wanted a whole number >= 1.")
        self.optimizer = getattr(optimizer, "optimizer", optimizer)
        self.config = config
        self.total_steps = total_steps
        self.schedule = schedule if isinstance(schedule, Schedule) else Schedule(schedule)
        steps = self.schedule.last_step(total_steps) - self.schedule.begin * total_steps
        self.interval = max(1, min(interval, int(steps / _ADJUSTMENTS)))
        found = pattern_of(self.optimizer)
        check_settings(self.optimizer)
        for sparse in sparse_parameters(self.optimizer):
            if sparse.parameter.ndim < 2:
                raise ValueError(
                    f"the optimizer shrinks {sparse.name}, of shape {tuple(sparse.parameter.shape)}: a "
                    "norm or a bias. Sort the parameters: "
                    "SparseAdamW(hf_sparse.sparse_param_groups(model, config))."
                )
        completed = not config.pattern.is_sized and isinstance(found, type(config.pattern))
        if found != config.pattern and not completed:
            raise ValueError(
                f"the optimizer's groups have pattern '{found}', the config has "
                f"'{config.pattern}'. Make both from one SparsityConfig."
            )
        attach(self.optimizer)
        take_over(self.optimizer)
        # Where every group has its zeros, the share is the one of the groups that have them.
        self._each = config.pattern.implied_sparsity is not None
        self._share = 1.0 if self._each else config.sparsity
        self._method_name = method
        self._seed: int | None = None
        self._start_or_resume()
        self._method = TRAINING_METHODS[method](self.optimizer, **options)

    def __repr__(self) -> str:
        [state, *_] = [group.get("sparsifier", {}) for group in sparse_groups(self.optimizer)]
        return (
            f"<Sparsifier of {type(self.optimizer).__name__}: {self.config!r}, {self._method_name}, "
            f"{self.schedule!r}, step {state.get('steps', 0)} of {self.total_steps}"
            f"{', finished' if state.get('finished') else ''}>"
        )

    def _start_or_resume(self) -> dict[str, Any]:
        """The state in the optimizer, made with the zeros of now if the optimizer has none.

        Optimizers get the state of another run when they load it, at any time: so every reader
        comes through here.

        Returns:
            Steps taken, the share of zeros at the beginning, whether the target is reached.

        Raises:
            ValueError: the optimizer is on its way to another target.
        """
        group = sparse_groups(self.optimizer)[0]
        if "sparsifier" not in group:
            initial = 0.0 if self._each else self.sparsity
            group["sparsifier"] = {
                "method": self._method_name,
                "share": self._share,
                "steps": 0,
                "initial": min(initial, self._share),
                "finished": False,
            }
        state: dict[str, Any] = group["sparsifier"]
        if (state["method"], state["share"]) != (self._method_name, self._share):
            raise ValueError(
                f"the optimizer is on its way to a share of {state['share']} by method "
                f"'{state['method']}', after {state['steps']} steps; wanted is {self._share} by "
                f"'{self._method_name}'. Resume with the settings of the first run, or make a new "
                "optimizer."
            )
        return state

    def _update(self, **changes: Any) -> None:
        """Change the state: by a new dict, since `state_dict` hands out this one."""
        sparse_groups(self.optimizer)[0]["sparsifier"] = {**self._start_or_resume(), **changes}

    @property
    def steps(self) -> int:
        """Steps taken."""
        return int(self._start_or_resume()["steps"])

    @property
    def finished(self) -> bool:
        """Whether the wanted sparsity is reached and its zeros are frozen."""
        return bool(self._start_or_resume()["finished"])

    @property
    def sparsity(self) -> float:
        """Fraction of zeros in the sparse groups now, counted."""
        return measured_sparsity(self.optimizer)

    @property
    def is_sharded(self) -> bool:
        """Whether the weights are spread over several processes."""
        members = sparse_parameters(self.optimizer)
        return processes_of(sparse.parameter for sparse in members).size > 1

    @property
    def lam(self) -> float:
        """The strength of the penalty now."""
        return float(sparse_groups(self.optimizer)[0]["lam"] or 0.0)

    def step(self) -> None:
        """Follow one more step of the optimizer.

        Raises:
            ValueError: the weights are no longer finite.
        """
        self._update(steps=self.steps + 1)
        self._approach()
        self.record()

    def _approach(self) -> None:
        if self.finished:
            return
        left = self.schedule.last_step(self.total_steps) - self.steps
        if left <= 0:
            self.finish()
        elif left == 1:
            self._method.release()
        elif self.steps % self.interval == 0 and self.steps >= self._first_step:
            due = self.schedule.progress(self.steps + self.interval, self.total_steps)
            start = self._start_or_resume()["initial"]
            self._method.approach(start + (self._share - start) * due, self.interval)

    @property
    def _first_step(self) -> float:
        return self.schedule.begin * self.total_steps

    def finish(self) -> None:
        """Make the sparsity exact now, and freeze the zeros."""
        self._method.finish(self._share)
        freeze_groups(self.optimizer)
        self._update(finished=True)

    def record(self, model: nn.Module | None = None, seed: int | None = None) -> None:
        """Let the model remember how it is trained, for its card; every `step` does so, too.

        Args:
            model: the model that is trained. None: the one that `sparse_param_groups` got, if any.
            seed: of the run.
        """
        self._seed = self._seed if seed is None else seed
        step = Step.of(self._card_method, self._options, self.config, seed=self._seed)
        record_optimizer_(self.optimizer, step, model)

    @property
    def _card_method(self) -> str:
        """The method as the report and the model card name it."""
        proximal = self._method_name == "proximal"
        return type(self.optimizer).__name__ if proximal else self._method_name

    @property
    def _options(self) -> dict[str, Any]:
        """What the report and the model card tell beside the method."""
        shape, begin, end = self.schedule.shape, self.schedule.begin, self.schedule.end
        return {
            **(shrinking(self.optimizer) if self._method_name == "proximal" else {}),
            "schedule": f"{shape} {begin} to {end}",
            "steps": self.steps,
            "lr": learning_rate(sparse_groups(self.optimizer)[0]),
        }

    def report(self, model: nn.Module, seconds: float | None = None) -> SparsityReport:
        """Exact counts and how they came about; the model remembers the latter, for its card.

        Args:
            model: the model that was trained; not under FSDP2, where no process has all its weights.
            seconds: time that the training took.
        """
        self.record(model)
        return replace(
            measure_sparsity(model, self.config),
            method=self._card_method,
            options=self._options,
            seconds=seconds,
        )

    def check(self) -> None:
        """Raise a ValueError if the zeros that the config promises are not there."""
        for sparse in sparse_parameters(self.optimizer):
            check_finite(sparse.name, sparse.weight)
        zero, units = count_zero_units(self.optimizer)
        if zero < round(self._share * units):
            raise ValueError(
                f"{zero:,} of {units:,} units of pattern '{self.config.pattern}' are zero in the "
                f"trained weights; promised was a share of {self._share}. Something wrote into the "
                "weights after the mask was frozen: another callback, or an older checkpoint."
            )
