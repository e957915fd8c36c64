"""The packed weights of a whole stack of blocks, and the numbers that describe it."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from hf_sparse.runtime.kernels import normalisation
from hf_sparse.runtime.kernels.call import Operation
from hf_sparse.runtime.kernels.weight_types import WEIGHT_TYPES, WeightType
from hf_sparse.runtime.weights.linear import Linear

# No window: further back than any position.
NO_WINDOW = 1 << 30


@dataclass(frozen=True, eq=False)
class Norm:
    """Weight and bias of a norm; `bias` is zeros for RMSNorm."""

    weight: Tensor
    bias: Tensor
    epsilon: float

    def operation(self, kernel: str, x: int, y: int, features: int, groups: int = 1) -> Operation:
        """Norm each of `groups` groups of `features` features at `x`, and write them to `y`."""
        return normalisation.SIGNATURE.operation(
            kernel,
            x=x,
            y=y,
            features=features,
            groups=groups,
            weight=self.weight.data_ptr(),
            bias=self.bias.data_ptr(),
            epsilon=self.epsilon,
        )


@dataclass(frozen=True, eq=False)
class Expert:
    """The layers of one expert."""

    gate: Linear
    up: Linear
    down: Linear


@dataclass(frozen=True, eq=False)
class Mixture:
    """Experts, of which every token uses some.

    Attributes:
        router: gives a logit for each expert.
        experts: all of one size.
        chosen: experts of a token: those with the largest logits.
        normalised: their weights, the softmax of all logits, are divided by their sum.
    """

    router: Linear
    experts: tuple[Expert, ...]
    chosen: int
    normalised: bool


@dataclass(frozen=True, eq=False)
class Cross:
    """Attention of a decoder's block to the states that an encoder gave.

    Attributes:
        query: queries, of what the block has.
        keys: keys and values, of the encoder's states.
        out: the projection behind attention.
        norm: before the queries, or behind the sum with the residual (`Stack.norm_first`).
    """

    query: Linear
    keys: Linear
    out: Linear
    norm: Norm


@dataclass(frozen=True, eq=False)
class Block:
    """One block. Parts are None where the family has none.

    Attributes:
        norms: of what attention and the perceptron read, or behind the sum with the residual
            (`Stack.norm_first`); where a second one is None, the perceptron reads what is there: the
            residual, or, side by side with attention (`Stack.parallel`), the same as attention.
        added_norms: of what attention and the perceptron give, before that is added.
        head_norms: of queries and keys: of each head, or of all heads together if they are so long.
        window: how many tokens back a token sees; if attention is not causal, as many ahead.
        rotation: which of a call's rotations turns queries and keys; None for none.
        mixture: experts in place of one perceptron; `gate`, `up` and `down` are the first one's.
        cross: attention to an encoder's states, between attention and the perceptron.
        distances: `(heads, 2 * furthest + 1)`, what is added to scores, by how far a query is behind a
            key: distance 0 is in the middle; of those further apart, as of the furthest.
    """

    qkv: Linear
    out: Linear
    up: Linear
    down: Linear
    gate: Linear | None
    norms: tuple[Norm | None, Norm | None]
    head_norms: tuple[Norm, Norm] | None
    window: int
    added_norms: tuple[Norm, Norm] | None = None
    rotation: int | None = 0
    mixture: Mixture | None = None
    cross: Cross | None = None
    distances: Tensor | None = None

    @property
    def named_linears(self) -> dict[str, Linear]:
        """The packed weights by their places in the block, in the order of their use."""
        named: dict[str, Linear | None] = {"qkv": self.qkv, "out": self.out}
        if self.cross is not None:
            parts = {"query": self.cross.query, "keys": self.cross.keys, "out": self.cross.out}
            named |= {f"cross.{name}": linear for name, linear in parts.items()}
        if self.mixture is None:
            named |= {"gate": self.gate, "up": self.up, "down": self.down}
        else:
            named["router"] = self.mixture.router
            for number, expert in enumerate(self.mixture.experts):
                named |= {f"experts.{number}.{name}": one for name, one in vars(expert).items()}
        return {name: linear for name, linear in named.items() if linear is not None}

    @property
    def linears(self) -> list[Linear]:
        """The packed weights, in the order of their use."""
        return list(self.named_linears.values())


@dataclass(frozen=True, eq=False)
class Stack:
    """All blocks of a model.

    Attributes:
        blocks: in the order in which they run; a shared block (ALBERT) is there several times.
        hidden, heads, key_heads, head_dim, intermediate: sizes; heads, key_heads and intermediate are
            the most of any block: `hf_sparse.shrink_` leaves some blocks fewer.
        scale: what scores are multiplied by.
        norm, norm_first, causal, rotary, activation, parallel: see `families.Blocks`.
        rotated: the first features of each head, which are rotated; 0 for all.
        softcap: the largest score, by a tanh; 0 for no such limit.
        biased: something is added to scores by distance: the blocks' `distances`, or what a call brings
            if they have none.
        multiplier: of what blocks add to the residual. The residual is divided by it on the way in
            and multiplied on the way out, so that blocks add what they have; norms take no notice,
            since their epsilons are divided by its square.
    """

    blocks: tuple[Block, ...]
    hidden: int
    heads: int
    key_heads: int
    head_dim: int
    intermediate: int
    scale: float
    norm: str
    norm_first: bool
    causal: bool
    rotary: bool
    activation: str
    parallel: bool = False
    rotated: int = 0
    softcap: float = 0.0
    biased: bool = False
    multiplier: float = 1.0

    @property
    def query_rows(self) -> int:
        """Rows of all heads' queries, in a block that has all heads."""
        return self.heads * self.head_dim

    @property
    def key_rows(self) -> int:
        """Rows of all heads' keys, in a block that has all; as many of values."""
        return self.key_heads * self.head_dim

    def heads_of(self, block: Block) -> tuple[int, int]:
        """Heads of queries and heads of keys that a block has."""
        heads = block.out.columns // self.head_dim
        return heads, (block.qkv.rows // self.head_dim - heads) // 2

    def rows_of(self, block: Block) -> tuple[int, int]:
        """Rows of a block's queries, and of its keys."""
        heads, key_heads = self.heads_of(block)
        return heads * self.head_dim, key_heads * self.head_dim

    def cross_heads(self, cross: Cross) -> tuple[int, int]:
        """Heads of queries and of keys that attention to an encoder's states has."""
        return cross.out.columns // self.head_dim, cross.keys.rows // (2 * self.head_dim)

    @property
    def crosses(self) -> bool:
        """Whether blocks can attend to an encoder's states."""
        return self.blocks[0].cross is not None

    @property
    def rotations(self) -> int:
        """How many rotations a call brings: cosines and sines of the positions, each."""
        turned = [block.rotation for block in self.blocks if block.rotation is not None]
        return 1 + max(turned, default=-1) if self.rotary else 0

    @property
    def rotary_dim(self) -> int:
        """Features of a head that are rotated."""
        return self.rotated or self.head_dim

    @property
    def linears(self) -> list[Linear]:
        """The packed weights of all blocks, shared ones once."""
        unique = {id(linear): linear for block in self.blocks for linear in block.linears}
        return list(unique.values())

    @property
    def weight_type(self) -> WeightType:
        """The type of all weights."""
        return WEIGHT_TYPES[self.blocks[0].qkv.dtype]

    @property
    def has_codes(self) -> bool:
        """Whether some weights are codes of few bits."""
        return any(linear.codes is not None for linear in self.linears)
