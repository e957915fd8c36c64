"""Sparse classes of every family of transformers, made when first asked for.

`SparseBertConfig`, `SparseBertModel`, `SparseBertForSequenceClassification`, ... : "Sparse" and
the name of the transformers class, or of a class that is registered with the Auto classes.
"""

from __future__ import annotations

from typing import Any

from hf_sparse.models import configuration


def __dir__() -> list[str]:
    """The names of the Sparse classes that have an Auto class, and of their configs."""
    from transformers.models.auto import configuration_auto, modeling_auto

    names = {f"Sparse{name}" for name in vars(configuration_auto)["CONFIG_MAPPING_NAMES"].values()}
    for mapping, heads in vars(modeling_auto).items():
        if mapping.startswith("MODEL_") and mapping.endswith("_MAPPING_NAMES"):
            for found in heads.values():
                several = found if isinstance(found, tuple | list) else (found,)
                names |= {f"Sparse{name}" for name in several if name}
    return sorted(names)


def __getattr__(name: str) -> Any:
    if name.startswith("Sparse"):
        try:
            return getattr(configuration, name)
        except AttributeError:  # no config: it may be a model
            from hf_sparse.models.modeling import sparse_class_named

            if (found := sparse_class_named(name)) is not None:
                return found
    raise AttributeError(
        f"hf_sparse has no class {name!r}. It has 'Sparse' + the name of a class of transformers that "
        "has a config of its own, such as SparseBertModel for BertModel. Code of other packages "
        "counts once AutoConfig.register and AutoModel.register know it."
    )
