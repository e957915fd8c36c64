"""`hf_sparse.drop_blocks_`: whole blocks are removed, those that the model misses least.

| by           | which block goes                                                                  |
|--------------|-----------------------------------------------------------------------------------|
| `loss`       | the one whose removal raises the loss on calibration data least, one after another |
| `similarity` | those that change their input least: 1 - mean cosine of a token's input and output |

Sources: Men et al., "ShortGPT: Layers in Large Language Models are More Redundant Than You Expect",
https://arxiv.org/abs/2403.03853, whose block influence is `similarity`: measured once, on the whole
model. Kim et al., "Shortened LLaMA", https://arxiv.org/abs/2402.02834, remove by the loss, measured
once; here it is measured anew after each block: of two that do the same only one can go.
Departures: padding does not count; blocks without which the family's config could not tell the model
are not chosen.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils.logging import tqdm

from hf_sparse.arguments import check_kinds, check_model
from hf_sparse.calibration.block_scores import Batches, Influence, mean_loss, skipping
from hf_sparse.calibration.losses import check_labels
from hf_sparse.calibration.modes import switched
from hf_sparse.calibration.windows import checked_batches, fingerprint
from hf_sparse.provenance.record import record_
from hf_sparse.provenance.values import Calibration, Step
from hf_sparse.report import format_table
from hf_sparse.structure.changeable import check_changeable
from hf_sparse.structure.depth import Depth
from hf_sparse.structure.layers import num_parameters
from hf_sparse.structure.targets import promised_layers, renew_promise_
from hf_sparse.suggestions import check_name


@dataclass(frozen=True)
class DropReport:
    """Which blocks `drop_blocks_` removed.

    Attributes:
        name: of the list of blocks.
        by: how they were chosen.
        removed: their numbers in the model as it was, in the order in which they were chosen.
        scores: what each of them was chosen by: the loss without it and those before it, or its
            influence.
        blocks: before and after.
        parameters: weights in the whole model, before and after.
        loss: on the calibration data, before and after; None where it was not measured.
        all_scores: of all blocks of the whole model; None: the block could not go.
    """

    name: str
    by: str
    removed: tuple[int, ...]
    scores: tuple[float, ...]
    blocks: tuple[int, int]
    parameters: tuple[int, int]
    loss: tuple[float, float] | None
    all_scores: tuple[float | None, ...]

    @property
    def method(self) -> str:
        """The name of the step on the model card."""
        return "drop_blocks"

    @property
    def options(self) -> dict[str, Any]:
        """What the card tells of it."""
        return {"by": self.by, "removed": ", ".join(map(str, self.removed))}

    def to_json(self) -> str:
        """All of it as JSON text."""
        return json.dumps(asdict(self), indent=2)

    def summary(self) -> str:
        """The totals in a few lines."""
        lines = [
            f"{self.blocks[1]} of {self.blocks[0]} blocks are left of {self.name}: "
            f"{', '.join(map(str, sorted(self.removed)))} went, by {self.by}",
            f"whole model: {self.parameters[1]:,} of {self.parameters[0]:,} weights",
        ]
        if self.loss is not None:
            lines.append(
                f"loss on the calibration data: {self.loss[0]:.4f} before, {self.loss[1]:.4f} after"
            )
        return "\n".join(lines)

    def __repr__(self) -> str:
        return f"<DropReport: {' '.join(self.summary().splitlines()[:2])}>"

    def __str__(self) -> str:
        return self.table()

    def table(self) -> str:
        """A row for each block of the whole model, and the totals."""
        turns = {number: turn for turn, number in enumerate(self.removed, start=1)}
        title = "loss without it" if self.by == "loss" else "influence"
        rows = [
            (
                f"{self.name}.{number}",
                "has to stay" if score is None else f"{score:.4f}",
                f"removed ({turns[number]})" if number in turns else "",
            )
            for number, score in enumerate(self.all_scores)
        ]
        return f"{format_table(('block', title, ''), rows)}\n{self.summary()}"


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
        model: an encoder or a decoder, with one list of blocks.
        count: how many go: a number of blocks, or a fraction of them, in `(0, 1)`, which is rounded.
        batches: calibration inputs, as for `hf_sparse.prune_`. For `"loss"` with `labels`, but for
            causal language models.
        by: `"loss"`: after each removal, the loss without each of the others is measured: about
            `count` x blocks passes over the data. `"similarity"`: one pass; no labels.

    Returns:
        Which blocks went, and the scores of all.

    Memory: the model, and the activations of one batch.

    Raises:
        ValueError: another `by` or count; an encoder-decoder; blocks that share weights; a model that
            is compiled, quantized or sharded, or has adapters or weights without values; no
            calibration data; a config that cannot tell fewer blocks; a loss that is not finite. Nothing
            has changed then.
    """
    check_model(model, "drop_blocks_", PreTrainedModel)
    check_kinds(drop_blocks_, locals())
    check_name(by, METHODS, "by", "ways to choose")
    check_changeable(model, "drop_blocks_", "drop blocks")
    depth = Depth.of(model)
    total = len(depth.blocks)
    wanted = number_of_blocks(count, total)
    inputs: Batches = checked_batches(batches, model, by)
    if by == "loss":
        check_labels(by, None, model, inputs)
    choice = _Choice.of(depth, wanted)
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
    )
    data = Calibration.of(inputs, fingerprint(inputs))
    record_(model, Step.of(report.method, report.options, calibration=data))
    return report


def number_of_blocks(count: int | float, total: int) -> int:
    """How many blocks a number or a fraction of them means.

    Raises:
        ValueError: none of them, or all.
    """
    most = f"at most {total - 1} of the {total} blocks, or a fraction of them in (0, 1)"
    if isinstance(count, float) and not 0 < count < 1:
        raise ValueError(f"count is {count}; wanted {most}. A number of blocks is a whole one.")
    found = round(count * total) if isinstance(count, float) else count
    if found < 1:
        raise ValueError(
            f"count is {count}, which is no block of {total}; wanted {most}. The smallest "
            f"fraction that is a block is {1 / total:.4g}."
        )
    if found >= total:
        raise ValueError(f"count is {count}, which is every block of {total}; wanted {most}.")
    return found


@dataclass(frozen=True)
class _Choice:
    """Which blocks can go.

    Attributes:
        depth: the model.
        free: whether any of them can.
    """

    depth: Depth
    free: bool

    @classmethod
    def of(cls, depth: Depth, wanted: int) -> _Choice:
        """Look whether the config can tell fewer blocks, before any work.

        Raises:
            ValueError: it cannot.
        """
        total = len(depth.blocks)
        choice = cls(depth, depth.all_alike and depth.allows(range(total - wanted)))
        if not choice.free and not choice.candidates(range(total)):
            raise ValueError(
                f"a config of type '{depth.model.config.model_type}' cannot tell a model without one "
                "of these blocks: transformers would build blocks of other kinds, or other weights "
                "beside them. Heads and neurons can go from it: hf_sparse.shrink_."
            )
        return choice

    def candidates(self, kept: Iterable[int]) -> list[int]:
        """Those of the blocks, any one of which can go."""
        numbers = list(kept)
        if self.free:
            return numbers
        return [
            number for number in numbers if self.depth.allows([o for o in numbers if o != number])
        ]


# What is chosen: the blocks that go, what each was chosen by, the scores of all, and the losses.
_Chosen = tuple[list[int], list[float], list[float | None], tuple[float, float] | None]


def _by_loss(choice: _Choice, wanted: int, batches: Batches) -> _Chosen:
    """Remove the block without which the loss is lowest, and again."""
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
    passes = sum(range(len(blocks), len(blocks) - wanted, -1))
    with tqdm(total=passes, desc="Measuring losses without a block") as progress:
        for _ in range(wanted):
            kept = [number for number in range(len(blocks)) if number not in removed]
            losses: dict[int, float] = {}
            for number in choice.candidates(kept):
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
            best = min(finite, key=lambda number: (finite[number], number))
            removed.append(best)
            chosen_by.append(finite[best])
    return removed, chosen_by, every, (before, chosen_by[-1])


def _by_similarity(choice: _Choice, wanted: int, batches: Batches) -> _Chosen:
    """Remove the blocks of least influence, measured once."""
    model, blocks = choice.depth.model, choice.depth.blocks
    influence = Influence(blocks)
    with influence.measuring():
        for batch in tqdm(batches, desc="Measuring the influence of blocks"):
            influence.mask = batch.get("attention_mask")
            model(**{name: value for name, value in batch.items() if name != "labels"})
    found = influence.values()
    if not all(map(math.isfinite, found)):
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
        removed.append(min(candidates, key=lambda number: (found[number], number)))
    every = [value if number in able else None for number, value in enumerate(found)]
    return removed, [found[number] for number in removed], every, None


METHODS = {"loss": _by_loss, "similarity": _by_similarity}
