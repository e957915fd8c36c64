"""Sparse classes of the families in `FAMILIES`, made when first asked for.

`SparseBertConfig`, `SparseBertModel`, `SparseBertForSequenceClassification`, ... : "Sparse" and
the name of the transformers class.
"""

from __future__ import annotations

from typing import Any

from hf_sparse.models import configuration
from hf_sparse.structure.families import FAMILIES

__all__ = ["FAMILIES"]


def __dir__() -> list[str]:
    """The names of the Sparse classes that have an Auto class, and of their configs."""
    from hf_sparse.upstream.transformers.auto import head_names

    names = {config.__name__ for config in configuration.CONFIGS.values()}
    for family, prefix in FAMILIES.items():
        names |= {f"Sparse{head}" for head in head_names(family) if head.startswith(prefix)}
    return sorted(names)


def __getattr__(name: str) -> Any:
    if name.startswith("Sparse") and name.endswith("Config") and hasattr(configuration, name):
        return getattr(configuration, name)
    for family, prefix in FAMILIES.items():
        if name.startswith(f"Sparse{prefix}"):
            from hf_sparse.models.modeling import model_classes

            if name in model_classes(family):
                return model_classes(family)[name]
    raise AttributeError(
        f"hf_sparse has no class {name!r}. It has 'Sparse' + the transformers class for "
        f"{', '.join(FAMILIES.values())}."
    )
