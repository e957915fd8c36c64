"""Blocks: what the compiler must know of a family's blocks. `families.COMPILED` has one for each.

A block is attention and a two-layer perceptron, each with norms and a residual. What differs between
families is where the parts are (`hf_sparse.structure.parts`), which comes first, and what is done to
positions and scores; the forward code is not repeated.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from hf_sparse.structure.parts import Parts

# transformers' names of activations, and the kernels that compute them.
ACTIVATION_NAMES = {
    "gelu": "gelu",
    "gelu_python": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_python_tanh": "gelu_tanh",
    "relu": "relu",
    "silu": "silu",
    "swish": "silu",
}
SLIDING = "sliding_attention"


@dataclass(frozen=True)
class CrossParts:
    """Paths, in a block, of what attends to an encoder's states.

    Attributes:
        query, out: projections to queries, and behind attention.
        keys: projections to keys and to values.
        norm: before the queries, or behind the residual.
    """

    query: str
    keys: tuple[str, str]
    out: str
    norm: str


@dataclass(frozen=True, kw_only=True)
class Blocks(Parts):
    """What the compiler must know of a family's blocks beside where their parts are.

    A gate and `up` at one path are one layer, whose first half is the gate.

    Attributes:
        norms: attention's and the perceptron's, None where there is none.
        bare_first: the first block has no norm before attention.
        added_norms: of what attention and the perceptron give, before it is added to the residual.
        head_norms: of queries and keys, each head by itself or all together, as long as their weights.
        norm: `layer` or `rms`.
        norm_offset: added to the norms' weights.
        norm_first: norms come before attention and perceptron, else behind the residual; or the
            name of the config's attribute that tells.
        parallel: attention and perceptron read the same residual; or the config's attribute that tells.
            Where the second of `norms` is None, they also share the first.
        interleaved: the layer that gives queries, keys and values gives all three of a head, then
            those of the next one.
        causal: a token sees those before it and itself.
        windows: the config may limit how far back a token sees; not causal, how far on both sides.
        rotary: positions are rotations of queries and keys.
        partial_rotary: of the first features of each head, a share that the config tells.
        rotary_kinds: each kind of attention in the config's `layer_types` has its own rotation.
        unrotated: the config's list that tells which blocks rotate, if not all do.
        biased: the model gives its blocks a bias by distance, which is added to scores.
        distances: a module in a block that has such a bias for buckets of distances; blocks without one
            have the first block's.
        cross: attention to an encoder's states, if blocks have it.
        names: attributes of the config that have another name for this stack, by their usual names.
        scale: what scores are multiplied by, from the config; by default the usual one.
        softcap: the config's attribute with the largest score.
        multiplier: the config's attribute by which is multiplied what is added to the residual.
        activation: the config's attribute that names the activation.
        epsilon: of all norms: the config's attribute that tells, or a number.
        router: the module whose weight gives a logit for each expert, in place of one perceptron; then
            `gate` and `up` are a parameter with the halves for each expert, and `down` is another.
        chosen: the config's attribute with the experts of a token.
        normalised: the weights of a token's experts sum up to 1; or the config's attribute.
        varied: blocks differ by their place, beside their kind of attention.
        last_norm: the norm behind the blocks, where the model around them is an embedding, the norm and
            a head, and nothing else is done to what they give. None: more is.
        block_class: the class of blocks, where transformers does not tell by which it collects hidden
            states: there the model's own loop does.
        clamped: hidden states in float16 that are too large become the largest number that there is.
        outputs: blocks give a tuple of so many values, the hidden states first; 0: these alone.
        supported: attributes of the config, and the values of them that are compiled.
    """

    norms: tuple[str | None, str | None]
    bare_first: bool = False
    added_norms: tuple[str, str] | None = None
    head_norms: tuple[str, str] | None = None
    norm: str = "layer"
    norm_offset: float = 0.0
    norm_first: bool | str = True
    parallel: bool | str = False
    interleaved: bool = False
    causal: bool = True
    windows: bool = False
    rotary: bool = False
    partial_rotary: bool = False
    rotary_kinds: bool = False
    unrotated: str | None = None
    biased: bool = False
    distances: str | None = None
    cross: CrossParts | None = None
    names: dict[str, str] = field(default_factory=dict)
    scale: Callable[[Any], float] | None = None
    softcap: str | None = None
    multiplier: str | None = None
    activation: str = "hidden_act"
    epsilon: str | float = "layer_norm_eps"
    router: str | None = None
    chosen: str = "num_experts_per_tok"
    normalised: bool | str = True
    varied: bool = False
    last_norm: str | None = None
    block_class: str | None = None
    clamped: bool = False
    outputs: int = 0
    supported: dict[str, tuple[object, ...]] = field(default_factory=dict)

    @property
    def holder(self) -> str:
        """The path of the module that has the list of blocks; empty for the base model itself."""
        return self.stack.rpartition(".")[0]

    @property
    def list_name(self) -> str:
        """What that module calls the list."""
        return self.stack.rpartition(".")[2]

    def norm_paths(self, index: int) -> tuple[str | None, str | None]:
        """Attention's and the perceptron's norms in block `index`."""
        first, second = self.norms
        return None if self.bare_first and not index else first, second

    def window(self, config: Any, index: int) -> int | None:
        """How many tokens back block `index` sees, itself among them; None for all."""
        if not self.windows:
            return None
        kinds = getattr(config, "layer_types", None)
        sliding = kinds[index] == SLIDING if kinds else True
        window: int | None = getattr(config, "sliding_window", None) if sliding else None
        # On both sides transformers counts the others alone.
        return window if window is None or self.causal else window + 1

    def rotation(self, config: Any, index: int) -> int | None:
        """Which of the model's rotations block `index` uses, None for none."""
        if self.unrotated is not None and not getattr(config, self.unrotated)[index]:
            return None
        return self.kinds(config).index(config.layer_types[index]) if self.rotary_kinds else 0

    def kinds(self, config: Any) -> list[str]:
        """Kinds of attention that have rotations of their own, in the order of rotations."""
        return list(dict.fromkeys(config.layer_types)) if self.rotary_kinds else []
