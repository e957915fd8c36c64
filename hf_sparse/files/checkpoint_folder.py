"""The folder of a checkpoint that is named: on this machine, or of the Hub."""

from __future__ import annotations

import os
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

_FROM_THE_HUB = ("*.json", "*.safetensors", "*.jinja", "README.md", "*.txt", "*.model")


def checkpoint_folder(named: str | os.PathLike[str]) -> Path:
    """A folder as it is, or a snapshot of a model of the Hub, downloaded where it is not here.

    Args:
        named: path of a folder, or name on the Hub.

    Raises:
        FileNotFoundError: there is no such folder, and the Hub has no such names.
        NotADirectoryError: it is a file.
        OSError: the Hub does not have it, or cannot be reached.
    """
    folder = Path(named)
    if folder.is_dir():
        return folder
    if folder.exists():
        raise NotADirectoryError(f"{folder} is a file; wanted the folder of a checkpoint.")
    try:
        validate_repo_id(os.fspath(named))
    except HFValidationError as error:
        raise FileNotFoundError(f"no such folder: {folder}") from error
    try:
        return Path(snapshot_download(os.fspath(named), allow_patterns=list(_FROM_THE_HUB)))
    except OSError as error:
        raise OSError(
            f"{named} is no folder here, and the Hub does not give it: {error}"
        ) from error
