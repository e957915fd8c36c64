"""The config files of a checkpoint: under the sparse model type, or the family's own."""

from __future__ import annotations

import copy
from dataclasses import asdict
from pathlib import Path

from transformers import PreTrainedConfig, PreTrainedModel

from hf_sparse.checkpoint.can_save import check_sizes
from hf_sparse.checkpoint.sparse_configs import SparseConfigMixin, base_config_class
from hf_sparse.checkpoint.stored_config import check_rebuilds, dense_class_name, sparse_config
from hf_sparse.configuration_sparse import SparsityConfig
from hf_sparse.structure.families import base_type
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
        model_config = sparse_config(model, config)
        model_config.base_model = base
        stub = STUB_NAME.removesuffix(".py")
        model_config.auto_map = {"AutoConfig": f"{stub}.{type(model_config).__name__}"}
        (folder / STUB_NAME).write_text(_stub(model_config))
        check_rebuilds(model)
    check_sizes(model, config.format)
    if config.format != "dense" and parts_of(model.config):
        # As the layers are, whatever the config said.
        sizes = shrunk_sizes(model)
        model_config.block_sizes = None if sizes is None else [asdict(size) for size in sizes]
    model_config.dtype = model.dtype
    (folder / "config.json").write_text(model_config.to_json_string())
    if model.can_generate():
        model.generation_config.save_pretrained(folder)


def _stub(config: PreTrainedConfig) -> str:
    """The code that `trust_remote_code` runs where hf_sparse is not imported yet, or not installed."""
    name, family = type(config).__name__, base_type(type(config).model_type)
    base, check = base_config_class(family), ""
    if not base.__module__.startswith("transformers."):
        check = (
            "from transformers import CONFIG_MAPPING\n\n"
            f'if "{family}" not in CONFIG_MAPPING:\n'
            "    raise ImportError(\n"
            f"        \"the checkpoint's model has code of its own, type '{family}'. Import it and \"\n"
            f"        \"call AutoConfig.register('{family}', {base.__name__}) and the Auto class's \"\n"
            '        "register before the checkpoint is loaded."\n'
            "    )\n"
        )
    return (
        '"""This checkpoint is compressed by hf_sparse: pip install hf_sparse"""\n\n'
        f'{check}from hf_sparse import {name}\n\n__all__ = ["{name}"]\n'
    )


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
