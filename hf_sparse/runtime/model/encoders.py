"""Descriptions of the blocks of encoders: every token sees all others, or those nearby."""

from __future__ import annotations

from typing import Any

from hf_sparse.runtime.model.description import Blocks
from hf_sparse.structure.parts import PARTS

_NO_DECODER: dict[str, tuple[object, ...]] = {
    "is_decoder": (False,),
    "add_cross_attention": (False, None),
    "is_causal": (False, None),
}


def _bert(**described: Any) -> Blocks:
    """BERT's blocks, which many encoders have: norms behind the residual."""
    return Blocks(
        **vars(PARTS["bert"]),
        norms=("attention.output.LayerNorm", "output.LayerNorm"),
        norm_first=False,
        causal=False,
        supported=_NO_DECODER,
        **described,
    )


ENCODERS = {
    "bert": _bert(),
    "albert": Blocks(
        **vars(PARTS["albert"]),
        norms=("attention.LayerNorm", "full_layer_layer_norm"),
        norm_first=False,
        causal=False,
        supported={"is_causal": (False, None)},
    ),
    "roberta": _bert(),
    "xlm-roberta": _bert(),
    "camembert": _bert(),
    "electra": _bert(),
    "mpnet": Blocks(
        stack="encoder.layer",
        qkv=("attention.attn.q", "attention.attn.k", "attention.attn.v"),
        out="attention.attn.o",
        up="intermediate.dense",
        down="output.dense",
        act="intermediate.intermediate_act_fn",
        norms=("attention.LayerNorm", "output.LayerNorm"),
        norm_first=False,
        causal=False,
        biased=True,
        block_class="MPNetLayer",
        supported={"is_causal": (False, None)},
    ),
    "distilbert": Blocks(
        stack="transformer.layer",
        qkv=("attention.q_lin", "attention.k_lin", "attention.v_lin"),
        out="attention.out_lin",
        up="ffn.lin1",
        down="ffn.lin2",
        act="ffn.activation",
        norms=("sa_layer_norm", "output_layer_norm"),
        norm_first=False,
        causal=False,
        activation="activation",
        epsilon=1e-12,
        supported={"is_causal": (False, None)},
    ),
    "vit": Blocks(
        stack="layers",
        qkv=("attention.q_proj", "attention.k_proj", "attention.v_proj"),
        out="attention.o_proj",
        up="mlp.fc1",
        down="mlp.fc2",
        act="mlp.activation_fn",
        norms=("layernorm_before", "layernorm_after"),
        causal=False,
        supported={"is_causal": (False, None)},
    ),
    "modernbert": Blocks(
        stack="layers",
        qkv=("attn.Wqkv",),
        out="attn.Wo",
        gate="mlp.Wi",
        up="mlp.Wi",
        down="mlp.Wo",
        act="mlp.act",
        norms=("attn_norm", "mlp_norm"),
        bare_first=True,
        causal=False,
        windows=True,
        rotary=True,
        rotary_kinds=True,
        activation="hidden_activation",
        epsilon="norm_eps",
        varied=True,
        supported={"is_causal": (False, None)},
    ),
}
