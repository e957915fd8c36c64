"""What of the blocks can go without a trace, and what stays: the plan that `hf_sparse.shrink_` follows.

A neuron can go when its column in `down` is zero, or when what it gives is the same number for every
token: with a zero row in `up` that is `act(bias)`, or `act(bias_gate) * bias_up` of a gated network.
That number, times its column, is added to the bias of `down`. A head can go when its columns in the
projection behind attention are zero, or when all rows of its values are: attention weights sum to 1,
so that it gives the bias of its values, which is added to the bias behind attention. A constant that
has no bias to go to stays where it is.

Every head of keys must serve as many heads of queries as the others (transformers' forward code
takes it so). A group whose heads can all go, goes with its keys and values; of the others each loses
as many as the one that can lose the fewest. A block keeps one head and one neuron at least, though
they be zero: no family's forward code can do without. Blocks that are to be of one size keep as many
groups, heads in a group, and neurons as the one that can lose the fewest.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hf_sparse.structure.layers import TargetLayer
from hf_sparse.structure.parts import BlockSize
from hf_sparse.structure.units import BlockUnits, unused_heads, unused_neurons


@dataclass(frozen=True)
class Kept:
    """What every block keeps at least: heads of keys, heads of queries of each, neurons."""

    groups: int
    queries: int
    neurons: int


@dataclass(frozen=True)
class Removable:
    """What can go of a block.

    Attributes:
        units: of the block.
        heads: which heads of queries can go, `(key_heads, heads of queries of each)`.
        neurons: which neurons can go.
        given, constant: of heads and of neurons, what a constant one gives, and which are constant.
    """

    units: BlockUnits
    heads: Tensor
    neurons: Tensor
    given: tuple[Tensor, Tensor]
    constant: tuple[Tensor, Tensor]

    @classmethod
    def of(cls, units: BlockUnits) -> Removable:
        """Look for zeros in the layers of a block."""
        of_heads, constant_heads = _head_constants(units)
        folded = _foldable(units.out, of_heads, constant_heads, units.head_dim)
        heads = unused_heads(units) | folded
        if units.parts.fixed:
            heads = torch.zeros_like(heads)
        of_neurons, constant = _neuron_constants(units)
        neurons = unused_neurons(units) | _foldable(units.down, of_neurons, constant, 1)
        return cls(
            units,
            heads.view(units.size.key_heads, -1),
            neurons,
            (of_heads, of_neurons),
            (constant_heads, constant),
        )


@dataclass(frozen=True)
class Plan:
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
    def of(cls, found: Removable, kept: Kept | None = None) -> Plan:
        """Remove all that can go, but for what is to be kept."""
        units, notes = found.units, []
        gone, left = heads_to_remove(found.heads, kept)
        reason = "every head of keys serves as many heads of queries"
        if left:
            reason = reason if kept is None else "all blocks have one size"
            notes.append(f"{units.name}: {left} heads are zero and stay, so that {reason}.")
        dead = found.neurons.clone()
        if kept is not None:
            dead &= dead.cumsum(0) <= len(dead) - kept.neurons
            if left := int((found.neurons & ~dead).sum()):
                notes.append(
                    f"{units.name}: {left} neurons are zero and stay, so that all blocks have one size."
                )
        elif dead.all():
            dead[0] = False
            notes.append(f"{units.name}: all neurons are zero, one of them stays.")
        constant_heads, constant = found.constant
        from_heads = gone.flatten() & constant_heads
        return cls(
            units,
            _numbers(~gone.flatten()),
            _numbers(~gone.all(dim=1)),
            _numbers(~dead),
            (
                _folded(units.out, found.given[0], from_heads, units.head_dim),
                _folded(units.down, found.given[1], dead & constant, 1),
            ),
            tuple(notes),
        )

    @property
    def size(self) -> BlockSize:
        """Of what stays."""
        return BlockSize(len(self.heads), len(self.key_heads), len(self.neurons))

    def apply(self) -> None:
        """Remove the rest from the block."""
        layers = (self.units.out, self.units.down)
        for layer, constant in zip(layers, self.constants, strict=True):
            if constant is not None:
                bias: Any = layer.module.bias
                bias.copy_(bias.float() + constant)
        self.units.keep_(self.heads, self.key_heads, self.neurons)


def plans_of(blocks: Sequence[BlockUnits], uniform: bool) -> list[Plan]:
    """A plan for each block.

    Raises:
        ValueError: the blocks are to be of one size and cannot: some have lost more already.
    """
    removables = [Removable.of(units) for units in blocks]
    kept = _kept_by_all(removables) if uniform else None
    plans = [Plan.of(removable, kept) for removable in removables]
    sizes = {plan.size: plan.units.name for plan in plans}
    if uniform and len(sizes) > 1:
        one, other, *_ = sizes.items()
        raise ValueError(
            f"uniform=True wants blocks of one size, and {one[1]} would be left with {_told(one[0])}, "
            f"{other[1]} with {_told(other[0])}: one of them was made smaller before. Leave "
            "uniform=True out, or prune the larger one further first."
        )
    return plans


def heads_to_remove(removable: Tensor, kept: Kept | None = None) -> tuple[Tensor, int]:
    """Which heads go, so that all heads of keys that stay serve equally many.

    Args:
        removable: `(key_heads, heads of queries of each)`.
        kept: what stays at least; None: one head.

    Returns:
        Those that go, of the same shape, and how many could go and stay.
    """
    whole = removable.all(dim=1)
    if kept is not None:
        # The last groups, so that the first one stays where all can go.
        after = whole.flip(0).cumsum(0).flip(0)
        whole = whole & (after <= len(whole) - kept.groups)
    gone = removable & whole[:, None]
    if gone.all():  # one head has to stay
        gone[0, 0] = False
        return gone, 0
    rest = ~whole
    count = int(removable[rest].sum(dim=1).min())
    if kept is not None:
        count = min(count, removable.shape[1] - kept.queries)
    # The first of those that can go, in each group.
    gone[rest] = removable[rest] & (removable[rest].cumsum(dim=1) <= count)
    return gone, int((removable & ~gone).sum())


def _kept_by_all(found: Sequence[Removable]) -> Kept:
    """What the block keeps that can lose the fewest."""
    groups = max(len(one.heads) - int(one.heads.all(dim=1).sum()) for one in found)
    neurons = max(len(one.neurons) - int(one.neurons.sum()) for one in found)
    kept = Kept(max(groups, 1), 1, max(neurons, 1))
    queries = [one.heads.shape[1] - _queries_to_remove(one.heads, kept) for one in found]
    return Kept(kept.groups, max(queries), kept.neurons)


def _queries_to_remove(removable: Tensor, kept: Kept) -> int:
    """How many heads of queries each head of keys loses."""
    gone, _ = heads_to_remove(removable, kept)
    return int(gone[~gone.all(dim=1)].sum(dim=1).min())


def _told(size: BlockSize) -> str:
    return ", ".join(f"{value} {name.replace('_', ' ')}" for name, value in vars(size).items())


def _head_constants(units: BlockUnits) -> tuple[Tensor, Tensor]:
    """What each head gives if its values are constant, `(heads * head_dim,)`, and which are."""
    size, last, rows = units.size, units.projections[-1], units.value_rows()
    chosen = last.weight[rows.to(last.weight.device)]
    zero = (chosen == 0).all(dim=1).view(size.key_heads, -1).all(dim=1).cpu()
    bias: Any = last.module.bias
    values = torch.zeros(len(rows)) if bias is None else bias[rows.to(bias.device)].float().cpu()
    queries = size.heads // size.key_heads
    shared = values.view(size.key_heads, -1).repeat_interleave(queries, dim=0)
    return shared.flatten(), zero.repeat_interleave(queries)


def _neuron_constants(units: BlockUnits) -> tuple[Tensor, Tensor]:
    """What each neuron gives if it is constant, `(neurons,)`, and which are."""
    zeros: list[Tensor] = []
    biases: list[Tensor] = []
    for layer in units.entries:
        bias: Any = layer.module.bias
        none = (layer.weight == 0).all(dim=1).cpu()
        values = torch.zeros(len(none)) if bias is None else bias.float().cpu()
        # A gate's rows come first where both are one layer.
        parts = 2 if units.parts.joined else 1
        zeros += reversed(none.chunk(parts))
        biases += reversed(values.chunk(parts))
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
