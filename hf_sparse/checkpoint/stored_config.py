"""The config that a model is stored with when it is compressed, and whether it describes the model."""

from __future__ import annotations

import copy
import json
from pathlib import Path

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from hf_sparse.checkpoint.bounds import Size
from hf_sparse.checkpoint.described import class_named, describe
from hf_sparse.checkpoint.model_classes import first_class_of
from hf_sparse.checkpoint.quantizer import SparseCheckpointConfig
from hf_sparse.checkpoint.sparse_configs import (
    SparseConfigMixin,
    base_config_class,
    sparse_config_class,
    type_of,
)
from hf_sparse.configuration_sparse import SparsityConfig
from hf_sparse.formats import FormatError
from hf_sparse.structure.parts import parts_of
from hf_sparse.upstream.transformers.models import is_from_transformers


def check_family(config: PreTrainedConfig, format: str) -> None:
    """Refuse a format that the model of a config cannot be loaded in.

    Raises:
        ValueError: AutoConfig does not know the config's class, and the format needs it.
    """
    if format == "dense" or isinstance(config, SparseConfigMixin):
        return
    kind = type(config)
    if type_of(kind) is None:
        name = kind.__name__
        raise ValueError(
            f"models of type '{config.model_type}' cannot be stored compressed: {name} of "
            f"{kind.__module__} is not the class that AutoConfig has for the type, so that nobody "
            "could load them. Register the model's code, here and where it is loaded: "
            f"AutoConfig.register('{config.model_type}', {name}) and AutoModel.register({name}, "
            "...). Or save it as large as the dense model, zeros included: "
            "SparsityConfig(..., format='dense')."
        )
    own = base_config_class(config.model_type)
    if not is_from_transformers(own) and first_class_of(own) is None:
        raise ValueError(
            f"models of type '{config.model_type}' cannot be stored compressed: no Auto class has a "
            f"model for {kind.__name__}, so that nobody could load them. Register it with "
            f"AutoModel.register({kind.__name__}, ...), or save it with format='dense'."
        )


def dense_class_name(model: PreTrainedModel) -> str:
    """The name of the transformers class, of a Sparse class too; FSDP renames classes."""
    return type(model).__name__.removeprefix("FSDP").removeprefix("Sparse")


def sparse_config(model: PreTrainedModel, config: SparsityConfig) -> PreTrainedConfig:
    """The config under the family's sparse model type, with what transformers loads it by."""
    if isinstance(model.config, SparseConfigMixin):
        model_config: PreTrainedConfig = copy.deepcopy(model.config)
    else:
        check_family(model.config, config.format)
        model_config = sparse_config_class(model.config.model_type).from_dict(
            model.config.to_dict()
        )
    model_config.architectures = [f"Sparse{dense_class_name(model)}"]
    model_config.quantization_config = SparseCheckpointConfig(**config.to_dict()).to_dict()
    return model_config


def check_rebuilds(model: PreTrainedModel) -> None:
    """Refuse a model that its config does not describe: a checkpoint of it would not load.

    Families whose blocks are known by name are looked at when they are loaded, but for parts of them.

    Raises:
        ValueError: the config cannot be read again, or gives a model of other weights.
    """
    if (parts := parts_of(model.config)) is not None:
        _check_whole(model, parts.stack)
        return
    place, kind = Path("config.json"), type(model).__name__
    values = json.loads(sparse_config(model, SparsityConfig("unstructured", 0.0)).to_json_string())
    try:
        family, named, exact = class_named(values, place)
        again = describe(values, named, family, place, Size.of_model(model)) if exact else None
    except FormatError as error:
        raise ValueError(
            f"the config of this {kind} cannot be read again, so that a compressed checkpoint would "
            f"not load: {error}. Save it with format='dense'."
        ) from error
    if again is None:  # a class of the user's: its own weights are compared when it is loaded
        return
    wanted, found = _shapes(model), _shapes(again)
    for name in sorted(wanted.keys() | found.keys()):
        if wanted.get(name) != found.get(name):
            raise ValueError(
                f"this {kind} is not the model that its config describes: {name} has the shape "
                f"{wanted.get(name)}, and {found.get(name)} in a model of the config. A checkpoint "
                "would not load: change the config to the model's sizes, or save it with "
                "format='dense'."
            )


def _check_whole(model: PreTrainedModel, stack: str) -> None:
    """Refuse a part of a family's model that no Auto class builds, such as OPT's decoder alone."""
    base: nn.Module = model.base_model
    if stack not in {name for name, _ in base.named_modules()}:
        kind = type(model).__name__
        whole = first_class_of(base_config_class(model.config.model_type))
        raise ValueError(
            f"{kind} is a part of a model of type '{model.config.model_type}': it has no blocks at "
            f"{stack}, and AutoModel would build a {whole.__name__}, which its weights do not fit. "
            f"Save the whole model, or save it with format='dense', for {kind}.from_pretrained."
        )


def _shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """The shapes of a model's parameters, by all names: on the disk, tied ones are several objects."""
    named = model.named_parameters(remove_duplicate=False)
    return {name: tuple(value.shape) for name, value in named}
