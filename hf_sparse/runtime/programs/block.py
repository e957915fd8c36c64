"""What a block does, described once: steps on named buffers.

`steps` is the description. The programs for many tokens and for one token follow it; each knows only
how a kind of step becomes operations. Where threads wait for each other, and which buffers share
memory, follows from what the steps say that they read and write (`dependences.py`).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import ClassVar

from hf_sparse.runtime.weights.linear import Linear
from hf_sparse.runtime.weights.stack import NO_WINDOW, Block, Norm, Stack


@dataclass(frozen=True)
class Buffer:
    """`features` numbers of each token."""

    name: str
    features: int


@dataclass(frozen=True)
class Heads:
    """Heads of queries, and of keys; there are as many of values as of keys.

    A buffer that holds all three has the queries first, then the keys, then the values.
    """

    queries: int
    keys: int
    dim: int

    @property
    def group(self) -> int:
        """Heads of queries that share a head of keys."""
        return self.queries // self.keys

    @property
    def query_rows(self) -> int:
        """Features of all queries."""
        return self.queries * self.dim

    @property
    def key_rows(self) -> int:
        """Features of all keys; of all values as many."""
        return self.keys * self.dim


class Uses:
    """What every step tells: which buffers it needs the content of, and which it changes."""

    READS: ClassVar[tuple[str, ...]] = ("x",)
    WRITES: ClassVar[tuple[str, ...]] = ("y",)

    @property
    def reads(self) -> tuple[Buffer, ...]:
        """Buffers whose content it needs: the fields `READS`."""
        return tuple(getattr(self, field) for field in self.READS)

    @property
    def writes(self) -> tuple[Buffer, ...]:
        """Buffers that it changes: the fields `WRITES`."""
        return tuple(getattr(self, field) for field in self.WRITES)


@dataclass(frozen=True, eq=False)
class Normalise(Uses):
    """`y = norm(x)` over all features; `kind` is one of `normalisation.NORMS`."""

    kind: str
    norm: Norm
    x: Buffer
    y: Buffer


@dataclass(frozen=True, eq=False)
class Multiply(Uses):
    """`y = W x + bias`; with `add`, `y += W x + bias`."""

    linear: Linear
    x: Buffer
    y: Buffer
    add: bool = False

    @property
    def reads(self) -> tuple[Buffer, ...]:
        return (self.x, self.y) if self.add else (self.x,)


@dataclass(frozen=True, eq=False)
class Add(Uses):
    """`y += x`."""

    x: Buffer
    y: Buffer
    READS = ("x", "y")


@dataclass(frozen=True, eq=False)
class WidthNorms(Uses):
    """Norm all queries in `x` together, and all keys, in place."""

    heads: Heads
    x: Buffer
    queries: Norm
    keys: Norm
    WRITES = ("x",)


@dataclass(frozen=True, eq=False)
class HeadNorms(Uses):
    """Norm each head of the queries in `x`, and each of the keys, in place."""

    heads: Heads
    x: Buffer
    queries: Norm
    keys: Norm
    WRITES = ("x",)


@dataclass(frozen=True, eq=False)
class Rotate(Uses):
    """Rotate queries and keys in `x` by the angles of their positions, in place.

    The angles have a number for each feature of a head, or for the first ones, which alone are turned.
    """

    heads: Heads
    x: Buffer
    cos: Buffer
    sin: Buffer
    READS, WRITES = ("x", "cos", "sin"), ("x",)


@dataclass(frozen=True, eq=False)
class Append(Uses):
    """Copy keys and values from `x` to the cache of the block, if there is one."""

    heads: Heads
    x: Buffer
    WRITES = ()


@dataclass(frozen=True, eq=False)
class Attend(Uses):
    """`y = softmax(cap(scale q k) + bias + mask) v`.

    The queries are in `x`; keys and values are those of the cache, or of all tokens' `x`.

    Attributes:
        causal: a token sees those before it and itself.
        window: how far back it sees, and ahead if not causal: itself and `window - 1` others.
        softcap: the largest score, 0 for none.
        biased: a bias by distance is added to scores.
    """

    heads: Heads
    x: Buffer
    y: Buffer
    scale: float
    causal: bool
    window: int
    softcap: float = 0.0
    biased: bool = False

    @property
    def ahead(self) -> int:
        """How many tokens ahead a token sees."""
        return 0 if self.causal else self.window - 1

    @property
    def plain(self) -> bool:
        """Whether scores are softmax's as they are, and no window is on both sides."""
        local = not self.causal and self.window != NO_WINDOW
        return not (self.softcap or self.biased or local)


@dataclass(frozen=True, eq=False)
class Activate(Uses):
    """`x = act(x)`, or `x = act(x) * other`, as `kernel` does."""

    kernel: str
    x: Buffer
    other: Buffer
    READS, WRITES = ("x", "other"), ("x",)


@dataclass(frozen=True, eq=False)
class FeedForward(Uses):
    """`opening`, `activate` and `down`, of which only the result lasts.

    A program may take some of the intermediate features at a time.
    """

    opening: tuple[Multiply, ...]
    activate: Activate
    down: Multiply

    @property
    def parts(self) -> tuple[Multiply | Activate, ...]:
        """The same as steps of their own."""
        return (*self.opening, self.activate, self.down)

    @property
    def inner(self) -> tuple[Buffer, ...]:
        """The buffers of intermediate features."""
        return tuple(layer.y for layer in self.opening)

    @property
    def reads(self) -> tuple[Buffer, ...]:
        outer = [*(layer.x for layer in self.opening), *self.down.reads]
        return tuple(buffer for buffer in outer if buffer not in self.inner)

    @property
    def writes(self) -> tuple[Buffer, ...]:
        return (*self.inner, self.down.y)


HeadStep = HeadNorms | Rotate | Append | Attend
Step = Normalise | Multiply | Add | WidthNorms | HeadStep | FeedForward


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


def rotated_at_once(heads: int, dim: int, cos: Buffer) -> Iterator[tuple[int, int]]:
    """A kernel turns whole heads, so it takes all of them, or the first features of each by itself.

    Yields:
        The first head of each call, and how many it turns.
    """
    if cos.features == dim:
        yield 0, heads
    else:
        yield from ((head, 1) for head in range(heads))


def steps(stack: Stack, block: Block) -> list[Step]:
    """The steps of one block, in order."""
    x = residual(stack)
    first, second = block.norms
    if not stack.norm_first:
        behind = [[Normalise(stack.norm, norm, x, x)] for norm in (first, second) if norm]
        attention, perceptron = behind
        return [
            *_attention(stack, block, x, x),
            *attention,
            _feed_forward(stack, block, x, x),
            *perceptron,
        ]
    before, source = _normed(stack, first, x)
    if not stack.parallel:
        again, other = _normed(stack, second, x)
        attended = _added(stack, block, 0, _attention(stack, block, source, x))
        return [
            *before,
            *attended,
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


def _feed_forward(stack: Stack, block: Block, source: Buffer, goal: Buffer) -> FeedForward:
    """The perceptron of `source`, added to `goal`."""
    gate, up = (Buffer(name, block.up.rows) for name in ("gate", "up"))
    down = Multiply(block.down, gate, goal, add=True)
    opening: tuple[Multiply, ...]
    if block.gate is None:
        opening, kernel, other = (Multiply(block.up, source, gate),), stack.activation, gate
    else:
        opening = (Multiply(block.gate, source, gate), Multiply(block.up, source, up))
        kernel, other = f"{stack.activation}_gate", up
    return FeedForward(opening, Activate(kernel, gate, other), down)
