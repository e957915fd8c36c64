"""The kinds of steps of a block, and the buffers that they work on.

Each tells what it reads and what it changes; how it becomes operations, the programs know.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from hf_sparse.runtime.weights.linear import Linear
from hf_sparse.runtime.weights.rows import DECODE_ROWS as ROW_UNIT
from hf_sparse.runtime.weights.stack import NO_WINDOW, Norm


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
    """`y = W x + bias`; with `add`, `y += W x + bias`.

    Attributes:
        room: where a program for many tokens puts `x` in eight bits, for weights of few bits.
    """

    linear: Linear
    x: Buffer
    y: Buffer
    add: bool = False
    room: Buffer | None = None

    @property
    def reads(self) -> tuple[Buffer, ...]:
        return (self.x, self.y) if self.add else (self.x,)

    @property
    def writes(self) -> tuple[Buffer, ...]:
        return (self.y,) if self.room is None else (self.y, self.room)


@dataclass(frozen=True, eq=False)
class Quantise(Uses):
    """`y = x` in eight bits, for weights of few bits; one token's alone."""

    x: Buffer
    y: Buffer


@dataclass(frozen=True, eq=False)
class Add(Uses):
    """`y += x`."""

    x: Buffer
    y: Buffer
    READS = ("x", "y")


@dataclass(frozen=True, eq=False)
class QueryKeyNorms(Uses):
    """Norm queries and keys in `x`, in place."""

    heads: Heads
    x: Buffer
    queries: Norm
    keys: Norm
    WRITES = ("x",)


class WidthNorms(QueryKeyNorms):
    """All queries of a token together, and all keys."""


class HeadNorms(QueryKeyNorms):
    """Each head of the queries, and each of the keys."""


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

    The queries are in `x`; keys and values are those of the cache, or of all tokens' `x`, or of an
    encoder's states.

    Attributes:
        causal: a token sees those before it and itself.
        window: how far back it sees, and ahead if not causal: itself and `window - 1` others.
        softcap: the largest score, 0 for none.
        biased: a bias by distance is added to scores.
        cross: keys and values are those of an encoder's states; all of them are seen.
    """

    heads: Heads
    x: Buffer
    y: Buffer
    scale: float
    causal: bool
    window: int
    softcap: float = 0.0
    biased: bool = False
    cross: bool = False

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
    def rooms(self) -> tuple[Buffer, ...]:
        """Where features are put in eight bits."""
        return tuple(layer.room for layer in (*self.opening, self.down) if layer.room is not None)

    @property
    def writes(self) -> tuple[Buffer, ...]:
        return (*self.inner, *self.rooms, self.down.y)


@dataclass(frozen=True, eq=False)
class Route(Uses):
    """`weights` of the experts that the largest of `logits` name; how many tokens in `counts`.

    Attributes:
        chosen: experts of a token.
        normalised: their weights sum up to 1.
    """

    logits: Buffer
    weights: Buffer
    counts: Buffer
    chosen: int
    normalised: bool
    READS, WRITES = ("logits",), ("weights", "counts")


@dataclass(frozen=True, eq=False)
class Experts(Uses):
    """Each expert's `FeedForward` of its tokens, times their weights, added to `goal`.

    The experts read the tokens in `packed`, one behind the other, and write to `result`. A program
    for single tokens needs no such moves: it has `opening` and `closing`, with a buffer for the
    intermediate features of all experts.
    """

    route: Route
    source: Buffer
    goal: Buffer
    packed: Buffer
    result: Buffer
    experts: tuple[FeedForward, ...]

    @property
    def inner(self) -> tuple[Buffer, ...]:
        """The buffers of intermediate features."""
        return self.experts[0].inner

    @property
    def reads(self) -> tuple[Buffer, ...]:
        return (self.source, self.route.weights, self.route.counts, self.goal)

    @property
    def writes(self) -> tuple[Buffer, ...]:
        return (self.packed, self.result, *self.inner, *self.experts[0].rooms, self.goal)

    @property
    def parts(self) -> tuple[OpenExperts, CloseExperts]:
        """The same as steps for single tokens."""
        width = -(-self.inner[0].features // ROW_UNIT) * ROW_UNIT
        gates, ups = (
            Buffer(f"experts' {buffer.name}", width * len(self.experts)) for buffer in self.inner
        )
        opened = OpenExperts(self.route, self.source, self.experts, gates, ups, width)
        return opened, CloseExperts(self.route, self.goal, self.experts, gates, width)


@dataclass(frozen=True, eq=False)
class OpenExperts(Uses):
    """The weighted intermediate features of the experts that a token is routed to.

    Those of an expert begin `width` features behind those of the one before.
    """

    route: Route
    source: Buffer
    experts: tuple[FeedForward, ...]
    gates: Buffer
    ups: Buffer
    width: int

    @property
    def reads(self) -> tuple[Buffer, ...]:
        return (self.source, self.route.weights, self.route.counts)

    @property
    def writes(self) -> tuple[Buffer, ...]:
        return (self.gates, self.ups)


@dataclass(frozen=True, eq=False)
class CloseExperts(Uses):
    """`goal +=` what `down` of the experts makes of their features; these in eight bits in `room`."""

    route: Route
    goal: Buffer
    experts: tuple[FeedForward, ...]
    gates: Buffer
    width: int
    room: Buffer | None = None

    @property
    def reads(self) -> tuple[Buffer, ...]:
        return (self.gates, self.route.counts, self.goal)

    @property
    def writes(self) -> tuple[Buffer, ...]:
        return (self.goal,) if self.room is None else (self.goal, self.room)


HeadStep = HeadNorms | Rotate | Append | Attend
Step = Normalise | Multiply | Add | WidthNorms | HeadStep | FeedForward | Route | Experts
