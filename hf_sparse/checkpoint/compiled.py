"""Compiled models in files: loading needs no packing, and maps the weights into memory.

A folder holds `compiled.json` (class, config, numbers of the stack) and `compiled.safetensors`
(packed streams, embeddings, heads). Both can lie beside a checkpoint: they touch no other file.
A checkpoint that is saved there later removes them, since they are of the weights before. The
machine code itself is not among them: it is made for the CPU that loads.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import transformers
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoConfig, GenerationConfig, PreTrainedModel

import hf_sparse
from hf_sparse.arguments import check_model
from hf_sparse.checkpoint.atomic import replacing
from hf_sparse.checkpoint.can_save import check_can_write
from hf_sparse.checkpoint.writing import COMPILED_DESCRIPTION, COMPILED_WEIGHTS
from hf_sparse.formats import FormatError
from hf_sparse.models.families import base_type
from hf_sparse.runtime.blocks import Stack, check_config, why_not_compiled
from hf_sparse.runtime.compiled import assemble, check_parameters, stack_of
from hf_sparse.runtime.families import COMPILED
from hf_sparse.runtime.jit import DEFAULT_CACHE
from hf_sparse.runtime.sparse_linear import CompiledLinear
from hf_sparse.runtime.state import LAYOUT, restore_stack, stack_state
from hf_sparse.runtime.target import named

_STACK, _REST, _BUFFER = "stack.", "model.", "buffer."


def save_compiled(model: PreTrainedModel, folder: Path | str) -> Path:
    """Save a compiled model so that `load_compiled` needs no packing.

    Args:
        model: what `hf_sparse.compile` gave, of a family whose blocks are compiled as a whole.
        folder: where to; files of other names in it stay. Written atomically. A tokenizer is not
            among them.

    Returns:
        The folder.

    Raises:
        ValueError: the model's blocks are not compiled, or its config was changed since.
        OSError: the folder cannot be written; what was in it stays.
    """
    check_model(model, "save_compiled", PreTrainedModel)
    if any(isinstance(module, CompiledLinear) for module in model.modules()):
        raise ValueError(
            f"the blocks of this {type(model).__name__} are compiled layer by layer, which is not "
            "saved: save the model itself, and compile it after loading."
        )
    check_can_write(folder)
    stack = stack_of(model)
    check_config(stack, model.config)
    tensors, description = stack_state(stack)
    stored = {f"{_STACK}{name}": tensor for name, tensor in tensors.items()}
    seen: dict[int, str] = {}
    tied: dict[str, str] = {}
    for name, tensor in model.state_dict().items():
        if tensor.data_ptr() in seen and tensor.numel():
            tied[name] = seen[tensor.data_ptr()]
            continue
        seen[tensor.data_ptr()] = name
        stored[f"{_REST}{name}"] = tensor.contiguous()
    buffers = _unsaved_buffers(model)
    stored |= {f"{_BUFFER}{name}": tensor.clone() for name, tensor in buffers.items()}
    described = {
        "layout": json.loads(json.dumps(LAYOUT)),
        "hf_sparse": hf_sparse.__version__,
        "class": type(model).__name__,
        "config": json.loads(model.config.to_json_string(use_diff=False)),
        "tied": tied,
        "types": {k: str(v.dtype) for k, v in {**model.state_dict(), **buffers}.items()},
        "generation": model.generation_config.to_dict() if model.can_generate() else None,
        **description,
    }
    folder = Path(folder)
    with replacing(folder) as fresh:
        save_file(stored, fresh / COMPILED_WEIGHTS, metadata={"format": "pt"})
        (fresh / COMPILED_DESCRIPTION).write_text(json.dumps(described))
    return folder


def load_compiled(
    folder: Path | str, *, target: str | None = None, cache: Path | str | None = DEFAULT_CACHE
) -> PreTrainedModel:
    """Load a model that `save_compiled` wrote.

    The weights are mapped into memory, not copied; every count, row, column and value in them is
    checked before machine code sees it, which reads them once.

    Args:
        folder: what `save_compiled` wrote.
        target, cache: as `hf_sparse.compile`'s.

    Raises:
        FormatError: a file is missing, damaged, or of another version's layout; or the two files
            contradict each other or the config.
        ImportError: llvmlite is not installed.
    """
    folder, chosen = Path(folder), named(target)
    file = folder / COMPILED_DESCRIPTION
    try:
        described = json.loads(file.read_text())
        tensors = load_file(folder / COMPILED_WEIGHTS)
    except (OSError, SafetensorError, ValueError, RecursionError) as error:
        raise FormatError(f"{folder} holds no compiled model that can be read: {error}") from error
    if not isinstance(described, dict) or described.get("layout") != json.loads(json.dumps(LAYOUT)):
        raise FormatError(
            f"{file} was written by another version of hf_sparse, with another layout of weights. "
            "Compile the model again."
        )
    try:
        packed = {k.removeprefix(_STACK): v for k, v in tensors.items() if k.startswith(_STACK)}
        stack = restore_stack(packed, described)
        model = _skeleton(described, stack)
        rest = {k.removeprefix(_REST): v for k, v in tensors.items() if k.startswith(_REST)}
        rest |= {name: rest[source] for name, source in described["tied"].items()}
        _load_rest(model, rest, described["types"])
        found = {k.removeprefix(_BUFFER): v for k, v in tensors.items() if k.startswith(_BUFFER)}
        _load_buffers(model, found, described["types"])
        _set_generation(model, described["generation"])
    except Exception as error:  # a damaged description can make any class of a config fail
        raise FormatError(f"{folder}: {error}") from error
    return assemble(model, stack, chosen, None if cache is None else Path(cache))


def _skeleton(described: dict[str, Any], stack: Stack) -> PreTrainedModel:
    """The model without blocks: built with one, which is then taken out."""
    config = AutoConfig.for_model(**described["config"])
    reason = why_not_compiled(config)
    if reason is not None:
        raise ValueError(reason)
    model_class = getattr(transformers, described["class"], None)
    if model_class is None:
        model_class = getattr(hf_sparse, described["class"])
    if not issubclass(model_class, PreTrainedModel):
        raise ValueError(f"{described['class']} is no model class")
    if model_class.config_class is not type(config):
        raise ValueError(f"{described['class']} is no class of models of type {config.model_type}")
    check_config(stack, config)
    family = COMPILED[base_type(config.model_type)]
    small = copy.deepcopy(config)
    small.num_hidden_layers = 1
    small.block_sizes = None
    if getattr(small, "layer_types", None):
        small.layer_types = small.layer_types[:1]
    model: PreTrainedModel = model_class(small)
    path, _, name = family.stack.rpartition(".")
    owner: Any = model.base_model.get_submodule(path)
    setattr(owner, name, nn.ModuleList())
    if hasattr(owner, "has_sliding_layers"):  # of all blocks, not of the one that was built
        owner.has_sliding_layers = "sliding_attention" in config.layer_types
    for module in model.modules():
        if getattr(module, "config", None) is small:
            module.__dict__["config"] = config
    return model


def _unsaved_buffers(model: PreTrainedModel) -> dict[str, Tensor]:
    """Buffers that no checkpoint holds, such as rotary frequencies: they may have been rounded."""
    saved = model.state_dict().keys()
    return {name: buffer for name, buffer in model.named_buffers() if name not in saved}


def _load_rest(model: PreTrainedModel, tensors: dict[str, Tensor], types: dict[str, str]) -> None:
    _check_fit(model.state_dict(), tensors, types)
    model.load_state_dict(tensors, assign=True)
    check_parameters(model)
    model.requires_grad_(False)


def _load_buffers(
    model: PreTrainedModel, tensors: dict[str, Tensor], types: dict[str, str]
) -> None:
    _check_fit(_unsaved_buffers(model), tensors, types)
    for name, tensor in tensors.items():
        path, _, own = name.rpartition(".")
        if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
            raise ValueError(f"{name} has values that are not finite")
        model.get_submodule(path).register_buffer(own, tensor, persistent=False)


def _check_fit(
    wanted: Mapping[str, Tensor], found: Mapping[str, Tensor], types: Mapping[str, str]
) -> None:
    """Refuse tensors of other names or shapes than the model's, or other types than were saved."""
    shapes = {name: tensor.shape for name, tensor in wanted.items()}
    if {name: tensor.shape for name, tensor in found.items()} != shapes:
        differing = sorted(set(shapes.items()) ^ {(k, v.shape) for k, v in found.items()})
        raise ValueError(f"weights do not fit the model: {differing[:3]}")
    for name, tensor in found.items():
        if str(tensor.dtype) != types[name]:
            raise ValueError(f"{name} is {tensor.dtype}; it was saved as {types[name]}")


def _set_generation(model: PreTrainedModel, described: dict[str, Any] | None) -> None:
    if (described is not None) != model.can_generate():
        raise ValueError(f"generation is {described!r}, which {type(model).__name__} cannot use")
    if described is not None:
        model.generation_config = GenerationConfig.from_dict(described)
