"""Reading the sparse checkpoints that compressed-tensors wrote in 2024 and 2025.

Its releases of 2026 and today's transformers no longer read them. The layout of the weight of a
layer X with R rows (out_features) and C columns (in_features):

                   sparse-bitmask                          sparse-24-bitmask
    X.shape        int64 (2,): R, C                        int64 (2, 1): R, C
    X.compressed   float (values,), row-major              float (R, C / 2)
    X.bitmask      uint8 (R, ceil(C / 8))                  the same; 2 bits are set in each 4
    X.row_offsets  int64 (R,): values in the rows before   -

Bit c % 8 (least significant first) of byte c // 8 of a row is set where column c has a value,
which may be a zero. The first releases stored vectors too, as one row with `shape` (1,),
`bitmask` (ceil(C / 8),) and `row_offsets` (), and wrote `X.weight.shape`. The parts of a weight
may lie in different shards. `config.json` has `"sparsity_config": {"format": "sparse-bitmask",
"sparsity_structure": "2:4" | "unstructured" | "0:0", "ignore": [layers], ...}` inside
`quantization_config`, in the first releases inside `compression_config`.

Source: github.com/vllm-project/compressed-tensors before pull request 610, in
`src/compressed_tensors/compressors/sparse_compressors`: sparse_bitmask.py, sparse_24_bitmask.py.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from torch import Tensor
from transformers import CONFIG_MAPPING, PreTrainedModel

from hf_sparse.arguments import check_kinds, check_path
from hf_sparse.checkpoint.bounds import Size, bounded, check_widths
from hf_sparse.checkpoint.can_save import check_can_save
from hf_sparse.checkpoint.described import describing
from hf_sparse.checkpoint.index import read_object
from hf_sparse.checkpoint.reading import checkpoint_files, open_file, watch
from hf_sparse.checkpoint.save import save_model
from hf_sparse.checkpoint.writing import check_not_lost
from hf_sparse.configuration_sparse import HIGHEST_SPARSITY, SparsityConfig
from hf_sparse.counts import count_zeros
from hf_sparse.files.links import check_links
from hf_sparse.formats import FORMATS, FormatError, bits, join, locate
from hf_sparse.provenance.record import record_
from hf_sparse.provenance.values import Step
from hf_sparse.structure.layers import target_layers
from hf_sparse.suggestions import check_name
from hf_sparse.upstream.accelerate import fetch_weights_from_
from hf_sparse.upstream.transformers.models import build

# The formats that are read, and the parts of a weight in each.
LAYOUTS: dict[str, tuple[str, ...]] = {
    "sparse-bitmask": ("shape", "compressed", "bitmask", "row_offsets"),
    "sparse-24-bitmask": ("shape", "compressed", "bitmask"),
    "dense": (),
}
_QUANTISED = ("_scale", "_zero_point", "_g_idx", "_packed")  # endings of tensor names
_COPIED = (  # beginnings of file names
    *("generation_config", "tokenizer", "special_tokens_map", "added_tokens", "chat_template"),
    *("vocab", "merges", "spiece", "sentencepiece"),
)
_COPIED_TYPES = (".json", ".txt", ".model", ".jinja")


def convert_legacy(
    folder: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    format: str = "auto",
    overwrite: bool = False,
) -> Path:
    """Convert a compressed-tensors `sparse-bitmask` checkpoint into one of hf_sparse.

    The weights stay the same, bit for bit (`-0.0` becomes `0.0` where they are compressed), and
    tokenizer and generation config are copied. The new config's `ignore` has the layers that were
    stored whole beside compressed ones, and those that the old config ignores.

    Args:
        folder: the old checkpoint; it is only read.
        output: made if it does not exist. Its files stay untouched until the new are complete.
        format: how the weights are stored, a key of `hf_sparse.formats.FORMATS`.
        overwrite: replace the model that is in `output`. Files of other names stay.

    Returns:
        The output folder. Its pattern is `2:4` if the old config says so, else `unstructured` with
        the sparsity that is measured.

    Memory: one shard, 5 GB or the largest weight. The weights are read twice, one at a time.

    Raises:
        FormatError: the checkpoint is damaged, incomplete, or not what its config promises; the
            message names tensor and file.
        ValueError: it is no such checkpoint, it is quantised too, AutoConfig does not know its type
            (`format="dense"` needs none), `output` lies inside `folder` or holds files without
            `overwrite`, a bad `format`, or a file that would be copied is a link out of the folder.
        OSError: `output` cannot be written or the disk is full. Nothing has changed then.

    Source: the layout of github.com/vllm-project/compressed-tensors, at the top of this file.
    """
    check_path(folder, "convert_legacy")
    check_path(output, "convert_legacy", "output folder")
    check_kinds(convert_legacy, locals())
    check_name(format, FORMATS, "format", "formats")
    folder, output = Path(folder), Path(output)
    if output.resolve().is_relative_to(folder.resolve()):
        raise ValueError(f"output {output} lies in {folder}, which is only read: choose another.")
    values, sparsity = _read_config(folder)
    stored = _Stored(folder)
    model = _meta_model(values, folder, stored.size)
    check_can_save(model, output, SparsityConfig("unstructured", 0.0, format=format))
    if not overwrite:
        check_not_lost(output)
    small_files = _SmallFiles(folder)
    weights = _OldWeights(stored, LAYOUTS[sparsity["format"]], model)
    config = _measure(weights, model, sparsity, format)
    # As for a model that `device_map` left on the disk, the weights are asked for by name.
    fetch_weights_from_(model, weights)
    record_(model, Step.of("conversion from compressed-tensors", {"format": sparsity["format"]}))
    save_model(model, output, config=config, tokenizer=small_files)
    return output


class _Stored:
    """What is stored in a folder: the keys of each file, and their size; headers are read once."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        files = checkpoint_files(folder)
        self.check_unchanged = watch(files)
        self.keys: dict[Path, list[str]] = {}
        for file in files:
            with open_file(file) as reader:
                self.keys[file] = list(reader.keys())

    @property
    def size(self) -> Size:
        """The parts of a weight are tensors of their own."""
        tensors = sum(map(len, self.keys.values()))
        return Size(tensors, sum(file.stat().st_size for file in self.keys))


class _OldWeights:
    """The weights of an old checkpoint by their names in the model, read when they are asked for.

    `parts` has for each weight its parts (`""`: the weight, stored whole): their keys and files.
    """

    def __init__(self, stored: _Stored, layout: tuple[str, ...], model: PreTrainedModel) -> None:
        self._shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
        self.parts: dict[str, dict[str, tuple[str, Path]]] = {}
        self._check_unchanged = stored.check_unchanged
        for file, keys in stored.keys.items():
            for key in keys:
                layer, _, part = key.rpartition(".")
                name, part = (layer, part) if part in layout else (key, "")
                name = join(name, "weight") if part and name not in self._shapes else name
                if part in self.parts.setdefault(name, {}):
                    raise FormatError(f"{self.place(name)}: {file} has '{part}' a second time")
                self.parts[name][part] = key, file
        if scales := [name for name in self.parts if name.endswith(_QUANTISED)]:
            _refuse_quantised(stored.folder, f"the tensor {scales[0]}")
        for name, parts in self.parts.items():
            if name not in self._shapes:
                raise FormatError(f"{self.place(name)}: config.json describes no such tensor")
            if set(parts) not in ({""}, set(layout)):
                raise FormatError(
                    f"{self.place(name)}: found the parts {[part or 'weight' for part in parts]}; "
                    f"wanted {', '.join(layout) or 'the weight alone'}"
                )
        tied: dict[int, list[str]] = {}
        for name in self._shapes:
            tied.setdefault(id(model.get_parameter_or_buffer(name)), []).append(name)
        for names in tied.values():
            there = [name for name in names if name in self.parts]
            if not there:
                raise FormatError(
                    f"{stored.folder} lacks the tensor {names[0]} of the model that config.json "
                    "describes"
                )
            self.parts |= {name: self.parts[there[0]] for name in names if name not in there}

    def place(self, name: str) -> str:
        """Tensor and files, for error messages."""
        files = sorted({str(file) for _, file in self.parts[name].values()})
        return f"tensor {name} in {', '.join(files)}"

    def __getitem__(self, name: str) -> Tensor:
        parts, shape = {}, self._shapes[name]
        with locate(self.place(name)):
            for part, (key, file) in self.parts[name].items():
                with open_file(file) as reader:
                    parts[part] = reader.get_tensor(key)
            weight = parts[""] if "" in parts else _decode(parts, shape)
            if tuple(weight.shape) != shape:
                raise FormatError(f"found shape {tuple(weight.shape)}; config.json implies {shape}")
        self._check_unchanged()
        return weight


def _decode(parts: Mapping[str, Tensor], shape: tuple[int, ...]) -> Tensor:
    """The weight of `shape`, `(out_features, in_features)` or a vector, from its parts."""
    stored_shape = tuple(parts["shape"].flatten().tolist())
    if stored_shape != shape or len(shape) not in (1, 2) or 0 in shape:
        raise FormatError(f"'shape' holds {stored_shape}; config.json implies {shape}")
    *rows, columns = shape
    values, packed, offsets = parts["compressed"], parts["bitmask"], parts.get("row_offsets")
    wanted = {"shape": (len(shape),), "bitmask": (*rows, -(-columns // 8)), "row_offsets": (*rows,)}
    wanted["compressed"] = (values.numel(),)
    if offsets is None:
        wanted |= {"shape": (len(shape), 1), "compressed": (*rows, columns // 2)}
    for part, tensor in parts.items():
        dtype = {"compressed": values.dtype, "bitmask": torch.uint8}.get(part, torch.int64)
        if tuple(tensor.shape) != wanted[part] or tensor.dtype != dtype:
            raise FormatError(
                f"'{part}' has shape {tuple(tensor.shape)} and type {tensor.dtype}; wanted "
                f"{wanted[part]} and {dtype}"
            )
    if not values.is_floating_point():
        raise FormatError(f"'compressed' has type {values.dtype}; wanted floats")
    lines = packed.numpy().reshape(-1, packed.shape[-1])
    if columns % 8 and np.any(lines[:, -1] >> (columns % 8)):
        raise FormatError(f"'bitmask' marks weights behind the last column, {columns - 1}")
    mask = np.unpackbits(lines, axis=1, count=columns, bitorder="little").view(bool)
    marked = np.count_nonzero(mask, axis=1)
    if marked.sum() != values.numel():
        raise FormatError(f"'bitmask' marks {marked.sum()} weights, stored are {values.numel()}")
    if offsets is None:
        if columns % 4 or np.any(np.count_nonzero(mask.reshape(-1, 4), axis=1) != 2):
            raise FormatError("'bitmask' does not mark 2 of each 4 weights")
    elif not np.array_equal(offsets.numpy().reshape(-1), np.cumsum(marked) - marked):
        raise FormatError("'row_offsets' are not the numbers of values that 'bitmask' marks")
    flat = bits.place(bits.as_bits(values).reshape(-1), mask.reshape(-1))
    return bits.as_weight(flat.reshape(shape), values.dtype)


def _measure(
    weights: _OldWeights, model: PreTrainedModel, sparsity: Mapping[str, Any], format: str
) -> SparsityConfig:
    """The new config: ignored layers, and the pattern and sparsity of the others, measured."""
    pattern = "2:4" if sparsity.get("sparsity_structure") == "2:4" else "unstructured"
    config = SparsityConfig(pattern, 0.5, format=format)
    old_ignore = sparsity.get("ignore")
    old_ignore = old_ignore if isinstance(old_ignore, list) else []
    zeros, numel, ignore = 0, 0, []
    for layer in target_layers(model):
        name = layer.weight_name
        whole = "" in weights.parts[name] and sparsity["format"] != "dense"
        if whole or layer.name in old_ignore:
            ignore.append(layer.name)
            continue
        weight = layer.part(weights[name])
        with locate(weights.place(name)):
            try:
                count = count_zeros(name, weight, config.pattern)
            except ValueError as error:
                raise FormatError(str(error)) from error
            if count.violations:
                raise FormatError(
                    f"{count.violations} groups break the sparsity_structure '{pattern}' of "
                    "config.json. To convert the weights as they are, write 'unstructured' there."
                )
        zeros, numel = zeros + count.zeros, numel + count.numel
    measured = None if pattern == "2:4" else min(zeros / max(numel, 1), HIGHEST_SPARSITY)
    return SparsityConfig(pattern, measured, None, ignore, format)


def _read_config(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """The model's config, and the old sparsity config that stood in it."""
    file = folder / "config.json"
    if not file.is_file():
        raise ValueError(f"{folder} has no config.json; wanted the folder of a checkpoint.")
    values = read_object(file)
    sections = [values.pop(f"{kind}_config", None) for kind in ("quantization", "compression")]
    section = next((section for section in sections if isinstance(section, dict)), {})
    if section.get("config_groups") or section.get("kv_cache_scheme"):
        _refuse_quantised(folder, f"a {section.get('format')!r} quantisation in config.json")
    sparsity = section.get("sparsity_config")
    sparsity = sparsity if isinstance(sparsity, dict) else {}
    if sparsity.get("format") not in list(LAYOUTS):
        raise ValueError(
            f"{file} describes no sparse checkpoint of compressed-tensors: sparsity_config.format is "
            f"{sparsity.get('format')!r}; wanted one of {', '.join(LAYOUTS)}."
        )
    values.pop("auto_map", None)  # code is never loaded from the folder
    return values, sparsity


def _refuse_quantised(folder: Path, found: str) -> None:
    raise ValueError(
        f"{folder} is quantised: it has {found}. Only sparse float weights are converted. Load it "
        "with compressed-tensors < 0.15 and a transformers of that time, "
        "CompressedTensorsConfig(run_compressed=False), and save it dense; then use "
        "hf_sparse.save_pretrained."
    )


def _meta_model(values: dict[str, Any], folder: Path, stored: Size) -> PreTrainedModel:
    """The model that the config describes, without memory for weights, if it can be what is stored."""
    file = folder / "config.json"
    check_widths(values, stored, file)
    with describing(file), torch.device("meta"):
        config = CONFIG_MAPPING[values["model_type"]].from_dict(values)
        model_class = getattr(transformers, values["architectures"][0])
        with bounded(stored):
            model: PreTrainedModel = build(model_class, config)
    return model


class _SmallFiles:
    """Tokenizer and generation config of a folder, to be saved as they are."""

    def __init__(self, folder: Path) -> None:
        self._files = [
            file
            for file in sorted(folder.iterdir())
            if file.name.startswith(_COPIED) and file.suffix in _COPIED_TYPES and file.is_file()
        ]
        check_links(folder, self._files)

    def save_pretrained(self, folder: Path) -> None:
        """Copy the files to `folder`, as a tokenizer would save its own."""
        for file in self._files:
            shutil.copyfile(file, folder / file.name)
