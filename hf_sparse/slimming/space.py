"""What of a model can go for a budget, and the mixes of it that are tried."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

from transformers import PreTrainedModel
from transformers.utils.logging import tqdm

from hf_sparse.calibration.block_scores import Batches, skipping
from hf_sparse.calibration.losses import mean_loss
from hf_sparse.dropping.blocks import Choice, by_loss
from hf_sparse.slimming.budget import Budget
from hf_sparse.slimming.costs import Costs, Weights, times_of
from hf_sparse.slimming.experts import (
    ExpertRanking,
    counts_of,
    is_possible,
    keep_experts_,
    mixtures_of,
    without_experts,
)
from hf_sparse.slimming.plan import SlimChoice, SlimPlan
from hf_sparse.slimming.width import Ranking, without_units
from hf_sparse.structure.depth import Depth
from hf_sparse.structure.layers import PRUNED_WITH
from hf_sparse.structure.mixtures import Mixtures
from hf_sparse.structure.own_config import is_expressible, set_size_, tell_modules_
from hf_sparse.structure.parts import BlockSize, parts_of
from hf_sparse.structure.targets import promised_layers, renew_promise_
from hf_sparse.structure.units import BlockUnits, check_whole, find_units

# Of blocks, of heads of keys and of neurons at least this share stays.
LEAST = 0.25
# Numbers of blocks that are tried, from none to as many as keep to the budget alone.
_DEPTHS = 5
# Neurons come in such numbers, which kernels like.
_STEP = 16
# Blocks that are tried again after each that was chosen to go: of 30 blocks the first eight cost 86
# passes over the data so, not 212.
_SHORTLIST = 8
# Which units stay, and which experts.
Rankings = tuple[Ranking | None, ExpertRanking | None]


@dataclass(frozen=True)
class Space:
    """A model and what of it can go.

    Attributes:
        model: the model.
        depth: its blocks; None: they stay.
        choice: which of them can go.
        units: the units of each block; empty: they stay.
        mixtures: the experts; None: they stay.
    """

    model: PreTrainedModel
    depth: Depth | None
    choice: Choice | None
    units: tuple[BlockUnits, ...]
    mixtures: Mixtures | None = None

    @classmethod
    def of(cls, model: PreTrainedModel, axes: Sequence[str]) -> Space:
        """Look what can go, of a model that may be without values.

        Raises:
            ValueError: the model lacks an axis.
        """
        depth = _depth_of(model) if "depth" in axes else None
        choice = None if depth is None else Choice.of(depth, 1)
        mixtures = mixtures_of(model) if "experts" in axes else None
        units = tuple(find_units(model)) if "width" in axes else ()
        sizes = list({one.size for one in units})
        if len(sizes) > 1:
            raise ValueError(
                f"the blocks of this {type(model).__name__} have {len(sizes)} different sizes, and "
                "axis 'width' takes as many units of each. Take axes=('depth',), or the model before "
                "hf_sparse.shrink_."
            )
        if sizes and not is_expressible(model, _smaller(sizes[0])):
            raise ValueError(
                f"a config of type '{model.config.model_type}' tells no number of neurons but "
                f"{sizes[0].neurons}, so that axis 'width' is not open. Take axes=('depth',)."
            )
        return cls(model, depth, choice, units, mixtures)

    def check_values(self) -> None:
        """Refuse weights that cannot be cut: see `check_whole`."""
        for one in self.units:
            check_whole(one.layers)

    @property
    def size(self) -> BlockSize | None:
        """Of each block; None: it is not looked at."""
        return self.units[0].size if self.units else None

    @property
    def count(self) -> int:
        """How many blocks there are."""
        if self.depth is not None:
            return len(self.depth.blocks)
        return len(self.units) or (0 if self.mixtures is None else len(self.mixtures.mixtures))

    @property
    def experts(self) -> int | None:
        """Of each block; None: they are not looked at."""
        return None if self.mixtures is None else self.mixtures.number

    @property
    def most(self) -> int:
        """How many blocks may go."""
        if self.depth is None:
            return 0
        return min(self.count - math.ceil(LEAST * self.count), self.count - len(self.depth.lists))

    def sizes(self) -> list[BlockSize | None]:
        """The numbers of heads that blocks may have, each with all neurons."""
        size = self.size
        if size is None:
            return [None]
        queries, fixed = size.heads // size.key_heads, self.units[0].parts.fixed
        least = size.key_heads if fixed else math.ceil(LEAST * size.key_heads)
        sizes = [
            BlockSize(groups * queries, groups, size.neurons)
            for groups in _spread(least, size.key_heads, _DEPTHS)
        ]
        return [one for one in sizes if one == size or is_expressible(self.model, one)]

    def costs(self, unit: str, batches: Batches) -> Costs:
        """What smaller models cost."""
        if unit == "ms":
            return times_of(self.model, self.depth, self.units, batches[0], self.mixtures)
        if self.depth is not None:
            modules = list(self.depth.blocks)
        elif self.units or self.mixtures is None:
            modules = [one.block for one in self.units]
        else:
            modules = [self.model.get_submodule(one.around) for one in self.mixtures.mixtures]
        return Weights.in_model(self.model, modules, self.units, unit, self.mixtures)

    def check_possible(self, budget: Budget, limit: float, costs: Costs) -> None:
        """Refuse a budget that is met already, or cannot be kept, before losses are measured."""
        whole = costs.of((), self.size)
        if limit >= whole:
            raise ValueError(
                f"{budget.told} is met already: this {type(self.model).__name__} has {whole:,.6g} "
                f"{budget.unit}. Ask for less."
            )
        smallest = _with(self.sizes()[0], self._least_neurons())
        least = costs.of(range(self.most), smallest, self._least_experts())
        if limit < least:
            raise ValueError(
                f"{budget.told} cannot be kept: with a quarter of its blocks, heads, neurons, experts, "
                f"as far as the axes {', '.join(self._axes())} reach, this {type(self.model).__name__} "
                f"has {least:,.6g} of {whole:,.6g} {budget.unit}. The nearest is "
                f"{budget.nearest(least, whole)}."
            )

    def run(
        self, limit: float, costs: Costs, batches: Batches
    ) -> tuple[float, Rankings, list[SlimChoice]]:
        """Measure the loss of the model, rank its units, and measure the mixes."""
        ranking = (
            Ranking.of(self.model, self.units, batches) if self.units else None,
            None if self.mixtures is None else ExpertRanking.of(self.mixtures, batches),
        )
        order: list[int] = []
        if self.choice is not None:
            wanted = next(
                (n for n in range(1, self.most + 1) if costs.of(range(n), self.size) <= limit),
                self.most,
            )
            order, _, _, _ = by_loss(self.choice, wanted, _half(batches), _SHORTLIST)
        loss = mean_loss(self.model, batches)
        mixes = list(self._mixes(order, limit, costs))
        choices = []
        for removed, size, experts in tqdm(mixes, desc="Measuring mixes"):
            cost = costs.of(removed, size, experts)
            lost = self._loss(removed, size, experts, ranking, batches)
            choices.append(SlimChoice(removed, size, cost, lost, experts))
        finite = [choice for choice in choices if math.isfinite(choice.loss)]
        if not finite:
            raise ValueError(
                f"no mix of {', '.join(self._axes())} keeps to the budget with a finite loss. Allow "
                "more, or look at the data."
            )
        return loss, ranking, finite

    def _axes(self) -> list[str]:
        open_ones = (("depth", self.depth), ("width", self.units), ("experts", self.mixtures))
        return [name for name, there in open_ones if there]

    def _least_experts(self) -> int | None:
        if self.mixtures is None:
            return None
        return next(n for n in counts_of(self.mixtures) if is_possible(self.mixtures, n))

    def _least_neurons(self) -> int:
        return math.ceil(LEAST * self.size.neurons) if self.size is not None else 0

    def _mixes(
        self, order: Sequence[int], limit: float, costs: Costs
    ) -> Iterator[tuple[tuple[int, ...], BlockSize | None, int | None]]:
        """The mixes that keep to the budget, with as many neurons or experts as it allows."""
        for count in _spread(0, len(order), _DEPTHS):
            removed = tuple(order[:count])
            for size in reversed(self.sizes()):
                if costs.of(removed, size) <= limit:
                    yield removed, size, self.experts
                    break  # fewer heads would only be less
                if size is not None and (fits := self._neurons(removed, size, limit, costs)):
                    yield removed, fits, self.experts
                experts = self._experts(removed, size, limit, costs)
                if experts is not None:
                    yield removed, size, experts

    def _experts(
        self, removed: Sequence[int], size: BlockSize | None, limit: float, costs: Costs
    ) -> int | None:
        """As many experts as the budget allows; None: fewer than may stay, or blocks have none."""
        if self.mixtures is None:
            return None
        return next(
            (
                count
                for count in reversed(counts_of(self.mixtures)[:-1])
                if costs.of(removed, size, count) <= limit and is_possible(self.mixtures, count)
            ),
            None,
        )

    def _neurons(
        self, removed: Sequence[int], size: BlockSize, limit: float, costs: Costs
    ) -> BlockSize | None:
        """The size with as many neurons as the budget allows; None: fewer than may stay."""
        step = _STEP if size.neurons >= 4 * _STEP else 1
        counts = range(size.neurons // step * step, self._least_neurons() - 1, -step)
        sizes = (BlockSize(size.heads, size.key_heads, count) for count in counts)
        return next((one for one in sizes if costs.of(removed, one) <= limit), None)

    def _loss(
        self,
        removed: Sequence[int],
        size: BlockSize | None,
        experts: int | None,
        rankings: Rankings,
        batches: Batches,
    ) -> float:
        """The loss without what goes."""
        units, of_experts = rankings
        blocks = [] if self.depth is None else [self.depth.blocks[number] for number in removed]
        with skipping(blocks), ExitStack() as cut:
            if size is not None and units is not None:
                cut.enter_context(without_units(self.units, units, size))
            if self.mixtures is not None and experts is not None and of_experts is not None:
                cut.enter_context(without_experts(self.mixtures, of_experts, experts))
            return mean_loss(self.model, batches)

    def apply(self, plan: SlimPlan) -> None:
        """Remove from the model what the plan says."""
        best, targets = plan.best, promised_layers(self.model)
        kept = [number for number in range(self.count) if number not in best.removed]
        if self.depth is not None and best.removed:
            self.depth.keep_(kept)
            renew_promise_(self.model, targets)
        if self.mixtures is not None and plan.expert_ranking is not None:
            keep_experts_(self.model, self.mixtures, plan.expert_ranking, best.experts)
        if best.size is None or best.size == self.size or plan.ranking is None:
            return
        for number in kept:
            self.units[number].keep_(*plan.ranking.kept(number, best.size))
        if parts_of(self.model.config) is not None:
            set_size_(self.model.config, best.size)
        else:
            tell_modules_(self.model, best.size)
        # What was promised of zeros was promised of weights that are gone.
        vars(self.model).pop(PRUNED_WITH, None)
        if getattr(self.model.config, "sparsity_config", None) is not None:
            self.model.config.sparsity_config = None


def _depth_of(model: PreTrainedModel) -> Depth:
    """The blocks of a model.

    Raises:
        ValueError: there are no lists of blocks with weights of their own.
    """
    try:
        return Depth.of(model)
    except ValueError as error:
        raise ValueError(
            f"axis 'depth' is not open: {error} axes=('width',) leaves the number of blocks as it is."
        ) from error


def _half(batches: Batches) -> Batches:
    """The first half of the batches: what blocks are ordered on."""
    return batches[: -(-len(batches) // 2)]


def _spread(first: int, last: int, most: int) -> list[int]:
    """At most so many whole numbers from the first to the last."""
    count = min(most, last - first + 1)
    return sorted({round(first + n * (last - first) / max(count - 1, 1)) for n in range(count)})


def _smaller(size: BlockSize) -> BlockSize:
    return BlockSize(size.heads, size.key_heads, size.neurons - 1)


def _with(size: BlockSize | None, neurons: int) -> BlockSize | None:
    return None if size is None else BlockSize(size.heads, size.key_heads, neurons)
