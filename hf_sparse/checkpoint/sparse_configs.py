"""What SparseBertConfig and its siblings add: the family's config under a model type of its own.

The type `sparse_bert` is what makes a compressed checkpoint fail loudly where hf_sparse is not
installed: a config of type `bert` would load there with randomly initialised weights.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from typing import Any, ClassVar

from huggingface_hub.errors import StrictDataclassError
from transformers import CONFIG_MAPPING, PreTrainedConfig

from hf_sparse.formats import FormatError
from hf_sparse.structure.families import base_type, sparse_type

# transformers makes lists of as many things before anybody can compare them with the weights.
_COUNTS = (
    (re.compile(r"((num|n)_)?(.+_)?(layers?|blocks|depth)"), -math.inf, 10_000),
    (re.compile(r"((num|n)_)?(.+_)?(experts|heads?)"), 0, 10_000),
    (re.compile(r"num_labels"), 0, 1_000_000),
)
# What comes of configs and models that cannot be made of their values.
NOT_MADE = (
    *(StrictDataclassError, ArithmeticError, AssertionError, AttributeError, LookupError),
    *(RuntimeError, TypeError, ValueError),
)
# What is told of a type whose family AutoConfig does not know.
UNKNOWN_TYPE = (
    "model_type is {!r}; wanted 'sparse_' and a type that AutoConfig knows, such as 'sparse_bert'. "
    "Update transformers, or import the code of the model and register it with AutoConfig.register and "
    "AutoModel.register."
)


class SparseConfigMixin:
    """What a Sparse config adds to the config of its family.

    Attributes:
        sparsity_config: the `SparsityConfig`, as a dict, of the checkpoint that the model was
            loaded from; None if it was dense. In files it is the `quantization_config`, where
            transformers looks for its loader.
        block_sizes: of a model that `hf_sparse.shrink_` made smaller, the heads, heads of keys and
            neurons of each block; None if nothing was removed.
        base_model: Hub name of the dense model; None if it is not known, or before the first
            save, which takes it from `name_or_path`. Older files have `""` for not known.
    """

    base_model_type: ClassVar[str]
    model_type: ClassVar[str]
    sparsity_config: dict[str, Any] | None
    base_model: str | None
    block_sizes: list[dict[str, int]] | None

    def __post_init__(self, **kwargs: Any) -> None:
        kwargs.pop("model_type", None)
        _check_counts(vars(self))
        _check_counts(kwargs)
        for name in ("sparsity_config", "base_model", "block_sizes"):
            if name not in vars(self):  # a family may have a field of this name
                setattr(self, name, kwargs.pop(name, None))
        super().__post_init__(**kwargs)  # type: ignore[misc]

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """As the family's.

        Raises:
            FormatError: the family makes no config of the values.
        """
        try:
            return super().from_dict(config_dict, **kwargs)  # type: ignore[misc]
        except FormatError:
            raise
        except NOT_MADE as error:
            raise FormatError(
                f"a config of type '{cls.model_type}' with these values describes no model of "
                f"transformers: {error!r}. Its file is damaged, or was changed by hand: copy or "
                "download it again."
            ) from error

    @classmethod
    def get_config_dict(cls, *args: Any, **kwargs: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        """As the family's; the config of a dense checkpoint is taken for one of this class."""
        config, unused = super().get_config_dict(*args, **kwargs)  # type: ignore[misc]
        model_type = config.get("model_type", "")
        if model_type.startswith("sparse_") and model_type != cls.model_type:
            raise ValueError(
                f"the checkpoint is of type '{model_type}', but {cls.__name__} is of "
                f"'{cls.model_type}'. Load it with AutoModel, or the classes of its own family."
            )
        if config.get("model_type") == cls.base_model_type:
            config["model_type"] = cls.model_type
        return config, unused

    def to_dict(self) -> dict[str, Any]:
        """The values of the config, under the family's model type.

        Libraries ask this dict which family a model is of (PEFT for its default target modules);
        the sparse type is for files, see `to_json_string`.
        """
        values: dict[str, Any] = super().to_dict()  # type: ignore[misc]
        values["model_type"] = self.base_model_type
        return values

    def to_json_string(self, use_diff: bool = True) -> str:
        """The config as stored in `config.json`, under the sparse model type."""
        values = json.loads(super().to_json_string(use_diff))  # type: ignore[misc]
        values["model_type"] = type(self).model_type
        values.pop("sparsity_config", None)
        if not values.get("base_model"):
            values.pop("base_model", None)
        return json.dumps(values, indent=2, sort_keys=True) + "\n"


def _check_counts(values: Mapping[str, Any]) -> None:
    """Raise a FormatError if a config, or one of its parts, has impossible counts."""
    for name, value in values.items():
        if isinstance(value, PreTrainedConfig):
            _check_counts(vars(value))
        elif isinstance(value, Mapping):
            _check_counts({key: item for key, item in value.items() if isinstance(key, str)})
        elif isinstance(value, int | float) and not isinstance(value, bool):
            for pattern, least, most in _COUNTS:
                if pattern.fullmatch(name) and not least <= value <= most:
                    between = f"{most} at most" if value > most else f"{least} at least"
                    raise FormatError(
                        f"the config has {name}={value!r:.40}; wanted {between}. It is damaged: copy "
                        "or download the checkpoint again."
                    )


def base_config_class(model_type: str) -> type[PreTrainedConfig]:
    """The family's own config class, that AutoConfig has for a type."""
    config_class: type[PreTrainedConfig] = CONFIG_MAPPING[base_type(model_type)]
    return config_class


def sparse_config_class(model_type: str) -> type[PreTrainedConfig]:
    """The Sparse config class of a family, which `hf_sparse.models` makes when it is asked for."""
    config_class: type[PreTrainedConfig] = CONFIG_MAPPING[sparse_type(base_type(model_type))]
    return config_class


def type_of(config_class: Any) -> str | None:
    """The type for which AutoConfig has a config class; None if it has another one, or none.

    A Sparse class can be made of those that it has.
    """
    model_type: str | None = getattr(config_class, "model_type", None)
    if model_type is None or model_type not in CONFIG_MAPPING:
        return None
    return model_type if CONFIG_MAPPING[model_type] is config_class else None
