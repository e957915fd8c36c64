"""What a block does, described once: steps on named buffers.

`steps` is the description. The programs for many tokens and for one token follow it; each knows only
how a kind of step becomes operations. Where threads wait for each other, and which buffers share
memory, follows from what the steps say that they read and write (`dependences.py`).
"""

from __future__ import annotations

from dataclasses import dataclass
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
class HeadNorms(Uses):
    """Norm each head of the queries in `x`, and each of the keys, in place."""

    heads: Heads
    x: Buffer
    queries: Norm
    keys: Norm
    WRITES = ("x",)


@dataclass(frozen=True, eq=False)
class Rotate(Uses):
    """Rotate queries and keys in `x` by the angles of their positions, in place."""

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
    """`y = softmax(scale q k + mask) v`.

    The queries are in `x`; keys and values are those of the cache, or of all tokens' `x`.

    Attributes:
        causal: a token sees those before it and itself.
        window: how far back it sees.
    """

    heads: Heads
    x: Buffer
    y: Buffer
    scale: float
    causal: bool
    window: int


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
Step = Normalise | Multiply | HeadStep | FeedForward


def residual(stack: Stack) -> Buffer:
    """What goes from block to block."""
    return Buffer("residual", stack.hidden)


def angles(stack: Stack) -> tuple[Buffer, ...]:
    """The cosines and sines of the positions, if the stack is rotary."""
    return tuple(Buffer(name, stack.head_dim) for name in ("cos", "sin") if stack.rotary)


def steps(stack: Stack, block: Block) -> list[Step]:
    """The steps of one block, in order."""
    x = residual(stack)
    # Norms come before attention and perceptron, or behind their sum with the residual.
    source = Buffer("normed", stack.hidden) if stack.norm_first else x
    norms = [Normalise(stack.norm, norm, x, source) for norm in block.norms]
    before = norms if stack.norm_first else []
    behind = [] if stack.norm_first else norms
    return [
        *before[:1],
        *_attention(stack, block, source, x),
        *behind[:1],
        *before[1:],
        _feed_forward(stack, block, source, x),
        *behind[1:],
    ]


def _attention(stack: Stack, block: Block, source: Buffer, goal: Buffer) -> list[Step]:
    """Attention to `source`, added to `goal`."""
    heads = Heads(*stack.heads_of(block), stack.head_dim)
    qkv, context = Buffer("qkv", block.qkv.rows), Buffer("context", heads.query_rows)
    found: list[Step] = [Multiply(block.qkv, source, qkv)]
    if block.head_norms is not None:
        found.append(HeadNorms(heads, qkv, *block.head_norms))
    if stack.rotary:
        found.append(Rotate(heads, qkv, *angles(stack)))
    window = block.window if stack.causal else NO_WINDOW
    return [
        *found,
        Append(heads, qkv),
        Attend(heads, qkv, context, stack.scale, stack.causal, window),
        Multiply(block.out, context, goal, add=True),
    ]


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
