"""Recovery in one call: a pruned language model is trained on text, and its zeros stay.

A model that lost blocks, heads or neurons has no zeros: it is trained as it is. The loop stands in
`recovery.py`; Trainer does the same with `KeepZeros`, or on what `get_peft_model` returns.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from hf_sparse.adapters.loading import import_peft
from hf_sparse.adapters.on_layers import adaptable, left_alone
from hf_sparse.arguments import check_gradients, check_has_values, check_kinds, check_model
from hf_sparse.calibration.losses import (
    check_labels,
    check_predicts,
    with_labels,
)
from hf_sparse.calibration.windows import checked_batches, fingerprint
from hf_sparse.counts import SparsityReport, measure_sparsity
from hf_sparse.distillation import Distillation
from hf_sparse.optim.zeros import is_sparse, sparse_layers, zeros_hash
from hf_sparse.provenance.record import (
    forget_teaching_,
    provenance_of,
    record_,
    record_training_,
)
from hf_sparse.provenance.values import Calibration, Step, pairs
from hf_sparse.recovery import RECOVERIES, Recovery
from hf_sparse.structure.layers import (
    TargetLayer,
    num_parameters,
    parameters_of,
    promised_config,
)
from hf_sparse.suggestions import check_name
from hf_sparse.upstream.peft_by_name import has_adapters, is_peft_model

# Steps of a model's history that leave it without zeros, and with less to know.
_SMALLER = ("shrink", "drop_blocks", "slim")


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
    """Train a sparse or smaller causal language model on text, in place; zeros stay, no other comes.

    Layers that the model's config does not target count as sparse from 0.5 % zeros on; fewer are
    taken for chance and not kept.

    On CPUs where bfloat16 is faster the products of a float32 model are taken in it.

    Args:
        model: the sparse model, or one that lost blocks, heads or neurons; without adapters.
        batches: as from `hf_sparse.calibration_batches`; their `labels`, if they have any, or else
            the tokens themselves.
        method: a key of `RECOVERIES`: `"finetune"`, `"lora"` or `"shira"`.
        teacher: the dense model, of any number of blocks; its logits are learned from too.
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
        ValueError: no zeros to keep in a model that was not made smaller, an unknown method, values
            outside what is allowed, fine-tuning of a model that is not float32, or the loss is no
            longer finite: without adapters the model is damaged then.
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
    _check_model(model, layers, method, teacher)
    zeros = zeros_hash(map(torch.Tensor.detach, parameters_of(layers)))
    start = time.perf_counter()
    distillation = None if teacher is None else Distillation(teacher, logits=logits)
    torch.manual_seed(seed)
    recovery = Recovery.of(method, layers, lr, r, epochs=epochs, accumulate=accumulate, seed=seed)
    with recovery.prepared(model, layers) as trained, _taught(model, distillation):
        losses = recovery.run(trained, inputs, freeze=recovery.r is None and bool(layers))
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


def _check_model(
    model: nn.Module, layers: Sequence[TargetLayer], method: str, teacher: nn.Module | None
) -> None:
    """Raise a ValueError unless there is something to recover, and a type that can be trained."""
    if not any(is_sparse(layer.parameter.detach()) for layer in layers):
        if not _is_smaller(model, teacher):
            raise ValueError(
                f"{type(model).__name__} has no zeros to keep, and is not known to have been made "
                "smaller. Prune it first: hf_sparse.prune_. Of a smaller model give the whole one as "
                "teacher."
            )
        if RECOVERIES[method].r is not None:
            raise ValueError(
                f"{type(model).__name__} has no zeros, which method '{method}' is for: what was made "
                "smaller needs all its weights to recover. Take method='finetune'."
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


def _is_smaller(model: nn.Module, teacher: nn.Module | None) -> bool:
    """Whether blocks or parts of them were removed, as its provenance or its teacher's size tells."""
    if any(step.method in _SMALLER for step in provenance_of(model).steps):
        return True
    return teacher is not None and num_parameters(model) < num_parameters(teacher)


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
