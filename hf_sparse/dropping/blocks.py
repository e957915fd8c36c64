"""`hf_sparse.drop_blocks_`: whole blocks are removed, those that the model misses least.

| by           | which block goes                                                                  |
|--------------|-----------------------------------------------------------------------------------|
| `loss`       | the one whose removal raises the loss on calibration data least, one after another |
| `similarity` | those that change their input least: 1 - mean cosine of a token's input and output |

Sources: Men et al., "ShortGPT: Layers in Large Language Models are More Redundant Than You Expect",
https://arxiv.org/abs/2403.03853, whose block influence is `similarity`: measured once, on the whole
model. Kim et al., "Shortened LLaMA", https://arxiv.org/abs/2402.02834, remove by the loss, measured
once; here it is measured anew after each block: of two that do the same only one can go.
Departures: padding does not count; the blocks of encoder and decoder compete; blocks without which the
family's config could not tell the model are not chosen.

Only a block's attention cannot go: no config of transformers tells a block without it. Where attention
and feed-forward network are blocks of their own (Nemotron-H), each can.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils.logging import tqdm

from hf_sparse.arguments import check_kinds, check_model
from hf_sparse.calibration.block_scores import Batches, Influence, skipping
from hf_sparse.calibration.calling import run_on
from hf_sparse.calibration.losses import check_labels, mean_loss
from hf_sparse.calibration.modes import switched
from hf_sparse.calibration.windows import checked_batches, fingerprint
from hf_sparse.dropping.counts import number_of_some
from hf_sparse.dropping.report import DropReport
from hf_sparse.provenance.record import record_
from hf_sparse.provenance.values import Calibration, Step
from hf_sparse.structure.changeable import check_changeable
from hf_sparse.structure.depth import Depth
from hf_sparse.structure.layers import num_parameters
from hf_sparse.structure.targets import promised_layers, renew_promise_
from hf_sparse.suggestions import check_name


@torch.no_grad()
def drop_blocks_(
    model: PreTrainedModel,
    count: int | float,
    batches: Iterable[Mapping[str, Tensor] | Tensor],
    *,
    by: str = "loss",
) -> DropReport:
    """Remove whole blocks of a model, in place: those that it misses least.

    What is left is a plain model of its family with fewer layers: its config is changed with it, so
    that it is saved, loaded, generated with, compiled and exported as any other. Train it afterwards,
    best with the whole model as teacher (`hf_sparse.Distillation`). Make optimizers after this.

    Args:
        model: an encoder or a decoder, with one list of blocks, or an encoder-decoder with two, whose
            blocks compete: each list keeps one.
        count: how many go: a number of blocks, or a fraction of all, in `(0, 1)`, which is rounded.
        batches: calibration inputs, as for `hf_sparse.prune_`. For `"loss"` with `labels`, but for
            causal language models.
        by: `"loss"`: after each removal, the loss without each of the others is measured: about
            `count` x blocks passes over the data. `"similarity"`: one pass; no labels.

    Returns:
        Which blocks went, and the scores of all.

    Memory: the model, and the activations of one batch.

    Raises:
        ValueError: another `by` or count; other lists of blocks; blocks that share weights; a model
            that is compiled, quantized or sharded, or has adapters or weights without values; no
            calibration data; a config that cannot tell fewer blocks; a loss that is not finite. Nothing
            has changed then.
    """
    check_model(model, "drop_blocks_", PreTrainedModel)
    check_kinds(drop_blocks_, locals())
    check_name(by, METHODS, "by", "ways to choose")
    check_changeable(model, "drop_blocks_", "drop blocks")
    depth = Depth.of(model)
    names = tuple(f"{name}.{number}" for name, number in depth.places)
    total = len(names)
    wanted = number_of_some(count, total, "block")
    inputs: Batches = checked_batches(batches, model, by)
    if by == "loss":
        check_labels(by, None, model, inputs)
    choice = Choice.of(depth, wanted)
    before = num_parameters(model)
    with switched(model, training=False, use_cache=False):
        removed, scores, every, loss = METHODS[by](choice, wanted, inputs)
    targets = promised_layers(model)
    depth.keep_([number for number in range(total) if number not in removed])
    renew_promise_(model, targets)
    report = DropReport(
        depth.name,
        by,
        tuple(removed),
        tuple(scores),
        (total, len(depth.blocks)),
        (before, num_parameters(model)),
        loss,
        tuple(every),
        names,
    )
    data = Calibration.of(inputs, fingerprint(inputs))
    record_(model, Step.of(report.method, report.options, calibration=data))
    return report


@dataclass(frozen=True)
class Choice:
    """Which blocks can go.

    Attributes:
        depth: the model.
        free: the lists any block of which can go.
    """

    depth: Depth
    free: frozenset[str]

    @classmethod
    def of(cls, depth: Depth, wanted: int) -> Choice:
        """Look whether the config can tell fewer blocks, before any work.

        Raises:
            ValueError: it cannot.
        """
        places = depth.places
        free = set()
        for name in depth.lists:
            numbers = [number for number, place in enumerate(places) if place[0] == name]
            last = set(numbers[1:][-wanted:])
            rest = [number for number in range(len(places)) if number not in last]
            if last and depth.is_alike(name) and depth.allows(rest):
                free.add(name)
        choice = cls(depth, frozenset(free))
        if not choice.candidates(range(len(places))):
            raise ValueError(
                f"a config of type '{depth.model.config.model_type}' cannot tell a model without one "
                "of these blocks: transformers would build blocks of other kinds, or other weights "
                "beside them. Heads and neurons can go from it: hf_sparse.shrink_."
            )
        return choice

    def candidates(self, kept: Iterable[int]) -> list[int]:
        """Those of the blocks, any one of which can go."""
        numbers = list(kept)
        lists = [self.depth.places[number][0] for number in numbers]
        return [
            number
            for number, name in zip(numbers, lists, strict=True)
            if lists.count(name) > 1
            and (name in self.free or self.depth.allows([o for o in numbers if o != number]))
        ]


# What is chosen: the blocks that go, what each was chosen by, the scores of all, and the losses.
_Chosen = tuple[list[int], list[float], list[float | None], tuple[float, float] | None]


def by_loss(choice: Choice, wanted: int, batches: Batches, shortlist: int | None = None) -> _Chosen:
    """Remove the block without which the loss is lowest, and again.

    Args:
        choice: which blocks can go.
        wanted: how many go.
        batches: model inputs.
        shortlist: after the first removal only so many blocks are tried again, those without which
            the loss was lowest when they were tried last; None: all are.
    """
    model, blocks = choice.depth.model, choice.depth.blocks
    before = mean_loss(model, batches)
    if not math.isfinite(before):
        raise ValueError(
            f"the loss of {type(model).__name__} on the calibration data is {before}. Load the model "
            "in float32, or look at the data."
        )
    removed: list[int] = []
    chosen_by: list[float] = []
    every: list[float | None] = [None] * len(blocks)
    known: dict[int, float] = {}
    with tqdm(total=_passes(len(blocks), wanted, shortlist), desc=_LOOKING) as progress:
        for _ in range(wanted):
            kept = [number for number in range(len(blocks)) if number not in removed]
            losses: dict[int, float] = {}
            for number in _nearest(choice.candidates(kept), known, shortlist):
                with skipping(blocks[other] for other in (*removed, number)):
                    losses[number] = mean_loss(model, batches)
                progress.update()
            finite = {number: loss for number, loss in losses.items() if math.isfinite(loss)}
            if not finite:
                raise ValueError(
                    f"no more than {len(removed)} blocks of this {type(model).__name__} can go: of the "
                    f"other {len(kept)}, {len(losses)} could be told by its config, and without each "
                    "of them the loss is not finite. Ask for fewer."
                )
            if not removed:
                every = [losses.get(number) for number in range(len(blocks))]
            known |= finite
            best = min(finite, key=lambda number: (finite[number], number))
            removed.append(best)
            chosen_by.append(finite[best])
    return removed, chosen_by, every, (before, chosen_by[-1])


_LOOKING = "Measuring losses without a block"


def _passes(blocks: int, wanted: int, shortlist: int | None) -> int:
    """How many blocks are tried in all, if any of them can go."""
    tried = range(blocks, blocks - wanted, -1)
    return sum(n if shortlist is None or n == blocks else min(n, shortlist) for n in tried)


def _nearest(
    candidates: Sequence[int], known: Mapping[int, float], shortlist: int | None
) -> list[int]:
    """So many of the candidates, in order, of least known loss; those that were never tried as well."""
    tried = sorted((known[number], number) for number in candidates if number in known)
    if not known or shortlist is None:
        return list(candidates)
    near = {number for _, number in tried[:shortlist]}
    return [number for number in candidates if number in near or number not in known]


def _by_similarity(choice: Choice, wanted: int, batches: Batches) -> _Chosen:
    """Remove the blocks of least influence, measured once."""
    model, blocks = choice.depth.model, choice.depth.blocks
    influence = Influence(blocks)
    with influence.measuring():
        for batch in tqdm(batches, desc="Measuring the influence of blocks"):
            influence.masks = _masks(batch, choice.depth)
            needs_none = len(choice.depth.lists) == 1  # a decoder's inputs are made of labels
            run_on(model, {k: v for k, v in batch.items() if not needs_none or k != "labels"})
    influences = influence.values()
    if not all(map(math.isfinite, influences)):
        raise ValueError(
            f"hidden states of this {type(model).__name__} are not finite on the calibration data. "
            "Load the model in float32, or look at the data."
        )
    removed: list[int] = []
    able = set(choice.candidates(range(len(blocks))))
    for _ in range(wanted):
        kept = [number for number in range(len(blocks)) if number not in removed]
        candidates = choice.candidates(kept) if removed else sorted(able)
        if not candidates:
            raise ValueError(
                f"no more than {len(removed)} blocks of this {type(model).__name__} can go: its config "
                f"cannot tell the model without one of the other {len(kept)}. Ask for fewer."
            )
        removed.append(min(candidates, key=lambda number: (influences[number], number)))
    every = [value if number in able else None for number, value in enumerate(influences)]
    return removed, [influences[number] for number in removed], every, None


def _masks(batch: Mapping[str, Any], depth: Depth) -> list[Tensor | None]:
    """Which tokens count, for each block: a decoder behind an encoder has its own."""
    first = next(iter(depth.lists))
    labels = batch.get("labels")
    of_decoder = batch.get("decoder_attention_mask", None if labels is None else labels != -100)
    mask = batch.get("attention_mask")
    return [mask if name == first else of_decoder for name, _ in depth.places]


METHODS = {"loss": by_loss, "similarity": _by_similarity}
