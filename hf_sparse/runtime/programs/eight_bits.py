"""Features of tiles in eight bits, for weights of few bits: where they are put, and what makes them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from hf_sparse.runtime.kernels.byte_tiles import QUANTISE_TILE, record_features
from hf_sparse.runtime.kernels.call import Operation
from hf_sparse.runtime.programs.step import Buffer, Experts, FeedForward, Multiply, Step
from hf_sparse.runtime.programs.tiling import Tile
from hf_sparse.runtime.weights.panels import CHUNK_ROWS

Places = Mapping[str, int]


def with_rooms(step: Step) -> Step:
    """The step with room for what it reads in eight bits, if its weights are of few bits."""
    match step:
        case Multiply():
            return _with_room(step, "eight bits", step.x.features)
        case FeedForward():
            return _opened(step)
        case Experts():
            return replace(step, experts=tuple(map(_opened, step.experts)))
    return step


def _opened(step: FeedForward) -> FeedForward:
    """Intermediate features are made, and put in eight bits, a chunk at a time."""
    opening = tuple(_with_room(one, "eight bits", one.x.features) for one in step.opening)
    most = min(step.down.x.features, CHUNK_ROWS)
    return replace(step, opening=opening, down=_with_room(step.down, "a chunk's eight bits", most))


def _with_room(step: Multiply, name: str, features: int) -> Multiply:
    if step.linear.codes is None:
        return step
    return replace(step, room=Buffer(name, record_features(features)))


def quantised(step: Multiply, tile: Tile, at: Places, columns: int = 0) -> list[Operation]:
    """What puts the features that a step reads in eight bits: `columns` of them, or all."""
    if step.room is None:
        return []
    return [
        QUANTISE_TILE.operation(
            f"quantise_tile{tile.vectors}",
            x=at[step.x.name],
            records=at[step.room.name],
            columns=columns or step.x.features,
        )
    ]


def in_eight_bits(step: Multiply, at: Places) -> int:
    """Where the features are that the weight of a step is multiplied with."""
    return at[(step.room or step.x).name]
