"""Reading compressed tensors from files and state dicts; nothing in them is trusted."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from hf_sparse.checkpoint.digests import digest_of_file
from hf_sparse.checkpoint.index import DIGEST, INDEX_NAME, index_of, read_index
from hf_sparse.checkpoint.writing import COMPILED_DESCRIPTION
from hf_sparse.configuration_sparse import SparsityConfig, matches
from hf_sparse.formats import (
    FORMATS,
    FormatError,
    are_complete,
    coding_of,
    decompress,
    format_of,
    group_parts,
    join,
    locate,
    read_layout,
    split_name,
)
from hf_sparse.structure.experts import ENDINGS
from hf_sparse.upstream.transformers.files import ADAPTER_CONFIG_NAME

WEIGHTS_NAME = "model.safetensors"


def restore_state_dict(
    state_dict: Mapping[str, Tensor],
    shapes: Mapping[str, tuple[int, ...]] | None = None,
    transposed: Mapping[str, bool] | None = None,
) -> dict[str, Tensor]:
    """Decompress every compressed tensor of a state dict; the others pass as they are.

    Args:
        state_dict: what was saved.
        shapes: of the model's tensors, with which the layouts are compared before any work. Tensors
            that are not among them stay without values, on the meta device. None: nothing is
            compared.
        transposed: whether the model's weights are `(in_features, out_features)`, by name, which
            layouts must agree with. None: nothing is compared.

    Raises:
        FormatError: a compressed tensor is damaged, or of another shape or direction; the message
            names it.
    """
    restored = {}
    for name, parts in group_parts(state_dict).items():
        if parts == [""]:
            restored[name] = state_dict[name]
            continue
        own = {part: state_dict[join(name, part)] for part in parts}
        with locate(name):
            layout = read_layout(own)
            shape = layout.shape
            if shapes is not None and name not in shapes:
                restored[name] = torch.empty(shape, device="meta")
                continue
            if shapes is not None and shape != shapes[name]:
                raise FormatError(
                    f"shape mismatch: {shape} is stored, the model wants {shapes[name]}. Load it into "
                    "a model that is made from the checkpoint's own config."
                )
            if transposed is not None:
                FORMATS[layout.format].check_direction(layout, transposed.get(name, False))
            restored[name] = decompress(own)
    return restored


@dataclass(frozen=True)
class StoredTensor:
    """A tensor of a checkpoint: its name, the parts that it is stored in, and the file."""

    name: str
    parts: tuple[str, ...]
    file: Path

    @property
    def place(self) -> str:
        """Tensor and file, for error messages."""
        return f"tensor {self.name} in {self.file}"

    @property
    def compressed(self) -> bool:
        """Whether it is stored in more parts than its values."""
        return self.parts != ("",)

    @property
    def format(self) -> str:
        """The format that it is stored in."""
        return format_of(self.parts)

    @property
    def coding(self) -> str | None:
        """The coding of its values; None: they are stored as they are."""
        return coding_of(self.parts)


def is_target(
    name: str, compressed: bool, config: SparsityConfig | None, *, coded: bool = False
) -> bool:
    """Whether a matrix of a checkpoint is one that its config promises zeros in, as names tell.

    Args:
        name: in the file.
        compressed: how it is stored: outside the blocks nothing but targets is compressed.
        config: of the checkpoint; None: every matrix in numbered blocks.
        coded: whether its values are codes: so are embeddings that are no targets.
    """
    if config is not None and config.embedding_bits is not None and coded:
        compressed = False
    layer, in_blocks = name.removesuffix(".weight"), re.search(r"\.\d+\.", name) is not None
    if layer == name and not name.endswith(ENDINGS):
        return False
    if config is not None and config.ignores(layer):
        return False
    if config is None or config.targets is None or (compressed and not in_blocks):
        return in_blocks or compressed
    return any(matches(layer, glob) for glob in config.targets)


def read_headers(files: Sequence[Path]) -> list[StoredTensor]:
    """List the tensors of safetensors files from their headers; weights are not read.

    Raises:
        FormatError: a file is truncated or no safetensors file, a part of a compressed tensor is
            missing, two files hold the same tensor, or a shard is not the one that the index beside
            it was saved with.
    """
    indices = {path: read_index(path) for path in map(index_of, files) if path and path.is_file()}
    tensors: dict[str, StoredTensor] = {}
    for file in files:
        with open_file(file) as reader:
            names, digest = list(reader.keys()), (reader.metadata() or {}).get(DIGEST)
        if (index := index_of(file)) in indices:
            indices[index].check_shard(file.name, set(names), digest)
        for name, parts in group_parts(names).items():
            stored = StoredTensor(name, tuple(parts), file)
            orphan = split_name(name)[1]
            if orphan or (stored.compressed and not are_complete(parts)):
                raise FormatError(
                    f"{stored.place}: found the parts {[part or 'values' for part in parts]}; "
                    "a compressed tensor has values, layout and one array of positions, or scales of "
                    "coded values. The checkpoint is incomplete: copy or download it again."
                )
            if name in tensors:
                raise FormatError(
                    f"{stored.place}: {tensors[name].file.name} has it, too. The files are of "
                    "different checkpoints: copy or download the folder again."
                )
            tensors[name] = stored
        _check_alone(file, compressed=any(tensor.compressed for tensor in tensors.values()))
    return list(tensors.values())


def _check_alone(file: Path, *, compressed: bool) -> None:
    """Refuse a file with all weights of a compressed checkpoint that has shards beside it.

    No save leaves both, and readers do not agree on which they take.
    """
    index = file.with_name(INDEX_NAME)
    if file.name == WEIGHTS_NAME and index.is_file() and (compressed or read_index(index).digests):
        raise FormatError(
            f"{file.parent} has {WEIGHTS_NAME} and shards with {INDEX_NAME}: weights of two saves. "
            "Remove those that are not meant, or copy or download the folder again."
        )


def watch(files: Sequence[Path]) -> Callable[[], None]:
    """A function that raises a FormatError if one of the files was replaced or written to since."""
    before = {file: _version(file) for file in files}

    def check() -> None:
        for file, version in before.items():
            if _version(file) != version:
                raise FormatError(
                    f"{file} was replaced while it was read: another process saved a model there. "
                    "Load it again."
                )

    return check


def _version(file: Path) -> tuple[int, ...] | None:
    try:
        status = file.stat()
    except OSError:
        return None
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


def check_digests(files: Iterable[Path]) -> None:
    """Compare the tensors of safetensors files with the digests in their headers.

    Files without a digest, of earlier versions or of others, pass. Memory: pages of the file.

    Raises:
        FormatError: the tensors are not those that were saved.
    """
    for file in files:
        with open_file(file) as reader:
            promised = (reader.metadata() or {}).get(DIGEST)
            if promised is None:
                continue
            found = digest_of_file(file, reader)
        if found != promised:
            raise FormatError(
                f"{file} was changed since it was saved: its tensors have the digest {found}, and its "
                f"header tells {str(promised)[:80]}. Copy or download it again."
            )


def begin_check_digests(files: Sequence[Path]) -> Callable[[], None]:
    """`check_digests` in a thread of its own, while the weights are restored.

    Returns:
        What waits for its end, and raises its error.
    """
    pool = ThreadPoolExecutor(1, thread_name_prefix="hf_sparse digests")
    checked = pool.submit(check_digests, files)
    pool.shutdown(wait=False)
    return checked.result


def read_parts(stored: StoredTensor) -> dict[str, Tensor]:
    """Read the parts of one tensor, by the names that `decompress` takes.

    Raises:
        FormatError: the file is damaged.
    """
    with open_file(stored.file) as reader:
        return {part: reader.get_tensor(join(stored.name, part)) for part in stored.parts}


def checkpoint_files(folder: Path) -> list[Path]:
    """The safetensors files of a folder, by its index where it has one.

    Raises:
        FormatError: there are none, the index is damaged, or a shard that it names is missing.
    """
    check_is_checkpoint(folder)
    index = folder / INDEX_NAME
    if (folder / WEIGHTS_NAME).is_file():
        return [folder / WEIGHTS_NAME]
    if not index.is_file():
        raise FormatError(f"{folder} has neither {WEIGHTS_NAME} nor {INDEX_NAME}")
    files = [folder / name for name in sorted(set(read_index(index).files.values()))]
    if missing := [file.name for file in files if not file.is_file()]:
        raise FormatError(
            f"{folder}: the shards {missing} that {INDEX_NAME} names are missing. Copy or download "
            "the folder again."
        )
    return files


def check_is_checkpoint(folder: Path) -> None:
    """Raise a FormatError if a folder holds a graph, a compiled model or an adapter instead."""
    graphs = [path.name for path in sorted(folder.glob("*.onnx"))]
    weights = [file for kind in ("safetensors", "bin", "gguf") for file in folder.glob(f"*.{kind}")]
    if graphs and not weights:
        raise FormatError(
            f"{folder} holds an ONNX graph, {graphs[0]}, and no checkpoint. Its README.md tells what "
            "is in it, and how to run it; wanted the folder of the model that it was exported from."
        )
    for name, kind, reader in (
        (COMPILED_DESCRIPTION, "a compiled model", "load_compiled"),
        (ADAPTER_CONFIG_NAME, "an adapter", "load_adapter"),
    ):
        if (folder / name).exists() and not (folder / "config.json").exists():
            raise FormatError(
                f"{folder} holds {kind}, which hf_sparse.{reader} reads, and no checkpoint; wanted "
                "the folder of the model that it was made from."
            )


@contextmanager
def open_file(file: Path) -> Iterator[safe_open]:
    """Open a safetensors file; its errors become FormatErrors that name the file."""
    try:
        with safe_open(file, framework="pt") as reader:
            yield reader
    except SafetensorError as error:
        raise FormatError(
            f"{file} cannot be read as safetensors ({error}). It is damaged or incomplete: copy or "
            "download it again."
        ) from error
    except FileNotFoundError as error:
        raise FormatError(
            f"{file} is missing, or was removed while the folder was read: another process may have "
            "saved a model there. Load it again, or copy or download it again."
        ) from error
