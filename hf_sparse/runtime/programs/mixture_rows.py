"""Mixtures of experts for single tokens: the threads share the rows of the experts that are chosen."""

from __future__ import annotations

from collections.abc import Sequence

from hf_sparse.runtime.kernels import activation
from hf_sparse.runtime.kernels.call import Operation
from hf_sparse.runtime.kernels.code_formats import BLOCK
from hf_sparse.runtime.kernels.code_rows import QUANTISE_ROW
from hf_sparse.runtime.kernels.experts import ROUTE, WEIGH, WHEN
from hf_sparse.runtime.programs.nested import Nested
from hf_sparse.runtime.programs.step import CloseExperts, OpenExperts, Route
from hf_sparse.runtime.weights.rows import share_rows

# Of a thread: the address of each sequence's vector.
Places = Sequence[int]


def route(step: Route, logits: Places, weights: Places, counts: Places) -> list[Operation]:
    """Find the experts of each sequence's token."""
    return [
        ROUTE.operation(
            "route",
            logits=one,
            weights=weight,
            counts=count,
            experts=step.logits.features,
            tokens=1,
            row_bytes=4,
            chosen=step.chosen,
            normalised=int(step.normalised),
        )
        for one, weight, count in zip(logits, weights, counts, strict=True)
    ]


def _if_chosen(nested: Nested, count: int, operations: Sequence[Operation]) -> Operation:
    return WHEN.operation(
        "when",
        count=count,
        above=0,
        most=1,
        operations=nested.place(operations),
        number=len(operations),
    )


def open_experts(
    step: OpenExperts,
    part: tuple[int, int],
    lanes: int,
    nested: Nested,
    places: Sequence[tuple[int, int, int, int, int]],
) -> list[Operation]:
    """A thread's rows of the experts' first layers.

    Args:
        step: the experts.
        part: thread, and the number of threads.
        lanes: of a vector.
        nested: keeps the operations of each expert.
        places: of each sequence, where it has its features, weights, counts, gates and ups.
    """
    thread, threads = part
    first, last = share_rows(step.experts[0].inner[0].features, threads)[thread]
    if first >= last:
        return []
    count = -(-(last - first) // lanes)
    found: list[Operation] = []
    for number, expert in enumerate(step.experts):
        gate, up = expert.opening
        for x, weights, counts, gates, ups in places:
            own, other = (place + 4 * step.width * number for place in (gates, ups))
            operations = [
                gate.linear.row_operation(x, own, first, last),
                up.linear.row_operation(x, other, first, last),
                activation.SIGNATURE.operation(
                    expert.activate.kernel, x=own + 4 * first, y=other + 4 * first, vectors=count
                ),
                WEIGH.operation(
                    "weigh", x=own + 4 * first, weight=weights + 4 * number, vectors=count
                ),
            ]
            found.append(_if_chosen(nested, counts + 8 * number, operations))
    return found


def close_experts(
    step: CloseExperts,
    part: tuple[int, int],
    nested: Nested,
    places: Sequence[tuple[int, int, int, int]],
) -> list[Operation]:
    """A thread's rows of the experts' last layers; `places` of counts, gates, goal, and of the room
    for features in eight bits."""
    thread, threads = part
    first, last = share_rows(step.goal.features, threads)[thread]
    if first >= last:
        return []
    found: list[Operation] = []
    for number, expert in enumerate(step.experts):
        for counts, gates, goal, room in places:
            own, operations = gates + 4 * step.width * number, []
            if step.room is not None:
                blocks = -(-expert.down.linear.columns // BLOCK)
                operations.append(
                    QUANTISE_ROW.operation("quantise_row", x=own, records=room, blocks=blocks)
                )
                own = room
            operations.append(expert.down.linear.row_operation(own, goal, first, last, add=True))
            found.append(_if_chosen(nested, counts + 8 * number, operations))
    return found
