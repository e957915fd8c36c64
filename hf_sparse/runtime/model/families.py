"""COMPILED: how the blocks of each family are built that is compiled as a whole."""

from __future__ import annotations

from typing import Any

from hf_sparse.runtime.model.decoders import DECODERS
from hf_sparse.runtime.model.description import Blocks
from hf_sparse.runtime.model.encoders import ENCODERS
from hf_sparse.structure.families import base_type

COMPILED = {**ENCODERS, **DECODERS}


def family_of(config: Any) -> Blocks | None:
    """The entry for a model's config, or None if there is none."""
    return COMPILED.get(base_type(config.model_type))
