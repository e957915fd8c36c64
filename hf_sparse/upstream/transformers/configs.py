"""The table by which transformers' AutoConfig finds the config class of a type."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from transformers import CONFIG_MAPPING, PreTrainedConfig
from transformers.models.auto import configuration_auto

__all__ = [
    "NAME_OR_PATH",
    "config_names",
    "extend_types_",
    "registered_configs",
    "with_special_floats",
]

# Where a config was read: an attribute of each.
NAME_OR_PATH = "_name_or_path"

Types = dict[str, type[PreTrainedConfig]]


def config_names() -> set[str]:
    """The names of transformers' own config classes that AutoConfig makes."""
    return set(vars(configuration_auto)["CONFIG_MAPPING_NAMES"].values())


def registered_configs() -> list[type[PreTrainedConfig]]:
    """The config classes that were registered with AutoConfig, in their order."""
    return list(CONFIG_MAPPING._extra_content.values())


def extend_types_(kind: Callable[[Types], Types]) -> None:
    """Let AutoConfig find further types: `kind` makes the new table of what is registered."""
    CONFIG_MAPPING._extra_content = kind(CONFIG_MAPPING._extra_content)


def with_special_floats(
    config_class: type[PreTrainedConfig], values: Mapping[str, Any]
) -> dict[str, Any]:
    """The values of a config.json, with infinities and NaN where it names them."""
    decoded: dict[str, Any] = config_class._decode_special_floats(dict(values))
    return decoded
