"""What a model's config tells of its blocks, and whether they can be compiled by it."""

from __future__ import annotations

import math
from typing import Any

from hf_sparse.runtime.model.description import ACTIVATION_NAMES, Blocks
from hf_sparse.runtime.model.families import NAMES, families_of, seen_by
from hf_sparse.runtime.weights.stack import NO_WINDOW, Block, Stack

# The furthest distance up to which biases may differ.
MOST_DISTANCES = 1 << 16


def why_not_compiled(config: Any) -> str | None:
    """Why the stacks of a model with this config cannot be compiled as a whole, or None."""
    families = families_of(config)
    if not families:
        return f"family '{config.model_type}' is not one of {', '.join(NAMES)}"
    reasons = (_why_not(seen_by(config, family), family) for family in families)
    return next((reason for reason in reasons if reason is not None), None)


def _why_not(config: Any, family: Blocks) -> str | None:
    for name, values in family.supported.items():
        value = getattr(config, name, values[0])
        if value not in values:
            return f"its config has {name}={value!r}"
    window = getattr(config, "sliding_window", None) if family.windows else None
    if window is not None and (not isinstance(window, int) or window < 1):
        return f"its config has sliding_window={window!r}"
    if family.windows and family.causal and not getattr(config, "is_causal", True):
        windows = [window_of(config, family, i) for i in range(config.num_hidden_layers)]
        if min(windows) != NO_WINDOW:
            return "its config has is_causal=False with sliding windows"
    activation = getattr(config, family.activation, None)
    if activation not in ACTIVATION_NAMES:
        return f"activation {activation!r} is not one of {', '.join(ACTIVATION_NAMES)}"
    if sizes_of(config)[2] % 4:
        return f"heads of size {sizes_of(config)[2]} are no multiple of 4"
    return _why_not_these_numbers(config, family)


def _why_not_these_numbers(config: Any, family: Blocks) -> str | None:
    """Which number of the config the kernels cannot compute with, or None."""
    turned, dim = _rotary_dim(config, family), sizes_of(config)[2]
    if not 0 < turned <= dim or turned % 2:
        return f"its config has {turned} features of {dim} in a head rotated; wanted an even number"
    if family.scale is not None:
        try:
            fits = math.isfinite(family.scale(config))
        except (TypeError, ArithmeticError):
            fits = False
        if not fits:
            return "its config has a scale of scores that is no number"
    for name in (family.softcap, family.multiplier):
        value = getattr(config, name, None) if name is not None else None
        optional = value is None and name == family.softcap
        if name is not None and not optional and not _is_positive(value):
            return f"its config has {name}={value!r}; wanted a number above 0"
    furthest = furthest_of(config, family)
    if not isinstance(furthest, int) or not 0 <= furthest <= MOST_DISTANCES:
        return f"its config has relative_attention_max_distance={furthest!r}"
    if not 0 <= epsilon_of(config, family) < 1:
        return f"its norms have an epsilon of {epsilon_of(config, family)}"
    return None


def furthest_of(config: Any, family: Blocks) -> Any:
    """The distance from which on biases stay the same; 0 for blocks that have none of their own."""
    return config.relative_attention_max_distance if family.distances else 0


def _is_positive(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value) and value > 0


def numbers_of(config: Any, family: Blocks) -> dict[str, Any]:
    """The fields of a stack that its config holds: all but the weights and the perceptron's size."""
    heads, key_heads, head_dim = sizes_of(config)
    turned = _rotary_dim(config, family)
    softcap = getattr(config, family.softcap) if family.softcap else None
    return {
        "hidden": config.hidden_size,
        "heads": heads,
        "key_heads": key_heads,
        "head_dim": head_dim,
        "scale": float(family.scale(config)) if family.scale else head_dim**-0.5,
        "norm": family.norm,
        "norm_first": _told(config, family.norm_first),
        "causal": family.causal and getattr(config, "is_causal", True),
        "rotary": family.rotary,
        "activation": ACTIVATION_NAMES[getattr(config, family.activation)],
        "parallel": _told(config, family.parallel),
        "rotated": turned if turned != head_dim else 0,
        "softcap": float(softcap or 0),
        "biased": family.biased or family.distances is not None,
        "multiplier": multiplier_of(config, family),
    }


def _told(config: Any, value: bool | str) -> bool:
    """A fact about a family, or what the config's attribute tells."""
    return bool(getattr(config, value)) if isinstance(value, str) else value


def sizes_of(config: Any) -> tuple[int, int, int]:
    """Heads, heads of keys, and the size of a head."""
    heads = config.num_attention_heads
    keys = getattr(config, "num_key_value_heads", None) or heads
    return heads, keys, getattr(config, "head_dim", None) or config.hidden_size // heads


def _rotary_dim(config: Any, family: Blocks) -> int:
    """The features of a head that are rotated."""
    dim = sizes_of(config)[2]
    if not family.partial_rotary:
        return dim
    return int(dim * (config.rope_parameters or {}).get("partial_rotary_factor", 1.0))


def multiplier_of(config: Any, family: Blocks) -> float:
    """What is multiplied with all that blocks add to the residual."""
    return float(getattr(config, family.multiplier)) if family.multiplier else 1.0


def routing_of(config: Any, family: Blocks) -> tuple[int, bool]:
    """How many experts a token has, and whether their weights sum up to 1; 0 without experts."""
    if family.router is None:
        return 0, False
    return getattr(config, family.chosen), _told(config, family.normalised)


def epsilon_of(config: Any, family: Blocks) -> float:
    """The epsilon of a stack's norms: as the config's, of a residual divided by the multiplier."""
    value = family.epsilon
    epsilon: float = getattr(config, value) if isinstance(value, str) else value
    return epsilon / multiplier_of(config, family) ** 2


def window_of(config: Any, family: Blocks, index: int) -> int:
    """How many tokens back block `index` sees; kernels count them in 32 bits."""
    window = family.window(config, index)
    return NO_WINDOW if window is None else min(window, NO_WINDOW)


def check_config(stack: Stack, whole: Any, family: Blocks) -> None:
    """Check that a stack is one of a model with this config, and of this entry.

    Raises:
        ValueError: a number, a part, or the order of its blocks differs; the message names it.
    """
    config, count = seen_by(whole, family), len(stack.blocks)
    told = config.num_hidden_layers
    order = run_order(config) if type(told) is int and told <= count else []
    if count != len(order):
        raise ValueError(f"there are {count} blocks, the config has {len(order) or told}")
    places: dict[int, int] = {}
    turns = [places.setdefault(id(block), len(places)) for block in stack.blocks]
    if turns != order:
        raise ValueError(f"the blocks run in the order {turns}, the config's family in {order}")
    for name, value in numbers_of(config, family).items():
        if getattr(stack, name) != value:
            raise ValueError(f"the blocks have {name}={getattr(stack, name)}, the config {value}")
    for index, block in enumerate(stack.blocks):
        _check_block(block, index, config, family)


def _check_block(block: Block, index: int, config: Any, family: Blocks) -> None:
    parts: tuple[object, ...] = (block.gate, *block.norms, block.head_norms, block.added_norms)
    parts += (block.cross, block.distances)
    described = (
        family.gate,
        *family.norm_paths(index),
        family.head_norms,
        family.added_norms,
        family.cross,
        family.distances,
    )
    if [part is None for part in parts] != [part is None for part in described]:
        raise ValueError(f"block {index} has other parts than its family's")
    for name, value in (
        ("window", window_of(config, family, index)),
        ("rotation", family.rotation(config, index)),
    ):
        if getattr(block, name) != value:
            raise ValueError(f"block {index} has {name}={getattr(block, name)}, the config {value}")
    mixture = block.mixture
    routing = (0, False) if mixture is None else (mixture.chosen, mixture.normalised)
    if routing != (wanted := routing_of(config, family)):
        raise ValueError(f"block {index} routes by {routing}, the config by {wanted}")
    if block.distances is not None:
        furthest = (block.distances.shape[1] - 1) // 2
        if furthest != furthest_of(config, family):
            raise ValueError(f"block {index} has biases for {furthest} tokens, unlike the config")
    epsilon = epsilon_of(config, family)
    crossing = () if block.cross is None else (block.cross.norm,)
    for norm in (*crossing, *block.norms, *(block.head_norms or ()), *(block.added_norms or ())):
        if norm is not None and norm.epsilon != epsilon:
            raise ValueError(
                f"block {index} has a norm with epsilon={norm.epsilon}, the config {epsilon}"
            )


def run_order(config: Any) -> list[int]:
    """The block that runs at each place: each its own, but for ALBERT's, which repeat."""
    layers, groups = config.num_hidden_layers, getattr(config, "num_hidden_groups", None)
    if groups is None:
        return list(range(layers))
    inner, places = config.inner_group_num, dict[int, int]()
    listed = [int(i / (layers / groups)) * inner + j for i in range(layers) for j in range(inner)]
    return [places.setdefault(place, len(places)) for place in listed]
