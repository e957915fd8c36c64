"""The commands of `hf-sparse` and their flags."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from typing import Any

from hf_sparse_cli.choices import (
    ALLOCATIONS,
    DTYPES,
    FORMATS,
    METHODS,
    PATTERNS,
    QUANTIZATIONS,
    RECOVERIES,
    REFINEMENTS,
)

_TEXT = '.jsonl with "text" fields, or plain text'


def make_parser() -> argparse.ArgumentParser:
    """The parser of the whole command line; `options.command` names the command."""
    parser = argparse.ArgumentParser(
        prog="hf-sparse",
        description="Make language models sparse, measure, inspect and publish them.",
        epilog="hf-sparse COMMAND --help tells the flags of a command.",
    )
    parser.add_argument("--version", action=_Version)
    commands = parser.add_subparsers(
        title="commands", required=True, metavar="COMMAND", dest="command"
    )
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


class _Version(argparse.Action):
    """Prints the installed version; reading it takes some time, so that it is read only here."""

    def __init__(self, option_strings: Sequence[str], dest: str) -> None:
        super().__init__(option_strings, dest, nargs=0, help="print the version and exit")

    def __call__(self, parser: argparse.ArgumentParser, *arguments: Any) -> None:
        from importlib.metadata import version

        print(f"hf_sparse {version('hf_sparse')}")
        parser.exit()


def _add_prune(commands: Any) -> None:
    command = _command(
        commands,
        "prune",
        "prune a model and save it compressed",
        "MODEL OUTPUT [--sparsity S | --pattern N:M] [--method NAME] [--calibration FILE ...]",
        [
            "MODEL OUTPUT --pattern 2:4 --calibration text.jsonl",
            "MODEL OUTPUT --sparsity 0.7 --method alps --calibration text.jsonl --stream",
            "MODEL OUTPUT --pattern column --sparsity 0.5 --method taylor --labels rows.jsonl",
            "MODEL OUTPUT --sparsity 0.5 --method magnitude",
        ],
    )
    what = command.add_argument_group("what to prune", _list("patterns", PATTERNS))
    what.add_argument("model", metavar="MODEL", help="folder or Hub name of the dense model")
    what.add_argument("--pattern", default="unstructured", help="see above (default unstructured)")
    what.add_argument("--sparsity", type=float, help="fraction of zeros, as 0.5; N:M fixes it")
    what.add_argument("--targets", nargs="+", metavar="GLOB", help="layers to prune")
    what.add_argument("--ignore", nargs="+", metavar="GLOB", help="layers to leave out")
    _add_loading(what)

    summaries = {name: method.summary for name, method in METHODS.items()}
    how = command.add_argument_group("how to prune", _list("methods", summaries))
    how.add_argument(
        "--method",
        default="wanda",
        choices=METHODS,
        metavar="NAME",
        help="see above (default wanda)",
    )
    how.add_argument("--scope", help="magnitude, taylor: layer (default) or global")
    how.add_argument(
        "--allocation", choices=ALLOCATIONS, help="sparsity of the blocks (default uniform)"
    )
    how.add_argument("--refine", choices=REFINEMENTS, help="improve each layer with its zeros")
    how.add_argument(
        "--reconstruct", type=int, metavar="EPOCHS", help="train each block with its zeros fixed"
    )
    how.add_argument(
        "--option", action="append", metavar="NAME=VALUE", help="an option of the method"
    )
    how.add_argument(
        "--stream", action="store_true", help="prune block by block from the disk: any size"
    )
    how.add_argument("--resume", action="store_true", help="go on with a stopped --stream run")

    calibration = command.add_argument_group(
        "calibration", "Texts that all methods but magnitude look at."
    )
    data = calibration.add_mutually_exclusive_group()
    data.add_argument("--calibration", nargs="+", metavar="FILE", help=_TEXT)
    _add_labels(calibration, data)
    calibration.add_argument(
        "--num-samples", type=int, default=128, help="windows, or rows at most (default 128)"
    )
    _add_windows(calibration)

    output = _output(command, "folder to save the sparse model in", _list("formats", FORMATS))
    output.add_argument(
        "--format",
        default="auto",
        choices=FORMATS,
        metavar="NAME",
        help="storage, see above (default auto)",
    )
    _add_saving(output)
    _add_printing(output, tensors=True)


def _add_recover(commands: Any) -> None:
    command = _command(
        commands,
        "recover",
        "train a sparse model, its zeros kept",
        "FOLDER OUTPUT --data FILE [FILE ...] [--method NAME]",
        ["SPARSE OUTPUT --data text.jsonl --method lora --teacher DENSE"],
    )
    what = command.add_argument_group("what to train")
    what.add_argument("folder", metavar="FOLDER", help="folder or Hub name of the sparse model")
    _add_loading(what)
    how = command.add_argument_group("how to train", _list("methods", RECOVERIES))
    how.add_argument(
        "--method",
        default="finetune",
        choices=RECOVERIES,
        metavar="NAME",
        help="see above (default finetune)",
    )
    how.add_argument("--teacher", help="the dense model, to learn from its logits")
    how.add_argument("--epochs", type=int, default=1, help="passes over the data (default 1)")
    how.add_argument("--accumulate", type=int, default=2, help="batches in a step (default 2)")
    how.add_argument("--lr", type=float, help="peak learning rate (default by method)")
    how.add_argument("--r", type=int, help="rank of lora, or its like of shira")
    data = command.add_argument_group("data")
    data.add_argument("--data", nargs="+", required=True, metavar="FILE", help=_TEXT)
    data.add_argument("--num-samples", type=int, help="windows of the data (default all)")
    _add_windows(data)
    output = _output(command, "folder to save the recovered model in")
    output.add_argument(
        "--format", choices=FORMATS, metavar="NAME", help="storage (default as the model's config)"
    )
    _add_overwrite(output)
    _add_printing(output, tensors=True)


def _add_eval(commands: Any) -> None:
    command = _command(
        commands,
        "eval",
        "measure perplexity or accuracy",
        "MODEL (--text FILE ... | --labels FILE ...) [--dense MODEL]",
        ["SPARSE --dense MODEL --text held_out.txt", "SPARSE --labels rows.jsonl"],
    )
    what = command.add_argument_group("what to measure")
    what.add_argument("model", metavar="MODEL", help="folder or Hub name")
    what.add_argument("--dense", help="the dense model, to be measured beside it")
    _add_loading(what)
    on = command.add_argument_group("data")
    data = on.add_mutually_exclusive_group(required=True)
    data.add_argument("--text", nargs="+", metavar="FILE", help=f"for perplexity: {_TEXT}")
    _add_labels(on, data)
    on.add_argument("--max-windows", type=int, help="use only the first windows")
    _add_windows(on)
    _add_printing(command.add_argument_group("output"))


def _add_inspect(commands: Any) -> None:
    command = _command(
        commands, "inspect", "read a checkpoint's sparsity from its files", "FOLDER", ["SPARSE"]
    )
    command.add_argument("folder", metavar="FOLDER", help="checkpoint folder")
    _add_printing(command.add_argument_group("output"), tensors=True)


def _add_bench(commands: Any) -> None:
    command = _command(
        commands,
        "bench",
        "time a sparse model on this CPU: torch, dense kernels, compiled",
        "MODEL",
        ["SPARSE --tokens 64 --explain"],
    )
    what = command.add_argument_group("what to time")
    what.add_argument("model", metavar="MODEL", help="folder or Hub name")
    _add_loading(what, tokenizer=False)
    how = command.add_argument_group("how to time")
    how.add_argument("--batch", type=int, default=1, help="sequences (default 1)")
    how.add_argument("--tokens", type=int, default=128, help="tokens in each (default 128)")
    how.add_argument("--repeats", type=int, default=10, help="calls of each (default 10)")
    how.add_argument("--threads", type=int, help="torch's threads (default: as torch chooses)")
    output = command.add_argument_group("output")
    output.add_argument(
        "--explain", action="store_true", help="also print what became of each layer"
    )
    _add_printing(output)


def _add_shrink(commands: Any) -> None:
    command = _command(
        commands,
        "shrink",
        "remove heads and neurons that are zero, and save the smaller model",
        "MODEL OUTPUT",
        ["SPARSE SMALLER"],
    )
    what = command.add_argument_group("what to shrink")
    what.add_argument(
        "model", metavar="MODEL", help="folder or Hub name of a model with such zeros"
    )
    _add_loading(what)
    output = _output(command, "folder to save the smaller model in")
    _add_saving(output)
    _add_printing(output)


def _add_export(commands: Any) -> None:
    command = _command(
        commands,
        "export",
        "export an ONNX graph whose zeros take no space",
        "MODEL OUTPUT",
        ["SPARSE GRAPH", "SPARSE GRAPH --quantize static --calibration text.jsonl"],
    )
    what = command.add_argument_group("what to export")
    what.add_argument("model", metavar="MODEL", help="folder or Hub name, of any family")
    _add_loading(what)
    how = command.add_argument_group("how to export")
    how.add_argument("--quantize", choices=QUANTIZATIONS, help="8-bit weights and activations")
    how.add_argument("--no-pack", action="store_true", help="store zeros as they are")
    data = command.add_argument_group("calibration", "Texts for --quantize static.")
    data.add_argument("--calibration", nargs="+", metavar="FILE", help=_TEXT)
    data.add_argument("--num-samples", type=int, default=32, help="windows of it (default 32)")
    _add_windows(data)
    output = _output(command, "folder for the graph: new, empty or an earlier export")
    _add_printing(output)


def _add_push(commands: Any) -> None:
    command = _command(
        commands,
        "push",
        "upload a checkpoint folder to the Hub; an adapter is merged into its base model",
        "FOLDER REPO_ID",
        ["SPARSE user/name-sparse --onnx"],
    )
    what = command.add_argument_group("what to upload")
    what.add_argument("folder", metavar="FOLDER", help="checkpoint folder, or that of an adapter")
    what.add_argument(
        "--base", help="folder or Hub name of the adapter's base model (default: what it names)"
    )
    what.add_argument(
        "--onnx", action="store_true", help="put the ONNX graph into its folder onnx/, too"
    )
    what.add_argument("--tokenizer", help="folder or Hub name, if the model has none")
    what.add_argument(
        "--dtype", default="auto", choices=DTYPES, help="of graph or merged model (default auto)"
    )
    where = command.add_argument_group("where to")
    where.add_argument("repo_id", metavar="REPO_ID", help="user/name on the Hub")
    where.add_argument("--private", action="store_true", help="make the repository private")
    _add_printing(command.add_argument_group("output"))
    command.set_defaults(gguf_file=None)


def _add_convert(commands: Any) -> None:
    command = _command(
        commands,
        "convert",
        "convert a sparse-bitmask checkpoint of compressed-tensors",
        "FOLDER OUTPUT",
        ["OLD_FOLDER NEW_FOLDER"],
    )
    command.add_argument("folder", metavar="FOLDER", help="the old checkpoint folder")
    output = _output(command, "folder to save the converted model in")
    output.add_argument(
        "--format", default="auto", choices=FORMATS, metavar="NAME", help="storage (default auto)"
    )
    _add_overwrite(output)
    _add_printing(output)


def _command(
    commands: Any, name: str, summary: str, usage: str, examples: Sequence[str]
) -> argparse.ArgumentParser:
    """A command with a short line of usage, and examples after its flags."""
    lines = [f"  hf-sparse {name} {example}" for example in examples]
    command: argparse.ArgumentParser = commands.add_parser(
        name,
        help=summary,
        description=f"{summary[0].upper()}{summary[1:]}.",
        usage=f"hf-sparse {name} {usage} [flags]",
        epilog="\n".join(["examples:", *lines]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    return command


def _list(title: str, entries: Mapping[str, str]) -> str:
    """A list of names and what they mean, for the head of a group of flags."""
    width = max(map(len, entries))
    return "\n".join([f"{title}:", *(f"  {name:{width}}  {entries[name]}" for name in entries)])


def _output(command: argparse.ArgumentParser, help: str, description: str | None = None) -> Any:
    """The group of the flags of the output, with the folder."""
    output = command.add_argument_group("output", description)
    output.add_argument("output", metavar="OUTPUT", help=help)
    return output


def _add_saving(group: Any) -> None:
    group.add_argument("--base-model", help="Hub name of the dense model, for the model card")
    _add_overwrite(group)


def _add_overwrite(group: Any) -> None:
    group.add_argument(
        "--overwrite", action="store_true", help="replace the model that is in OUTPUT"
    )


def _add_printing(group: Any, tensors: bool = False) -> None:
    if tensors:
        group.add_argument("--tensors", action="store_true", help="list every tensor")
    group.add_argument("--json", action="store_true", help="print JSON for machines")


def _add_labels(group: Any, data: Any) -> None:
    data.add_argument("--labels", nargs="+", metavar="FILE", help=".jsonl with texts and a label")
    group.add_argument(
        "--fields", default="sentence", help="text fields of --labels, by commas (default sentence)"
    )


def _add_windows(group: Any) -> None:
    group.add_argument("--window", type=int, default=512, help="tokens in a window (default 512)")
    group.add_argument("--batch-size", type=int, default=1, help="windows at a time (default 1)")


def _add_loading(group: Any, tokenizer: bool = True) -> None:
    if tokenizer:
        group.add_argument("--tokenizer", help="folder or Hub name, if the model's folder has none")
    group.add_argument(
        "--dtype", default="auto", choices=DTYPES, help="of the weights (default auto: as stored)"
    )
    group.add_argument("--gguf-file", help="GGUF file in the dense model's folder")
