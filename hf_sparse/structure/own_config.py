"""Blocks of one size in the family's own config, so that transformers alone builds them.

Whether a config can tell a size is tried: a block is built from it, without values, and measured.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError

from hf_sparse.structure.depth import shorten_
from hf_sparse.structure.families import base_type
from hf_sparse.structure.modules_described import described
from hf_sparse.structure.parts import NEURONS, BlockSize, head_size, parts_of
from hf_sparse.structure.units import find_units, sizes_of
from hf_sparse.upstream.transformers.models import build


def check_expressible(model: Any, size: BlockSize) -> None:
    """Refuse a size of all blocks that the family's config cannot tell.

    Args:
        model: with units that are known, of any size.
        size: of each block.

    Raises:
        ValueError: the message tells the sizes that it can tell, and the nearest.
    """
    if is_expressible(model, size):
        return
    now = (sizes_of(model) or [size])[0]
    family = base_type(model.config.model_type)
    start = f"blocks of {_told(size)} cannot be told by a config of type '{family}': "
    leave_out = (
        ", or leave uniform=True out: such models are saved with the sizes of their blocks, and load "
        "with hf_sparse"
        if parts_of(model.config) is not None
        else ", or whole blocks (hf_sparse.drop_blocks_)"
    )
    with_all_heads = BlockSize(now.heads, now.key_heads, size.neurons)
    if not is_expressible(model, with_all_heads):
        raise ValueError(
            f"{start}it tells no number of neurons but {now.neurons}. Take other units{leave_out}."
        )
    queries = size.heads // size.key_heads
    counts = [
        count
        for count in range(1, now.key_heads + 1)
        if is_expressible(model, BlockSize(count * queries, count, size.neurons))
    ]
    nearest = min(counts, key=lambda count: (abs(count - size.key_heads), -count), default=None)
    told = ", ".join(str(count * queries) for count in counts) or str(now.heads)
    best = now.heads if nearest is None else nearest * queries
    raise ValueError(
        f"{start}with {head_size(model.config)} features in a head it tells {told} heads, the nearest "
        f"is {best}{_sparsity_for(nearest, now)}. Take that, or prune neurons (pattern 'column')"
        f"{leave_out}."
    )


def is_expressible(model: Any, size: BlockSize) -> bool:
    """Whether transformers builds blocks of this size from the family's config with these numbers."""
    try:
        config = copy.deepcopy(model.config)
        set_size_(config, size)
        if not getattr(config, "is_encoder_decoder", False):
            shorten_(config, {"num_hidden_layers": [0]})
        checked = type(config).from_dict(config.to_dict())  # what a file of it is checked for
        with torch.device("meta"):
            built = build(type(model.base_model), checked)
        [found] = {units.size for units in find_units(built)}
    except (ArithmeticError, RuntimeError, StrictDataclassError, TypeError, ValueError):
        return False
    return found == size and head_size(checked) == head_size(model.config)


def set_size_(config: Any, size: BlockSize) -> None:
    """Let a config tell the size of all blocks by the family's own names."""
    head_dim = head_size(config)
    config.num_attention_heads = size.heads
    if getattr(config, "num_key_value_heads", None) is not None:
        config.num_key_value_heads = size.key_heads
    names = [next(name for name in NEURONS if hasattr(config, name))]
    if names == ["encoder_ffn_dim"]:
        names.append("decoder_ffn_dim")
    for name in names:
        setattr(config, name, size.neurons)
    if head_size(config) != head_dim:
        config.head_dim = head_dim
    if getattr(config, "block_sizes", None) is not None:
        config.block_sizes = None


def tell_modules_(model: Any, size: BlockSize) -> None:
    """Let the modules and the configs of a model tell the size that its blocks have.

    What hangs on it transformers tells itself: the model is built from its config as it is and from
    the new one, without values, and what modules say differently is copied.

    Args:
        model: whose layers have this size, and whose config tells another.
        size: that the family's config can tell.
    """
    smaller = copy.deepcopy(model.config)
    set_size_(smaller, size)
    with torch.device("meta"):
        whole, small = (build(type(model), config) for config in (model.config, smaller))
    before, after = dict(described(whole)), dict(described(small))
    configs = {id(model.config): model.config}
    for path, module in model.named_modules():
        values, others = before[path][1], after[path][1]
        for name, value in values.items():
            if value != others[name] and vars(module).get(name) == value:
                setattr(module, name, others[name])
        own = getattr(module, "config", None)
        if type(own) is type(model.config):
            configs.setdefault(id(own), own)
    for config in configs.values():
        set_size_(config, size)


def _told(size: BlockSize) -> str:
    grouped = f" ({size.key_heads} of keys)" if size.key_heads != size.heads else ""
    return f"{size.heads} heads{grouped} and {size.neurons} neurons"


def _sparsity_for(nearest: int | None, now: BlockSize) -> str:
    if nearest is None or nearest == now.key_heads:
        return ""
    return f" (sparsity={1 - nearest / now.key_heads:.4g})"
