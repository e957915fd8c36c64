"""The tables by which transformers' Auto classes find the classes of a family."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from transformers.models.auto import modeling_auto
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.models.auto.tokenization_auto import TOKENIZER_MAPPING

__all__ = [
    "CAUSAL_LM_NAMES",
    "auto_classes",
    "head_names",
    "mapped_classes",
    "register_classes_",
    "tokenizers_of",
]

# The names of the classes that predict the next token.
CAUSAL_LM_NAMES = frozenset(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values())


def head_names() -> set[str]:
    """The names of all classes of models that an Auto class makes."""
    names: set[str] = set()
    for table, heads in vars(modeling_auto).items():
        if table.startswith("MODEL_") and table.endswith("_MAPPING_NAMES"):
            for found in heads.values():
                names |= set(found) if isinstance(found, tuple | list) else {found}
    return names - {"", None}


def auto_classes() -> Iterator[Any]:
    """Every Auto class of models: `AutoModel`, `AutoModelForCausalLM`, ..."""
    for item in list(vars(modeling_auto).values()):
        if isinstance(item, type) and getattr(item, "_model_mapping", None) is not None:
            yield item


def mapped_classes(auto_class: Any, config_class: type) -> tuple[Any, ...]:
    """What an Auto class has for configs of a class: models, and what stands for missing packages."""
    mapping = auto_class._model_mapping
    if config_class not in mapping:
        return ()
    classes = mapping[config_class]
    return tuple(classes) if isinstance(classes, tuple | list) else (classes,)


def register_classes_(auto_class: Any, config_class: type, classes: Sequence[Any]) -> None:
    """Let an Auto class make models of these classes from configs of a class; the first is usual."""
    usual_first = classes[0] if len(classes) == 1 else tuple(classes)
    auto_class._model_mapping.register(config_class, usual_first, exist_ok=True)


def tokenizers_of(config_class: type) -> Any:
    """The tokenizer for models with configs of this class, as `AutoTokenizer.register` takes it."""
    return TOKENIZER_MAPPING.get(config_class, None)
