"""Blocks of one size in the family's own config, so that transformers alone builds them.

Whether a config can tell a size is tried: a block is built from it, without values, and measured.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError

from hf_sparse.structure.families import base_type
from hf_sparse.structure.parts import NEURONS, BlockSize, head_size
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
    with_all_heads = BlockSize(now.heads, now.key_heads, size.neurons)
    if not is_expressible(model, with_all_heads):
        raise ValueError(
            f"{start}it tells no number of neurons but {now.neurons}. Leave uniform=True out: such "
            "models are saved with the sizes of their blocks, and load with hf_sparse."
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
        f"is {best}{_sparsity_for(nearest, now)}. Take that, or prune neurons (pattern 'column'), or "
        "leave uniform=True out: such models are saved with the sizes of their blocks, and load with "
        "hf_sparse."
    )


def is_expressible(model: Any, size: BlockSize) -> bool:
    """Whether transformers builds blocks of this size from the family's config with these numbers."""
    try:
        config = copy.deepcopy(model.config)
        set_size_(config, size)
        config.num_hidden_layers = 1
        if getattr(config, "layer_types", None):
            config.layer_types = config.layer_types[:1]
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
    setattr(config, next(name for name in NEURONS if hasattr(config, name)), size.neurons)
    if head_size(config) != head_dim:
        config.head_dim = head_dim
    if getattr(config, "block_sizes", None) is not None:
        config.block_sizes = None


def _told(size: BlockSize) -> str:
    grouped = f" ({size.key_heads} of keys)" if size.key_heads != size.heads else ""
    return f"{size.heads} heads{grouped} and {size.neurons} neurons"


def _sparsity_for(nearest: int | None, now: BlockSize) -> str:
    if nearest is None or nearest == now.key_heads:
        return ""
    return f" (sparsity={1 - nearest / now.key_heads:.4g})"
