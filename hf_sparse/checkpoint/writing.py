"""Writing the safetensors shards of a checkpoint, one shard in memory at a time."""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from hf_sparse.checkpoint.card import CARD_NAME
from hf_sparse.checkpoint.digests import digest_of
from hf_sparse.checkpoint.index import DIGEST, DIGESTS
from hf_sparse.formats import join

COMPILED_DESCRIPTION, COMPILED_WEIGHTS = "compiled.json", "compiled.safetensors"
# Of an ONNX export: what transformers' ExportedModel reads, and the graph.
MANIFEST_NAME, GRAPH_NAME = "export.json", "model.onnx"


def is_weight_file(name: str, variant: str | None = None) -> bool:
    """Whether a file of a checkpoint folder holds weights, or their index, of that variant."""
    infix = f".{re.escape(variant)}" if variant else ""
    shard = r"(-\d{5}-of-\d{5})?"
    files = rf"model{infix}{shard}\.safetensors|pytorch_model{infix}{shard}\.bin"
    indices = rf"model\.safetensors\.index{infix}\.json|pytorch_model\.bin\.index{infix}\.json"
    return re.fullmatch(f"{files}|{indices}", name) is not None


def compiled_files(folder: Path) -> set[str]:
    """The files of a compiled model that `save_compiled` wrote into a folder, if there is one."""
    try:
        described = json.loads((folder / COMPILED_DESCRIPTION).read_text())
    except (OSError, ValueError, RecursionError):
        return set()
    ours = isinstance(described, dict) and {"layout", "hf_sparse", "class"} <= described.keys()
    return {COMPILED_DESCRIPTION, COMPILED_WEIGHTS} if ours else set()


def check_folder(folder: Path, variant: str | None = None) -> None:
    """Refuse a folder that a checkpoint cannot be saved in; warn of files that saving will remove.

    Weights of PyTorch's own format are removed: a loader may prefer them to those that are saved.

    Raises:
        NotADirectoryError: it is a file.
        IsADirectoryError: its README.md is a folder.
        ValueError: it holds an ONNX export.
    """
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"{folder} is a file; wanted a folder to save the model in")
    if (folder / CARD_NAME).is_dir():
        raise IsADirectoryError(
            f"{folder / CARD_NAME} is a folder; wanted a file, the model card. Move it away."
        )
    if all((folder / name).exists() for name in (MANIFEST_NAME, GRAPH_NAME)):
        raise ValueError(
            f"{folder} holds {GRAPH_NAME}: an ONNX export, whose config.json the checkpoint would "
            "replace. Wanted a folder of its own, such as the one that the export's folder is in."
        )
    names = sorted(path.name for path in folder.glob("pytorch_model*"))
    if removed := [name for name in names if is_weight_file(name, variant)]:
        warnings.warn(
            f"{folder} holds the weights {', '.join(removed)}. They are removed when the model is "
            "saved there, since they are not its weights. Move them away first if they are needed.",
            stacklevel=4,
        )


def check_not_lost(folder: Path) -> None:
    """Refuse a folder that holds files: saving would replace a model without being asked to.

    Raises:
        ValueError: it holds files; the message names one of them.
    """
    names = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
    if names:
        first = "config.json" if "config.json" in names else names[0]
        others = f" and {len(names) - 1} more" if len(names) > 1 else ""
        raise ValueError(
            f"{folder} is not empty: it holds {first}{others}. Give another folder, or overwrite=True: "
            "the model in it is replaced, files of other names stay."
        )


class ShardWriter:
    """Collects tensors into safetensors shards of at most `max_bytes` (a larger tensor has its own).

    All parts of a tensor go into the same shard, so that a shard can be read on its own. Each file has
    a digest of its tensors in its header, and the index has those of the shards. Memory: the tensors
    of one shard.
    """

    def __init__(self, folder: Path, max_bytes: int, variant: str | None = None) -> None:
        self._folder = folder
        self._max_bytes = max_bytes
        self._variant = f".{variant}" if variant else ""
        self._pending: dict[str, Tensor] = {}
        self._pending_bytes = 0
        self._shards: list[list[str]] = []
        self._digests: list[str] = []
        self.total_bytes = 0

    def add(self, name: str, parts: Mapping[str, Tensor]) -> None:
        """Add the parts of one tensor: `{"": tensor}` for a dense one, none to pass it over."""
        size = sum(part.numel() * part.element_size() for part in parts.values())
        if self._pending and self._pending_bytes + size > self._max_bytes:
            self._flush()
        for part, tensor in parts.items():
            self._pending[join(name, part)] = tensor.contiguous()
        self._pending_bytes += size
        self.total_bytes += size

    def close(self, total_parameters: int) -> None:
        """Write the last shard, give the files their names and write the index if there are several.

        Args:
            total_parameters: weights in the model, for the index.
        """
        self._flush()
        if len(self._shards) == 1:
            self._shard(0).rename(self._folder / f"model{self._variant}.safetensors")
            return
        weight_map, digests = {}, {}
        for number, names in enumerate(self._shards):
            stem = f"model{self._variant}-{number + 1:05d}-of-{len(self._shards):05d}"
            file = f"{stem}.safetensors"
            self._shard(number).rename(self._folder / file)
            weight_map.update(dict.fromkeys(names, file))
            digests[file] = self._digests[number]
        metadata = {
            "total_parameters": total_parameters,
            "total_size": self.total_bytes,
            DIGESTS: digests,
        }
        index = {"metadata": metadata, "weight_map": weight_map}
        name = f"model.safetensors.index{self._variant}.json"
        (self._folder / name).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")

    def _flush(self) -> None:
        metadata = {"format": "pt", DIGEST: digest_of(self._pending)}
        self._digests.append(metadata[DIGEST])
        try:
            save_file(self._pending, self._shard(len(self._shards)), metadata=metadata)
        except SafetensorError as error:  # what safetensors makes of a full disk
            raise OSError(f"the weights cannot be written: {error}") from error
        _sort_metadata(self._shard(len(self._shards)), metadata)
        self._shards.append(list(self._pending))
        self._pending, self._pending_bytes = {}, 0

    def _shard(self, number: int) -> Path:
        return self._folder / f"model.shard-{number}"


def _sort_metadata(file: Path, metadata: Mapping[str, str]) -> None:
    """Put the metadata of a header in order: safetensors writes them in a random one.

    Equal models are equal files by that, which storage can share.
    """
    first = '{"__metadata__":'
    ordered = json.dumps(metadata, separators=(",", ":"), sort_keys=True)
    with file.open("r+b") as opened:
        opened.seek(8)  # the header's length
        header = opened.read(len(first) + len(ordered)).decode()
        if header.startswith(first) and json.loads(header.removeprefix(first)) == metadata:
            opened.seek(8 + len(first))
            opened.write(ordered.encode())
