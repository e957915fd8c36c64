"""The JSON files of a checkpoint folder: objects, and the index of its shards; neither is trusted.

The index of a save of hf_sparse has, beside the file of each tensor, the digest of each file's
tensors, which stands in the header of that file too. Shards of two saves do not agree in them.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hf_sparse.configuration_sparse import SparsityConfig
from hf_sparse.formats import FormatError

INDEX_NAME = "model.safetensors.index.json"
# The digest of a shard's tensors: in its header under this key, in the index's metadata by file.
DIGEST, DIGESTS = "hf_sparse_digest", "hf_sparse_digests"
_SHARD = re.compile(r"model(\.[^/]+)?-\d{5}-of-\d{5}\.safetensors")
_LONGEST_NAME = 255


@dataclass(frozen=True)
class Index:
    """An index of shards.

    Attributes:
        path: of the index.
        files: the file of each tensor, by the name in the files.
        digests: of each file's tensors; empty if the save recorded none.
    """

    path: Path
    files: Mapping[str, str]
    digests: Mapping[str, Any] = field(default_factory=dict)

    def check_shard(self, file: str, names: set[str], digest: str | None) -> None:
        """Raise a FormatError if a shard is not the one that this index was written for.

        Args:
            file: its name.
            names: of the tensors in it.
            digest: in its header; None if there is none.
        """
        place, again = self.path.parent / file, "copy or download the folder again."
        promised = {name for name, shard in self.files.items() if shard == file}
        if missing := sorted(promised - names):
            raise FormatError(
                f"{place} lacks {len(missing)} tensors that {self.path.name} promises, first "
                f"{missing[0]}. The shards are of different checkpoints: {again}"
            )
        if self.digests.get(file) != digest:
            raise FormatError(
                f"{place} is not the shard that {self.path.name} was saved with: its header has the "
                f"digest {digest}, the index has {self.digests.get(file)}. The files are of different "
                f"saves, or the model was saved anew while it was read: load it again, or {again}"
            )


def index_of(file: Path) -> Path | None:
    """Where the index of a shard is, by the shard's name; None for a file that is no shard."""
    shard = _SHARD.fullmatch(file.name)
    return file.with_name(f"model.safetensors.index{shard[1] or ''}.json") if shard else None


def read_index(path: Path) -> Index:
    """Read an index of shards.

    Raises:
        FormatError: it is no such index, or it names files that are not in its folder.
    """
    values = read_object(path)
    files, metadata = values.get("weight_map"), values.get("metadata")
    if not isinstance(files, dict) or not files or not isinstance(metadata, dict):
        raise FormatError(
            f"{path} is no shard index: wanted an object with weight_map and metadata"
        )
    for tensor, name in files.items():
        if not _is_file_name(name):
            raise FormatError(
                f"{path}: weight_map does not map tensors to files of its folder: {tensor[:80]!r} is "
                f"in {str(name)[:80]!r}; wanted the name of a safetensors file"
            )
    digests = metadata.get(DIGESTS, {})
    if not isinstance(digests, dict):
        raise FormatError(f"{path}: {DIGESTS} is a {type(digests).__name__}, wanted an object")
    return Index(path, files, digests)


def read_object(path: Path) -> dict[str, Any]:
    """Read a JSON file that holds an object.

    Raises:
        FileNotFoundError: there is no such file.
        FormatError: it holds something else.
    """
    try:
        values = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{path} is no JSON object: {error}") from error
    if not isinstance(values, dict):
        raise FormatError(f"{path} is no JSON object: it holds a {type(values).__name__}")
    return values


def read_sparsity(path: Path, entry: Mapping[str, Any]) -> SparsityConfig:
    """The sparsity config that a config.json holds.

    Args:
        path: of the file, for errors.
        entry: its `quantization_config`.

    Raises:
        FormatError: a value is not allowed, a key is not known, or a newer version wrote it.
    """
    values = {key: value for key, value in entry.items() if key != "quant_method"}
    try:
        return SparsityConfig.from_dict(values)
    except (TypeError, ValueError) as error:
        raise FormatError(f"{path}: quantization_config: {error}") from error


def _is_file_name(name: Any) -> bool:
    """Whether this is the plain name of a safetensors file."""
    return (
        isinstance(name, str)
        and name.isprintable()
        and re.fullmatch(r"[^/\\:]+\.safetensors", name) is not None
        and len(os.fsencode(name)) <= _LONGEST_NAME
    )
