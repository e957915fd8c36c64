"""The generation_config.json beside a checkpoint: transformers reads it, and trusts it."""

from __future__ import annotations

from pathlib import Path

from transformers import GenerationConfig

from hf_sparse.checkpoint.index import read_object
from hf_sparse.checkpoint.sparse_configs import NOT_MADE
from hf_sparse.formats import FormatError

_NAME = "generation_config.json"


def check_generation(folder: Path) -> None:
    """Refuse settings of generation that cannot be; a folder without any passes.

    Raises:
        FormatError: the file is no JSON object, or transformers takes no such settings.
    """
    file = folder / _NAME
    if not file.is_file():
        return
    try:
        GenerationConfig.from_dict(read_object(file))
    except FormatError:
        raise
    except NOT_MADE as error:
        raise FormatError(
            f"{file} has settings that transformers does not take: {error}. Correct them, or copy or "
            "download the file again."
        ) from error
