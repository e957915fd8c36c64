"""Two names of a model type: the family's own, and the one that its compressed checkpoints have."""

from __future__ import annotations

_PREFIX = "sparse_"


def base_type(model_type: str) -> str:
    """The family's `model_type`, of a sparse model too."""
    return model_type.removeprefix(_PREFIX)


def sparse_type(model_type: str) -> str:
    """The `model_type` under which a family is stored when it is compressed."""
    return f"{_PREFIX}{model_type}"
