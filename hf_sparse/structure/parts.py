"""PARTS: where attention and the feed-forward network are in each family's blocks, by name.

Read by what works on whole heads and neurons (`hf_sparse.structure.units`) and by the compiler.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from hf_sparse.structure.families import base_type


@dataclass(frozen=True, kw_only=True)
class Parts:
    """Names of modules; but for the stack they are paths inside a block.

    Attributes:
        stack: path of the list of blocks in the base model.
        qkv: the projections to queries, keys and values, or the one that gives all three.
        out: the projection behind attention.
        up, down: the feed-forward network's layers.
        gate: the layer whose activation multiplies `up`, if the family has one.
        act: the network's activation.
        layout: of one projection for all: "parts", or "heads" if it has three parts for each head.
        joined: whether `up` holds the rows of a gate, before its own.
        fixed: why no head can go; None: they can.
    """

    stack: str
    qkv: tuple[str, ...]
    out: str
    up: str
    down: str
    gate: str | None = None
    act: str
    layout: str = "parts"
    joined: bool = False
    fixed: str | None = None


def attention(path: str, *qkv: str, out: str) -> dict[str, Any]:
    """The names of projections in a module at `path`."""
    return {"qkv": tuple(f"{path}.{name}" for name in qkv), "out": f"{path}.{out}"}


def perceptron(up: str, down: str, act: str, gate: str | None = None) -> dict[str, Any]:
    """The names of a feed-forward network's modules."""
    return {"up": up, "down": down, "act": act, "gate": gate}


_LLAMA = Parts(
    stack="layers",
    **attention("self_attn", "q_proj", "k_proj", "v_proj", out="o_proj"),
    **perceptron("mlp.up_proj", "mlp.down_proj", act="mlp.act_fn", gate="mlp.gate_proj"),
)

PARTS = {
    "bert": Parts(
        stack="encoder.layer",
        **attention("attention", "self.query", "self.key", "self.value", out="output.dense"),
        **perceptron("intermediate.dense", "output.dense", act="intermediate.intermediate_act_fn"),
    ),
    "albert": Parts(
        stack="encoder.albert_layer_groups",
        **attention("attention", "query", "key", "value", out="dense"),
        **perceptron("ffn", "ffn_output", act="activation"),
    ),
    "gpt2": Parts(
        stack="h",
        **attention("attn", "c_attn", out="c_proj"),
        **perceptron("mlp.c_fc", "mlp.c_proj", act="mlp.act"),
    ),
    "opt": Parts(
        stack="decoder.layers",
        **attention("self_attn", "q_proj", "k_proj", "v_proj", out="out_proj"),
        **perceptron("fc1", "fc2", act="activation_fn"),
    ),
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": _LLAMA,
    "qwen3": _LLAMA,
}


def parts_of(config: Any) -> Parts | None:
    """The entry for a model's config, or None if there is none."""
    return PARTS.get(base_type(getattr(config, "model_type", "")))


@dataclass(frozen=True)
class BlockSize:
    """How many units a block has: heads of queries, heads of keys and values, neurons."""

    heads: int
    key_heads: int
    neurons: int


# What the families' configs call the number of neurons.
NEURONS = ("intermediate_size", "ffn_dim", "n_inner", "d_ff", "encoder_ffn_dim", "hidden_dim")


def full_size(config: Any) -> BlockSize:
    """The size of a block from which nothing was removed, read from the family's config."""
    heads = config.num_attention_heads
    neurons = [getattr(config, name, None) for name in NEURONS]
    return BlockSize(
        heads,
        getattr(config, "num_key_value_heads", None) or heads,
        next((size for size in neurons if size), 4 * config.hidden_size),
    )


def sizes_in(config: Any) -> list[BlockSize] | None:
    """The sizes of a shrunk model's blocks, as its config tells them; None if it is not shrunk.

    Raises:
        ValueError: they are damaged.
    """
    stored = getattr(config, "block_sizes", None)
    if stored is None or parts_of(config) is None:  # other families have values of this name
        return None
    try:
        sizes = [BlockSize(**size) for size in stored]
    except TypeError as error:
        raise ValueError(_damaged(f"{stored!r:.200}")) from error
    full = full_size(config)
    for number, size in enumerate(sizes):
        values = [(name, value, getattr(full, name)) for name, value in vars(size).items()]
        for name, value, limit in values:
            if type(value) is not int or not 1 <= value <= limit:
                raise ValueError(_damaged(f"block {number} has {name}={value!r} of {limit}"))
        if size.heads % size.key_heads:
            raise ValueError(
                _damaged(
                    f"block {number} has {size.heads} heads for {size.key_heads} heads of keys"
                )
            )
    return sizes


def _damaged(found: str) -> str:
    return (
        f"block_sizes in the config: {found}. Wanted heads, key_heads and neurons of each block, 1 or "
        "more and no more than the model had, heads a multiple of key_heads. The file is damaged or "
        "was changed by hand: save the model again."
    )


def head_size(config: Any) -> int:
    """Features of one attention head; shrinking does not change it."""
    size = getattr(config, "head_dim", None)
    return int(size or config.hidden_size // config.num_attention_heads)
