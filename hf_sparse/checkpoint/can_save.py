"""Checks from a model's config and the folder whether it can be saved, before any work."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from hf_sparse.checkpoint.stored_config import check_family, check_rebuilds
from hf_sparse.checkpoint.writing import check_folder
from hf_sparse.configuration_sparse import SparsityConfig
from hf_sparse.formats import compress
from hf_sparse.structure.families import base_type
from hf_sparse.structure.grids import gridded
from hf_sparse.structure.layers import check_divides, promised_config
from hf_sparse.structure.targets import Targets
from hf_sparse.structure.units import shrunk_sizes
from hf_sparse.upstream.transformers.models import quantized_by


def check_can_save(
    model: PreTrainedModel | PreTrainedConfig,
    folder: str | os.PathLike[str],
    config: SparsityConfig | None = None,
) -> None:
    """Refuse what `save_pretrained` would refuse at the end.

    Args:
        model: a model, which may be on the meta device, or the config of one: then the shapes of
            its weights are not looked at.
        folder: where it is to be saved.
        config: what it is pruned to. None: what it is already pruned to.

    Raises:
        ValueError: nobody could load the model in the format, or its config does not describe it; the
            format does not hold the pattern, the pattern or the groups of scales do not divide a
            weight, targets match nothing, or the folder holds an ONNX export.
        OSError: the folder is a file, or cannot be made or written.
    """
    check_folder(Path(folder))
    check_can_write(folder)
    promised = config
    if isinstance(model, PreTrainedModel):
        promised = promised_config(model) if config is None else config
        check_not_quantized(model)
    format = "auto" if promised is None else promised.format
    described = model.config if isinstance(model, PreTrainedModel) else model
    check_family(described, format)
    if isinstance(model, PreTrainedModel):
        check_sizes(model, format)
        if format != "dense":
            check_rebuilds(model)
        if config is not None:
            _check_pattern(model, config)


def check_can_write(folder: str | os.PathLike[str]) -> None:
    """Refuse a folder that cannot be made or written; tried with a hidden folder that is removed.

    Raises:
        OSError: the folder is a file, or may not be written. The message names it.
    """
    folder = Path(os.path.realpath(folder))
    place = next(path for path in (folder, *folder.parents) if path.exists())
    if not place.is_dir():
        raise NotADirectoryError(f"{place} is a file; wanted a folder to save in.")
    try:
        os.rmdir(tempfile.mkdtemp(prefix=".writable-", dir=place))
    except OSError as error:
        raise type(error)(
            f"{folder} cannot be written: {error.strerror} in {place}. Choose another folder."
        ) from error


def check_sizes(model: PreTrainedModel, format: str) -> None:
    """Refuse the format `dense` for a model whose blocks `shrink_` made smaller.

    Raises:
        ValueError: it is such a model.
    """
    if format == "dense" and shrunk_sizes(model) is not None:
        raise ValueError(
            f"the blocks of this {type(model).__name__} were made smaller by hf_sparse.shrink_, and "
            f"models of type '{base_type(model.config.model_type)}' have blocks of one size: "
            "transformers could not load it. Save it in another format, as 'auto': it loads with "
            "hf_sparse, and what is dense is stored as it is."
        )


def check_not_quantized(model: nn.Module) -> None:
    """Refuse weights that are no plain floats; those of a GGUF file are restored when loaded.

    Raises:
        ValueError: the model is quantized.
    """
    method = quantized_by(model)
    if method not in (None, "gguf"):
        raise ValueError(
            f"the model is quantized with {method}, but zeros are stored "
            "as floats. Load it without quantization (for MXFP4 and FP8: quantization_config="
            "Mxfp4Config(dequantize=True), FineGrainedFP8Config(dequantize=True)), or call "
            "model.dequantize() first."
        )


def _check_pattern(model: nn.Module, config: SparsityConfig) -> None:
    targets = Targets.of(model, config)
    pattern = targets.pattern
    gridded(model, targets)  # tells of groups that do not divide a weight
    for layer in targets.layers:
        check_divides(pattern, layer.weight_name, *layer.weight.shape)
    group = torch.zeros(pattern.group_shape(1, 1))
    compress(group, config.format, pattern)  # tells if the format has no such pattern
