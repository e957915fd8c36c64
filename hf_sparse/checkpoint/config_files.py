"""The config files of a checkpoint: under the sparse model type, or the family's own."""

from __future__ import annotations

import copy
from dataclasses import asdict
from pathlib import Path

from transformers import PreTrainedConfig, PreTrainedModel

from hf_sparse.checkpoint.can_save import check_family, check_sizes
from hf_sparse.checkpoint.quantizer import SparseCheckpointConfig
from hf_sparse.checkpoint.sparse_configs import (
    SparseConfigMixin,
    base_config_class,
    sparse_config_class,
)
from hf_sparse.configuration_sparse import SparsityConfig
from hf_sparse.structure.parts import parts_of
from hf_sparse.structure.units import shrunk_sizes

STUB_NAME = "modeling_hf_sparse.py"


def write_configs(
    model: PreTrainedModel, config: SparsityConfig, folder: Path, base: str | None = None
) -> None:
    """Write `config.json`, the generation config, and the stub for `trust_remote_code`."""
    if config.format == "dense":
        model_config = dense_config(model)
    else:
        model_config = _sparse_config(model, config)
        model_config.base_model = base
        config_class = type(model_config).__name__
        model_config.auto_map = {"AutoConfig": f"{STUB_NAME.removesuffix('.py')}.{config_class}"}
        (folder / STUB_NAME).write_text(
            '"""This checkpoint is compressed by hf_sparse: pip install hf_sparse"""\n\n'
            f'from hf_sparse import {config_class}\n\n__all__ = ["{config_class}"]\n'
        )
    check_sizes(model, config.format)
    if config.format != "dense" and parts_of(model.config):
        # As the layers are, whatever the config said.
        sizes = shrunk_sizes(model)
        model_config.block_sizes = None if sizes is None else [asdict(size) for size in sizes]
    model_config.dtype = model.dtype
    (folder / "config.json").write_text(model_config.to_json_string())
    if model.can_generate():
        model.generation_config.save_pretrained(folder)


def dense_class_name(model: PreTrainedModel) -> str:
    """The name of the transformers class, of a Sparse class too; FSDP renames classes."""
    return type(model).__name__.removeprefix("FSDP").removeprefix("Sparse")


def dense_config(model: PreTrainedModel) -> PreTrainedConfig:
    """A copy of the config under the family's own model type."""
    if isinstance(model.config, SparseConfigMixin):
        values = model.config.to_dict()
        for key in ("sparsity_config", "base_model", "auto_map", *_ours(model)):
            values.pop(key, None)
        model_config = base_config_class(model.config.base_model_type).from_dict(values)
    else:
        model_config = copy.deepcopy(model.config)
        for key in _ours(model):  # transformers has the first one for GGUF files, too
            vars(model_config).pop(key, None)
    model_config.architectures = [dense_class_name(model)]
    return model_config


def _ours(model: PreTrainedModel) -> tuple[str, ...]:
    """What a config under the family's own type has no place for."""
    sizes = ("block_sizes",) if parts_of(model.config) else ()
    return ("quantization_config", *sizes)


def _sparse_config(model: PreTrainedModel, config: SparsityConfig) -> PreTrainedConfig:
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
