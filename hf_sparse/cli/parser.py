"""The command line: its commands and their flags."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import Any

from huggingface_hub.errors import HfHubHTTPError
from safetensors import SafetensorError

import hf_sparse
from hf_sparse.cli.commands import (
    bench,
    convert,
    evaluate,
    export,
    inspect,
    prune,
    push,
    recover,
    shrink,
)
from hf_sparse.exporters import QUANTIZATIONS
from hf_sparse.formats import FORMATS
from hf_sparse.patterns import NOTATIONS
from hf_sparse.pruning.allocation import ALLOCATIONS
from hf_sparse.pruning.methods import METHODS, REFINEMENTS
from hf_sparse.recovery.recover import RECOVERIES

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
        told = f"the Hub could not be reached: {error}" if network else error
        print(f"hf-sparse: error: {told}", file=sys.stderr)
        return 1
    return code


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
