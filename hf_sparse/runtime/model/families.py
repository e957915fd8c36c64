"""COMPILED: how each family's blocks are built, as a table of names. One entry each.

A block is attention and a two-layer perceptron, each with a norm and a residual. What differs
between families is where the parts are (`hf_sparse.structure.parts`) and which comes first; the forward
code is not repeated.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from hf_sparse.structure.families import base_type
from hf_sparse.structure.parts import PARTS, Parts

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


@dataclass(frozen=True, kw_only=True)
class Blocks(Parts):
    """What the compiler must know of a family's blocks beside where their parts are.

    Attributes:
        norms: attention's and the perceptron's.
        head_norms: norms of each head's queries and keys, if the family has them.
        norm: `layer` or `rms`.
        norm_first: norms come before attention and perceptron, else behind the residual; or the
            name of the config's attribute that tells.
        causal: a token sees those before it and itself.
        windows: the config may limit how far back a token sees.
        rotary: positions are rotations of queries and keys.
        activation: the config's attribute that names the activation.
        epsilon: of all norms: the config's attribute that tells, or a number.
        supported: attributes of the config, and the values of them that are compiled.
    """

    norms: tuple[str, str]
    head_norms: tuple[str, str] | None = None
    norm: str = "layer"
    norm_first: bool | str = True
    causal: bool = True
    rotary: bool = False
    windows: bool = False
    activation: str = "hidden_act"
    epsilon: str | float = "layer_norm_eps"
    supported: dict[str, tuple[object, ...]] = field(default_factory=dict)


def family_of(config: Any) -> Blocks | None:
    """The entry for a model's config, or None if there is none."""
    return COMPILED.get(base_type(config.model_type))


def _blocks(family: str, **described: Any) -> Blocks:
    return Blocks(**vars(PARTS[family]), **described)


def _llama(family: str, head_norms: tuple[str, str] | None = None, **described: Any) -> Blocks:
    return _blocks(
        family,
        norms=("input_layernorm", "post_attention_layernorm"),
        head_norms=head_norms,
        norm="rms",
        epsilon="rms_norm_eps",
        rotary=True,
        **described,
    )


COMPILED = {
    "bert": _blocks(
        "bert",
        norms=("attention.output.LayerNorm", "output.LayerNorm"),
        norm_first=False,
        causal=False,
        supported={
            "is_decoder": (False,),
            "add_cross_attention": (False, None),
            "is_causal": (False, None),
        },
    ),
    "albert": _blocks(
        "albert",
        norms=("attention.LayerNorm", "full_layer_layer_norm"),
        norm_first=False,
        causal=False,
        supported={"is_causal": (False, None)},
    ),
    "gpt2": _blocks(
        "gpt2",
        norms=("ln_1", "ln_2"),
        activation="activation_function",
        epsilon="layer_norm_epsilon",
        supported={
            "add_cross_attention": (False, None),
            "scale_attn_weights": (True,),
            "scale_attn_by_inverse_layer_idx": (False,),
        },
    ),
    "opt": _blocks(
        "opt",
        norms=("self_attn_layer_norm", "final_layer_norm"),
        norm_first="do_layer_norm_before",
        activation="activation_function",
        epsilon=1e-5,
    ),
    "llama": _llama("llama"),
    # All its blocks have the window, also those that `layer_types` calls others.
    "mistral": _llama("mistral", windows=True, supported={"layer_types": (None,)}),
    "qwen2": _llama("qwen2", windows=True),
    "qwen3": _llama("qwen3", ("self_attn.q_norm", "self_attn.k_norm"), windows=True),
}
