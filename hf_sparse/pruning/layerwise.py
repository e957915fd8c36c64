"""Pruning a model layer by layer, each block on the outputs of the pruned blocks before it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from accelerate.utils import broadcast, gather_object
from torch import Tensor

from hf_sparse.calibration.input_statistics import Grams, InputStatistics, Norms, Seen
from hf_sparse.calibration.walk import BlockStep, Observer, run_model, walk
from hf_sparse.pruning import few_bits
from hf_sparse.pruning.problem import Notes, Problem, Solver, by_scores
from hf_sparse.pruning.reconstruction import reconstruct_
from hf_sparse.pruning.task import Task
from hf_sparse.quantization import Grid
from hf_sparse.structure.layers import TargetLayer, layers_in, layers_outside

# The norm of a feature over so many tokens is uncertain by an eighth, if they are like normal values.
_FEW_FOR_NORMS = 32
# Puts a pruned weight into its place in a parameter.
Write = Callable[[Tensor, Tensor], object]
Refinement = Callable[[Problem, list[Tensor]], list[Tensor]]


@dataclass
class LayerPruner:
    """Prunes layers on what they see of the calibration data.

    Attributes:
        task: what is pruned.
        solver: what prunes a layer.
        options: of the solver.
        refinements: applied to a problem and its pruned weights, in order.
        grid: that the kept weights are rounded to; None: they may have any values.
        feedback: whether rounding looks at Gram matrices; else at the norms of the inputs alone.
    """

    task: Task
    solver: Solver
    options: Mapping[str, Any]
    refinements: Sequence[Refinement] = ()
    grid: Grid | None = None
    feedback: bool = True

    def statistics(self) -> InputStatistics:
        """What is to be collected for the solver and its refinements."""
        rounds = self.grid is not None and self.feedback
        kind = Grams if self.refinements or rounds else self.solver.statistic
        return kind(self.task.accelerator, self.task.token_weights)

    def prune(
        self, run: Callable[[Observer], None], layers: Sequence[TargetLayer], *, stop: bool
    ) -> None:
        """Collect what the layers see while the data runs, and prune them.

        The data runs once for all layers that are no experts, and as often as the Gram matrices of the
        experts need (`InputStatistics.passes`). All passes see the weights as they were: what the first
        ones prune is written at the end.

        Args:
            run: shows the calibration data to an observer.
            layers: to be pruned; none is fine.
            stop: whether a call may end when all layers have been seen.
        """
        if not layers:
            return
        statistics = self.statistics()
        held: list[tuple[Tensor, Tensor]] = []
        *early, last = statistics.passes(layers)
        for part in early:
            with statistics.collecting(part, stop=stop):
                run(statistics)
            self.solve(statistics.groups(), lambda place, weight: held.append((place, weight)))
        with statistics.collecting(last, stop=stop):
            run(statistics)
        self.solve(statistics.groups())
        for place, weight in held:
            place.copy_(weight)

    def solve(self, groups: Sequence[Seen], write: Write = Tensor.copy_) -> None:
        """Prune groups of layers; of several processes each solves some and hands out the weights.

        Args:
            groups: the layers, and what they saw.
            write: called with the place of each weight, as it is stored, and the pruned one.
        """
        task, owners = self.task, self._owners(groups)
        solved: dict[str, Tensor] = {}
        notes, failure = Notes(), None
        for seen, owner in zip(groups, owners, strict=True):
            if owner != task.rank or failure is not None:
                continue
            try:
                problem = Problem.of(seen, task.config.pattern, task.sparsities, notes)
                pruned = self.pruned(problem)
            except ValueError as error:
                if not task.is_shared:
                    raise
                failure = str(error)  # the other processes must hear of it before this one stops
                continue
            for layer, weight in zip(seen.layers, pruned, strict=True):
                place = layer.stored(layer.parameter.data)
                turned = (weight.T if layer.transposed else weight).to(place.dtype)
                if task.is_shared:
                    solved[layer.name] = turned.contiguous()
                else:
                    write(place, turned)
        if not task.is_shared:
            task.notes.merge([notes])
            return
        if failures := [text for text in gather_object([failure]) if text is not None]:
            raise ValueError(failures[0])
        task.notes.merge(gather_object([notes]))
        for seen, owner in zip(groups, owners, strict=True):
            for layer in seen.layers:
                place = layer.stored(layer.parameter.data)
                own = solved.pop(layer.name, None)
                empty = torch.empty_like(place) if own is None else own
                write(place, broadcast(empty, from_process=owner))

    def pruned(self, problem: Problem) -> list[Tensor]:
        """The pruned weights of a problem; by magnitude if its layers saw no token."""
        pruned = self._on_the_grid(problem)
        if self.grid is not None:
            errors = few_bits.relative_error(problem, pruned)
            problem.notes.errors.update(zip(problem.names, errors, strict=True))
        return pruned

    def _on_the_grid(self, problem: Problem) -> list[Tensor]:
        """The pruned weights, rounded if there is a grid: by the solver itself, or behind it."""
        if self.grid is None:
            return self._solved(problem)
        on_grid = replace(problem, grid=self.grid)
        joint = self.solver.rounds and not self.refinements and problem.tokens > 0
        pruned = self._solved(on_grid if joint else problem)
        return few_bits.rounded(on_grid, pruned, is_rounded=joint)

    def _solved(self, problem: Problem) -> list[Tensor]:
        if not problem.tokens and self.solver.is_decided:
            return self.solver.solve(problem, **self.options)
        if not problem.tokens:
            problem.note("saw no calibration token and was pruned by magnitude.")
            return by_scores(problem, [weight.abs() for weight in problem.weights])
        if problem.statistic.ndim == 1 and problem.tokens < _FEW_FOR_NORMS:
            problem.note(
                f"saw fewer than {_FEW_FOR_NORMS} calibration tokens: its norms are uncertain."
            )
        pruned = self.solver.solve(problem, **self.options)
        for refine in self.refinements:
            pruned = refine(problem, pruned)
        return pruned

    def _owners(self, groups: Sequence[Seen]) -> list[int]:
        """The process of each group: the costliest first, each to the least busy process."""
        owners = [0] * len(groups)
        if not self.task.is_shared:
            return owners
        busy = [0.0] * self.task.accelerator.num_processes
        costs = [_cost(seen) for seen in groups]
        for index in sorted(range(len(groups)), key=lambda i: -costs[i]):
            owners[index] = busy.index(min(busy))
            busy[owners[index]] += costs[index]
        return owners


def _cost(seen: Seen) -> float:
    rows = sum(len(layer.weight) for layer in seen.layers)
    columns = seen.statistic.shape[0]
    return columns**2 * (columns + rows)


def _kept(problem: Problem) -> list[Tensor]:
    """The weights as they are."""
    return list(problem.weights)


# What prunes nothing, so that layers are only rounded.
KEEP = Solver(_kept, Norms, updates=False, is_decided=True)


def rounder(task: Task, *, feedback: bool = True) -> LayerPruner:
    """What rounds layers to the grid of a task's config, zeros kept."""
    return LayerPruner(task, KEEP, {}, grid=task.config.grid, feedback=feedback)


PruneBlock = Callable[[LayerPruner, BlockStep, Sequence[TargetLayer]], None]


def prune_layers(pruner: LayerPruner, step: BlockStep, layers: Sequence[TargetLayer]) -> None:
    """Prune all layers of a block on what the dense block sees."""
    pruner.prune(step.run, layers, stop=step.repeats == 1)


def prune(
    pruner: LayerPruner, *, prune_block: PruneBlock = prune_layers, reconstruct: int = 0
) -> None:
    """Prune block after block, and last what lies outside the blocks.

    Args:
        pruner: prunes a layer.
        prune_block: prunes the layers of one block.
        reconstruct: passes over the calibration data in which each block is trained then; see
            `reconstruct_`. Only what that leaves is rounded to the pruner's grid.

    Memory: see `walk`; the statistics of one block, what the solver needs for one group of layers.

    Raises:
        ValueError: a layer's inputs are not finite; the message names it.
    """
    task, whole = pruner.task, pruner
    if reconstruct:
        pruner = replace(pruner, grid=None)
    lowered = []
    for step in walk(**task.data, follow_dense=reconstruct > 0):
        if task.residence.restore(step):
            continue
        chosen = layers_in(step.block, task.layers)
        prune_block(pruner, step, chosen)
        if reconstruct and chosen:
            lowered.append(reconstruct_(step, chosen, reconstruct, accelerator=task.accelerator))
            if whole.grid is not None:
                prune_layers(rounder(task), step, chosen)
        task.residence.finish(step)
    if lowered:
        before, after = (sum(errors) / len(lowered) for errors in zip(*lowered, strict=True))
        task.notes.add(
            [f"{len(lowered)} blocks"],
            "were reconstructed: their mean relative output error (against the dense model's "
            f"outputs) went from {before:.4f} to {after:.4f}.",
        )

    outside = layers_outside(task.stacks, task.layers)
    whole.prune(partial(run_model, task.model, task.batches), outside, stop=False)
