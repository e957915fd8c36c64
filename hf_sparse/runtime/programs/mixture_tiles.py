"""Mixtures of experts on tiles: each expert takes the tokens of a tile that are routed to it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial

from hf_sparse.runtime.kernels.call import Operation
from hf_sparse.runtime.kernels.experts import MOVE, ROUTE, WHEN
from hf_sparse.runtime.programs.nested import Nested
from hf_sparse.runtime.programs.step import Experts, FeedForward, Route
from hf_sparse.runtime.programs.tiling import Tile

Places = Mapping[str, int]


def route(step: Route, tile: Tile, at: Places) -> Operation:
    """Find the experts of a tile's tokens."""
    return ROUTE.operation(
        "route",
        logits=at[step.logits.name],
        weights=at[step.weights.name],
        counts=at[step.counts.name],
        experts=step.logits.features,
        tokens=tile.tokens,
        row_bytes=4 * tile.width,
        chosen=step.chosen,
        normalised=int(step.normalised),
    )


def run_experts(
    step: Experts,
    tile: Tile,
    at: Places,
    nested: Nested,
    feed_forward: Callable[[FeedForward, Tile, Places], list[Operation]],
) -> list[Operation]:
    """Each expert on as narrow a tile as its tokens need: one list for each width.

    Args:
        step: the experts.
        tile: whose tokens they take.
        at: where the buffers are.
        nested: keeps the lists.
        feed_forward: gives the operations of one expert.
    """
    found: list[Operation] = []
    for number, expert in enumerate(step.experts):
        weights = at[step.route.weights.name] + 4 * tile.width * number
        vectors = 1
        while vectors <= tile.vectors:
            narrow = replace(tile, width=vectors * tile.lanes)
            move = partial(
                MOVE.operation, weights=weights, features=step.goal.features, tokens=tile.tokens
            )
            wide_rows, narrow_rows = 4 * tile.width, 4 * narrow.width
            source, packed = at[step.source.name], at[step.packed.name]
            result, goal = at[step.result.name], at[step.goal.name]
            gather = move(
                "gather", x=source, y=packed, x_row_bytes=wide_rows, y_row_bytes=narrow_rows
            )
            scatter = move(
                "scatter", x=result, y=goal, x_row_bytes=narrow_rows, y_row_bytes=wide_rows
            )
            # All tiles of a thread compute in the same buffers, and share these operations.
            own = (*step.inner, *expert.rooms, step.packed, step.result)
            buffers = tuple(at[buffer.name] for buffer in own)
            middle = nested.shared(
                (id(expert), vectors, *buffers),
                partial(feed_forward, expert, narrow, at),
            )
            count = at[step.route.counts.name] + 8 * number
            above, most = (0 if vectors == 1 else narrow.width // 2), narrow.width
            compute = _when(count, above, most, *middle)
            operations = [gather, compute, scatter]
            found.append(_when(count, above, most, nested.place(operations), len(operations)))
            vectors *= 2
    return found


def _when(count: int, above: int, most: int, operations: int, number: int) -> Operation:
    return WHEN.operation(
        "when", count=count, above=above, most=most, operations=operations, number=number
    )
