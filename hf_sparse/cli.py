"""The `hf-sparse` command: thin wrappers over the package's functions."""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import HfHubHTTPError
from safetensors import SafetensorError

import hf_sparse
from hf_sparse.checkpoint.loading import dense_model_class
from hf_sparse.checkpoint.reading import check_no_graph
from hf_sparse.checkpoint.source import remember_source_
from hf_sparse.documents import read_documents, read_rows
from hf_sparse.exporters import QUANTIZATIONS
from hf_sparse.formats import FORMATS
from hf_sparse.history import steps_of
from hf_sparse.patterns import NOTATIONS
from hf_sparse.pruning.allocation import ALLOCATIONS
from hf_sparse.pruning.calibration import token_windows
from hf_sparse.pruning.methods import METHODS, REFINEMENTS, Recipe
from hf_sparse.recovery.recover import RECOVERIES
from hf_sparse.report import format_table

_EXPECTED = (ValueError, OSError, ImportError, HfHubHTTPError, SafetensorError)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code: 0 done, 1 failed, 2 wrong usage."""
    parser = _parser()
    options = parser.parse_args(arguments)
    if options.json:
        from transformers.utils.logging import disable_progress_bar

        disable_progress_bar()
    try:
        code: int = options.run(options)
    except Exception as error:
        # What went wrong on the network has no common class: the client's library decides it.
        network = type(error).__module__.startswith(("httpx", "httpcore"))
        if not network and not isinstance(error, _EXPECTED):
            raise
        print(f"hf-sparse: error: {error}", file=sys.stderr)
        return 1
    return code


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
        rows = _labelled(options)
    elif needs_calibration:
        documents = read_documents(options.calibration)
    model: Any = None
    if options.stream:
        tokenizer = load_tokenizer(options.model, options)
    else:
        model, tokenizer = load(options.model, options)
    batches = None
    if documents is not None:
        batches = _windows(tokenizer, documents, options)
    elif rows is not None:
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


def _windows(tokenizer: Any, documents: Sequence[str], options: argparse.Namespace) -> list[Any]:
    """Calibration data as the options want it."""
    return hf_sparse.calibration_batches(
        tokenizer,
        documents,
        num_samples=options.num_samples,
        window=options.window,
        batch_size=options.batch_size,
    )


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
    measure = _measurement(options)
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
    needs_tokenizer = bool(options.tokenizer) or _has_tokenizer(options.model)
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
        batches = _windows(tokenizer, read_documents(options.calibration), options)
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
    from hf_sparse.hub import push_to_hub, upload_folder

    private = options.private or None
    if (Path(options.folder) / "adapter_config.json").exists():
        model, tokenizer = _merged(options)
        commit = push_to_hub(
            model, options.repo_id, tokenizer=tokenizer, private=private, onnx=options.onnx
        )
    elif options.base is not None:
        raise ValueError(f"--base is for adapters, and {options.folder} is none: leave it out.")
    else:
        hf_sparse.inspect_checkpoint(options.folder)  # a damaged folder is not uploaded
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
    needs_tokenizer = bool(options.tokenizer) or _has_tokenizer(str(folder))
    model, tokenizer = load(str(folder), options, needs_tokenizer)
    hf_sparse.export_onnx(model, copy / "onnx", tokenizer=tokenizer)
    return copy


def _merged(options: argparse.Namespace) -> tuple[Any, Any]:
    """The base model of an adapter with the adapter merged, and the tokenizer, if it has one."""
    from hf_sparse.recovery.adapters import stored_config

    base = options.base or stored_config(options.folder).get("base_model_name_or_path")
    if not base:
        raise ValueError(f"{options.folder} does not tell its base model: give --base FOLDER.")
    try:
        model, tokenizer = load(base, options, bool(options.tokenizer) or _has_tokenizer(base))
    except (OSError, ValueError) as error:
        raise ValueError(
            f"the base model of {options.folder} cannot be loaded from {base}: {error} Give the "
            "sparse model that the adapter was trained on: --base FOLDER."
        ) from error
    return hf_sparse.merge_adapters(hf_sparse.load_adapter(model, options.folder)), tokenizer


def _has_tokenizer(source: str) -> bool:
    """Whether a folder has a tokenizer; a model of the Hub is taken to have one."""
    return not Path(source).is_dir() or (Path(source) / "tokenizer_config.json").exists()


def convert(options: argparse.Namespace) -> int:
    """Convert an old checkpoint."""
    folder = hf_sparse.convert_legacy(options.folder, options.output)
    print(json.dumps({"folder": str(folder)}) if options.json else f"saved to {folder}")
    return 0


def load(source: str, options: argparse.Namespace, needs_tokenizer: bool = True) -> tuple[Any, Any]:
    """Load a model with the head that it was saved with, and its tokenizer if that is needed.

    Raises:
        ValueError: there is no such folder, the config names no class that transformers or
            hf_sparse has, or the tokenizer is not the model's.
    """
    import transformers

    known = _known_arguments(source, options)
    config = transformers.AutoConfig.from_pretrained(source, **known)
    name = (config.architectures or ["AutoModelForCausalLM" if known else ""])[0]
    if name.startswith("Sparse") and hasattr(hf_sparse, name):
        model_class = getattr(hf_sparse, name)
    elif name.startswith("Auto"):
        model_class = transformers.AutoModelForCausalLM
    else:
        model_class = dense_model_class(source, config)
    model = model_class.from_pretrained(source, dtype=options.dtype, **known)
    if not steps_of(model):  # of a checkpoint in the format "dense"
        remember_source_(model, Path(source))
    if not needs_tokenizer:
        return model, None
    return model, load_tokenizer(source, options, config)


def load_tokenizer(source: str, options: argparse.Namespace, config: Any = None) -> Any:
    """Load a model's tokenizer, from --tokenizer if that is given.

    Args:
        source: of the model.
        options: of the command.
        config: of the model, if it is known already.

    Raises:
        ValueError: there is no such folder, or the tokenizer is not the model's.
    """
    import transformers

    known = _known_arguments(source, options)
    if config is None:
        config = transformers.AutoConfig.from_pretrained(source, **known)
    given = {"pretrained_model_name_or_path": options.tokenizer or source}
    tokenizer = transformers.AutoTokenizer.from_pretrained(
        **given, **({} if options.tokenizer else known)
    )
    # Without its files a tokenizer of special tokens alone is made, which reads every text the same.
    if len(tokenizer) < 0.5 * config.vocab_size:
        raise ValueError(
            f"the tokenizer of {options.tokenizer or source} has {len(tokenizer)} tokens, the model "
            f"{config.vocab_size}: its files are missing. Name the right one with --tokenizer."
        )
    return tokenizer


def _known_arguments(source: str, options: argparse.Namespace) -> dict[str, str]:
    """What a dense model's folder needs beside its name: the GGUF file in it."""
    folder = Path(source)
    if not folder.exists() and (source.startswith((".", "/", "~")) or source.count("/") > 1):
        raise ValueError(f"no such folder: {source}")
    check_no_graph(folder)
    gguf_file = options.gguf_file
    return {"gguf_file": gguf_file} if gguf_file and (folder / gguf_file).exists() else {}


def _measurement(options: argparse.Namespace) -> Callable[[Any, Any], float]:
    """What is measured of a model and its tokenizer; the texts are read once, before any model."""
    if not options.labels:
        documents = read_documents(options.text)
        return lambda model, tokenizer: hf_sparse.perplexity(
            model,
            tokenizer,
            documents,
            options.window,
            max_windows=options.max_windows,
            batch_size=options.batch_size,
        )
    texts, labels = _labelled(options)
    return lambda model, tokenizer: hf_sparse.accuracy(
        model, tokenizer, texts, labels, batch_size=options.batch_size
    )


def _labelled(options: argparse.Namespace) -> tuple[Any, list[Any]]:
    """The texts, or tuples of texts, of --labels, and their labels."""
    fields = options.fields.split(",")
    rows = [row for file in options.labels for row in read_rows(Path(file), [*fields, "label"])]
    texts = [row[fields[0]] if len(fields) == 1 else tuple(row[f] for f in fields) for row in rows]
    return texts, [row["label"] for row in rows]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="hf-sparse",
        description="Make language models sparse, measure, inspect and publish them.",
    )
    parser.add_argument("--version", action="version", version=f"hf_sparse {hf_sparse.__version__}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    _add_prune(commands)
    _add_recover(commands)
    _add_eval(commands)
    _add_inspect(commands)
    _add_bench(commands)
    _add_shrink(commands)
    _add_export(commands)
    _add_push(commands)
    _add_convert(commands)
    return parser


def _add_prune(commands: Any) -> None:
    methods = "; ".join(f"{name}: {method.summary}" for name, method in METHODS.items())
    command = _command(commands, "prune", prune, "prune a model and save it compressed")
    command.add_argument("model", help="folder or Hub name of the dense model")
    command.add_argument("output", help="folder to save the sparse model in")
    command.add_argument(
        "--pattern",
        default="unstructured",
        help=f"one of {', '.join(NOTATIONS)} (default unstructured)",
    )
    command.add_argument("--sparsity", type=float, help="fraction of zeros; N:M fixes it")
    command.add_argument(
        "--method", default="wanda", choices=METHODS, help=f"{methods} (default wanda)"
    )
    command.add_argument("--scope", help="magnitude, taylor: layer (default) or global")
    command.add_argument(
        "--allocation", choices=ALLOCATIONS, help="sparsity of the blocks (default uniform)"
    )
    command.add_argument("--refine", choices=REFINEMENTS, help="improve each layer with its zeros")
    command.add_argument(
        "--reconstruct", type=int, metavar="EPOCHS", help="train each block with its zeros fixed"
    )
    command.add_argument(
        "--option", action="append", metavar="NAME=VALUE", help="an option of the method"
    )
    command.add_argument(
        "--stream", action="store_true", help="prune block by block from the disk: any size"
    )
    command.add_argument("--resume", action="store_true", help="go on with a stopped --stream run")
    command.add_argument("--targets", nargs="+", metavar="GLOB", help="layers to prune")
    command.add_argument("--ignore", nargs="+", metavar="GLOB", help="layers to leave out")
    command.add_argument("--format", default="auto", choices=FORMATS, help="storage (default auto)")
    command.add_argument("--base-model", help="Hub name of the dense model, for the model card")
    data = command.add_mutually_exclusive_group()
    data.add_argument(
        "--calibration", nargs="+", metavar="FILE", help='.jsonl with "text" fields, or plain text'
    )
    _add_labels(command, data)
    command.add_argument(
        "--num-samples",
        type=int,
        default=128,
        help="windows, or rows at most (default 128)",
    )
    _add_data(command)
    _add_tensors(command)


def _add_recover(commands: Any) -> None:
    methods = "; ".join(f"{name}: {recovery.summary}" for name, recovery in RECOVERIES.items())
    command = _command(commands, "recover", recover, "train a sparse model, its zeros kept")
    command.add_argument("folder", help="folder or Hub name of the sparse model")
    command.add_argument("output", help="folder to save the recovered model in")
    command.add_argument(
        "--data", nargs="+", required=True, metavar="FILE", help="text: .jsonl or plain"
    )
    command.add_argument(
        "--method", default="finetune", choices=RECOVERIES, help=f"{methods} (default finetune)"
    )
    command.add_argument("--teacher", help="the dense model, to learn from its logits")
    command.add_argument("--epochs", type=int, default=1, help="passes over the data (default 1)")
    command.add_argument("--accumulate", type=int, default=2, help="batches in a step (default 2)")
    command.add_argument("--lr", type=float, help="peak learning rate (default by method)")
    command.add_argument("--r", type=int, help="rank of lora, or its like of shira")
    command.add_argument("--num-samples", type=int, help="windows of the data (default all)")
    _add_data(command)
    _add_tensors(command)


def _add_eval(commands: Any) -> None:
    command = _command(commands, "eval", evaluate, "measure perplexity or accuracy")
    command.add_argument("model", help="folder or Hub name")
    command.add_argument("--dense", help="the dense model, to be measured beside it")
    data = command.add_mutually_exclusive_group(required=True)
    data.add_argument(
        "--text", nargs="+", metavar="FILE", help="text for perplexity: .jsonl or plain"
    )
    _add_labels(command, data)
    command.add_argument("--max-windows", type=int, help="use only the first windows")
    _add_data(command)


def _add_inspect(commands: Any) -> None:
    command = _command(commands, "inspect", inspect, "read a checkpoint's sparsity from its files")
    command.add_argument("folder", help="checkpoint folder")
    _add_tensors(command)


def _add_bench(commands: Any) -> None:
    summary = "time a sparse model on this CPU: torch, dense kernels, compiled"
    command = _command(commands, "bench", bench, summary)
    command.add_argument("model", help="folder or Hub name")
    command.add_argument("--batch", type=int, default=1, help="sequences (default 1)")
    command.add_argument("--tokens", type=int, default=128, help="tokens in each (default 128)")
    command.add_argument("--repeats", type=int, default=10, help="calls of each (default 10)")
    command.add_argument("--threads", type=int, help="torch's threads (default: as torch chooses)")
    command.add_argument(
        "--explain", action="store_true", help="also print what became of each layer"
    )
    command.add_argument("--dtype", default="auto", help="torch's dtype (default as stored)")
    command.add_argument("--gguf-file", help="GGUF file in the model's folder")


def _add_shrink(commands: Any) -> None:
    summary = "remove heads and neurons that are zero, and save the smaller model"
    command = _command(commands, "shrink", shrink, summary)
    command.add_argument("model", help="folder or Hub name of a model with such zeros")
    command.add_argument("output", help="folder to save the smaller model in")
    command.add_argument("--tokenizer", help="folder or Hub name, if the model's folder has none")
    command.add_argument("--base-model", help="Hub name of the dense model, for the model card")
    command.add_argument(
        "--dtype", default="auto", help="float32, bfloat16, ... (default as stored)"
    )
    command.add_argument("--gguf-file", help="GGUF file in the model's folder")


def _add_export(commands: Any) -> None:
    command = _command(commands, "export", export, "export an ONNX graph whose zeros take no space")
    command.add_argument("model", help="folder or Hub name")
    command.add_argument("output", help="folder for the graph: new, empty or an earlier export")
    command.add_argument("--quantize", choices=QUANTIZATIONS, help="8-bit weights and activations")
    command.add_argument("--no-pack", action="store_true", help="store zeros as they are")
    command.add_argument(
        "--calibration", nargs="+", metavar="FILE", help='.jsonl with "text" fields, or plain text'
    )
    command.add_argument("--num-samples", type=int, default=32, help="windows of it (default 32)")
    _add_data(command)


def _add_push(commands: Any) -> None:
    summary = "upload a checkpoint folder to the Hub; an adapter is merged into its base model"
    command = _command(commands, "push", push, summary)
    command.add_argument("folder", help="checkpoint folder, or that of an adapter")
    command.add_argument("repo_id", help="user/name on the Hub")
    command.add_argument(
        "--base", help="folder or Hub name of the adapter's base model (default: what it names)"
    )
    command.add_argument("--private", action="store_true", help="make the repository private")
    command.add_argument(
        "--onnx", action="store_true", help="put the ONNX graph into its folder onnx/, too"
    )
    command.add_argument("--tokenizer", help="folder or Hub name, if the model has none")
    command.add_argument(
        "--dtype", default="auto", help="of graph or merged model (default as stored)"
    )
    command.set_defaults(gguf_file=None)


def _add_convert(commands: Any) -> None:
    summary = "convert a sparse-bitmask checkpoint of compressed-tensors"
    command = _command(commands, "convert", convert, summary)
    command.add_argument("folder", help="the old checkpoint folder")
    command.add_argument("output", help="folder to save the converted model in")


def _command(commands: Any, name: str, run: Any, summary: str) -> argparse.ArgumentParser:
    command: argparse.ArgumentParser = commands.add_parser(name, help=summary, description=summary)
    command.set_defaults(run=run)
    command.add_argument("--json", action="store_true", help="print JSON for machines")
    return command


def _add_labels(command: argparse.ArgumentParser, data: Any) -> None:
    data.add_argument("--labels", nargs="+", metavar="FILE", help=".jsonl with texts and a label")
    command.add_argument(
        "--fields", default="sentence", help="text fields of --labels, by commas (default sentence)"
    )


def _add_data(command: argparse.ArgumentParser) -> None:
    command.add_argument("--window", type=int, default=512, help="tokens in a window (default 512)")
    command.add_argument("--batch-size", type=int, default=1, help="windows at a time (default 1)")
    command.add_argument("--tokenizer", help="folder or Hub name, if the model's folder has none")
    command.add_argument(
        "--dtype", default="auto", help="float32, bfloat16, ... (default as stored)"
    )
    command.add_argument("--gguf-file", help="GGUF file in the dense model's folder")


def _add_tensors(command: argparse.ArgumentParser) -> None:
    command.add_argument("--tensors", action="store_true", help="list every tensor")


if __name__ == "__main__":
    sys.exit(main())
