"""Pruning a model layer by layer, each block on the outputs of the pruned blocks before it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from accelerate.utils import broadcast, gather_object
from torch import Tensor

from hf_sparse.calibration.input_statistics import Grams, InputStatistics, Seen
from hf_sparse.calibration.walk import BlockStep, Observer, run_model, walk
from hf_sparse.pruning.problem import Notes, Problem, Solver, by_scores
from hf_sparse.pruning.reconstruction import reconstruct_
from hf_sparse.pruning.task import Task
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
    """

    task: Task
    solver: Solver
    options: Mapping[str, Any]
    refinements: Sequence[Refinement] = ()

    def statistics(self) -> InputStatistics:
        """What is to be collected for the solver and its refinements."""
        kind = Grams if self.refinements else self.solver.statistic
        return kind(self.task.accelerator)

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
            `reconstruct_`.

    Memory: see `walk`; the statistics of one block, what the solver needs for one group of layers.

    Raises:
        ValueError: a layer's inputs are not finite; the message names it.
    """
    task = pruner.task
    lowered = []
    for step in walk(**task.data, follow_dense=reconstruct > 0):
        if task.residence.restore(step):
            continue
        chosen = layers_in(step.block, task.layers)
        prune_block(pruner, step, chosen)
        if reconstruct and chosen:
            lowered.append(reconstruct_(step, chosen, reconstruct, accelerator=task.accelerator))
        task.residence.finish(step)
    if lowered:
        before, after = (sum(errors) / len(lowered) for errors in zip(*lowered, strict=True))
        task.notes.add(
            [f"{len(lowered)} blocks"],
            "were reconstructed: their mean relative output error (against the dense model's "
            f"outputs) went from {before:.4f} to {after:.4f}.",
        )

    outside = layers_outside(task.stacks, task.layers)
    pruner.prune(partial(run_model, task.model, task.batches), outside, stop=False)
