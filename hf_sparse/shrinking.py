"""`hf_sparse.shrink_`: zeros that are whole heads, neurons and experts become a smaller dense model.

What can go, and what has to stay, tells `hf_sparse.structure.removal`; of experts
`hf_sparse.dropping.zero_experts`.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from hf_sparse.arguments import check_kinds, check_model
from hf_sparse.counts import StepReport, format_table
from hf_sparse.dropping.expert_report import ExpertReport
from hf_sparse.dropping.zero_experts import drop_zero_experts_, has_zero_experts
from hf_sparse.provenance.record import record_
from hf_sparse.provenance.values import Step
from hf_sparse.structure.changeable import check_changeable
from hf_sparse.structure.layers import PRUNED_WITH, num_parameters, promised_config
from hf_sparse.structure.own_config import (
    check_expressible,
    is_expressible,
    set_size_,
    tell_modules_,
)
from hf_sparse.structure.parts import BlockSize, parts_of
from hf_sparse.structure.removal import plans_of
from hf_sparse.structure.units import BlockUnits, check_whole, find_units
from hf_sparse.suggestions import deprecated_name


@dataclass(frozen=True, repr=False)
class ShrinkReport(StepReport):
    """What `shrink_` removed.

    Attributes:
        names: of the blocks, shared ones once.
        before, after: their sizes.
        block_weights: weights in the layers of the blocks, before and after.
        parameters: weights in the whole model, before and after.
        notes: what could not be removed, and why.
        uniform: whether blocks of one size were asked for.
        plain: whether the family's own config tells the size of the blocks, so that the model loads
            with transformers alone.
    """

    # The name of the step on the model card.
    method = "shrink"

    names: tuple[str, ...]
    before: tuple[BlockSize, ...]
    after: tuple[BlockSize, ...]
    block_weights: tuple[int, int]
    parameters: tuple[int, int]
    notes: tuple[str, ...] = ()
    uniform: bool = False
    plain: bool = False

    @property
    def options(self) -> dict[str, Any]:
        """What the card tells of it."""
        return _options(self.uniform)

    @property
    def share(self) -> float:
        """Weights in the blocks that are left, as a fraction: that of their products, too."""
        return self.block_weights[1] / self.block_weights[0]

    def to_json(self) -> str:
        """All of it as JSON text."""
        return json.dumps({**asdict(self), "share": self.share}, indent=2)

    def summary(self) -> str:
        """The totals in a few lines."""
        parts = [
            f"{sum(getattr(size, name) for size in self.after):,} of "
            f"{sum(getattr(size, name) for size in self.before):,} {title}"
            for name, title in (("heads", "heads"), ("neurons", "neurons"))
        ]
        return "\n".join(
            [
                f"{len(self.names)} blocks keep {' and '.join(parts)}: {self.block_weights[1]:,} of "
                f"{self.block_weights[0]:,} weights ({self.share:.4f})",
                f"whole model: {self.parameters[1]:,} of {self.parameters[0]:,} weights",
                "all blocks have one size: a plain model, that transformers loads alone"
                if self.plain
                else "config.json will tell the sizes of the blocks: the model loads with hf_sparse",
                *self.notes,
            ]
        )

    def table(self) -> str:
        """A row for each block, and the totals."""
        rows = [
            (
                name,
                f"{after.heads} of {before.heads}",
                f"{after.key_heads} of {before.key_heads}",
                f"{after.neurons} of {before.neurons}",
            )
            for name, before, after in zip(self.names, self.before, self.after, strict=True)
        ]
        head = ("block", "heads", "heads of keys", "neurons")
        return f"{format_table(head, rows)}\n{self.summary()}"


@torch.no_grad()
def shrink_(model: PreTrainedModel, *, uniform: bool = False) -> ShrinkReport | ExpertReport:
    """Remove the heads, neurons and experts that zeros have made useless, in place.

    The model gives the same outputs, up to rounding, and is as fast as a dense one of its size
    everywhere. Save it with `hf_sparse.save_pretrained`. Where all blocks are left with one size that
    the family's config can tell, its numbers are changed, and the model is a plain one of the family:
    it loads with transformers alone. Elsewhere the config tells the sizes of the blocks, and
    `AutoModel*.from_pretrained` makes them after `import hf_sparse`. Make optimizers after this.

    Of a mixture, experts that are zero go with their rows of the router, so that tokens go to others:
    the outputs are those of `hf_sparse.drop_experts_`, not of the model with zeros.

    Args:
        model: of a family in `hf_sparse.structure.parts.PARTS` or `anatomy.FAMILIES`, pruned by whole
            heads (`head`), neurons (`column`, `row`), or trained to have such zeros. Blocks of the
            latter are always left with one size. Or a mixture, some of whose experts are zero, as
            pattern `expert` makes them: as many in each block.
        uniform: leave all blocks with one size, that of the block which can lose the fewest, though
            other blocks keep zeros (experts, too); refuse if the family's config cannot tell it. What
            was pruned to a `SparsityConfig` with `uniform=True` is shrunk so without asking.

    Returns:
        The sizes of the blocks before and after; of a mixture, which experts went.

    Memory: one weight beside the model.

    Raises:
        ValueError: there is nothing to remove, the family is not known, or weights are sharded,
            offloaded, quantized, not finite, or belong to adapters; blocks of one size are wanted, and
            the family's config cannot tell it. Nothing has changed then.
    """
    check_model(model, "shrink_", PreTrainedModel)
    check_kinds(shrink_, locals())
    check_changeable(model, "shrink_", "shrink")
    if has_zero_experts(model):
        return drop_zero_experts_(model, uniform=uniform)
    blocks = find_units(model)
    _check_own(blocks)
    for units in blocks:
        check_whole(units.layers)
    promised = promised_config(model)
    listed = parts_of(model.config) is not None
    uniform = uniform or (promised is not None and promised.uniform) or not listed
    plans = plans_of(blocks, uniform)
    before = tuple(units.size for units in blocks)
    after = tuple(plan.size for plan in plans)
    if before == after:
        raise ValueError(
            f"there is nothing to remove: no head and no neuron of this {type(model).__name__} is zero "
            "as a whole. Prune it with pattern 'head' or 'column' first: "
            'hf_sparse.prune_(model, SparsityConfig("head", 0.5), ...).'
        )
    if uniform:
        check_expressible(model, after[0])
    plain = len(set(after)) == 1 and is_expressible(model, after[0])
    weights, parameters = _weights(blocks), num_parameters(model)
    for plan in plans:
        plan.apply()
    if plain and listed:
        set_size_(model.config, after[0])
    elif plain:
        tell_modules_(model, after[0])
    else:
        model.config.block_sizes = [asdict(size) for size in after]
    # What was promised of the zeros was promised of weights that are gone.
    vars(model).pop(PRUNED_WITH, None)
    if getattr(model.config, "sparsity_config", None) is not None:
        model.config.sparsity_config = None
    record_(model, Step.of("shrink", _options(uniform)))
    return ShrinkReport(
        tuple(units.name for units in blocks),
        before,
        after,
        (weights, _weights(blocks)),
        (parameters, num_parameters(model)),
        tuple(note for plan in plans for note in plan.notes),
        uniform,
        plain,
    )


shrink = deprecated_name("shrink", shrink_)


def _options(uniform: bool) -> dict[str, Any]:
    return {"uniform": True} if uniform else {}


def _check_own(blocks: Sequence[BlockUnits]) -> None:
    """Refuse blocks that share weights: what is removed from one would be missing in the other."""
    owners: dict[int, str] = {}
    for units in blocks:
        for layer in units.layers:
            for parameter in layer.module.parameters():
                other = owners.setdefault(id(parameter), layer.name)
                if other != layer.name:
                    raise ValueError(
                        f"{layer.name} shares a weight with {other}; wanted blocks with weights of "
                        "their own. Copy the shared modules first (copy.deepcopy)."
                    )


def _weights(blocks: Sequence[BlockUnits]) -> int:
    return sum(layer.parameter.numel() for units in blocks for layer in units.layers)
