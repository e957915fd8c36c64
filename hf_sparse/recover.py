"""Recovery in one call: a pruned language model is trained on text, and its zeros stay.

A plain loop for causal language models: AdamW without decay, a warm-up and a cosine, gradients
clipped to norm 1. Trainer does the same with `KeepZeros`, or on what `get_peft_model` returns.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers.utils.logging import tqdm

from hf_sparse.adapters.loading import get_peft_model, import_peft
from hf_sparse.adapters.merging import merge_
from hf_sparse.adapters.on_layers import adaptable, adapter_on, left_alone, shira_rank
from hf_sparse.arguments import check_gradients, check_has_values, check_kinds, check_model
from hf_sparse.calibration.losses import (
    check_labels,
    check_predicts,
    fast_autocast,
    with_labels,
)
from hf_sparse.calibration.modes import switched
from hf_sparse.calibration.windows import checked_batches, fingerprint
from hf_sparse.distillation import Distillation
from hf_sparse.optim.keep_zeros import FrozenMask
from hf_sparse.optim.zeros import is_sparse, sparse_layers, zeros_hash
from hf_sparse.provenance.record import forget_teaching_, record_, record_training_
from hf_sparse.provenance.values import Calibration, Step, pairs
from hf_sparse.report import SparsityReport, measure_sparsity
from hf_sparse.structure.layers import TargetLayer, parameters_of, promised_config
from hf_sparse.suggestions import check_name
from hf_sparse.upstream.peft_by_name import has_adapters, is_peft_model

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
        self, trained: nn.Module, batches: Sequence[dict[str, Any]], *, freeze: bool
    ) -> list[float]:
        """Train what has gradients in what `prepared` gave.

        Args:
            trained: the model, or the model with an adapter.
            batches: with labels.
            freeze: whether a mask keeps the zeros; an adapter keeps them by itself.

        Returns:
            The mean loss of each step.
        """
        parameters = [parameter for parameter in trained.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(parameters, lr=self.lr, weight_decay=0.0)
        frozen = FrozenMask(optimizer, trained) if freeze else None
        groups = self._order(len(batches))
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: _share(step, len(groups))
        )
        trained.train()
        losses: list[float] = []
        for group in tqdm(groups, desc="Recovering"):
            total = 0.0
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
            nn.utils.clip_grad_norm_(parameters, _CLIP)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad(set_to_none=True)
            losses.append(total)
        if frozen is not None:
            frozen.check()
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


def recover_(
    model: Any,
    batches: Iterable[Mapping[str, Tensor] | Tensor],
    method: str = "finetune",
    *,
    teacher: nn.Module | None = None,
    epochs: int = 1,
    accumulate: int = 2,
    lr: float | None = None,
    r: int | None = None,
    logits: float = 0.5,
    seed: int = 0,
) -> SparsityReport:
    """Train a sparse causal language model on text, in place; every zero stays, and no other comes.

    Layers that the model's config does not target count as sparse from 0.5 % zeros on; fewer are
    taken for chance and not kept.

    On CPUs where bfloat16 is faster the products of a float32 model are taken in it.

    Args:
        model: the sparse model, without adapters.
        batches: as from `hf_sparse.calibration_batches`; their `labels`, if they have any, or else
            the tokens themselves.
        method: a key of `RECOVERIES`: `"finetune"`, `"lora"` or `"shira"`.
        teacher: the dense model; its logits are learned from too.
        epochs: passes over the batches.
        accumulate: batches in an optimizer step.
        lr: peak learning rate; None: the method's.
        r: rank of LoRA, or ShiRA's measure; None: the method's, and for ShiRA no more than every
            layer has kept weights for.
        logits: the teacher's share of the loss.
        seed: of the order of the batches and the start of adapters.

    Returns:
        Exact counts, with method, options and time.

    Memory: `"finetune"`: gradients and two moments of each weight. Adapters: only of their own
    weights; the base model may be bfloat16.

    Raises:
        ValueError: no zeros to keep, an unknown method, values outside what is allowed, fine-tuning
            of a model that is not float32, or the loss is no longer finite: without
            adapters the model is damaged then.
        ImportError: adapters without PEFT installed.
    """
    check_name(method, RECOVERIES, "method", "methods")
    check_model(model, "recover_")
    check_kinds(recover_, locals())
    check_has_values(model, "recover_")
    if is_peft_model(model) or has_adapters(model):
        raise ValueError("the model has adapters already. Merge them: hf_sparse.merge_adapters_.")
    if RECOVERIES[method].r is not None:
        import_peft()
    _check_settings(method, epochs, accumulate, lr, r)
    if not 0 <= logits <= 1:
        raise ValueError(f"logits={logits!r}; wanted the teacher's share, from 0 to 1.")
    if not 0 <= seed < 2**63:
        raise ValueError(f"seed is {seed!r}; wanted a whole number from 0 on, below 2**63.")
    check_gradients(model, "recover_")
    given = checked_batches(batches, model, method)
    inputs = _labelled(given, model, method)
    layers = sparse_layers(model)
    _check_model(model, layers, method)
    zeros = zeros_hash(map(torch.Tensor.detach, parameters_of(layers)))
    start = time.perf_counter()
    distillation = None if teacher is None else Distillation(teacher, logits=logits)
    torch.manual_seed(seed)
    recovery = Recovery.of(method, layers, lr, r, epochs=epochs, accumulate=accumulate, seed=seed)
    with recovery.prepared(model, layers) as trained, _taught(model, distillation):
        losses = recovery.run(trained, inputs, freeze=recovery.r is None)
    if zeros_hash(map(torch.Tensor.detach, parameters_of(sparse_layers(model)))) != zeros:
        raise ValueError("the zeros of the model have changed while it was trained. Load it again.")
    report = replace(
        measure_sparsity(model, promised_config(model)),
        method=f"recovery by {method}",
        options={**recovery.options, "distilled": teacher is not None},
        seconds=time.perf_counter() - start,
        notes=(
            f"loss {losses[0]:.3f} at the start, {losses[-1]:.3f} at the end",
            *(left_alone(layers) if recovery.r is not None else ()),
        ),
    )
    data = Calibration.of(given, fingerprint(given))
    step = Step.of(f"recovery by {method}", recovery.options, calibration=data, seed=seed)
    if distillation is None:
        record_training_(model, step)
    else:
        record_(model, replace(step, distillation=pairs(distillation.settings)))
    return report


def _check_settings(
    method: str, epochs: int, accumulate: int, lr: float | None, r: int | None
) -> None:
    for name, value in (("epochs", epochs), ("accumulate", accumulate), ("r", r)):
        if value is not None and (type(value) is not int or value < 1):
            raise ValueError(f"{name} is {value!r}; wanted a whole number >= 1.")
    if r is not None and RECOVERIES[method].r is None:
        raise ValueError(f"method '{method}' trains all weights; r is for 'lora' and 'shira'.")
    if lr is not None and not 0 < lr < math.inf:
        raise ValueError(f"lr is {lr!r}; wanted a number > 0.")


def _labelled(
    batches: Sequence[dict[str, Any]], model: nn.Module, method: str
) -> list[dict[str, Any]]:
    """The batches with labels, each of which has a token to predict."""
    check_labels(method, None, model, batches)
    labelled = [with_labels(batch) for batch in batches]
    for batch in labelled:
        check_predicts(batch)
    return labelled


def _check_model(model: nn.Module, layers: Sequence[TargetLayer], method: str) -> None:
    """Raise a ValueError unless the model has zeros to keep, and a type that can be trained."""
    if not any(is_sparse(layer.parameter.detach()) for layer in layers):
        raise ValueError(
            f"{type(model).__name__} has no zeros to keep. Prune it first: hf_sparse.prune_."
        )
    if RECOVERIES[method].r is not None and not adaptable(layers):
        raise ValueError(
            f"the sparse weights of {type(model).__name__} are experts in 3-D parameters, which no "
            "adapter that keeps zeros reaches. Take method='finetune'."
        )
    if method == "finetune" and any(p.dtype != torch.float32 for p in model.parameters()):
        raise ValueError(
            "fine-tuning all weights of a model in half precision loses small updates. Load it with "
            "dtype=torch.float32, or recover by 'lora', whose base model may be bfloat16."
        )


@contextmanager
def _taught(model: nn.Module, distillation: Distillation | None) -> Iterator[None]:
    """Let a model learn from a teacher for a while, if there is one."""
    if distillation is None:
        yield
        return
    try:
        distillation.attach(model)
        forget_teaching_(model)  # the step of the recovery tells of it
        yield
    finally:
        distillation.remove()


def _share(step: int, steps: int) -> float:
    """Share of the peak rate in a step: a warm-up, then a cosine down to nothing."""
    warm = max(1, round(_WARM_UP * steps))
    if step < warm:
        return (step + 1) / warm
    return 0.5 * (1 + math.cos(math.pi * (step - warm) / max(steps - warm, 1)))
