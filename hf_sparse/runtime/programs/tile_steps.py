"""The steps of a stack for many tokens, and how the threads of its program share them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from hf_sparse.runtime.programs.block import all_angles, encoded, filling, residual, steps
from hf_sparse.runtime.programs.dependences import ALL, Use
from hf_sparse.runtime.programs.eight_bits import with_rooms
from hf_sparse.runtime.programs.shape import Shape
from hf_sparse.runtime.programs.step import Append, Attend, Buffer, FeedForward, Step, Uses
from hf_sparse.runtime.programs.tile_buffers import TURNS
from hf_sparse.runtime.weights.stack import Stack


@dataclass(frozen=True, eq=False)
class Load(Uses):
    """Turn what a call gives for `slot` into tiles."""

    slot: str
    y: Buffer
    READS = ()


@dataclass(frozen=True, eq=False)
class Store(Uses):
    """Turn tiles into the output, as that of number `state`."""

    x: Buffer
    state: int
    WRITES = ()


@dataclass(frozen=True, eq=False)
class Copy(Uses):
    """`y = x`."""

    x: Buffer
    y: Buffer


TileStep = Step | Load | Store | Copy
# A step, and the number of its block.
Numbered = tuple[int, TileStep]


def numbered_steps(stack: Stack, shape: Shape) -> Iterator[Numbered]:
    """All steps, from the input to the output, with their blocks' numbers."""
    if shape.filling:
        yield 0, Load("hidden", encoded(stack))
        for index, step in filling(stack):
            yield index, with_rooms(step)
        return
    x = residual(stack)
    yield 0, Load("hidden", x)
    for angle in all_angles(stack):
        yield 0, Load(angle.name, angle)
    for index, block in enumerate(stack.blocks):
        for step in map(with_rooms, steps(stack, block, crossing=shape.encoded > 0)):
            for one in without_overlap(step):
                yield index, one
        if shape.states or index == len(stack.blocks) - 1:
            yield index, Store(x, index if shape.states else 0)


def without_overlap(step: Step) -> list[TileStep]:
    """A feed-forward that reads one buffer and adds to another: `down` adds to its goal while
    `opening` still reads, for later chunks, what was there."""
    if not isinstance(step, FeedForward):
        return [step]
    # What is in eight bits was read before `down` begins.
    if step.down.y not in [one.x for one in step.opening if one.room is None]:
        return [step]
    source = Buffer("source", step.down.y.features)
    opening = tuple(replace(layer, x=source) for layer in step.opening)
    return [Copy(step.down.y, source), replace(step, opening=opening)]


def uses(index: int, step: TileStep, keys: set[str], cached: bool) -> Iterator[Use]:
    """A thread uses its own tiles, and attention the keys of all."""

    def memory(buffer: Buffer) -> tuple[str, int]:
        return buffer.name, index % TURNS if buffer.name in keys else 0

    for buffer in step.reads:
        yield Use(memory(buffer), "own tiles", False)
    for buffer in step.writes:
        yield Use(memory(buffer), "own tiles", True)
    if isinstance(step, Append) and cached:
        yield Use(("cache", index), "own tiles", True)
    if isinstance(step, Attend) and not step.cross:
        yield Use(("cache", index) if cached else memory(step.x), ALL, False)
