"""The command `push`: a checkpoint folder, or an adapter merged into its base model."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
from pathlib import Path

from huggingface_hub import HfApi

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
from hf_sparse.hub import check_can_push
from hf_sparse.uploads import GRAPH_FOLDER, carry_out, plan_upload
from hf_sparse.upstream.transformers.files import ADAPTER_CONFIG_NAME


def push(options: argparse.Namespace) -> int:
    """Upload a checkpoint folder, or an adapter merged into its base model."""
    api, merges = HfApi(), (Path(options.folder) / ADAPTER_CONFIG_NAME).exists()
    with tempfile.TemporaryDirectory() as temporary:
        folder = (_merged if merges else _checked)(options, Path(temporary) / "model")
        upload = plan_upload(
            api,
            folder,
            options.repo_id,
            revision=options.revision,
            private=options.private or None,
            settle_card=merges,
        )
        if options.dry_run:
            print(json.dumps(upload.to_dict(), indent=2) if options.json else upload)
            return 0
        if upload.warning is not None:
            print(f"hf-sparse: {upload.warning}", file=sys.stderr)
        if upload.foreign is not None and not (options.overwrite or options.create_pr):
            _ask(upload.foreign)
        commit = carry_out(api, upload, revision=options.revision, create_pr=options.create_pr)
    url = commit.pr_url or commit.commit_url
    print(json.dumps({"url": url}) if options.json else url)
    return 0


def _check_token(options: argparse.Namespace) -> None:
    """Refuse an upload that nobody may make; a dry run looks at what everybody sees."""
    if not options.dry_run:
        check_can_push(options.repo_id)


def _ask(why: str) -> None:
    """Ask whether what is there may be replaced.

    Raises:
        ValueError: it may not, or nobody is there to answer.
    """
    advice = (
        "Give --overwrite to replace it, --create-pr to open a pull request, or another REPO_ID."
    )
    if not sys.stdin.isatty():
        raise ValueError(f"{why} {advice}")
    print(f"{why}\nReplace it? [y/N] ", end="", file=sys.stderr, flush=True)
    if sys.stdin.readline().strip().lower() not in ("y", "yes"):
        raise ValueError(f"nothing was uploaded. {advice}")


def _checked(options: argparse.Namespace, copy: Path) -> Path:
    """The checkpoint folder, or a copy of it with the graph, that is known to be whole."""
    if options.base is not None:
        raise ValueError(f"--base is for adapters, and {options.folder} is none: leave it out.")
    folder = Path(options.folder)
    check_is_checkpoint(folder)
    check_links(folder)
    _check_token(options)
    if options.onnx:
        check_can_export(skeleton(options.folder, options), copy / "onnx")
    hf_sparse.inspect_checkpoint(folder)  # a damaged folder is not uploaded
    return _with_graph(folder, copy, options) if options.onnx else folder


def _with_graph(folder: Path, copy: Path, options: argparse.Namespace) -> Path:
    """A copy of a checkpoint folder, of links, with the ONNX graph in it."""
    shutil.copytree(folder.resolve(), copy, copy_function=os.symlink)
    needs_tokenizer = bool(options.tokenizer) or has_tokenizer(str(folder))
    model, tokenizer = load(str(folder), options, needs_tokenizer=needs_tokenizer)
    hf_sparse.export_onnx(model, copy / "onnx", tokenizer=tokenizer)
    return copy


def _merged(options: argparse.Namespace, folder: Path) -> Path:
    """Save the base model of an adapter with the adapter merged, and what belongs to it."""
    base = options.base or stored_config(options.folder).get("base_model_name_or_path")
    if not base:
        raise ValueError(f"{options.folder} does not tell its base model: give --base FOLDER.")
    _check_token(options)
    try:
        check_family(skeleton(base, options).config, "auto")
        needs_tokenizer = bool(options.tokenizer) or has_tokenizer(base)
        model, tokenizer = load(base, options, needs_tokenizer=needs_tokenizer)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"the base model of {options.folder} cannot be loaded from {base}: {error} Give the "
            "sparse model that the adapter was trained on: --base FOLDER."
        ) from error
    merged = hf_sparse.merge_adapters_(hf_sparse.load_adapter(model, options.folder))
    hf_sparse.save_pretrained(merged, folder, tokenizer=tokenizer)
    if options.onnx:
        hf_sparse.export_onnx(merged, folder / GRAPH_FOLDER, tokenizer=tokenizer)
    return folder
