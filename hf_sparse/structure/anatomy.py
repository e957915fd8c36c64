"""Heads and neurons of families that `PARTS` does not list: found by what their blocks are made of.

A block has a module with three projections, or one for all, and one behind attention; and a network
of two layers, or three with a gate, which may be one with the layer that it multiplies. These have few
names in transformers, and stand in the tables below. Heads stay where anything else in the attention
belongs to all of them: a norm over all heads, a table of positions with an entry for each head (T5),
a second attention (decoders behind encoders). FAMILIES lists the types for which it was tried that
the model without a unit computes what it does with the unit zero (tests/structure/test_anatomy.py).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from torch import nn

from hf_sparse.structure.families import base_type
from hf_sparse.structure.layers import find_stacks, is_matrix
from hf_sparse.structure.parts import Parts, head_size

FAMILIES = (
    *("arcee", "bart", "biogpt", "camembert", "cohere", "cohere2", "deberta", "deberta-v2"),
    *("deit", "distilbert", "electra", "ernie", "ernie4_5", "exaone4", "gemma", "gemma2"),
    *("gemma3_text", "glm", "glm4", "gpt_neox", "gptj", "granite", "helium", "marian", "mbart"),
    *("megatron-bert", "modernbert", "mpnet", "mt5", "olmo", "olmo2", "olmo3", "pegasus", "phi"),
    *("phi3", "roberta", "roformer", "seed_oss", "smollm3", "stablelm", "starcoder2", "t5", "vit"),
    *("xglm", "xlm-roberta"),
)
_QKV = (
    ("q_proj", "k_proj", "v_proj"),
    ("query", "key", "value"),
    ("q_lin", "k_lin", "v_lin"),
    ("query_proj", "key_proj", "value_proj"),
    ("q", "k", "v"),
)
# One projection for all, and whether its rows are in three parts, or three of each head in turn.
_FUSED = {"qkv_proj": "parts", "Wqkv": "parts", "query_key_value": "heads", "in_proj": "heads"}
_OUT = ("o_proj", "out_proj", "dense", "out_lin", "o", "Wo")
# The layer under the activation, the one that it multiplies, the one behind both.
_GATED = (("gate_proj", "up_proj", "down_proj"), ("wi_0", "wi_1", "wo"))
# One layer for the first two, in this order, and the one behind both.
_JOINED = (("gate_up_proj", "down_proj"), ("Wi", "Wo"))
_PLAIN = (
    ("fc1", "fc2"),
    ("c_fc", "c_proj"),
    ("lin1", "lin2"),
    ("fc_in", "fc_out"),
    ("dense_h_to_4h", "dense_4h_to_h"),
    ("wi", "wo"),
    ("up_proj", "down_proj"),
    ("intermediate.dense", "output.dense"),
)
_ACTIVATIONS = ("act_fn", "activation_fn", "act", "activation", "intermediate_act_fn")


def is_derived(config: Any) -> bool:
    """Whether the units of a model of this config are found by what its blocks are made of."""
    return base_type(getattr(config, "model_type", "")) in FAMILIES


def derived_parts(model: nn.Module) -> list[tuple[str, nn.Module, Parts]]:
    """The blocks of a model of one of `FAMILIES`: their names, themselves, and where their parts are.

    Raises:
        ValueError: a block is not made as those that were tried: its modules are others.
    """
    head_dim = head_size(model.config)
    found: list[tuple[str, nn.Module, Parts]] = []
    for stack in find_stacks(model):
        for number, block in enumerate(stack.blocks):
            name = f"{stack.name}.{number}"
            found.append((name, block, _parts(name, block, stack.name, head_dim)))
    fixed = next((parts.fixed for _, _, parts in found if parts.fixed), None)
    return [(name, block, replace(parts, fixed=fixed)) for name, block, parts in found]


def _parts(name: str, block: nn.Module, stack: str, head_dim: int) -> Parts:
    attentions = list(_attentions(block))
    network = _network(block)
    if not attentions or network is None:
        missing = "attention" if not attentions else "feed-forward network"
        raise ValueError(
            f"the blocks of this model are not its own: in {name} is no {missing} that is known. "
            "Wanted a model whose modules are as transformers makes them, without adapters."
        )
    _, qkv, out, layout = attentions[0]
    fixed = _why_fixed(block, name, attentions, head_dim)
    return Parts(stack=stack, qkv=qkv, out=out, layout=layout, fixed=fixed, **network)


def _attentions(block: nn.Module) -> Iterator[tuple[str, tuple[str, ...], str, str]]:
    """The attentions of a block: path, projections, the one behind, and how a fused one is laid out."""
    for path, module in block.named_modules():
        qkv = next((names for names in _QKV if _has(module, names)), None)
        fused = next((name for name in _FUSED if _has(module, (name,))), None)
        if qkv is None and fused is None:
            continue
        names: tuple[str, ...] = qkv or (str(fused),)
        out = next((_join(path, name) for name in _OUT if _has(module, (name,))), None)
        beside = _join(path.rpartition(".")[0], "output.dense")
        if out is None and _has(block, (beside,)):
            out = beside
        if out is not None:
            layout = "parts" if fused is None else _FUSED[fused]
            yield path, tuple(_join(path, name) for name in names), out, layout


def _network(block: nn.Module) -> dict[str, Any] | None:
    """Where the feed-forward network is, as fields of `Parts`."""
    for path, module in block.named_modules():
        for gate, up, down in _GATED:
            if _has(module, (gate, up, down)):
                named = {"gate": gate, "up": up, "down": down}
                return _network_at(module, path, named)
        for up, down in _JOINED:
            if _has(module, (up, down)):
                network = _network_at(module, path, {"up": up, "down": down})
                return None if network is None else {**network, "joined": True}
        for up, down in _PLAIN:
            if _has(module, (up, down)):
                return _network_at(module, path, {"up": up, "down": down})
    return None


def _network_at(module: nn.Module, path: str, named: dict[str, str]) -> dict[str, Any] | None:
    inside = named["up"].rpartition(".")[0]
    owner = module.get_submodule(inside)
    act = next((_join(inside, name) for name in _ACTIVATIONS if hasattr(owner, name)), None)
    if act is None:
        return None
    return {field: _join(path, name) for field, name in {**named, "act": act}.items()}


def _why_fixed(
    block: nn.Module,
    name: str,
    attentions: list[tuple[str, tuple[str, ...], str, str]],
    head_dim: int,
) -> str | None:
    """Why no head can go; None: they can."""
    if len(attentions) > 1:
        return f"{name} has a second attention, {attentions[1][0]}, with as many heads"
    [(path, qkv, out, _)] = attentions
    own = tuple(f"{layer}." for layer in (*qkv, out))
    for parameter_name, parameter in block.get_submodule(path).named_parameters(prefix=path):
        if parameter_name.startswith(own) or tuple(parameter.shape) == (head_dim,):
            continue
        return f"{name}.{parameter_name} belongs to all heads"
    return None


def _has(module: nn.Module, paths: tuple[str, ...]) -> bool:
    """Whether a module has matrices of these names."""
    for path in paths:
        try:
            part = module.get_submodule(path)
        except AttributeError:
            return False
        if not is_matrix(part):
            return False
    return True


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name
