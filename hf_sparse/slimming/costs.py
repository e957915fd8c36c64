"""What a model of fewer or smaller blocks costs: its weights to the last one, or its time.

Time is that of a forward pass of the first calibration sequence in plain torch, with the threads that
torch has. Models of the family with fewer blocks, neurons, heads and experts are built and timed in
turns, and what lies between is taken to be

    base + blocks * (one block + heads of keys * one head + neurons * one neuron
                     + experts * one expert)
"""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn

from hf_sparse.calibration.modes import switched
from hf_sparse.slimming.experts import counts_of, is_possible, weights_by_block
from hf_sparse.structure.depth import Depth, shorten_
from hf_sparse.structure.layers import num_parameters
from hf_sparse.structure.mixtures import Mixtures
from hf_sparse.structure.own_config import is_expressible, set_size_
from hf_sparse.structure.parts import BlockSize
from hf_sparse.structure.units import BlockUnits
from hf_sparse.upstream.transformers.models import attention_of, build

_TURNS = 7


class Costs(Protocol):
    """What models cost."""

    def of(
        self, removed: Sequence[int], size: BlockSize | None, experts: int | None = None
    ) -> float:
        """The cost without some blocks, the others of a size and with so many experts.

        None: as they are.
        """
        ...


@dataclass(frozen=True)
class Weights:
    """Counts of weights, or their bytes.

    Attributes:
        total: weights of the whole model.
        blocks: weights of each block.
        groups, neurons: of each block, weights of a head of keys with its queries, and of a neuron.
        size: of the blocks now; None: their size is not looked at.
        scale: what one weight costs.
        unit: "weights" or "MB".
        expert: of each block, weights of an expert.
        experts: of each block now.
    """

    total: int
    blocks: tuple[int, ...]
    groups: tuple[int, ...]
    neurons: tuple[int, ...]
    size: BlockSize | None
    scale: float
    unit: str
    expert: tuple[int, ...] = ()
    experts: int | None = None

    @classmethod
    def in_model(
        cls,
        model: Any,
        modules: Sequence[nn.Module],
        units: Sequence[BlockUnits],
        unit: str,
        mixtures: Mixtures | None = None,
    ) -> Weights:
        """Count the weights of a model's blocks."""
        blocks = [sum(p.numel() for p in module.parameters()) for module in modules]
        counted = [_of_units(one) for one in units]
        scale = 1.0 if unit == "weights" else next(model.parameters()).element_size() / 1e6
        return cls(
            num_parameters(model),
            tuple(blocks),
            tuple(group for group, _ in counted),
            tuple(neuron for _, neuron in counted),
            units[0].size if units else None,
            scale,
            unit,
            () if mixtures is None else weights_by_block(mixtures, modules),
            None if mixtures is None else mixtures.number,
        )

    def of(
        self, removed: Sequence[int], size: BlockSize | None, experts: int | None = None
    ) -> float:
        """The weights that are left."""
        left = self.total - sum(self.blocks[number] for number in removed)
        if size is not None and self.size is not None:
            groups = self.size.key_heads - size.key_heads
            neurons = self.size.neurons - size.neurons
            for number in range(len(self.blocks)):
                if number not in removed:
                    left -= groups * self.groups[number] + neurons * self.neurons[number]
        if experts is not None and self.experts is not None:
            gone = self.experts - experts
            left -= gone * sum(n for place, n in enumerate(self.expert) if place not in removed)
        return left * self.scale


@dataclass(frozen=True)
class Times:
    """Predicted times in milliseconds.

    Attributes:
        base: of all but the blocks.
        block, group, neuron: of one in each block.
        count: of blocks in the whole model.
        size: of them.
        expert: of one in each block.
        experts: of each block.
    """

    base: float
    block: float
    group: float
    neuron: float
    count: int
    size: BlockSize | None
    unit: str = "ms"
    expert: float = 0.0
    experts: int | None = None

    def of(
        self, removed: Sequence[int], size: BlockSize | None, experts: int | None = None
    ) -> float:
        """The time with what is left."""
        one, size = self.block, size or self.size
        one += self.expert * (experts or self.experts or 0)
        if size is not None:
            one += self.group * size.key_heads + self.neuron * size.neurons
        return self.base + (self.count - len(removed)) * one


def _of_units(units: BlockUnits) -> tuple[int, int]:
    """The weights of a head of keys with its queries, and those of a neuron, biases included."""
    size = units.size
    queries = size.heads // size.key_heads
    rows = (queries + 2) * units.head_dim
    projections = units.projections
    inputs = projections[0].weight.shape[1]
    group = rows * inputs + queries * units.head_dim * units.out.weight.shape[0]
    if projections[0].module.bias is not None:
        group += rows
    neuron = units.down.weight.shape[0]
    for layer in units.entries:
        rows = 2 if units.parts.joined else 1
        neuron += rows * (layer.weight.shape[1] + (layer.module.bias is not None))
    return group, neuron


def times_of(
    model: Any,
    depth: Depth | None,
    units: Sequence[BlockUnits],
    batch: Mapping[str, Any],
    mixtures: Mixtures | None = None,
) -> Times:
    """Time a model and smaller ones of its family.

    Args:
        model: the whole one.
        depth: its blocks, if some of them may go.
        units: of its blocks, if these may.
        batch: of which the first sequence is taken.
        mixtures: its experts, if these may.
    """
    inputs = {k: v[:1] for k, v in batch.items() if isinstance(v, torch.Tensor) and k != "labels"}
    if getattr(model.config, "is_encoder_decoder", False) and "labels" in batch:
        inputs["labels"] = batch["labels"][:1]
    count = len(depth.blocks) if depth is not None else len(units)
    if mixtures is not None and not count:
        count = len(mixtures.mixtures)
    size = units[0].size if units else None
    configs: dict[str, Any] = {"whole": model.config}
    if depth is not None:
        configs["blocks"] = _with_fewer_blocks(model.config, depth)
    sizes: dict[str, BlockSize] = {}
    if size is not None:
        half = (size.neurons + 1) // 2
        sizes["neurons"] = BlockSize(size.heads, size.key_heads, half)
        least = BlockSize(size.heads // size.key_heads, 1, size.neurons)
        if size.key_heads > 1 and is_expressible(model, least):
            sizes["groups"] = least
        for name, smaller in sizes.items():
            configs[name] = copy.deepcopy(model.config)
            set_size_(configs[name], smaller)
    experts = None if mixtures is None else _fewer_experts(mixtures)
    if mixtures is not None and experts is not None:
        configs["experts"] = mixtures.config(experts)
    times = _timed({name: (type(model), config) for name, config in configs.items()}, inputs)
    whole = times["whole"]
    left = count - len(_half(depth)) if depth is not None else 0
    each = max((whole - times["blocks"]) / left, 0.0) if depth is not None else whole / count
    neuron = group = 0.0
    if size is not None:
        neuron = max((whole - times["neurons"]) / (count * (size.neurons // 2)), 0.0)
    if size is not None and "groups" in sizes:
        group = max((whole - times["groups"]) / (count * (size.key_heads - 1)), 0.0)
    block = each if size is None else each - group * size.key_heads - neuron * size.neurons
    expert = 0.0
    if mixtures is not None and experts is not None:
        gone = count * (mixtures.number - experts)
        expert = min(max((whole - times["experts"]) / gone, 0.0), each / mixtures.number)
        block -= expert * mixtures.number
    number = None if mixtures is None else mixtures.number
    return Times(
        whole - count * each, block, group, neuron, count, size, expert=expert, experts=number
    )


def _fewer_experts(mixtures: Mixtures) -> int | None:
    """About half of the experts, a number that the config can tell; None: there is none."""
    half = mixtures.number // 2
    able = sorted(counts_of(mixtures)[:-1], key=lambda count: abs(count - half))
    return next((count for count in able if is_possible(mixtures, count)), None)


def _half(depth: Depth) -> list[int]:
    """The first blocks of each list, half of them."""
    places = depth.places
    counts = {name: sum(other == name for other, _ in places) for name in depth.lists}
    return [n for n, (name, place) in enumerate(places) if place < (counts[name] + 1) // 2]


def _with_fewer_blocks(config: Any, depth: Depth) -> Any:
    short = copy.deepcopy(config)
    places = [depth.places[number] for number in _half(depth)]
    kept = {name: [place for other, place in places if other == name] for name in depth.lists}
    shorten_(short, {depth.lists[name]: numbers for name, numbers in kept.items()})
    return short


@torch.no_grad()
def _timed(models: Mapping[str, tuple[Any, Any]], inputs: Mapping[str, Any]) -> dict[str, float]:
    """Medians in milliseconds of forward passes, in turns."""
    built = {}
    for name, (kind, config) in models.items():
        config = copy.deepcopy(config)
        built[name] = build(kind, config, attention_of(config) or "eager").eval()
    times: dict[str, list[float]] = {name: [] for name in built}
    for turn in range(_TURNS + 1):
        for name, model in built.items():
            with switched(model, training=False, use_cache=False):
                start = time.perf_counter()
                model(**inputs)
                if turn:
                    times[name].append((time.perf_counter() - start) * 1e3)
    return {name: statistics.median(found) for name, found in times.items()}
