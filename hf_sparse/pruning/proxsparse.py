"""ProxSparse: N:M masks of the whole model, learned from its loss.

Source: Liu et al., "ProxSparse: Regularized Learning of Semi-Structured Sparsity Masks for
Pretrained LLMs", https://arxiv.org/abs/2502.00258.

    min  loss(W) + lam sum over groups of R(W) + preserve / 2 sum (W (W - W₀) / W₀)² / rms(W₀)²

on a few hundred samples. `R` is zero exactly where the pattern holds and enters by its proximal
operator after each step (`hf_sparse.optim.prox.nm_shrink_`). The last term is zero where a weight is
what it was, and where it is zero. The N weights of largest learned magnitude of each group make the
mask; it is applied to the original weights.

Departures: the weights of a group compare by `|w_j| ||X_j||` as in Wanda, not by `|w_j|`: the
operator and the mask see weights times the norms of their inputs, from a pass over up to 64 batches
first. `lam` and the learning rate are relative to the root mean square of each layer's weights (the
operator is homogeneous, so one value serves all layers and models). Masters are in fp32.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers.utils.logging import tqdm

from hf_sparse.calibration.input_statistics import Norms
from hf_sparse.calibration.losses import check_labels, loss_of
from hf_sparse.calibration.modes import switched
from hf_sparse.calibration.processes import averaged, steps_per_epoch
from hf_sparse.calibration.recording import Batch
from hf_sparse.calibration.walk import run_model
from hf_sparse.calibration.windows import fingerprint
from hf_sparse.optim.prox import nm_shrink_
from hf_sparse.optim.sharding import local_part, processes_of
from hf_sparse.patterns import NM
from hf_sparse.pruning.prox_local import check_learnable
from hf_sparse.pruning.task import Task
from hf_sparse.selection import Processes
from hf_sparse.structure.layers import TargetLayer, parameters_of
from hf_sparse.upstream.torch import foreach_div_, foreach_mul_

_WARM_UP = 0.1
_SAVE_EVERY = 25
_NORM_BATCHES = 64
_LEAST_NORM = 1e-3
_SAMPLED = 97  # every so many weights tell a resumed run its model


@dataclass(frozen=True)
class Settings:
    """The options of `masks`."""

    lam: float
    relative_lr: float
    preserve: float
    epochs: int
    accumulate: int
    gradient_checkpointing: bool


def masks(
    task: Task,
    *,
    lam: float = 0.01,
    relative_lr: float = 0.01,
    preserve: float = 0.0,
    epochs: int = 1,
    accumulate: int = 2,
    gradient_checkpointing: bool = False,
    state: str | None = None,
) -> Iterator[tuple[TargetLayer, Tensor]]:
    """Learn the masks of all layers.

    Args:
        task: with an N:M pattern, and batches with `labels` unless the model is a causal one.
        lam: strength of the regulariser, relative to the weights' root mean square.
        relative_lr: learning rate of AdamW, relative to it too.
        preserve: weight of the term that keeps weights at their values or at zero.
        epochs: passes over the batches.
        accumulate: batches per step.
        gradient_checkpointing: compute activations twice instead of keeping them.
        state: folder in which the training state is kept every 25 steps; a run that finds one of
            its own there goes on with it.

    Yields:
        A layer, and the boolean mask of the weights to keep.

    Memory: the weights of the layers five times in fp32 (four where the model has fp32), and
    what training needs for the activations of one batch.

    Raises:
        ValueError: no N:M pattern, batches without labels for a model that
            does not predict its next token, a loss that is not finite, or a state of another run.
    """
    pattern = check_learnable("proxsparse", task.config.pattern)
    settings = Settings(lam, relative_lr, preserve, epochs, accumulate, gradient_checkpointing)
    check_labels("proxsparse", "prox_local", task.model, task.batches)
    learner = _Learner(task, pattern, settings)
    try:
        trained = parameters_of(task.layers)
        with switched(task.model, trained=trained, checkpointing=gradient_checkpointing):
            learner.learn(None if state is None else Path(state))
    except BaseException:
        learner.restore()
        raise
    yield from learner.masks()


class _Learner:
    """Trains the weights of the task's layers; `masks` puts the original ones back."""

    def __init__(self, task: Task, pattern: NM, settings: Settings) -> None:
        self._task, self._pattern, self._settings = task, pattern, settings
        self._parameters = parameters_of(task.layers)
        self._stored = [layer.stored(local_part(layer.parameter.data)) for layer in task.layers]
        self._originals = [stored.clone() for stored in self._stored]
        self._masters = [stored.float() for stored in self._stored]  # itself if it is fp32
        self._processes = processes_of(self._parameters)
        self._norms = _relative_norms(task)
        self._scales = [_rms(master, self._processes) for master in self._masters]
        power = pattern.n - 1
        self._strengths = [
            settings.lam / (_rms(self._scored(index), self._processes) or 1.0) ** power
            for index in range(len(self._masters))
        ]
        self._optimizer = torch.optim.AdamW(
            [
                {"params": [master], "lr": settings.relative_lr * scale, "weight_decay": 0.0}
                for master, scale in zip(self._masters, self._scales, strict=True)
            ],
            fused=True,
        )
        count = steps_per_epoch(len(task.batches), task.accelerator)
        self._order = [
            [i % len(task.batches) for i in range(start, min(start + settings.accumulate, count))]
            for start in range(0, count, settings.accumulate)
        ]
        self._total = len(self._order) * settings.epochs
        self._schedule = torch.optim.lr_scheduler.LambdaLR(self._optimizer, self._share)

    def learn(self, state: Path | None) -> None:
        """Take all steps that the state does not have yet."""
        start = 0 if state is None else self._resume(state)
        for number in tqdm(range(start, self._total), desc="Learning masks"):
            self._step([self._task.batches[i] for i in self._order[number % len(self._order)]])
            if state is not None and (number + 1) % _SAVE_EVERY == 0:
                self._save(state, number + 1)

    def masks(self) -> Iterator[tuple[TargetLayer, Tensor]]:
        """The masks, and a note on how far the learned weights follow the pattern by themselves."""
        zeros = torch.zeros(self._pattern.m + 1, dtype=torch.int64)
        for index, layer in enumerate(self._task.layers):
            learned = self._scored(index)
            counts = (self._pattern.groups(learned) == 0).sum(dim=1)
            zeros += torch.bincount(counts, minlength=len(zeros)).cpu()
            mask = self._pattern.keep(learned.abs(), self._pattern.implied_sparsity)
            self._stored[index].copy_(self._originals[index])
            yield layer, mask  # before it goes on, the model may be changed
        self._processes.sum_(zeros)
        shares = ", ".join(f"{n}: {share:.1%}" for n, share in enumerate(zeros / zeros.sum()))
        self._task.notes.add(
            [f"{len(self._masters)} layers"],
            f"had these shares of groups by number of zeros before the final mask: {shares}.",
        )

    def restore(self) -> None:
        """Give the model its original weights back."""
        for stored, original in zip(self._stored, self._originals, strict=True):
            stored.copy_(original)

    def _scored(self, index: int) -> Tensor:
        """The weights of a layer times the norms of their inputs, `(out_features, in_features)`."""
        return self._weight(index) * self._norms[index]

    def _weight(self, index: int) -> Tensor:
        """A master as `(out_features, in_features)`: a view."""
        master = self._masters[index]
        return master.T if self._task.layers[index].transposed else master

    def _step(self, batches: Sequence[Batch]) -> None:
        for parameter in self._parameters:
            parameter.grad = None
        for batch in batches:
            (loss_of(self._task.model, batch) / len(batches)).backward()
        for layer, master, original, scale in zip(
            self._task.layers, self._masters, self._originals, self._scales, strict=True
        ):
            whole = layer.parameter.grad
            if whole is None:  # an expert that no token reached
                master.grad = torch.zeros_like(master)
                continue
            grad = layer.stored(local_part(whole)).float()
            if not isinstance(whole, DTensor):  # FSDP averages by itself
                grad = averaged(grad, self._task.accelerator)
            if self._settings.preserve:
                grad += self._settings.preserve * _preserving_gradient(master, original, scale)
            master.grad = grad
        self._optimizer.step()
        self._schedule.step()
        weights = [self._weight(index) for index in range(len(self._masters))]
        foreach_mul_(weights, self._norms)
        nm_shrink_(weights, self._strengths, self._pattern)
        foreach_div_(weights, self._norms)
        for master, stored in zip(self._masters, self._stored, strict=True):
            if stored is not master:
                stored.copy_(master)

    def _share(self, step: int) -> float:
        return min(1.0, (step + 1) / max(_WARM_UP * self._total, 1))

    @cached_property
    def _run(self) -> str:
        """What a run must share with the one whose state it takes over."""
        names = [layer.name for layer in self._task.layers]
        data = fingerprint(self._task.batches)
        weights = fingerprint(
            [{"weight": original.reshape(-1)[::_SAMPLED]} for original in self._originals]
        )
        return json.dumps([str(self._settings), str(self._pattern), data, names, weights])

    def _save(self, folder: Path, step: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {"step": torch.tensor(step)}
        for index, master in enumerate(self._masters):
            known = self._optimizer.state[master]
            tensors[f"{index}.weight"] = master
            tensors[f"{index}.exp_avg"] = known["exp_avg"]
            tensors[f"{index}.exp_avg_sq"] = known["exp_avg_sq"]
        tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
        file = self._file(folder)
        fresh = file.with_suffix(".new")
        save_file(tensors, fresh, metadata={"run": self._run})
        fresh.replace(file)

    def _resume(self, folder: Path) -> int:
        """Take over the state that is in the folder; returns the steps that it has done."""
        file = self._file(folder)
        if not file.exists():
            return 0
        with safe_open(file, "pt") as opened:
            run = (opened.metadata() or {}).get("run")
        if run != self._run:
            raise ValueError(
                f"{file} is the state of another run: other options, data or weights. Continue with "
                "those it was made with, or name another folder."
            )
        tensors = load_file(file, device=str(self._masters[0].device))
        step = tensors.pop("step")
        for index, (master, stored) in enumerate(zip(self._masters, self._stored, strict=True)):
            master.copy_(tensors[f"{index}.weight"])
            stored.copy_(master)
            self._optimizer.state[master] = {
                "step": step.float(),
                "exp_avg": tensors[f"{index}.exp_avg"],
                "exp_avg_sq": tensors[f"{index}.exp_avg_sq"],
            }
        done = int(step)
        for group, base in zip(self._optimizer.param_groups, self._schedule.base_lrs, strict=True):
            group["lr"] = base * self._share(done)
        self._schedule.last_epoch = done
        return done

    def _file(self, folder: Path) -> Path:
        return folder / f"proxsparse-{self._task.rank}.safetensors"


def _rms(values: Tensor, processes: Processes) -> float:
    """The root mean square of values, of all their shards."""
    squares = values.double().square().sum()
    totals = torch.stack([squares, torch.full_like(squares, values.numel())])
    processes.sum_(totals)
    return math.sqrt(float(totals[0] / totals[1].clamp_min(1)))


def _relative_norms(task: Task) -> list[Tensor]:
    """The norm of each input feature of each layer over the first batches; 1 in the quadratic mean.

    The whole model runs, so that this works on shards too.
    """
    found: dict[str, Tensor] = {}
    norms = Norms(task.accelerator)
    with norms.collecting(task.layers):
        run_model(task.model, task.batches[:_NORM_BATCHES], norms)
    for seen in norms.groups():
        mean = seen.statistic.square().mean().sqrt()
        relative = (seen.statistic / mean).clamp_min(_LEAST_NORM) if mean > 0 else None
        for layer in seen.layers:
            known = torch.ones_like(seen.statistic) if relative is None else relative
            found[layer.name] = known.float()
    return [found[layer.name] for layer in task.layers]


def _preserving_gradient(weight: Tensor, original: Tensor, scale: float) -> Tensor:
    """The gradient of `1/2 (w (w - w0) / w0)² / scale²`, with w0 kept away from zero."""
    given = original.float()
    given = torch.where(given < 0, -1.0, 1.0) * given.abs().clamp_min(1e-3 * scale)
    ratio = weight / given
    return ratio * (weight - given) * (2 * ratio - 1) / scale**2
