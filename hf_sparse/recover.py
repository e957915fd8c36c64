"""Recovery in one call: a pruned language model is trained on text, and its zeros stay.

A model that lost blocks, heads or neurons has no zeros: it is trained as it is. The loop stands in
`recovery_methods.py`; Trainer does the same with `KeepZeros`, or on what `get_peft_model` returns.
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
from hf_sparse.configuration_sparse import SparsityConfig
from hf_sparse.counts import SparsityReport, measure_sparsity
from hf_sparse.distillation import Distillation
from hf_sparse.optim.zeros import is_sparse, sparse_layers
from hf_sparse.provenance.record import (
    forget_teaching_,
    provenance_of,
    record_,
    record_training_,
)
from hf_sparse.provenance.values import Calibration, Step, pairs
from hf_sparse.pruning.quantize import round_
from hf_sparse.recovery_methods import RECOVERIES, Recovery
from hf_sparse.structure.grids import Gridded, check_grid, gridded
from hf_sparse.structure.layers import (
    TargetLayer,
    num_parameters,
    parameters_of,
    promised_config,
)
from hf_sparse.structure.targets import Targets
from hf_sparse.suggestions import check_name
from hf_sparse.upstream.peft_by_name import has_adapters, is_peft_model

# Steps of a model's history that leave it without zeros, and with less to know.
_SMALLER = ("shrink", "drop_blocks", "drop_experts", "drop_hidden", "slim")


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
    """Train a sparse or smaller causal language model on text, in place.

    Its zeros stay, and no others appear.

    Layers that the model's config does not target count as sparse from 0.5 % zeros on; fewer are
    taken for chance and not kept.

    A quantised model stays on its grid: `"finetune"` trains rounded weights (straight-through), with
    the scales that they have; adapters are merged, and the sum is rounded again with the same batches,
    as `quantize_` does it. Rounding may add zeros.

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
    _check_settings(method, epochs, accumulate, lr, r, seed)
    if not 0 <= logits <= 1:
        raise ValueError(f"logits={logits!r}; wanted the teacher's share, from 0 to 1.")
    check_gradients(model, "recover_")
    given = checked_batches(batches, model, method)
    inputs = _labelled(given, model, method)
    layers = _trained_layers(model)
    _check_model(model, layers, method, teacher)
    promised = promised_config(model)
    grids = _grids(model, promised)
    zeros = _zeros_to_keep(layers, promised)
    start = time.perf_counter()
    distillation = None if teacher is None else Distillation(teacher, logits=logits)
    torch.manual_seed(seed)
    recovery = Recovery.of(method, layers, lr, r, epochs=epochs, accumulate=accumulate, seed=seed)
    with recovery.prepared(model, layers) as trained, _taught(model, distillation):
        whole = recovery.r is None
        losses = recovery.run(
            trained, inputs, freeze=whole and bool(zeros), grids=grids if whole else ()
        )
    if grids and promised is not None and not whole:
        round_(model, Targets.of(model, promised), given, "gptq")
    _check_zeros(zeros, may_grow=bool(grids))
    report = replace(
        measure_sparsity(model, promised_config(model)),
        method=f"recovery by {method}",
        options={**recovery.options, "distilled": teacher is not None},
        seconds=time.perf_counter() - start,
        notes=(
            f"loss {losses[0]:.3f} at the start, {losses[-1]:.3f} at the end",
            *(left_alone(layers) if recovery.r is not None else ()),
            *(("the merged weights were rounded again",) if grids and not whole else ()),
        ),
    )
    data = Calibration.of(given, fingerprint(given))
    step = Step.of(f"recovery by {method}", recovery.options, calibration=data, seed=seed)
    _record(model, step, distillation)
    return report


def _record(model: nn.Module, step: Step, distillation: Distillation | None) -> None:
    """Let the model remember a recovery, and the teacher that it had."""
    if distillation is None:
        record_training_(model, step)
    else:
        record_(model, replace(step, distillation=pairs(distillation.settings)))


def _trained_layers(model: nn.Module) -> list[TargetLayer]:
    """The layers that are sparse; of a quantised model without promised zeros all that are."""
    promised = promised_config(model)
    if promised is not None and promised.bits is not None and not promised.sparsity:
        return list(Targets.of(model, promised).layers)
    return sparse_layers(model)


def _grids(model: nn.Module, promised: SparsityConfig | None) -> list[Gridded]:
    """The weights that lie on grids, if the model was quantised.

    Raises:
        OffGridError: they did, and no longer do.
    """
    if promised is None or not (promised.bits or promised.embedding_bits):
        return []
    check_grid(model, promised)
    return gridded(model, promised)


def _zeros_to_keep(
    layers: Sequence[TargetLayer], promised: SparsityConfig | None
) -> list[tuple[nn.Parameter, Tensor]]:
    """The parameters of layers, and where they are zero.

    Of a quantised model without promised zeros none: rounding alone made them, and they may go again.
    """
    if promised is not None and promised.bits is not None and not promised.sparsity:
        return []
    return [(parameter, parameter.detach() == 0) for parameter in parameters_of(layers)]


def _check_zeros(zeros: Sequence[tuple[nn.Parameter, Tensor]], *, may_grow: bool) -> None:
    """Raise a ValueError if weights that were zero are not, or, if not `may_grow`, others are."""
    for parameter, before in zeros:
        now = parameter.detach() == 0
        if not bool(now[before].all()) or (not may_grow and not torch.equal(now, before)):
            raise ValueError(
                "the zeros of the model have changed while it was trained. Load it again."
            )


def _check_settings(
    method: str, epochs: int, accumulate: int, lr: float | None, r: int | None, seed: int
) -> None:
    for name, value in (("epochs", epochs), ("accumulate", accumulate), ("r", r)):
        if value is not None and (type(value) is not int or value < 1):
            raise ValueError(f"{name} is {value!r}; wanted a whole number >= 1.")
    if r is not None and RECOVERIES[method].r is None:
        raise ValueError(f"method '{method}' trains all weights; r is for 'lora' and 'shira'.")
    if lr is not None and not 0 < lr < math.inf:
        raise ValueError(f"lr is {lr!r}; wanted a number > 0.")
    if not 0 <= seed < 2**63:
        raise ValueError(f"seed is {seed!r}; wanted a whole number from 0 on, below 2**63.")


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
    promised = promised_config(model)
    quantised = promised is not None and promised.bits is not None
    if not quantised and not any(is_sparse(layer.parameter.detach()) for layer in layers):
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
