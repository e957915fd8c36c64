"""The steps of a stack for one new token, and how the threads of its program share them."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from dataclasses import replace

from hf_sparse.runtime.programs.block import residual, steps
from hf_sparse.runtime.programs.dependences import ALL, Use
from hf_sparse.runtime.programs.step import (
    Activate,
    Add,
    Buffer,
    CloseExperts,
    Experts,
    FeedForward,
    HeadStep,
    Multiply,
    Normalise,
    OpenExperts,
    Quantise,
    Route,
    WidthNorms,
)
from hf_sparse.runtime.weights.stack import Stack

Mixing = Route | OpenExperts | CloseExperts
RowStep = Normalise | Multiply | Quantise | Add | WidthNorms | HeadStep | Activate | Mixing
# A step, and the number of its block.
Numbered = tuple[int, RowStep]


def fits(stack: Stack) -> bool:
    """Whether a stack's single tokens can be computed by rows: else they go as narrow tiles."""
    every = [step for _, step in numbered_steps(stack, crossing=stack.crosses)]
    own = own_buffers(every)
    others = [step for step in every if not isinstance(step, Normalise | Route | Quantise)]
    alone = all(own.isdisjoint(_shared(step)) for step in others)
    given = stack.biased and stack.blocks[0].distances is None
    return alone and stack.causal and not given


def numbered_steps(stack: Stack, *, crossing: bool = False) -> Iterator[Numbered]:
    """All steps with their blocks' numbers; features in eight bits are made where codes need them."""
    packed: dict[Buffer, Buffer] = {}
    for index, block in enumerate(stack.blocks):
        for step in steps(stack, block, crossing=crossing):
            for one in step.parts if isinstance(step, FeedForward | Experts) else (step,):
                for part in [one] if stack.norm_first else _sum_apart(one, residual(stack)):
                    for found in _with_eight_bits(part, packed):
                        yield index, found


def _sum_apart(step: RowStep, x: Buffer) -> list[RowStep]:
    """A step of a block whose norms are behind the residual: these are read from elsewhere.

    Every thread norms all features, so `x`, where the result goes, is each thread's own; what is added
    to it is not, and is added elsewhere, each thread its rows.
    """
    total = Buffer("sum", x.features)
    match step:
        case Multiply() if step.y == x:
            return [replace(step, y=total, add=False), Add(x, total)]
        case Normalise() if step.x == x:
            return [replace(step, x=total)]
    return [step]


def _with_eight_bits(step: RowStep, packed: dict[Buffer, Buffer]) -> Iterator[RowStep]:
    """A step as it reads features in eight bits, and before it what makes them.

    Args:
        step: reads floats.
        packed: buffers whose content is there in eight bits as well, and where.
    """
    match step:
        case Multiply() if step.linear.codes is not None:
            yield from _made(step.x, packed)
            step = replace(step, x=packed[step.x])
        case OpenExperts() if step.experts[0].opening[0].linear.codes is not None:
            yield from _made(step.source, packed)
            step = replace(step, source=packed[step.source])
        case CloseExperts() if step.experts[0].down.linear.codes is not None:
            step = replace(step, room=Buffer("gates, in eight bits", step.width))
    yield step
    for buffer in step.writes:
        packed.pop(buffer, None)


def _made(x: Buffer, packed: dict[Buffer, Buffer]) -> Iterator[Quantise]:
    """What makes features in eight bits, unless they are there. Records fit into as many floats."""
    if x not in packed:
        packed[x] = Buffer(f"{x.name}, in eight bits", x.features)
        yield Quantise(x, packed[x])


def own_buffers(every: Sequence[RowStep]) -> set[Buffer]:
    """The buffers that each thread has for itself: every thread norms all features."""
    own = {step.y for step in every if isinstance(step, Normalise | Quantise)}
    own |= {step.room for step in every if isinstance(step, CloseExperts) and step.room}
    return own.union(*(step.writes for step in every if isinstance(step, Route)))


def _shared(step: RowStep) -> Sequence[Buffer]:
    """What a step changes that is not a thread's own."""
    return (step.goal,) if isinstance(step, CloseExperts) else step.writes


def uses(step: RowStep, own: set[Buffer]) -> Iterator[Use]:
    """A norm reads all features, and so does a weight; else a thread uses its rows, or its heads."""
    part: Hashable
    match step:
        case Multiply():
            part = step.linear.rows
        case Activate() | Add():
            part = step.x.features
        case Normalise() | Quantise():
            part = ALL
        case Route():
            part = ALL
        case OpenExperts():
            part = "rows of each expert"
        case CloseExperts():
            part = step.goal.features
        case WidthNorms():
            part = "the first and the last thread"
        case _:
            part = step.heads
    whole: tuple[Buffer, ...] = ()
    if isinstance(step, Multiply | CloseExperts):
        whole = (step.x,) if isinstance(step, Multiply) else (step.gates,)
    for buffer in step.reads:
        if buffer not in own:
            yield Use(buffer, ALL if buffer in whole else part, False)
    for buffer in step.writes:
        if buffer not in own:
            yield Use(buffer, part, True)
