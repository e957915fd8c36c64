"""Reading the sparsity of a checkpoint without building its model."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path

from hf_sparse.checkpoint.reading import checkpoint_files, read_headers, read_parts
from hf_sparse.configuration_sparse import SparsityConfig
from hf_sparse.formats import FormatError, decompress, locate, num_bytes, read_layout
from hf_sparse.patterns import Unstructured
from hf_sparse.report import SparsityReport, count_zeros


@dataclass(frozen=True)
class CheckpointSparsity:
    """What a checkpoint holds.

    Attributes:
        config: the `SparsityConfig` in `config.json`; None for a dense checkpoint.
        report: exact counts of every tensor that is stored compressed, or of every 2-D tensor of a
            dense checkpoint.
        formats: the format of each of those tensors.
        stored_bytes: bytes of each of them in the files, headers aside.
        file_bytes: size of all weight files.
    """

    config: SparsityConfig | None
    report: SparsityReport
    formats: dict[str, str]
    stored_bytes: dict[str, int]
    file_bytes: int


def inspect_checkpoint(folder: str | os.PathLike[str]) -> CheckpointSparsity:
    """Read what a checkpoint holds, checking every compressed tensor on the way.

    Args:
        folder: a checkpoint folder, dense or compressed.

    Memory: one tensor.

    Raises:
        FileNotFoundError: there is no `config.json`.
        FormatError: the checkpoint is damaged. Groups that break the promised pattern are counted
            in the report.
    """
    folder = Path(folder)
    config = read_sparsity_config(folder)
    pattern = Unstructured() if config is None else config.pattern
    files = checkpoint_files(folder)
    stored = read_headers(files)
    compressed = [tensor for tensor in stored if tensor.compressed]
    counts, formats, sizes, parameters = [], {}, {}, 0
    for tensor in stored:
        parts = read_parts(tensor)
        with locate(tensor.place):
            weight = decompress(parts) if tensor.compressed else parts[""]
        parameters += weight.numel()
        if tensor.compressed or (not compressed and weight.ndim == 2):
            transposed = tensor.compressed and read_layout(parts)[3]
            counts.append(count_zeros(tensor.name, weight.T if transposed else weight, pattern))
            formats[tensor.name] = tensor.format
            sizes[tensor.name] = num_bytes(parts)
    report = SparsityReport(tuple(counts), str(pattern), parameters)
    total = sum(file.stat().st_size for file in files)
    return CheckpointSparsity(config, report, formats, sizes, total)


def read_sparsity_config(folder: Path) -> SparsityConfig | None:
    """The sparsity config of a checkpoint folder; None for a dense checkpoint.

    Raises:
        FileNotFoundError: there is no `config.json`.
        FormatError: `config.json` is no JSON object, or was written by a newer version.
    """
    path = folder / "config.json"
    try:
        values = json.loads(path.read_text())
        entry = values.get("quantization_config") or {}
    except (json.JSONDecodeError, UnicodeDecodeError, AttributeError) as error:
        raise FormatError(f"{path} is no JSON object: {error}") from error
    if not isinstance(entry, dict):
        raise FormatError(f"{path}: quantization_config is {entry!r}, wanted an object")
    if entry.get("quant_method") != "hf_sparse":
        return None
    with locate(str(path)):
        return SparsityConfig.from_dict(
            {key: value for key, value in entry.items() if key != "quant_method"}
        )
