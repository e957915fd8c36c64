"""Descriptions of the blocks of encoders: every token sees all others, or those nearby."""

from __future__ import annotations

from typing import Any

from hf_sparse.runtime.model.description import Blocks
from hf_sparse.structure.parts import PARTS, attention, perceptron

_NO_DECODER: dict[str, tuple[object, ...]] = {
    "is_decoder": (False,),
    "add_cross_attention": (False, None),
    "is_causal": (False, None),
}


def _encoder(**described: Any) -> Blocks:
    """Blocks in which every token sees all others, or those nearby."""
    return Blocks(**{"causal": False, "supported": {"is_causal": (False, None)}, **described})


# BERT's blocks, which many encoders have: norms behind the residual.
_BERT = _encoder(
    **vars(PARTS["bert"]),
    norms=("attention.output.LayerNorm", "output.LayerNorm"),
    norm_first=False,
    supported=_NO_DECODER,
)
ENCODERS = {
    "bert": _BERT,
    "albert": _encoder(
        **vars(PARTS["albert"]),
        norms=("attention.LayerNorm", "full_layer_layer_norm"),
        norm_first=False,
    ),
    "roberta": _BERT,
    "xlm-roberta": _BERT,
    "camembert": _BERT,
    "electra": _BERT,
    "mpnet": _encoder(
        stack="encoder.layer",
        **attention("attention.attn", "q", "k", "v", out="o"),
        **perceptron("intermediate.dense", "output.dense", act="intermediate.intermediate_act_fn"),
        norms=("attention.LayerNorm", "output.LayerNorm"),
        norm_first=False,
        biased=True,
        block_class="MPNetLayer",
        outputs=1,
    ),
    "distilbert": _encoder(
        stack="transformer.layer",
        **attention("attention", "q_lin", "k_lin", "v_lin", out="out_lin"),
        **perceptron("ffn.lin1", "ffn.lin2", act="ffn.activation"),
        norms=("sa_layer_norm", "output_layer_norm"),
        norm_first=False,
        activation="activation",
        epsilon=1e-12,
    ),
    "vit": _encoder(
        stack="layers",
        **attention("attention", "q_proj", "k_proj", "v_proj", out="o_proj"),
        **perceptron("mlp.fc1", "mlp.fc2", act="mlp.activation_fn"),
        norms=("layernorm_before", "layernorm_after"),
    ),
    "modernbert": _encoder(
        stack="layers",
        **attention("attn", "Wqkv", out="Wo"),
        **perceptron("mlp.Wi", "mlp.Wo", act="mlp.act", gate="mlp.Wi"),
        norms=("attn_norm", "mlp_norm"),
        bare_first=True,
        windows=True,
        rotary=True,
        rotary_kinds=True,
        activation="hidden_activation",
        epsilon="norm_eps",
        varied=True,
    ),
}
