"""`hf_sparse.shrink_`: zeros that are whole heads and neurons become a smaller dense model.

A neuron can go when its column in `down` is zero, or when what it gives is the same number for every
token: with a zero row in `up` that is `act(bias)`, or `act(bias_gate) * bias_up` of a gated network.
That number, times its column, is added to the bias of `down`. A head can go when its columns in the
projection behind attention are zero, or when all rows of its values are: attention weights sum to 1,
so that it gives the bias of its values, which is added to the bias behind attention. A constant that
has no bias to go to stays where it is.

Every head of keys must serve as many heads of queries as the others (transformers' forward code
takes it so). A group whose heads can all go, goes with its keys and values; of the others each loses
as many as the one that can lose the fewest. A block keeps one head and one neuron at least, though
they be zero: no family's forward code can do without.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from hf_sparse.arguments import check_has_values, check_model
from hf_sparse.provenance.record import record_
from hf_sparse.provenance.values import Step
from hf_sparse.report import format_table
from hf_sparse.structure.layers import PRUNED_WITH, TargetLayer, num_parameters
from hf_sparse.structure.parts import BlockSize
from hf_sparse.structure.units import (
    BlockUnits,
    check_whole,
    find_units,
    unused_heads,
    unused_neurons,
)
from hf_sparse.suggestions import deprecated_name


@dataclass(frozen=True)
class ShrinkReport:
    """What `shrink_` removed.

    Attributes:
        names: of the blocks, shared ones once.
        before, after: their sizes.
        block_weights: weights in the layers of the blocks, before and after.
        parameters: weights in the whole model, before and after.
        notes: what could not be removed, and why.
    """

    names: tuple[str, ...]
    before: tuple[BlockSize, ...]
    after: tuple[BlockSize, ...]
    block_weights: tuple[int, int]
    parameters: tuple[int, int]
    notes: tuple[str, ...] = ()

    @property
    def method(self) -> str:
        """The name of the step on the model card."""
        return "shrink"

    @property
    def options(self) -> dict[str, Any]:
        """No options: shrinking has none."""
        return {}

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
                *self.notes,
            ]
        )

    def __repr__(self) -> str:
        return f"<ShrinkReport: {' '.join(self.summary().splitlines()[:2])}>"

    def __str__(self) -> str:
        return self.table()

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
def shrink_(model: PreTrainedModel) -> ShrinkReport:
    """Remove the attention heads and feed-forward neurons that zeros have made useless, in place.

    The model gives the same outputs, up to rounding, and is as fast as a dense one of its size
    everywhere. Save it with `hf_sparse.save_pretrained`: its config then tells the sizes of the
    blocks, and `AutoModel*.from_pretrained` makes them. Make optimizers after this.

    Args:
        model: of a family in `hf_sparse.structure.parts.PARTS`, pruned by whole heads (`head`), neurons
            (`column`, `row`), or trained to have such zeros.

    Returns:
        The sizes of the blocks before and after.

    Memory: one weight beside the model.

    Raises:
        ValueError: there is nothing to remove, the family is not known, or weights are sharded,
            offloaded, quantized, not finite, or belong to adapters. Nothing has changed then.
    """
    check_model(model, "shrink_", PreTrainedModel)
    check_has_values(model, "shrink_")
    blocks = find_units(model)
    _check_own(blocks)
    for units in blocks:
        check_whole(units.layers)
    plans = [_Plan.of(units) for units in blocks]
    before = tuple(units.size for units in blocks)
    after = tuple(plan.size for plan in plans)
    if before == after:
        raise ValueError(
            f"there is nothing to remove: no head and no neuron of this {type(model).__name__} is zero "
            "as a whole. Prune it with pattern 'head' or 'column' first: "
            'hf_sparse.prune_(model, SparsityConfig("head", 0.5), ...).'
        )
    weights, parameters = _weights(blocks), num_parameters(model)
    for plan in plans:
        plan.apply()
    model.config.block_sizes = [asdict(size) for size in after]
    # What was promised of the zeros was promised of weights that are gone.
    vars(model).pop(PRUNED_WITH, None)
    if getattr(model.config, "sparsity_config", None) is not None:
        model.config.sparsity_config = None
    record_(model, Step.of("shrink", {}))
    return ShrinkReport(
        tuple(units.name for units in blocks),
        before,
        after,
        (weights, _weights(blocks)),
        (parameters, num_parameters(model)),
        tuple(note for plan in plans for note in plan.notes),
    )


shrink = deprecated_name("shrink", shrink_)


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


@dataclass(frozen=True)
class _Plan:
    """What of a block stays, and the constants of what goes.

    Attributes:
        heads, key_heads, neurons: the numbers of those that stay.
        constants: what is to be added to the biases behind attention and network; None: nothing.
    """

    units: BlockUnits
    heads: Tensor
    key_heads: Tensor
    neurons: Tensor
    constants: tuple[Tensor | None, Tensor | None]
    notes: tuple[str, ...]

    @classmethod
    def of(cls, units: BlockUnits) -> _Plan:
        size = units.size
        given, constant = _head_constants(units)
        removable = unused_heads(units) | _foldable(units.out, given, constant, units.head_dim)
        gone, left = heads_to_remove(removable.view(size.key_heads, -1))
        notes = []
        if left:
            notes.append(
                f"{units.name}: {left} heads are zero and stay, so that every head of keys serves as "
                "many heads of queries."
            )
        from_heads = _folded(units.out, given, gone.flatten() & constant, units.head_dim)

        given, constant = _neuron_constants(units)
        dead = unused_neurons(units) | _foldable(units.down, given, constant, 1)
        if dead.all():
            dead[0] = False
            notes.append(f"{units.name}: all neurons are zero, one of them stays.")
        from_neurons = _folded(units.down, given, dead & constant, 1)
        return cls(
            units,
            _numbers(~gone.flatten()),
            _numbers(~gone.all(dim=1)),
            _numbers(~dead),
            (from_heads, from_neurons),
            tuple(notes),
        )

    @property
    def size(self) -> BlockSize:
        return BlockSize(len(self.heads), len(self.key_heads), len(self.neurons))

    def apply(self) -> None:
        layers = (self.units.out, self.units.down)
        for layer, constant in zip(layers, self.constants, strict=True):
            if constant is not None:
                bias: Any = layer.module.bias
                bias.copy_(bias.float() + constant)
        self.units.keep_(self.heads, self.key_heads, self.neurons)


def heads_to_remove(removable: Tensor) -> tuple[Tensor, int]:
    """Which heads go, so that all heads of keys that stay serve equally many.

    Args:
        removable: `(key_heads, heads of queries of each)`.

    Returns:
        Those that go, of the same shape, and how many could go and stay.
    """
    gone = removable & removable.all(dim=1, keepdim=True)
    if gone.all():  # one head has to stay
        gone[0, 0] = False
        return gone, 0
    rest = ~removable.all(dim=1)
    count = int(removable[rest].sum(dim=1).min())
    # The first of those that can go, in each group.
    gone[rest] = removable[rest] & (removable[rest].cumsum(dim=1) <= count)
    return gone, int((removable & ~gone).sum())


def _head_constants(units: BlockUnits) -> tuple[Tensor, Tensor]:
    """What each head gives if its values are constant, `(heads * head_dim,)`, and which are."""
    size, last = units.size, units.projections[-1]
    count = size.key_heads * units.head_dim
    zero = (last.weight[-count:] == 0).all(dim=1).view(size.key_heads, -1).all(dim=1).cpu()
    bias: Any = last.module.bias
    values = torch.zeros(count) if bias is None else bias[-count:].float().cpu()
    queries = size.heads // size.key_heads
    shared = values.view(size.key_heads, -1).repeat_interleave(queries, dim=0)
    return shared.flatten(), zero.repeat_interleave(queries)


def _neuron_constants(units: BlockUnits) -> tuple[Tensor, Tensor]:
    """What each neuron gives if it is constant, `(neurons,)`, and which are."""
    zeros, biases = [], []
    for layer in units.entries:
        bias: Any = layer.module.bias
        zeros.append((layer.weight == 0).all(dim=1).cpu())
        biases.append(torch.zeros(len(layer.weight)) if bias is None else bias.float().cpu())
    if len(zeros) == 1:
        return units.activation(biases[0]), zeros[0]
    (up_zero, gate_zero), up, gate = zeros, biases[0], units.activation(biases[1])
    nothing = (up_zero & (up == 0)) | (gate_zero & (gate == 0))
    return torch.where(nothing, 0.0, gate * up), nothing | (up_zero & gate_zero)


def _foldable(layer: TargetLayer, given: Tensor, constant: Tensor, width: int) -> Tensor:
    """Which constant units may go: all where the layer has a bias, else those that give zero.

    Args:
        layer: that the units enter, each with `width` columns.
        given: what they give, `(units * width,)`.
        constant: which of them are constant, `(units,)`.
        width: columns of a unit.
    """
    if layer.module.bias is not None:
        return constant
    return constant & (given == 0).view(-1, width).all(dim=1)


def _folded(layer: TargetLayer, given: Tensor, gone: Tensor, width: int) -> Tensor | None:
    """What the units that go add to the layer's outputs, fp32, `(out_features,)`; None: nothing."""
    columns = gone.repeat_interleave(width)
    if not columns.any() or not given[columns].any():
        return None
    weight = layer.weight
    columns = columns.to(weight.device)
    return weight[:, columns].double().matmul(given.to(weight.device)[columns].double()).float()


def _numbers(chosen: Tensor) -> Tensor:
    return chosen.nonzero()[:, 0]
