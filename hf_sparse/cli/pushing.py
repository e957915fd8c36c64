"""The command `push`: a checkpoint folder, or an adapter merged into its base model."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

from transformers.utils.peft_utils import ADAPTER_CONFIG_NAME

import hf_sparse
from hf_sparse.adapters.stored import stored_config
from hf_sparse.checkpoint.reading import check_is_checkpoint
from hf_sparse.checkpoint.stored_config import check_family
from hf_sparse.cli.loading import (
    has_tokenizer,
    load,
    skeleton,
)
from hf_sparse.exporters.can_export import check_can_export
from hf_sparse.files.links import check_links
from hf_sparse.hub import check_can_push, push_to_hub, upload_folder


def push(options: argparse.Namespace) -> int:
    """Upload a checkpoint folder, or an adapter merged into its base model."""
    private = options.private or None
    if (Path(options.folder) / ADAPTER_CONFIG_NAME).exists():
        model, tokenizer = _merged(options)
        commit = push_to_hub(
            model, options.repo_id, tokenizer=tokenizer, private=private, onnx=options.onnx
        )
    elif options.base is not None:
        raise ValueError(f"--base is for adapters, and {options.folder} is none: leave it out.")
    else:
        check_is_checkpoint(Path(options.folder))
        check_links(Path(options.folder))
        check_can_push(options.repo_id)
        with tempfile.TemporaryDirectory() as temporary:
            folder, copy = Path(options.folder), Path(temporary) / "model"
            if options.onnx:
                check_can_export(skeleton(options.folder, options), copy / "onnx")
            hf_sparse.inspect_checkpoint(folder)  # a damaged folder is not uploaded
            if options.onnx:
                folder = _with_graph(folder, copy, options)
            commit = upload_folder(folder, options.repo_id, private=private)
    print(json.dumps({"url": commit.commit_url}) if options.json else commit.commit_url)
    return 0


def _with_graph(folder: Path, copy: Path, options: argparse.Namespace) -> Path:
    """A copy of a checkpoint folder, of links, with the ONNX graph in it."""
    shutil.copytree(folder.resolve(), copy, copy_function=os.symlink)
    needs_tokenizer = bool(options.tokenizer) or has_tokenizer(str(folder))
    model, tokenizer = load(str(folder), options, needs_tokenizer)
    hf_sparse.export_onnx(model, copy / "onnx", tokenizer=tokenizer)
    return copy


def _merged(options: argparse.Namespace) -> tuple[Any, Any]:
    """The base model of an adapter with the adapter merged, and the tokenizer, if it has one."""
    base = options.base or stored_config(options.folder).get("base_model_name_or_path")
    if not base:
        raise ValueError(f"{options.folder} does not tell its base model: give --base FOLDER.")
    check_can_push(options.repo_id)
    try:
        check_family(skeleton(base, options).config, "auto")
        model, tokenizer = load(base, options, bool(options.tokenizer) or has_tokenizer(base))
    except (OSError, ValueError) as error:
        raise ValueError(
            f"the base model of {options.folder} cannot be loaded from {base}: {error} Give the "
            "sparse model that the adapter was trained on: --base FOLDER."
        ) from error
    return hf_sparse.merge_adapters_(hf_sparse.load_adapter(model, options.folder)), tokenizer
