"""What each command does: thin wrappers over the package's functions."""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

import hf_sparse
from hf_sparse.cli.loading import (
    has_tokenizer,
    labelled_texts,
    load,
    load_tokenizer,
    measurement,
    windows,
)
from hf_sparse.documents import read_documents
from hf_sparse.pruning.calibration import token_windows
from hf_sparse.pruning.methods import METHODS, Recipe
from hf_sparse.report import format_table


def prune(options: argparse.Namespace) -> int:
    """Prune a model and save it."""
    if Path(options.output).resolve() == Path(options.model).resolve():
        raise ValueError(f"OUTPUT is MODEL, {options.model}: the dense model would be lost.")
    if (
        options.sparsity is None
        and hf_sparse.Pattern.parse(options.pattern).implied_sparsity is None
    ):
        raise ValueError(f"pattern '{options.pattern}' needs a sparsity: --sparsity 0.5")
    config = hf_sparse.SparsityConfig(
        options.pattern, options.sparsity, options.targets, options.ignore, options.format
    )
    own = method_options(options)
    needs_calibration = Recipe.of(options.method, config.pattern, own).needs_calibration
    if needs_calibration and not options.calibration and not options.labels:
        raise ValueError(
            f"method '{options.method}' needs calibration text: --calibration FILE, or of a classifier "
            "--labels FILE"
        )
    if options.stream and options.labels:
        raise ValueError(
            "--labels are for methods that need the model's loss, and those do not --stream: give "
            "--calibration instead."
        )
    if options.resume and not options.stream:
        raise ValueError("--resume goes on with a streamed run: give --stream too.")
    documents = rows = None
    if needs_calibration and options.labels:
        rows = labelled_texts(options)
    elif needs_calibration:
        documents = read_documents(options.calibration)
    model: Any = None
    if options.stream:
        tokenizer = load_tokenizer(options.model, options)
    else:
        model, tokenizer = load(options.model, options)
    batches = None
    if documents is not None:
        batches = windows(tokenizer, documents, options)
    elif rows is not None:
        if options.num_samples < 1:
            raise ValueError(f"--num-samples is {options.num_samples}; wanted at least 1.")
        batches = hf_sparse.labelled_batches(
            model,
            tokenizer,
            *(column[: options.num_samples] for column in rows),
            window=options.window,
            batch_size=options.batch_size,
        )
    if model is None:
        report = hf_sparse.prune_checkpoint(
            options.model,
            options.output,
            config,
            options.method,
            batches,
            resume=options.resume,
            tokenizer=tokenizer,
            dtype=options.dtype,
            base_model=options.base_model,
            **own,
        )
    else:
        report = hf_sparse.prune_(model, config, options.method, batches, **own)
        hf_sparse.save_pretrained(
            model,
            options.output,
            config,
            tokenizer=tokenizer,
            report=report,
            base_model=options.base_model,
        )
    return _print_saved(report, options)


def _print_saved(report: Any, options: argparse.Namespace) -> int:
    """Print a report as the options want it, and where the model was saved; the exit code."""
    if options.json:
        _print_json(report, options)
    else:
        print(report if options.tensors else report.summary())
        print(f"saved to {options.output}")
    return 0


def _print_json(report: Any, options: argparse.Namespace) -> None:
    """Print a report as JSON, with the folder that was written."""
    print(json.dumps({**json.loads(report.to_json()), "folder": options.output}, indent=2))


def method_options(options: argparse.Namespace) -> dict[str, Any]:
    """The keyword arguments of `prune_` that the flags give.

    Raises:
        ValueError: a value cannot be read as the option's type.
    """
    own: dict[str, Any] = {}
    for name in ("scope", "allocation", "refine", "reconstruct"):
        if (value := getattr(options, name)) is not None:
            own[name] = value
    defaults = METHODS[options.method].options()
    for given in options.option or ():
        name, equals, text = given.partition("=")
        if not equals or name not in defaults:
            raise ValueError(
                f"--option {given}: wanted NAME=VALUE; method '{options.method}' has the options "
                f"{', '.join(f'{k}={v}' for k, v in defaults.items()) or 'none'}."
            )
        try:
            own[name] = _read_as(defaults[name], text)
        except ValueError as error:
            raise ValueError(
                f"--option {given}: wanted a value like {name}={defaults[name]}."
            ) from error
    return own


def _read_as(default: Any, text: str) -> Any:
    """The text as a value of the default's type."""
    if isinstance(default, bool):
        if text not in ("true", "false"):
            raise ValueError(text)
        return text == "true"
    return text if default is None else type(default)(text)


def recover(options: argparse.Namespace) -> int:
    """Train a sparse model on text, its zeros kept, and save it."""
    if Path(options.output).resolve() == Path(options.folder).resolve():
        raise ValueError(f"OUTPUT is FOLDER, {options.folder}: the pruned model would be lost.")
    documents = read_documents(options.data)
    if options.method == "finetune" and options.dtype == "auto":
        options.dtype = "float32"
    model, tokenizer = load(options.folder, options)
    windows = token_windows(tokenizer, documents, options.window, options.num_samples)
    batches = [{"input_ids": batch} for batch in windows.split(options.batch_size)]
    teacher = None
    if options.teacher is not None:
        teacher, _ = load(options.teacher, options, needs_tokenizer=False)
    report = hf_sparse.recover_(
        model,
        batches,
        options.method,
        teacher=teacher,
        epochs=options.epochs,
        accumulate=options.accumulate,
        lr=options.lr,
        r=options.r,
    )
    hf_sparse.save_pretrained(model, options.output, tokenizer=tokenizer, report=report)
    return _print_saved(report, options)


def evaluate(options: argparse.Namespace) -> int:
    """Measure a model, and the dense one beside it."""
    measure = measurement(options)
    figures = {}
    for name, source in (("sparse", options.model), ("dense", options.dense)):
        if source is not None:
            figures[name] = measure(*load(source, options))
    metric = "accuracy" if options.labels else "perplexity"
    if options.json:
        finite = {name: f if math.isfinite(f) else None for name, f in figures.items()}
        print(json.dumps({"metric": metric, "window": options.window, **finite}))
    else:
        rows = [(name, f"{figure:.4f}") for name, figure in figures.items()]
        print(format_table(("model", metric), rows))
        if "dense" not in figures:
            print("Give --dense MODEL to see the dense model's figure beside it.")
    return 0


def inspect(options: argparse.Namespace) -> int:
    """Print what a checkpoint folder holds."""
    found = hf_sparse.inspect_checkpoint(options.folder)
    report = found.report
    if options.json:
        described = dataclasses.asdict(found)
        described["config"] = found.config.to_dict() if found.config else None
        described["report"] = json.loads(report.to_json())
        print(json.dumps(described, indent=2))
    else:
        if options.tensors:
            print(report)
        print(found)
    if found.config is not None and found.config.pattern.implied_sparsity and report.violations:
        print(
            f"hf-sparse: error: {report.violations} groups break the promised pattern "
            f"'{report.pattern}'",
            file=sys.stderr,
        )
        return 1
    return 0


def bench(options: argparse.Namespace) -> int:
    """Time a model with torch, with dense kernels, and compiled."""
    model, _ = load(options.model, options, needs_tokenizer=False)
    if options.threads is not None:
        if options.threads < 1:
            raise ValueError(f"--threads {options.threads}: wanted at least 1.")
        torch.set_num_threads(options.threads)
    found = hf_sparse.benchmark(model, options.batch, options.tokens, options.repeats)
    if options.json:
        print(json.dumps(found.to_dict()))
        return 0
    if options.explain:
        compiled: Any = hf_sparse.compile(model)
        print(compiled.explain(options.batch * options.tokens), end="\n\n")
    print(found)
    return 0


def shrink(options: argparse.Namespace) -> int:
    """Remove the heads and neurons that zeros have made useless, and save the smaller model."""
    if Path(options.output).resolve() == Path(options.model).resolve():
        raise ValueError(f"OUTPUT is MODEL, {options.model}: the larger model would be lost.")
    needs_tokenizer = bool(options.tokenizer) or has_tokenizer(options.model)
    model, tokenizer = load(options.model, options, needs_tokenizer)
    report = hf_sparse.shrink(model)
    hf_sparse.save_pretrained(
        model, options.output, tokenizer=tokenizer, base_model=options.base_model
    )
    if options.json:
        _print_json(report, options)
    else:
        print(report)
        print(f"saved to {options.output}{'' if needs_tokenizer else ', without a tokenizer'}")
    return 0


def export(options: argparse.Namespace) -> int:
    """Export a model as an ONNX graph."""
    if options.quantize == "static" and not options.calibration:
        raise ValueError("--quantize static calibrates on text: --calibration FILE")
    if options.calibration and options.quantize != "static":
        raise ValueError("--calibration is for --quantize static alone: leave it out.")
    model, tokenizer = load(options.model, options)
    batches = None
    if options.calibration:
        batches = windows(tokenizer, read_documents(options.calibration), options)
    report = hf_sparse.export_onnx(
        model,
        options.output,
        tokenizer=tokenizer,
        pack=not options.no_pack,
        quantize=options.quantize,
        batches=batches,
    )
    print(json.dumps(report.to_dict()) if options.json else report)
    return 0


def push(options: argparse.Namespace) -> int:
    """Upload a checkpoint folder, or an adapter merged into its base model."""
    from hf_sparse.checkpoint.links import check_links
    from hf_sparse.hub import push_to_hub, upload_folder
    from hf_sparse.recovery.stored import ADAPTER_CONFIG

    private = options.private or None
    if (Path(options.folder) / ADAPTER_CONFIG).exists():
        model, tokenizer = _merged(options)
        commit = push_to_hub(
            model, options.repo_id, tokenizer=tokenizer, private=private, onnx=options.onnx
        )
    elif options.base is not None:
        raise ValueError(f"--base is for adapters, and {options.folder} is none: leave it out.")
    else:
        hf_sparse.inspect_checkpoint(options.folder)  # a damaged folder is not uploaded
        check_links(Path(options.folder))
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(options.folder)
            if options.onnx:
                folder = _with_graph(folder, Path(temporary) / "model", options)
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
    from hf_sparse.recovery.stored import stored_config

    base = options.base or stored_config(options.folder).get("base_model_name_or_path")
    if not base:
        raise ValueError(f"{options.folder} does not tell its base model: give --base FOLDER.")
    try:
        model, tokenizer = load(base, options, bool(options.tokenizer) or has_tokenizer(base))
    except (OSError, ValueError) as error:
        raise ValueError(
            f"the base model of {options.folder} cannot be loaded from {base}: {error} Give the "
            "sparse model that the adapter was trained on: --base FOLDER."
        ) from error
    return hf_sparse.merge_adapters(hf_sparse.load_adapter(model, options.folder)), tokenizer


def convert(options: argparse.Namespace) -> int:
    """Convert an old checkpoint."""
    folder = hf_sparse.convert_legacy(options.folder, options.output)
    print(json.dumps({"folder": str(folder)}) if options.json else f"saved to {folder}")
    return 0
