"""Which experts of each block matter least, and a mixture that does without them for a while.

They go as by `hf_sparse.drop_experts_`: those of least REAP score, as many of each block, with their
rows of the router (`hf_sparse.calibration.expert_scores`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_sparse.calibration.expert_scores import kept_in_block, scores_of
from hf_sparse.dropping.experts import promised_experts, renew_promise_of_experts_
from hf_sparse.structure.mixtures import Mixtures

# Of the experts of a block at least this share stays.
LEAST = 0.25


@dataclass(frozen=True)
class ExpertRanking:
    """How much the experts of each mixture are used.

    Attributes:
        scores: of each mixture's experts, `(experts,)`.
        groups: that routers choose among.
    """

    scores: tuple[Tensor, ...]
    groups: int

    @classmethod
    def of(cls, mixtures: Mixtures, batches: Sequence[Any]) -> ExpertRanking:
        """Score experts on calibration data."""
        scores, _ = scores_of(mixtures, batches, "reap")
        return cls(tuple(scores), mixtures.routing.groups)

    def kept(self, count: int) -> list[list[int]]:
        """The experts that stay of each mixture, if so many do."""
        return [kept_in_block(own, count, self.groups) for own in self.scores]


def mixtures_of(model: PreTrainedModel) -> Mixtures:
    """The experts of a model.

    Raises:
        ValueError: it has none, or they cannot go.
    """
    try:
        found = Mixtures.of(model)
    except ValueError as error:
        raise ValueError(f"axis 'experts' is not open: {error} Take axes=('depth',).") from error
    return found


def counts_of(mixtures: Mixtures) -> list[int]:
    """The numbers of experts that blocks may have, from the least on, that of now the last."""
    least = max(math.ceil(LEAST * mixtures.number), 1)
    routing = mixtures.routing
    fewer = [n for n in range(least, mixtures.number) if routing.refusal(n) is None]
    return [*fewer, mixtures.number]


def is_possible(mixtures: Mixtures, count: int) -> bool:
    """Whether transformers builds the model with so many experts."""
    try:
        if count < mixtures.number:
            mixtures.check(count)
    except ValueError:
        return False
    return True


def weights_by_block(mixtures: Mixtures, blocks: Sequence[nn.Module]) -> tuple[int, ...]:
    """For each block how many weights of it belong to one expert: 0 where it is no mixture."""
    if (count := next((n for n in counts_of(mixtures) if is_possible(mixtures, n)), None)) is None:
        return (0,) * len(blocks)
    if count == mixtures.number:
        return (0,) * len(blocks)
    owners = {id(module): n for n, block in enumerate(blocks) for module in block.modules()}
    found = [0] * len(blocks)
    for module, name in mixtures.holders(count):
        held = getattr(module, name)
        if isinstance(held, nn.Parameter):
            found[owners[id(module)]] += held.numel() // mixtures.number
    return tuple(found)


@contextmanager
def without_experts(mixtures: Mixtures, ranking: ExpertRanking, count: int) -> Iterator[None]:
    """Let a model be the one with so many experts, then as it was.

    Memory: the weights of the experts that stay, once more.
    """
    if count == mixtures.number:
        yield
        return
    with mixtures.kept(ranking.kept(count)):
        yield


def keep_experts_(
    model: PreTrainedModel, mixtures: Mixtures, ranking: ExpertRanking, count: int | None
) -> None:
    """Remove the other experts of the mixtures that a model still has.

    Args:
        model: that may have lost blocks.
        mixtures: all that it had.
        ranking: of them.
        count: of experts that stay; None: all do.
    """
    if count in (None, mixtures.number):
        return
    staying = dict(
        zip(
            (id(mixture.stack.module) for mixture in mixtures.mixtures),
            ranking.kept(count),
            strict=True,
        )
    )
    left = Mixtures.of(model)
    kept = [staying[id(mixture.stack.module)] for mixture in left.mixtures]
    promised = promised_experts(model)
    left.keep_(kept)
    renew_promise_of_experts_(left, promised, kept)
