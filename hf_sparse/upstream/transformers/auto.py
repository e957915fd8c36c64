"""The tables by which transformers' Auto classes find the classes of a family."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

from transformers.models.auto import modeling_auto
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.models.auto.tokenization_auto import TOKENIZER_MAPPING

__all__ = ["CAUSAL_LM_NAMES", "auto_classes", "head_names", "tokenizers_of"]

# The names of the classes that predict the next token.
CAUSAL_LM_NAMES = frozenset(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values())


def head_names(family: str) -> set[str]:
    """The names of a family's classes that any Auto class makes."""
    tables = [
        table for name, table in vars(modeling_auto).items() if name.endswith("_MAPPING_NAMES")
    ]
    return {str(table[family]) for table in tables if isinstance(table, dict) and family in table}


def auto_classes(config_class: type) -> Iterator[tuple[Any, Any]]:
    """The Auto classes that make a model from a config of this class, each with the model's class."""
    for auto_class in vars(modeling_auto).values():
        mapping = getattr(auto_class, "_model_mapping", None)
        if inspect.isclass(auto_class) and mapping is not None and config_class in mapping:
            found = mapping[config_class]
            yield auto_class, found[0] if isinstance(found, tuple | list) else found


def tokenizers_of(config_class: type) -> Any:
    """The tokenizer for models with configs of this class, as `AutoTokenizer.register` takes it."""
    return TOKENIZER_MAPPING.get(config_class, None)
