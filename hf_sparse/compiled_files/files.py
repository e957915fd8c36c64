"""Compiled models in files: loading needs no packing.

A folder holds `compiled.json` (class, config, numbers of the stack, type and shape of each tensor)
and `compiled.safetensors` (packed streams, embeddings, heads). Both have the same random `id`, which
tells that they were saved together (`old_layout.py`: files that have none), and the description has the
digests of both (`digests.py`). Both can lie beside a checkpoint: they touch no other file. A checkpoint
that is saved there later removes them, since they are of the weights before. The machine code itself is
not among them: it is made for the CPU that loads.
"""

from __future__ import annotations

import json
import secrets
import warnings
from collections.abc import Mapping
from dataclasses import astuple
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

from hf_sparse.arguments import check_kinds, check_model, check_path
from hf_sparse.checkpoint.can_save import check_can_write
from hf_sparse.checkpoint.writing import COMPILED_DESCRIPTION, COMPILED_WEIGHTS
from hf_sparse.compiled_files.digests import DIGESTS, check_digests, digests
from hf_sparse.compiled_files.old_layout import check_zeros, is_old, types_of
from hf_sparse.compiled_files.owned_tensors import Entry, read_header, read_tensor
from hf_sparse.compiled_files.skeleton import (
    build_skeleton,
    fill,
    plain_state,
    set_generation,
    unsaved_buffers,
)
from hf_sparse.compiled_files.stacks import PREFIXES, restore_stacks, stacks_state, under
from hf_sparse.files.atomic import replacing
from hf_sparse.files.disk import disk_errors
from hf_sparse.formats import FormatError
from hf_sparse.quantization import Grid, OffGridError
from hf_sparse.runtime.llvm.jit import DEFAULT_CACHE
from hf_sparse.runtime.llvm.target import named
from hf_sparse.runtime.model.coded_head import CodedHead
from hf_sparse.runtime.model.compiled import assemble, stacks_of
from hf_sparse.runtime.model.configured import check_config
from hf_sparse.runtime.model.families import families_in
from hf_sparse.runtime.model.single_layers import CompiledLinear
from hf_sparse.runtime.model.state import LAYOUT
from hf_sparse.runtime.weights.memory import Shelf
from hf_sparse.runtime.weights.rounding import Coding
from hf_sparse.version import __version__

_REST, _BUFFER, _ID = "model.", "buffer.", "id"
_ID_BYTES = 16
_UNTIED = (
    f"{{folder}} was written by an earlier version of hf_sparse, without an id: nothing tells that "
    f"{COMPILED_DESCRIPTION} and {COMPILED_WEIGHTS} were saved together. They agree in names, types "
    "and sizes of all tensors and in the number of zeros of each weight. Save the model again to have "
    "an id in both: hf_sparse.save_compiled(model, folder)."
)


def save_compiled(model: PreTrainedModel, folder: Path | str) -> Path:
    """Save a compiled model so that `load_compiled` needs no packing.

    Args:
        model: what `hf_sparse.compile` gave, of a family whose blocks are compiled as a whole.
        folder: where to; files of other names in it stay. Written atomically. A tokenizer is not
            among them, nor a `config.json`: transformers' `from_pretrained` cannot read the folder
            unless a checkpoint is in it, too.

    Returns:
        The folder.

    Raises:
        ValueError: the model's blocks are not compiled, or its config was changed since.
        OSError: the folder cannot be written, or the disk is full; what was in it stays.
    """
    check_model(model, "save_compiled", PreTrainedModel)
    check_path(folder, "save_compiled")
    if any(isinstance(module, CompiledLinear) for module in model.modules()):
        raise ValueError(
            f"the blocks of this {type(model).__name__} are compiled layer by layer, which is not "
            "saved: save the model itself, and compile it after loading."
        )
    check_can_write(folder)
    families, stacks = families_in(model.base_model), stacks_of(model)
    for family, stack in zip(families, stacks, strict=True):
        check_config(stack, model.config, family)
    placed = {family.stack: stack for family, stack in zip(families, stacks, strict=True)}
    tensors, description = stacks_state(model.config.model_type, placed)
    own = secrets.token_bytes(_ID_BYTES)
    stored = {_ID: torch.tensor(list(own), dtype=torch.uint8)}
    stored |= tensors
    rest, tied = _untied(plain_state(model))
    stored |= {f"{_REST}{name}": tensor for name, tensor in rest.items()}
    stored |= {f"{_BUFFER}{name}": tensor for name, tensor in unsaved_buffers(model).items()}
    stored = _apart(stored)
    head = model.get_output_embeddings()
    described = {
        "layout": LAYOUT,
        "hf_sparse": __version__,
        "id": own.hex(),
        "class": type(model).__name__,
        "config": json.loads(model.config.to_json_string(use_diff=False)),
        "tied": tied,
        "types": {name: [str(t.dtype), list(t.shape)] for name, t in stored.items()},
        "generation": model.generation_config.to_dict() if model.can_generate() else None,
        "head": list(astuple(head.coding)) if isinstance(head, CodedHead) else None,
        **description,
    }
    described = json.loads(json.dumps(described))
    described[DIGESTS] = digests(described, stored)
    folder = Path(folder)
    with replacing(folder) as fresh:
        with disk_errors():
            save_file(stored, fresh / COMPILED_WEIGHTS, metadata={"format": "pt"})
        (fresh / COMPILED_DESCRIPTION).write_text(json.dumps(described))
    return folder


def load_compiled(
    folder: Path | str, *, target: str | None = None, cache: Path | str | None = DEFAULT_CACHE
) -> PreTrainedModel:
    """Load a model that `save_compiled` wrote.

    The weights are read into memory, and every count, row, column and value in them is checked there
    before machine code sees it; then both files are compared with their digests. What happens to the
    files afterwards does not matter. Files of earlier versions have no digests; those without an id are
    known to be of one save by sizes and zeros alone, with a warning.

    Args:
        folder: what `save_compiled` wrote.
        target, cache: as `hf_sparse.compile`'s.

    Raises:
        FormatError: a file is missing, damaged, or of an unknown layout; or the two files
            were not saved together, or contradict each other or the config.
        ImportError: llvmlite is not installed.
    """
    check_path(folder, "load_compiled")
    check_kinds(load_compiled, locals())
    folder, chosen = Path(folder), named(target)
    described = _read_description(folder)
    try:
        tensors = _read_weights(folder / COMPILED_WEIGHTS, described)
        stacks = restore_stacks(described["config"]["model_type"], tensors, described)
        old = is_old(described["layout"])
        if old:
            check_zeros(next(iter(stacks.values())))
        rest, tied = under(_REST, tensors), described["tied"]
        if both := sorted(tied.keys() & rest.keys()):
            raise ValueError(f"{both[0]} is stored, and tied to {tied[both[0]]} as well")
        rest |= {name: rest[source] for name, source in tied.items()}
        model = build_skeleton(described["class"], described["config"], stacks)
        fill(model, rest, under(_BUFFER, tensors))
        set_generation(model, described["generation"])
        coding = _head_coding(described.get("head"))
        check_digests(described, tensors)  # last: the other checks tell more of what is wrong
    except Exception as error:  # a damaged description can make any class of a config fail
        raise FormatError(f"{folder}: {error or repr(error)}") from error
    if old:
        warnings.warn(_UNTIED.format(folder=folder), stacklevel=2)
    try:
        folder_of_code = None if cache is None else Path(cache)
        return assemble(model, list(stacks.values()), chosen, folder_of_code, coding)
    except OffGridError as error:
        raise FormatError(
            f"{folder}: its head is on another grid than it tells: {error}"
        ) from error


def _read_description(folder: Path) -> dict[str, Any]:
    """The description, if both files are there and it is of this version's layout."""
    file = folder / COMPILED_DESCRIPTION
    missing = [n for n in (COMPILED_DESCRIPTION, COMPILED_WEIGHTS) if not (folder / n).is_file()]
    if missing:
        raise FormatError(
            f"{folder} holds no compiled model: {' and '.join(missing)} missing{_instead(folder)}. "
            "Wanted a folder that hf_sparse.save_compiled wrote."
        )
    try:
        described = json.loads(file.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise FormatError(f"{folder} holds no compiled model that can be read: {error}") from error
    if not isinstance(described, dict) or not _is_known(described.get("layout")):
        raise FormatError(
            f"{file} was written by another version of hf_sparse, with another layout of weights. "
            "Compile the model again."
        )
    return described


def _head_coding(told: Any) -> Coding | None:
    """How the output head became codes, which are made again."""
    if told is None:
        return None
    grid, exact = told
    if not isinstance(exact, bool):
        raise ValueError(f"its head is {told!r}")
    return Coding(Grid(*grid), exact)


def _is_known(layout: Any) -> bool:
    # That of 4 knew no windows (`weights/shuffled.py`), those of 4 and 5 no codes of few bits, those
    # before 7 no encoders with decoders; what they knew is the same.
    return layout in ([number, *LAYOUT[1:]] for number in (4, 5, 6, LAYOUT[0])) or is_old(layout)


def _instead(folder: Path) -> str:
    """What a folder holds instead of a compiled model, for an error message."""
    if not folder.is_dir():
        return ", since there is no such folder" if not folder.exists() else ", since it is a file"
    if (folder / "config.json").is_file():
        return (
            "; it holds a checkpoint, for from_pretrained, whose model hf_sparse.compile compiles"
        )
    names = sorted(path.name for path in folder.iterdir())
    return f"; it holds {', '.join(names[:5]) or 'nothing'}"


def _read_weights(path: Path, described: Mapping[str, Any]) -> dict[str, Tensor]:
    """The tensors of the weights' file: those that the description names, all of them and no others.

    Raises:
        ValueError: it is damaged, or of another save than the description.
    """
    shelf = Shelf()
    with path.open("rb") as file:
        entries = read_header(file)
        own = entries.get(_ID)
        if is_old(described["layout"]):
            fits, types = own is None, types_of(entries, described)
        else:
            fits = own is not None and (own.dtype, own.shape) == (torch.uint8, (_ID_BYTES,))
            fits = fits and bytes(read_tensor(file, entries[_ID]).tolist()).hex() == described["id"]
            types = described["types"]
        if not fits:
            raise ValueError(
                f"{COMPILED_WEIGHTS} and {COMPILED_DESCRIPTION} were not saved together: one of them "
                "is another model's, or saving was interrupted. Save the compiled model again."
            )
        _check_entries(entries, types)
        # Packed weights side by side, in the order of their use, which is that of the types.
        return {
            name: read_tensor(file, entries[name], shelf if name.startswith(PREFIXES) else None)
            for name in types
        }


def _check_entries(entries: Mapping[str, Entry], types: Mapping[str, Any]) -> None:
    """Refuse tensors that are missing, not described, or of another type or shape."""
    for name in sorted(entries.keys() ^ types.keys()):
        what = "is missing" if name in types else "is not described"
        raise ValueError(f"a compiled model is damaged: {name} {what}. Compile it again.")
    for name, entry in entries.items():
        dtype, shape = types[name]
        if [str(entry.dtype), list(entry.shape)] != [dtype, shape]:
            raise ValueError(
                f"a compiled model is damaged: {name} is {entry}; it was saved as {dtype} of shape "
                f"{tuple(shape)}. Compile it again."
            )


def _untied(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Each tensor once, and for the other names of one the first."""
    first: dict[Any, str] = {}
    tied: dict[str, str] = {}
    for name, tensor in tensors.items():
        same = (tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())
        if first.setdefault(same, name) != name and tensor.numel():
            tied[name] = first[same]
    return {name: tensor for name, tensor in tensors.items() if name not in tied}, tied


def _apart(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors contiguous, and those copied that share memory with one before, as files want it."""
    seen: set[int] = set()
    apart = {}
    for name, tensor in tensors.items():
        place = tensor.untyped_storage().data_ptr()
        shared = place in seen or not tensor.is_contiguous()
        apart[name] = tensor.detach().contiguous().clone() if shared else tensor.detach()
        seen.add(place)
    return apart
