"""Models that are compiled for another target, or that are changed behind their config's back."""

from __future__ import annotations

from typing import Any

import pytest
from transformers import PreTrainedModel

import hf_sparse
from hf_sparse.runtime.llvm.target import named


def compiled_for(target: str, model: PreTrainedModel) -> PreTrainedModel:
    """The model, compiled for a target; the test is skipped where this CPU does not run it."""
    try:
        named(target)
    except ValueError as error:
        pytest.skip(str(error))
    return hf_sparse.compile(model, target=target)


def change_attribute(block: Any, name: str) -> None:
    """Give an attribute of a block, or of a module inside it, a value that no config gives it."""
    path, _, last = name.rpartition(".")
    setattr(block.get_submodule(path), last, 0.123)
