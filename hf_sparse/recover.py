"""Recovery in one call: a pruned language model is trained on text, and its zeros stay.

A model that lost blocks, heads or neurons has no zeros: it is trained as it is. The loop stands in the
room `recovery`; Trainer does the same with `KeepZeros`, or on what `get_peft_model` returns.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from hf_sparse.adapters.on_layers import left_alone
from hf_sparse.arguments import check_gradients, check_has_values, check_kinds, check_model
from hf_sparse.calibration.attending import fast_attention
from hf_sparse.calibration.windows import checked_batches, fingerprint
from hf_sparse.configuration_sparse import SparsityConfig
from hf_sparse.counts import SparsityReport, measure_sparsity
from hf_sparse.distillation import Distillation
from hf_sparse.optim.zeros import sparse_layers
from hf_sparse.provenance.record import (
    forget_teaching_,
    record_,
    record_training_,
)
from hf_sparse.provenance.values import Calibration, Step, pairs
from hf_sparse.pruning.quantize import round_
from hf_sparse.recovery.checks import (
    check_rate,
    check_recoverable,
    check_settings,
    labelled,
    split_held_out,
)
from hf_sparse.recovery.methods import RECOVERIES, Recovery
from hf_sparse.recovery.rates import SEARCH, Training
from hf_sparse.structure.grids import Gridded, check_grid, gridded
from hf_sparse.structure.layers import (
    TargetLayer,
    parameters_of,
    promised_config,
)
from hf_sparse.structure.targets import Targets
from hf_sparse.suggestions import check_name
from hf_sparse.upstream.peft_by_name import has_adapters, is_peft_model


def recover_(
    model: Any,
    batches: Iterable[Mapping[str, Tensor] | Tensor],
    method: str = "finetune",
    *,
    teacher: nn.Module | None = None,
    epochs: int = 1,
    accumulate: int = 2,
    lr: float | str | None = None,
    r: int | None = None,
    logits: float = 0.5,
    hidden: float = 0.0,
    temperature: float = 2.0,
    held_out: int = 0,
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
        lr: peak learning rate; None: the method's; `"search"`: of a third of that, that and three times
            that, the one after whose short run the loss on the held-out batches is least.
        r: rank of LoRA, or ShiRA's measure; None: the method's, and for ShiRA no more than every
            layer has kept weights for.
        logits: the teacher's share of the loss.
        hidden: weight of the teacher's hidden states, relative as in `Distillation`; its depth and
            width must be the model's.
        temperature: of the teacher's logits, `> 0`.
        held_out: batches at the end of the data that are not trained on. Their loss is measured four
            times; the weights with the least are kept, those from before too, and training stops when
            it has not fallen twice in a row.
        seed: of the order of the batches and the start of adapters.

    Returns:
        Exact counts, with method, options and time.

    Memory: `"finetune"`: gradients and two moments of each weight. Adapters: only of their own
    weights; the base model may be bfloat16. With `held_out` what is trained once more.

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
    check_settings(method, epochs, accumulate, r, seed)
    check_rate(lr, held_out)
    check_gradients(model, "recover_")
    given = checked_batches(batches, model, method)
    inputs, watched = split_held_out(labelled(given, model, method), held_out)
    layers = _trained_layers(model)
    check_recoverable(model, layers, method, teacher)
    promised = promised_config(model)
    grids = _grids(model, promised)
    zeros = _zeros_to_keep(layers, promised)
    start = time.perf_counter()
    distillation = _distillation(teacher, logits, hidden, temperature)
    torch.manual_seed(seed)
    recovery = Recovery.of(method, layers, lr, r, epochs=epochs, accumulate=accumulate, seed=seed)
    whole = recovery.r is None
    with (
        fast_attention(model, inputs),
        recovery.prepared(model, layers) as trained,
        _taught(model, distillation, inputs),
    ):
        kept = whole and bool(zeros), grids if whole else ()
        recovery, notes = Training(inputs, watched, *kept, lr == SEARCH).of(recovery, trained)
    if grids and promised is not None and not whole:
        round_(model, Targets.of(model, promised), given, "gptq")
    _check_zeros(zeros, may_grow=bool(grids))
    report = replace(
        measure_sparsity(model, promised_config(model)),
        method=f"recovery by {method}",
        options={**recovery.options, "distilled": teacher is not None},
        seconds=time.perf_counter() - start,
        notes=(
            *notes,
            *(() if whole else left_alone(layers)),
            *(("the merged weights were rounded again",) if grids and not whole else ()),
        ),
    )
    _record(model, recovery, given, distillation)
    return report


def _distillation(
    teacher: nn.Module | None, logits: float, hidden: float, temperature: float
) -> Distillation | None:
    """What is learned from a teacher, if there is one.

    Raises:
        ValueError: values outside what is allowed.
    """
    if not 0 <= logits <= 1:
        raise ValueError(f"logits is {logits!r}; wanted the teacher's share, from 0 to 1.")
    if teacher is None:
        return None
    return Distillation(
        teacher, logits=logits, hidden=hidden, temperature=temperature, relative=True
    )


def _record(
    model: nn.Module,
    recovery: Recovery,
    batches: Sequence[Mapping[str, Any]],
    distillation: Distillation | None,
) -> None:
    """Let the model remember a recovery, and the teacher that it had."""
    data = Calibration.of(batches, fingerprint(batches))
    step = Step.of(
        f"recovery by {recovery.method}", recovery.options, calibration=data, seed=recovery.seed
    )
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


@contextmanager
def _taught(
    model: nn.Module, distillation: Distillation | None, batches: Sequence[dict[str, Any]]
) -> Iterator[None]:
    """Let a model learn from a teacher for a while, if there is one."""
    if distillation is None:
        yield
        return
    try:
        distillation.attach(model)
        forget_teaching_(model)  # the step of the recovery tells of it
        with fast_attention(distillation.teacher, batches):
            yield
    finally:
        distillation.remove()
