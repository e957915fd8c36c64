"""Descriptions of the blocks of decoders: a token sees those before it."""

from __future__ import annotations

from typing import Any

from hf_sparse.runtime.model.description import Blocks
from hf_sparse.structure.parts import PARTS, attention, perceptron

_LLAMA = vars(PARTS["llama"])
_HEAD_NORMS = ("self_attn.q_norm", "self_attn.k_norm")


def _llama(**described: Any) -> Blocks:
    """Llama's blocks, which many decoders have: rotations, RMS norms, a gate."""
    usual: dict[str, Any] = {
        "norms": ("input_layernorm", "post_attention_layernorm"),
        "norm": "rms",
        "epsilon": "rms_norm_eps",
        "rotary": True,
        "last_norm": "norm",
    }
    return Blocks(**{**_LLAMA, **usual, **described})


def _gemma(**described: Any) -> Blocks:
    """Llama's, but for norms whose weights are kept less one; the embeddings scale themselves."""
    forward = {"use_bidirectional_attention": (False, None)}
    return _llama(norm_offset=1.0, supported=forward, **described)


def _gemma_of_four_norms(**described: Any) -> Blocks:
    """Norms before and behind attention and perceptron, and blocks that see a window."""
    return _gemma(
        norms=("input_layernorm", "pre_feedforward_layernorm"),
        added_norms=("post_attention_layernorm", "post_feedforward_layernorm"),
        activation="hidden_activation",
        windows=True,
        scale=lambda config: config.query_pre_attn_scalar**-0.5,
        last_norm=None,  # logits may be capped
        **described,
    )


def _mixture(**described: Any) -> Blocks:
    """Llama's, with experts in place of the perceptron."""
    return _llama(
        router="mlp.gate",
        **perceptron(
            "mlp.experts.gate_up_proj",
            "mlp.experts.down_proj",
            act="mlp.experts.act_fn",
            gate="mlp.experts.gate_up_proj",
        ),
        **described,
    )


DECODERS = {
    "gpt2": Blocks(
        **vars(PARTS["gpt2"]),
        norms=("ln_1", "ln_2"),
        activation="activation_function",
        epsilon="layer_norm_epsilon",
        supported={
            "add_cross_attention": (False, None),
            "scale_attn_weights": (True,),
            "scale_attn_by_inverse_layer_idx": (False,),
        },
    ),
    "opt": Blocks(
        **vars(PARTS["opt"]),
        norms=("self_attn_layer_norm", "final_layer_norm"),
        norm_first="do_layer_norm_before",
        activation="activation_function",
        epsilon=1e-5,
    ),
    "llama": _llama(),
    # All its blocks have the window, also those that `layer_types` calls others.
    "mistral": _llama(windows=True, supported={"layer_types": (None,)}),
    "qwen2": _llama(windows=True),
    "qwen3": _llama(head_norms=_HEAD_NORMS, windows=True),
    "gpt_neox": Blocks(
        stack="layers",
        **attention("attention", "query_key_value", out="dense"),
        interleaved=True,
        **perceptron("mlp.dense_h_to_4h", "mlp.dense_4h_to_h", act="mlp.act"),
        norms=("input_layernorm", "post_attention_layernorm"),
        parallel="use_parallel_residual",
        rotary=True,
        partial_rotary=True,
        last_norm="final_layer_norm",
    ),
    "phi": Blocks(
        stack="layers",
        **attention("self_attn", "q_proj", "k_proj", "v_proj", out="dense"),
        **perceptron("mlp.fc1", "mlp.fc2", act="mlp.activation_fn"),
        norms=("input_layernorm", None),
        parallel=True,
        rotary=True,
        partial_rotary=True,
        last_norm="final_layernorm",
        supported={"qk_layernorm": (False,)},
    ),
    "phi3": _llama(
        qkv=("self_attn.qkv_proj",),
        gate="mlp.gate_up_proj",
        up="mlp.gate_up_proj",
        act="mlp.activation_fn",
        last_norm=None,  # it drops its cache where its rotations change
        partial_rotary=True,
        windows=True,
        supported={"layer_types": (None,)},
    ),
    "gemma": _gemma(),
    "gemma2": _gemma_of_four_norms(softcap="attn_logit_softcapping"),
    "gemma3_text": _gemma_of_four_norms(head_norms=_HEAD_NORMS, rotary_kinds=True),
    "smollm3": _llama(windows=True, unrotated="no_rope_layers", varied=True),
    "olmo2": _llama(
        norms=(None, None),
        added_norms=("post_attention_layernorm", "post_feedforward_layernorm"),
        head_norms=_HEAD_NORMS,
    ),
    "granite": _llama(
        scale=lambda config: config.attention_multiplier,
        multiplier="residual_multiplier",
        last_norm=None,  # embeddings and logits are multiplied
    ),
    "mixtral": _mixture(windows=True, supported={"layer_types": (None,)}),
    "qwen3_moe": _mixture(
        head_norms=_HEAD_NORMS,
        windows=True,
        normalised="norm_topk_prob",
        supported={
            "layer_types": (None,),
            "mlp_only_layers": ([], None),
            "decoder_sparse_step": (1,),
        },
    ),
    "starcoder2": Blocks(
        stack="layers",
        **attention("self_attn", "q_proj", "k_proj", "v_proj", out="o_proj"),
        **perceptron("mlp.c_fc", "mlp.c_proj", act="mlp.act"),
        norms=("input_layernorm", "post_attention_layernorm"),
        rotary=True,
        windows=True,
        last_norm="norm",
        epsilon="norm_epsilon",
        supported={"layer_types": (None,)},
    ),
}
