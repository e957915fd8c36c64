"""Sparse classes of the families in `FAMILIES`, made when first asked for.

`SparseBertConfig`, `SparseBertModel`, `SparseBertForSequenceClassification`, ... : "Sparse" and
the name of the transformers class.
"""

from __future__ import annotations

from typing import Any

from hf_sparse.models import configuration
from hf_sparse.models.families import FAMILIES
from hf_sparse.models.modeling import family_of, model_classes

__all__ = ["FAMILIES"]


def __getattr__(name: str) -> Any:
    if name.startswith("Sparse") and name.endswith("Config") and hasattr(configuration, name):
        return getattr(configuration, name)
    family = family_of(name)
    if family is not None and name in model_classes(family):
        return model_classes(family)[name]
    raise AttributeError(
        f"hf_sparse has no class {name!r}. It has 'Sparse' + the transformers class for "
        f"{', '.join(FAMILIES.values())}."
    )
