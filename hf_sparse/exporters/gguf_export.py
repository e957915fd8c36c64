"""`export_gguf`: the codes of a model of few bits in a dense GGUF file, which llama.cpp opens."""

from __future__ import annotations

import importlib.util
import json
import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel

from hf_sparse.arguments import check_has_values, check_kinds, check_model, check_path
from hf_sparse.checkpoint.on_grids import named, on_grids
from hf_sparse.checkpoint.save import tensors_to_store
from hf_sparse.checkpoint.source import described
from hf_sparse.configuration_sparse import SparsityConfig, check_config
from hf_sparse.exporters.gguf_blocks import BlockType, block_type, check_columns
from hf_sparse.exporters.gguf_tokenizer import described_tokenizer, write_tokenizer
from hf_sparse.files.single import replacing_file
from hf_sparse.provenance.entry import to_dict
from hf_sparse.structure.families import base_type
from hf_sparse.structure.layers import check_has_weights, promised_config
from hf_sparse.structure.units import shrunk_sizes

# Of `general.file_type`, by the type of most weights.
_FILE_TYPES = {"F32": 0, "F16": 1, "Q4_0": 2, "Q8_0": 7, "BF16": 32}
_FAMILY = "llama"


@dataclass(frozen=True)
class GGUFReport:
    """What was written.

    Attributes:
        file: where.
        bytes: its size.
        types: how many tensors of which type of GGUF.
        zeros: weights that are zero in the file.
    """

    file: Path
    bytes: int
    types: dict[str, int]
    zeros: int

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {**asdict(self), "file": str(self.file)}

    def __str__(self) -> str:
        types = ", ".join(f"{count} {name}" for name, count in sorted(self.types.items()))
        return f"{self.file}: {self.bytes / 1e6:.1f} MB; {types}; {self.zeros:,} zeros"


def export_gguf(
    model: PreTrainedModel,
    file: str | os.PathLike[str],
    *,
    tokenizer: Any = None,
    config: SparsityConfig | None = None,
    overwrite: bool = False,
) -> GGUFReport:
    """Write a model of few bits as a dense GGUF file of the same codes: Q4_0 and Q8_0.

    Every weight has the value that it has in the model, bit for bit, and zeros are zeros; they take the
    place of other weights. Weights without a grid are stored in their type, vectors in float32. Before
    the file is put in place it is read again with the package gguf, and compared with the model.

    Args:
        model: a `LlamaForCausalLM`, of any size, Sparse or not.
        file: `NAME.gguf`.
        tokenizer: byte-level BPE, written into the file; without it programs have no vocabulary.
        config: with the grids of its weights. None: what the model was quantised or loaded with.
            Without bits all weights are stored in the model's type.
        overwrite: replace the file if it is there.

    Returns:
        Its size and types.

    Memory: some copies of the largest weight, beside the model.

    Raises:
        ImportError: the package gguf is missing.
        OffGridError: weights that are not on the grid; the message names them.
        ValueError: a model of another family, or with what the format's `llama` has not; a grid with
            zero points; another kind of tokenizer; or the file is there.
        OSError: the disk is full, or the folder cannot be written. Nothing has changed then.

    Source: the specification of GGUF in github.com/ggml-org/ggml, docs/gguf.md.
    """
    check_path(file, "export_gguf", "file")
    if config is not None:
        check_config(config)
    file = Path(file)
    check_can_export_gguf(model, file, overwrite=overwrite)
    check_kinds(export_gguf, locals())
    check_has_values(model, "export_gguf")
    words = None if tokenizer is None else described_tokenizer(tokenizer)
    entries = list(_entries(model, config or promised_config(model)))
    with replacing_file(file) as fresh:
        _write(model, fresh, entries, tokenizer, words)
        zeros = _compare(fresh, entries)
    types = Counter(entry.type.name for entry in entries)
    return GGUFReport(file, file.stat().st_size, dict(types), zeros)


def check_can_export_gguf(
    model: PreTrainedModel, file: str | os.PathLike[str], *, overwrite: bool = False
) -> None:
    """Refuse an export for the kind of model, for its file, or for want of the package.

    Args:
        model: it may be on the meta device.
        file, overwrite: see `export_gguf`.

    Raises:
        ImportError, ValueError: as `export_gguf`.
    """
    check_model(model, "export_gguf", PreTrainedModel)
    check_has_weights(model)
    file = Path(file)
    if file.suffix != ".gguf" or file.is_dir():
        raise ValueError(f"{file} is no name for a GGUF file; wanted NAME.gguf.")
    if file.exists() and not overwrite:
        raise ValueError(f"{file} is there already. Give another name, or overwrite=True.")
    _check_kind(model)
    if importlib.util.find_spec("gguf") is None:
        raise ImportError("export_gguf needs gguf: pip install 'hf_sparse[gguf]'")


def _check_kind(model: Any) -> None:
    """Refuse what the format's architecture `llama` does not have."""
    config, kind = model.config, type(model).__name__
    if base_type(config.model_type) != _FAMILY or not hasattr(model, "lm_head"):
        raise ValueError(f"a {kind} cannot be written as GGUF yet; wanted a LlamaForCausalLM.")
    if shrunk_sizes(model) is not None:
        raise ValueError(
            f"the blocks of this {kind} were made smaller, each its own way: GGUF has one size."
        )
    rope = (getattr(config, "rope_parameters", None) or {}).get("rope_type", "default")
    found = {
        "attention_bias": getattr(config, "attention_bias", False),
        "mlp_bias": getattr(config, "mlp_bias", False),
        "hidden_act": config.hidden_act != "silu" and config.hidden_act,
        "rope_type": rope != "default" and rope,
    }
    for name, value in found.items():
        if value:
            raise ValueError(
                f"this {kind} has {name}={value!r}, which is not written as GGUF yet; wanted a model "
                "without biases, with silu and plain rotary positions."
            )


@dataclass(frozen=True)
class _Entry:
    """A tensor of the file.

    Attributes:
        name: in the file.
        weight: of the model, in the file's order of rows.
        type: that it is stored in.
        source: its name in the model.
    """

    name: str
    weight: Tensor
    type: BlockType
    source: str

    def data(self) -> NDArray[np.uint8]:
        """The bytes, row by row."""
        with named(self.source):
            return self.type.data(self.weight)


def _entries(model: PreTrainedModel, config: SparsityConfig | None) -> Iterator[_Entry]:
    """The tensors in the order of the file."""
    from gguf import MODEL_ARCH, get_tensor_name_map

    grids = {} if config is None else on_grids(model, config)
    names = get_tensor_name_map(MODEL_ARCH.LLAMA, model.config.num_hidden_layers)
    for name, tensor in tensors_to_store(model).items():
        weight = tensor.detach().cpu()
        found = names.get_name(name, try_suffixes=(".weight",))
        if found is None:
            raise ValueError(f"{name} has no name in GGUF files of the architecture llama.")
        grid = grids[name].grid if name in grids else None
        if weight.ndim == 1:
            weight = weight.float()
        with named(name):
            if grid is not None:
                check_columns(weight.shape[1])
            type = block_type(grid, weight.dtype)
        yield _Entry(found, _in_pairs(model, name, weight), type, name)


def _in_pairs(model: PreTrainedModel, name: str, weight: Tensor) -> Tensor:
    """The rows of queries and keys in GGUF's order: features that turn together lie side by side."""
    config = model.config
    if name.endswith("q_proj.weight"):
        heads = config.num_attention_heads
    elif name.endswith("k_proj.weight"):
        heads = config.num_key_value_heads
    else:
        return weight
    halves = weight.reshape(heads, 2, -1, weight.shape[1])
    return halves.transpose(1, 2).reshape(weight.shape)


def _write(
    model: PreTrainedModel,
    file: Path,
    entries: list[_Entry],
    tokenizer: Any,
    words: dict[str, Any] | None,
) -> None:
    """Write metadata and tensors, one in memory at a time."""
    import gguf

    writer = gguf.GGUFWriter(file, _FAMILY)
    _describe(writer, model, entries)
    rows = model.config.vocab_size
    if words is None:
        writer.add_tokenizer_model("no_vocab")
    else:
        write_tokenizer(writer, tokenizer, words, rows)
    for entry in entries:
        shape = (*entry.weight.shape[:-1], entry.type.row_bytes(entry.weight.shape[-1]))
        kind = gguf.GGMLQuantizationType[entry.type.name]
        size = int(np.prod(shape))
        writer.add_tensor_info(entry.name, shape, np.dtype(np.uint8), size, raw_dtype=kind)
    try:
        writer.write_header_to_file(file)
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for entry in entries:
            writer.write_tensor_data(entry.data())
    finally:
        writer.close()


def _describe(writer: Any, model: PreTrainedModel, entries: list[_Entry]) -> None:
    """Write what the model is, and what is known of where it comes from."""
    config = model.config
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    sizes = Counter[str]()
    for entry in entries:
        sizes[entry.type.name] += entry.weight.numel()
    provenance = described(model, None, None)
    writer.add_type("model")
    writer.add_name((provenance.base_model or config.name_or_path or _FAMILY).rpartition("/")[2])
    writer.add_file_type(_FILE_TYPES[sizes.most_common(1)[0][0]])
    writer.add_quantization_version(2)
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head)
    writer.add_value_length(head)
    writer.add_rope_dimension_count(head)
    writer.add_rope_freq_base(float(config.rope_parameters["rope_theta"]))
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_string("hf_sparse.provenance", json.dumps(to_dict(provenance), sort_keys=True))


def _compare(file: Path, entries: list[_Entry]) -> int:
    """Read the file again, and compare every weight with the model's.

    Returns:
        The zeros in the file.

    Raises:
        ValueError: a weight differs.
    """
    import gguf

    zeros = 0
    for stored, entry in zip(gguf.GGUFReader(file).tensors, entries, strict=True):
        found = torch.from_numpy(np.array(gguf.dequantize(stored.data, stored.tensor_type)))
        if not torch.equal(found.reshape(entry.weight.shape).to(entry.weight.dtype), entry.weight):
            raise ValueError(
                f"{entry.source} is not in {file} what it is in the model. Nothing was written: "
                "please report the model's class, and the version of gguf."
            )
        zeros += int((found == 0).sum())
    return zeros
