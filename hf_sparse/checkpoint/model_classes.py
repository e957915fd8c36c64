"""The classes that transformers' Auto classes have for a config, those of registered code too."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import transformers

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


def classes_of(auto_class: Any, config_class: type[PreTrainedConfig]) -> tuple[Any, ...]:
    """The classes that an Auto class has for a config, without those whose packages are missing."""
    from hf_sparse.upstream.transformers.auto import mapped_classes

    return tuple(each for each in mapped_classes(auto_class, config_class) if is_model_class(each))


def all_classes_of(config_class: type[PreTrainedConfig]) -> Iterator[Any]:
    """The classes that any Auto class has for a config; one that several have comes several times."""
    from hf_sparse.upstream.transformers.auto import auto_classes  # importing it takes a while

    return (each for auto_class in auto_classes() for each in classes_of(auto_class, config_class))


def is_model_class(item: Any) -> bool:
    """Whether this is a class of models that can be made here."""
    return isinstance(item, type) and issubclass(item, transformers.PreTrainedModel)


def model_class_named(name: str, config_class: type[PreTrainedConfig] | None = None) -> Any:
    """The dense class of models of this name; None if there is none.

    Args:
        name: of a class of transformers, or of one that an Auto class has for the config; or of a part
            of the family's models.
        config_class: the family's own.
    """
    named = getattr(transformers, name, None) if name.isidentifier() else None
    if is_model_class(named):
        return named
    if config_class is None:
        return None
    known = itertools.chain.from_iterable(
        classes(config_class) for classes in (all_classes_of, part_classes)
    )
    return next((each for each in known if each.__name__ == name), None)


def part_classes(config_class: type[PreTrainedConfig]) -> list[Any]:
    """The classes for configs of this class that stand beside its family's models.

    Of a config of a part, such as the tower of a model of images and text, no Auto class may have any.
    """
    from hf_sparse.upstream.transformers.models import import_modeling

    try:
        module: Any = import_modeling(config_class)
    except ImportError:
        return []
    return [
        each
        for each in vars(module).values()
        if is_model_class(each)
        and each.config_class is config_class
        and each.__module__ == module.__name__
        and not each.__name__.endswith("PreTrainedModel")
    ]


def first_class_of(config_class: type[PreTrainedConfig]) -> Any:
    """The class without a head that a config has, else its first one; None if there is none."""
    first = classes_of(transformers.AutoModel, config_class)
    return first[0] if first else next(all_classes_of(config_class), None)
