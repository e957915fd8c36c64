"""One threshold over many weights, against sorting them all; and over processes that hold parts."""

from __future__ import annotations

from collections.abc import Sequence
from threading import Barrier, Thread

import pytest
import torch
from torch import Tensor

from hf_sparse.patterns import Pattern
from hf_sparse.selection import Processes, global_masks, kth_smallest

SHAPES = [(4, 8), (8, 4), (12, 16)]


def random_scores(ties: bool, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    scores = [torch.rand(*shape, generator=generator) for shape in SHAPES]
    return [(8 * part).round() / 8 for part in scores] if ties else scores


def expected_masks(scores: Sequence[Tensor], share: float) -> list[Tensor]:
    """The lowest of all weights, of equal ones the earlier first."""
    joined = torch.cat([part.flatten() for part in scores])
    order = joined.argsort(stable=True)
    pruned = torch.zeros(len(joined), dtype=torch.bool)
    pruned[order[: round(share * len(joined))]] = True
    parts = pruned.split([part.numel() for part in scores])
    return [part.view(shape.shape) for part, shape in zip(parts, scores, strict=True)]


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("share", [0.0, 0.002, 0.3, 0.5, 0.97, 1.0])
def test_the_lowest_of_all_weights_go(share: float, ties: bool) -> None:
    scores = random_scores(ties)
    masks = list(global_masks(lambda: iter(scores), Pattern.parse("unstructured"), share))
    for mask, wanted in zip(masks, expected_masks(scores, share), strict=True):
        assert torch.equal(mask, wanted)


@pytest.mark.parametrize("notation", ["block:2x2", "row", "column"])
def test_the_lowest_of_all_groups_go(notation: str) -> None:
    scores, pattern = random_scores(False), Pattern.parse(notation)
    units = [pattern.units(part) for part in scores]
    masks = list(global_masks(lambda: iter(scores), pattern, 0.4))
    for mask, wanted, part in zip(masks, expected_masks(units, 0.4), scores, strict=True):
        assert torch.equal(mask, pattern.expand(wanted, part))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_scores_that_are_not_finite_are_counted_and_refused(value: float) -> None:
    scores = random_scores(False)
    scores[0][0, :2] = scores[2][5, 5] = value
    with pytest.raises(ValueError, match="3 scores are NaN or infinite"):
        list(global_masks(lambda: iter(scores), Pattern.parse("unstructured"), 0.5))


@pytest.mark.parametrize("ties", [False, True])
def test_the_smallest_of_many_tensors_is_exact(ties: bool) -> None:
    scores = [*random_scores(ties), torch.tensor([[0.0, 1e-45, 1e-38, 3e38, 65504.0]])]
    ordered = torch.cat([part.flatten() for part in scores]).sort().values
    for count in (1, 2, 3, 17, len(ordered) // 2, len(ordered) - 1, len(ordered)):
        value, equal = kth_smallest(lambda: iter(scores), count)
        assert value == ordered[count - 1]
        assert equal == count - int((ordered < value).sum())


class Threads(Processes):
    """Processes of a test: threads, that add up by what they share."""

    def __init__(self, rank: int, size: int, shared: list[Tensor], barrier: Barrier) -> None:
        self.rank, self.size, self._shared, self._barrier = rank, size, shared, barrier

    def sum_(self, tensor: Tensor) -> None:
        self._shared[self.rank] = tensor.clone()
        self._barrier.wait()
        total = torch.stack(self._shared).sum(0)
        self._barrier.wait()
        tensor.copy_(total)


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("share", [0.0, 0.3, 0.97])
def test_processes_choose_together_what_one_chooses_alone(share: float, ties: bool) -> None:
    """Each holds a third of the weights; of equal scores those of lower ranks go first."""
    scores, pattern = random_scores(ties), Pattern.parse("unstructured")
    shared, barrier = [torch.empty(0)] * len(scores), Barrier(len(scores), timeout=60)
    masks: list[list[Tensor]] = [[] for _ in scores]

    def choose(rank: int) -> None:
        own = Threads(rank, len(scores), shared, barrier)
        masks[rank] = list(global_masks(lambda: iter([scores[rank]]), pattern, share, own))

    threads = [Thread(target=choose, args=(rank,)) for rank in range(len(scores))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for [mask], wanted in zip(masks, expected_masks(scores, share), strict=True):
        assert torch.equal(mask, wanted)
