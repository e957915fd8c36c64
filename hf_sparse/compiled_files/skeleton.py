"""A model without its blocks, from its config and its other tensors: nothing is allocated or drawn.

The config comes from a file. Counts by which transformers builds lists are compared with what the
file has before it builds any, and the model is built on `meta`, where a size costs nothing; its
tensors are then those of the file, whose shapes must be the model's.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import AutoConfig, GenerationConfig, PreTrainedModel

from hf_sparse import models
from hf_sparse.arguments import check_finite
from hf_sparse.runtime.model.configured import check_config, why_not_compiled
from hf_sparse.runtime.model.description import Blocks
from hf_sparse.runtime.model.families import families_in, families_of, seen_by
from hf_sparse.runtime.model.plain import check_parameters, check_types
from hf_sparse.runtime.model.references import LAYERS
from hf_sparse.runtime.weights.stack import Stack
from hf_sparse.upstream.torch import saved_tensors
from hf_sparse.upstream.transformers.models import set_attention_


def build_skeleton(
    class_name: str, described: Mapping[str, Any], stacks: Mapping[str, Stack]
) -> PreTrainedModel:
    """The model on `meta`: built with one block in each stack, which is then taken out.

    Args:
        class_name: of transformers or hf_sparse.
        described: the config.
        stacks: the blocks that the config must fit, by the places of their lists in the base model.

    Raises:
        ValueError: the config is of no model that is compiled, or of another one than the blocks.
    """
    _check_counts(described, max(len(stack.blocks) for stack in stacks.values()))
    config = AutoConfig.for_model(**described)
    reason = why_not_compiled(config)
    if reason is not None:
        raise ValueError(reason)
    model_class = getattr(transformers, class_name, None)
    if model_class is None:
        model_class = getattr(models, class_name)
    if not issubclass(model_class, PreTrainedModel):
        raise ValueError(f"{class_name} is no model class")
    if model_class.config_class is not type(config):
        raise ValueError(f"{class_name} is no class of models of type {config.model_type}")
    families = [family for family in families_of(config) if family.stack in stacks]
    if [family.stack for family in families] != list(stacks):
        raise ValueError(f"blocks at {', '.join(stacks)} are not those of {config.model_type}")
    for family in families:
        check_config(stacks[family.stack], config, family)
    # What a file names here can be code to download; compiled blocks have an attention of their own.
    set_attention_(config, "eager")
    small = _with_one_block(config)
    with torch.inference_mode(False), torch.device("meta"):
        model: PreTrainedModel = model_class(small)
    if [family.stack for family in families_in(model.base_model)] != list(stacks):
        raise ValueError(f"{class_name} has other stacks of blocks than {', '.join(stacks)}")
    for family in families:
        owner: Any = model.base_model.get_submodule(family.holder)
        setattr(owner, family.list_name, nn.ModuleList())
        if hasattr(owner, "has_sliding_layers"):  # of all blocks, not of the one that was built
            owner.has_sliding_layers = "sliding_attention" in config.layer_types
        if getattr(owner, "config", small) is not small:
            _set_counts_(owner.config, config, family)
    for module in model.modules():
        if getattr(module, "config", None) is small:
            module.__dict__["config"] = config
    return model


def _set_counts_(copied: Any, config: Any, family: Blocks) -> None:
    """Give the copy of a config that a stack has the numbers of blocks that the whole one has."""
    for name in LAYERS:
        if hasattr(config, name):
            setattr(copied, name, getattr(config, name))
    # To the stack its own blocks are the only ones.
    copied.num_hidden_layers = seen_by(config, family).num_hidden_layers


def _check_counts(described: Mapping[str, Any], blocks: int) -> None:
    """Refuse counts by which transformers builds lists, unless there are as many things."""
    for name in ("num_hidden_layers", "n_layer", "n_layers", "inner_group_num"):
        count = described.get(name, 1)
        if type(count) is not int or not 0 < count <= blocks:
            raise ValueError(f"config.{name} is {count!r}, and there are {blocks} blocks")
    labels = described.get("id2label")
    if not isinstance(labels, dict) or described.get("num_labels", len(labels)) != len(labels):
        raise ValueError("config.id2label and config.num_labels differ")


def _with_one_block(config: Any) -> Any:
    """A config for one block of each kind of attention."""
    small = copy.deepcopy(config)
    kinds = list(dict.fromkeys(getattr(small, "layer_types", None) or [""]))
    small.num_hidden_layers = len(kinds)  # what is around the blocks may be made for each kind
    for name in LAYERS - {"num_hidden_layers"}:
        if hasattr(small, name):
            setattr(small, name, 1)
    small.block_sizes = None
    for name in ("num_hidden_groups", "inner_group_num"):
        if hasattr(small, name):
            setattr(small, name, 1)
    if getattr(small, "layer_types", None):
        small.layer_types = kinds
    return small


def plain_state(model: PreTrainedModel) -> dict[str, Tensor]:
    """The tensors of a model's state dict that are not packed, also of a compiled model."""
    return {
        f"{path}.{name}".removeprefix("."): tensor.detach()
        for path, module in model.named_modules(remove_duplicate=False)
        for name, tensor in saved_tensors(module).items()
    }


def unsaved_buffers(model: PreTrainedModel) -> dict[str, Tensor]:
    """Buffers that no checkpoint holds, such as rotary frequencies: they may have been rounded."""
    saved = plain_state(model).keys()
    return {name: buffer for name, buffer in model.named_buffers() if name not in saved}


def fill(
    model: PreTrainedModel, tensors: Mapping[str, Tensor], buffers: Mapping[str, Tensor]
) -> None:
    """Give a skeleton its tensors.

    Raises:
        ValueError: they are not those of this model, or not finite.
    """
    _check_shapes(plain_state(model), tensors)
    _check_shapes(unsaved_buffers(model), buffers)
    model.load_state_dict(tensors, assign=True)
    check_types(model)
    check_parameters(model)
    for name, tensor in buffers.items():
        path, _, own = name.rpartition(".")
        check_finite(name, tensor)
        model.get_submodule(path).register_buffer(own, tensor, persistent=False)
    for path, module in model.named_modules():
        for name, value in vars(module).items():
            if isinstance(value, Tensor) and value.is_meta:
                raise ValueError(f"{path}.{name} is neither a parameter nor a buffer")
    model.requires_grad_(False)


def _check_shapes(wanted: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> None:
    """Refuse tensors of other names or shapes than the model's."""
    shapes = {name: tuple(tensor.shape) for name, tensor in wanted.items()}
    differing = set(shapes.items()) ^ {(k, tuple(v.shape)) for k, v in found.items()}
    if differing:
        raise ValueError(f"weights do not fit the model: {sorted(differing)[:3]}")


def set_generation(model: PreTrainedModel, described: dict[str, Any] | None) -> None:
    """Give a model its generation config, if it is one that generates.

    Raises:
        ValueError: it generates and there is none, or the other way round.
    """
    if (described is not None) != model.can_generate():
        raise ValueError(f"generation is {described!r}, which {type(model).__name__} cannot use")
    if described is not None:
        model.generation_config = GenerationConfig.from_dict(described)
