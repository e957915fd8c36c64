"""Descriptions of the blocks of models that have an encoder and a decoder.

The decoder's blocks attend to the encoder's states, between attention and the perceptron. Some models
of these families have only one of the two.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from hf_sparse.runtime.model.description import Blocks, CrossParts
from hf_sparse.structure.parts import attention, perceptron

# For a config, the blocks of the encoder and those of the decoder.
Pair = tuple[Blocks, Blocks]


def _bart(norm_first: bool) -> Callable[[Any], Pair]:
    """BART's: biases everywhere, learned or fixed positions before the blocks."""
    shared: dict[str, Any] = {
        **attention("self_attn", "q_proj", "k_proj", "v_proj", out="out_proj"),
        **perceptron("fc1", "fc2", act="activation_fn"),
        "norms": ("self_attn_layer_norm", "final_layer_norm"),
        "norm_first": norm_first,
        "clamped": True,
        "activation": "activation_function",
        "epsilon": 1e-5,
        "supported": {"is_causal": (None,)},
    }
    encoder = Blocks(stack="encoder.layers", causal=False, **shared)
    decoder = Blocks(
        stack="decoder.layers",
        cross=CrossParts(
            "encoder_attn.q_proj",
            ("encoder_attn.k_proj", "encoder_attn.v_proj"),
            "encoder_attn.out_proj",
            "encoder_attn_layer_norm",
        ),
        names={
            "num_hidden_layers": "decoder_layers",
            "num_attention_heads": "decoder_attention_heads",
        },
        **shared,
    )
    return lambda config: (encoder, decoder)


def _t5_stack(last: int, gated: bool, **described: Any) -> Blocks:
    """T5's: norms first, biases by distance, scores as they are; the perceptron is layer `last`."""
    network = f"layer.{last}.DenseReluDense"
    up, gate = (f"{network}.wi_1", f"{network}.wi_0") if gated else (f"{network}.wi", None)
    return Blocks(
        **attention("layer.0.SelfAttention", "q", "k", "v", out="o"),
        **perceptron(up, f"{network}.wo", act=f"{network}.act", gate=gate),
        norms=("layer.0.layer_norm", f"layer.{last}.layer_norm"),
        norm="rms",
        clamped=True,
        distances="layer.0.SelfAttention",
        scale=lambda config: 1.0,
        activation="dense_act_fn",
        epsilon="layer_norm_epsilon",
        varied=True,
        supported={"is_causal": (None,)},
        **described,
    )


def _t5(outputs: int) -> Callable[[Any], Pair]:
    def described(config: Any) -> Pair:
        gated = bool(config.is_gated_act)
        cross = CrossParts(
            "layer.1.EncDecAttention.q",
            ("layer.1.EncDecAttention.k", "layer.1.EncDecAttention.v"),
            "layer.1.EncDecAttention.o",
            "layer.1.layer_norm",
        )
        names = {"num_hidden_layers": "num_decoder_layers"}
        return (
            _t5_stack(1, gated, stack="encoder.block", causal=False, outputs=outputs),
            _t5_stack(2, gated, stack="decoder.block", cross=cross, names=names, outputs=outputs),
        )

    return described


_NORMS_BEHIND, _NORMS_FIRST = _bart(norm_first=False), _bart(norm_first=True)
PAIRS: dict[str, Callable[[Any], Pair]] = {
    "bart": _NORMS_BEHIND,
    "blenderbot": _NORMS_FIRST,
    "blenderbot-small": _NORMS_BEHIND,
    "marian": _NORMS_BEHIND,
    "mbart": _NORMS_FIRST,
    "pegasus": _NORMS_FIRST,
    "plbart": _NORMS_BEHIND,
    # Their blocks hand on the biases by distance; those of umt5 have their own.
    "t5": _t5(outputs=3),
    "mt5": _t5(outputs=3),
    "umt5": _t5(outputs=0),
}
