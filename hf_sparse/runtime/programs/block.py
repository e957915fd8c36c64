"""What a block does, described once: steps on named buffers.

`steps` is the description. The programs for many tokens and for one token follow it; each knows only
how a kind of step becomes operations (`step.py` has the kinds). Where threads wait for each other,
and which buffers share memory, follows from what the steps say that they read and write
(`dependences.py`).
"""

from __future__ import annotations

from dataclasses import replace

from hf_sparse.runtime.programs.step import (
    Activate,
    Add,
    Append,
    Attend,
    Buffer,
    Experts,
    FeedForward,
    HeadNorms,
    Heads,
    Multiply,
    Normalise,
    Rotate,
    Route,
    Step,
    WidthNorms,
)
from hf_sparse.runtime.weights.stack import (
    NO_WINDOW,
    Block,
    Cross,
    Expert,
    Mixture,
    Norm,
    Stack,
)


def residual(stack: Stack) -> Buffer:
    """What goes from block to block."""
    return Buffer("residual", stack.hidden)


def angles(stack: Stack, rotation: int) -> tuple[Buffer, Buffer]:
    """The cosines and sines of the positions, of one of the rotations that a call brings."""
    suffix = str(rotation or "")
    cos, sin = (Buffer(f"{name}{suffix}", stack.rotary_dim) for name in ("cos", "sin"))
    return cos, sin


def all_angles(stack: Stack) -> list[Buffer]:
    """Those of all rotations."""
    return [buffer for number in range(stack.rotations) for buffer in angles(stack, number)]


def filling(stack: Stack) -> list[tuple[int, Step]]:
    """What keeps the keys and values of an encoder's states, for all blocks, by their numbers."""
    found: list[tuple[int, Step]] = []
    for index, block in enumerate(stack.blocks):
        assert block.cross is not None
        keys = block.cross.keys
        heads = Heads(0, stack.cross_heads(block.cross)[1], stack.head_dim)
        kept = Buffer("keys", keys.rows)
        found += [(index, Multiply(keys, encoded(stack), kept)), (index, Append(heads, kept))]
    return found


def encoded(stack: Stack) -> Buffer:
    """The states of an encoder."""
    cross = stack.blocks[0].cross
    assert cross is not None
    return Buffer("encoded", cross.keys.columns)


def steps(stack: Stack, block: Block, *, crossing: bool = False) -> list[Step]:
    """The steps of one block, in order; those of attention to an encoder's states if there are any."""
    x = residual(stack)
    first, second = block.norms
    cross = _cross_attention(stack, block.cross, x) if crossing and block.cross else []
    if not stack.norm_first:
        behind = [[Normalise(stack.norm, norm, x, x)] for norm in (first, second) if norm]
        attention, perceptron = behind
        return [
            *_attention(stack, block, x, x),
            *attention,
            *cross,
            _feed_forward(stack, block, x, x),
            *perceptron,
        ]
    before, source = _normed(stack, first, x)
    if not stack.parallel:
        again, other = _normed(stack, second, x)
        attended = _added(stack, block, 0, _attention(stack, block, source, x))
        if block.mixture is not None:
            return [*before, *attended, *cross, *again, *_mixture(stack, block.mixture, other, x)]
        return [
            *before,
            *attended,
            *cross,
            *again,
            *_added(stack, block, 1, [_feed_forward(stack, block, other, x)]),
        ]
    # Nothing is added before both have read what they need of the residual.
    *attended, out = _attention(stack, block, source, x)
    again, other = ([], source) if second is None else _normed(stack, second, x)
    return [*before, *attended, *again, _feed_forward(stack, block, other, x), out]


def _normed(stack: Stack, norm: Norm | None, x: Buffer) -> tuple[list[Step], Buffer]:
    """What norms the residual, and where the result is."""
    if norm is None:
        return [], x
    normed = Buffer("normed", stack.hidden)
    return [Normalise(stack.norm, norm, x, normed)], normed


def _added(stack: Stack, block: Block, which: int, found: list[Step]) -> list[Step]:
    """Steps that add to the residual at last; with a norm before that, if the block has one."""
    if block.added_norms is None:
        return found
    x, given, normed = (Buffer(name, stack.hidden) for name in ("residual", "given", "normed"))
    *others, last = found
    match last:
        case Multiply():
            last = replace(last, y=given, add=False)
        case FeedForward():
            last = replace(last, down=replace(last.down, y=given, add=False))
    norm = Normalise(stack.norm, block.added_norms[which], given, normed)
    return [*others, last, norm, Add(normed, x)]


def _attention(stack: Stack, block: Block, source: Buffer, goal: Buffer) -> list[Step]:
    """Attention to `source`, added to `goal`."""
    heads = Heads(*stack.heads_of(block), stack.head_dim)
    qkv, context = Buffer("qkv", block.qkv.rows), Buffer("context", heads.query_rows)
    found: list[Step] = [Multiply(block.qkv, source, qkv)]
    if block.head_norms is not None:
        whole = len(block.head_norms[0].weight) == heads.query_rows != heads.dim
        kind = WidthNorms if whole else HeadNorms
        found.append(kind(heads, qkv, *block.head_norms))
    if stack.rotary and block.rotation is not None:
        found.append(Rotate(heads, qkv, *angles(stack, block.rotation)))
    attend = Attend(
        heads,
        qkv,
        context,
        stack.scale,
        stack.causal,
        block.window,
        stack.softcap,
        stack.biased,
    )
    return [*found, Append(heads, qkv), attend, Multiply(block.out, context, goal, add=True)]


def _cross_attention(stack: Stack, cross: Cross, x: Buffer) -> list[Step]:
    """Attention of `x` to an encoder's states, added to `x`, and its norm."""
    heads = Heads(*stack.cross_heads(cross), stack.head_dim)
    queries, context = (Buffer(name, heads.query_rows) for name in ("queries", "context"))
    norm, source = _normed(stack, cross.norm, x) if stack.norm_first else ([], x)
    return [
        *norm,
        Multiply(cross.query, source, queries),
        Attend(heads, queries, context, stack.scale, False, NO_WINDOW, cross=True),
        Multiply(cross.out, context, x, add=True),
        *([] if stack.norm_first else [Normalise(stack.norm, cross.norm, x, x)]),
    ]


def _feed_forward(
    stack: Stack, layers: Block | Expert, source: Buffer, goal: Buffer, *, add: bool = True
) -> FeedForward:
    """The perceptron of `source`, added to `goal`, or in its place."""
    gate, up = (Buffer(name, layers.up.rows) for name in ("gate", "up"))
    down = Multiply(layers.down, gate, goal, add=add)
    opening: tuple[Multiply, ...]
    if layers.gate is None:
        opening, kernel, other = (Multiply(layers.up, source, gate),), stack.activation, gate
    else:
        opening = (Multiply(layers.gate, source, gate), Multiply(layers.up, source, up))
        kernel, other = f"{stack.activation}_gate", up
    return FeedForward(opening, Activate(kernel, gate, other), down)


def _mixture(stack: Stack, mixture: Mixture, source: Buffer, goal: Buffer) -> list[Step]:
    """The experts of `source`, added to `goal`."""
    count = len(mixture.experts)
    logits, weights = Buffer("logits", count), Buffer("routed", count)
    # A count has 8 bytes.
    counts = Buffer("counts", 2 * count)
    route = Route(logits, weights, counts, mixture.chosen, mixture.normalised)
    packed, result = Buffer("packed", stack.hidden), Buffer("result", stack.hidden)
    experts = tuple(
        _feed_forward(stack, expert, packed, result, add=False) for expert in mixture.experts
    )
    return [
        Multiply(mixture.router, source, logits),
        route,
        Experts(route, source, goal, packed, result, experts),
    ]
