"""The commands of `hf-sparse` and their flags."""

from __future__ import annotations

import argparse
from typing import Any

from hf_sparse_cli.choices import (
    ALLOCATIONS,
    DTYPES,
    EXPERT_METHODS,
    FORMATS,
    METHODS,
    PATTERNS,
    QUANTIZATIONS,
    REFINEMENTS,
    SCOPES,
    TOKEN_WEIGHTS,
)
from hf_sparse_cli.effort import add_effort
from hf_sparse_cli.flags import (
    TEXT,
    add_folder,
    add_labels,
    add_model,
    add_overwrite,
    add_printing,
    add_saving,
    add_windows,
    command_parser,
    named_list,
    output_group,
)
from hf_sparse_cli.messages import add_messages
from hf_sparse_cli.names import Parser, fraction
from hf_sparse_cli.quantizing import add_grid, add_quantize
from hf_sparse_cli.recovering import add_recover
from hf_sparse_cli.reporting import add_inspect, add_report
from hf_sparse_cli.shrinking import add_shrink
from hf_sparse_cli.slimming import add_slim
from hf_sparse_cli.tasks import add_tasks
from hf_sparse_cli.top import top_parser
from hf_sparse_cli.upstream import commands_of


def make_parser() -> Parser:
    """The parser of the whole command line; `options.command` names the command."""
    parser = top_parser()
    commands = parser.add_subparsers(
        title="commands", required=True, metavar="COMMAND", dest="command"
    )
    _add_prune(commands)
    add_recover(commands)
    _add_eval(commands)
    add_inspect(commands)
    add_report(commands)
    _add_bench(commands)
    add_shrink(commands)
    add_slim(commands)
    add_quantize(commands)
    _add_export(commands)
    _add_push(commands)
    _add_convert(commands)
    for command in commands_of(parser).values():
        add_messages(command)
    return parser


def _add_prune(commands: Any) -> None:
    command = command_parser(
        commands,
        "prune",
        "prune a model and save it compressed",
        "MODEL OUTPUT [--sparsity S | --pattern N:M] [--method NAME] [--calibration FILE ...]",
        [
            "MODEL OUTPUT --pattern 2:4 --calibration text.jsonl",
            "MODEL OUTPUT --sparsity 0.7 --method alps --calibration text.jsonl --stream",
            "MODEL OUTPUT --pattern column --sparsity 0.5 --method taylor --labels rows.jsonl",
            "MODEL OUTPUT --sparsity 0.5 --method magnitude",
            "MODEL OUTPUT --pattern 2:4 --bits 4 --group-size 32 --calibration text.jsonl",
            "MODEL OUTPUT --sparsity 0.5 --effort minutes --calibration text.jsonl",
        ],
    )
    _add_targets(command)
    _add_method(command)
    add_grid(command.add_argument_group("bits of the kept weights"))
    add_effort(command)
    _add_calibration(command)
    output = output_group(
        command, "folder to save the sparse model in", named_list("formats", FORMATS)
    )
    output.add_argument(
        "--format",
        default="auto",
        choices=FORMATS,
        metavar="NAME",
        help="storage, see above (default auto)",
    )
    add_saving(output)
    add_printing(output, tensors=True)


def _add_targets(command: argparse.ArgumentParser) -> None:
    add_model(command, "model")
    what = command.add_argument_group("what to prune", named_list("patterns", PATTERNS))
    what.add_argument("--pattern", default="unstructured", help="see above (default unstructured)")
    what.add_argument(
        "--sparsity", type=fraction, help="fraction of zeros, such as 0.5; N:M fixes it"
    )
    what.add_argument(
        "--targets", nargs="+", metavar="GLOB", help="layers to prune (default: all of the blocks)"
    )
    what.add_argument("--ignore", nargs="+", metavar="GLOB", help="layers to leave out")
    what.add_argument(
        "--uniform", action="store_true", help="prune as many heads or neurons of every block"
    )


def _add_method(command: argparse.ArgumentParser) -> None:
    summaries = {name: method.summary for name, method in METHODS.items()}
    of_experts = {name: method.summary for name, method in EXPERT_METHODS.items()}
    how = command.add_argument_group(
        "how to prune",
        f"{named_list('methods', summaries)}\n{named_list('methods of pattern expert', of_experts)}",
    )
    how.add_argument(
        "--method",
        choices=list(dict.fromkeys((*METHODS, *EXPERT_METHODS))),
        metavar="NAME",
        help="see above (default wanda)",
    )
    how.add_argument(
        "--scope",
        choices=SCOPES,
        help="of magnitude, taylor, pattern expert: what competes (default layer: each by itself)",
    )
    how.add_argument(
        "--allocation",
        choices=ALLOCATIONS,
        help="how the sparsity is shared among the blocks (default uniform)",
    )
    how.add_argument(
        "--refine",
        choices=REFINEMENTS,
        help="improve each pruned layer: exchange zeros, or fit kept columns",
    )
    how.add_argument(
        "--reconstruct",
        type=int,
        metavar="EPOCHS",
        help="train each block for so many passes, its zeros fixed",
    )
    how.add_argument(
        "--token-weights",
        choices=TOKEN_WEIGHTS,
        help="weight tokens by the gradients of the model's loss",
    )
    how.add_argument(
        "--option",
        action="append",
        metavar="NAME=VALUE",
        help="an option of the method; may be repeated",
    )
    how.add_argument(
        "--stream",
        action="store_true",
        help="read, prune and write one block at a time, for models larger than memory",
    )
    how.add_argument(
        "--resume", action="store_true", help="continue a stopped run of --stream or --effort"
    )


def _add_calibration(command: argparse.ArgumentParser) -> None:
    calibration = command.add_argument_group(
        "calibration", "Texts for all methods but magnitude, and for rounding to few bits."
    )
    data = calibration.add_mutually_exclusive_group()
    data.add_argument("--calibration", nargs="+", metavar="FILE", help=TEXT)
    add_labels(calibration, data)
    calibration.add_argument(
        "--num-samples",
        type=int,
        help="windows of text, or rows of --labels, at most (default 128; with --effort all)",
    )
    add_windows(calibration)


def _add_eval(commands: Any) -> None:
    command = command_parser(
        commands,
        "eval",
        "measure perplexity, accuracy, or zero-shot tasks",
        "MODEL (--text FILE ... | --labels FILE ... | --tasks NAMES) [--dense MODEL]",
        [
            "SPARSE --dense MODEL --text held_out.txt",
            "SPARSE --dense MODEL --text held_out.txt --record",
            "SPARSE --labels rows.jsonl",
            "SPARSE --dense MODEL --tasks arc_easy,piqa --task-data FOLDER --record",
        ],
    )
    what = add_model(command, "what to measure")
    what.add_argument("--dense", help="folder or Hub name of the dense model, to be measured, too")
    on = command.add_argument_group("data")
    data = on.add_mutually_exclusive_group(required=True)
    data.add_argument("--text", nargs="+", metavar="FILE", help=f"for perplexity: {TEXT}")
    add_labels(on, data)
    data.add_argument("--tasks", metavar="NAMES", help="zero-shot tasks below, by commas")
    on.add_argument("--max-windows", type=int, help="measure only so many windows")
    on.add_argument("--window", type=int, default=512, help="tokens in a window (default 512)")
    on.add_argument(
        "--batch-size", type=int, help="windows or texts at a time (default 1, with --tasks 16)"
    )
    add_tasks(command)
    output = command.add_argument_group("output")
    output.add_argument(
        "--record", action="store_true", help="also write the figures into the model card in MODEL"
    )
    add_printing(output)


def _add_bench(commands: Any) -> None:
    command = command_parser(
        commands,
        "bench",
        "time a sparse model on this CPU: torch, dense kernels, compiled",
        "MODEL",
        ["SPARSE --tokens 64 --explain", "SPARSE --bits 8 --json"],
    )
    add_model(command, "what to time", tokenizer=False)
    how = command.add_argument_group("how to time")
    how.add_argument("--batch", type=int, default=1, help="sequences in a call (default 1)")
    how.add_argument("--tokens", type=int, default=128, help="tokens in a sequence (default 128)")
    how.add_argument(
        "--repeats", type=int, default=10, help="timed calls of each model (default 10)"
    )
    how.add_argument("--threads", type=int, help="torch's threads (default: as torch chooses)")
    bits = "also compile with weights of so many bits, rounded if needed"
    how.add_argument("--bits", type=int, choices=(8, 4), help=bits)
    output = command.add_argument_group("output")
    output.add_argument(
        "--explain", action="store_true", help="also print the pattern and the kernel of each layer"
    )
    profile = "print the time of each kernel in a call, by threads, instead"
    output.add_argument("--profile", action="store_true", help=profile)
    add_printing(output)


def _add_export(commands: Any) -> None:
    command = command_parser(
        commands,
        "export",
        "export an ONNX graph whose zeros take no space, or a GGUF file of the same codes",
        "MODEL OUTPUT",
        [
            "SPARSE GRAPH",
            "SPARSE GRAPH --quantize static --calibration text.jsonl",
            "INT4 int4.gguf --gguf",
        ],
    )
    add_model(command, "what to export", "For ONNX: encoders and decoders that read token ids.")
    how = command.add_argument_group("how to export")
    how.add_argument("--quantize", choices=QUANTIZATIONS, help="8-bit weights and activations")
    how.add_argument("--no-pack", action="store_true", help="store zeros as they are")
    gguf = "write a model of few bits as a dense GGUF file, OUTPUT"
    how.add_argument("--gguf", action="store_true", help=gguf)
    data = command.add_argument_group("calibration", "Texts for --quantize static.")
    data.add_argument("--calibration", nargs="+", metavar="FILE", help=TEXT)
    data.add_argument("--num-samples", type=int, default=32, help="windows of text (default 32)")
    add_windows(data)
    folder = "folder for the graph: new, empty or an earlier export; with --gguf a file NAME.gguf"
    output = output_group(command, folder)
    add_printing(output)


def _add_push(commands: Any) -> None:
    command = command_parser(
        commands,
        "push",
        "upload a checkpoint folder to the Hub; an adapter is merged into its base model",
        "FOLDER REPO_ID",
        ["SPARSE user/name-sparse --dry-run", "SPARSE user/name-sparse --onnx"],
    )
    what = add_folder(command, "what to upload", "folder of a checkpoint or of an adapter")
    what.add_argument(
        "--base",
        help="folder or Hub name of the adapter's base model (default: the one that the adapter names)",
    )
    what.add_argument(
        "--onnx", action="store_true", help="also upload an ONNX graph, in the folder onnx/"
    )
    what.add_argument("--tokenizer", help="folder or Hub name, if the model has none")
    what.add_argument(
        "--dtype",
        default="auto",
        choices=DTYPES,
        help="type of the weights in the graph or the merged model (default auto)",
    )
    where = command.add_argument_group("where to")
    where.add_argument("repo_id", metavar="REPO_ID", help="user/name on the Hub")
    where.add_argument("--private", action="store_true", help="make the repository private")
    where.add_argument("--revision", metavar="BRANCH", help="branch to commit to (default main)")
    where.add_argument("--create-pr", action="store_true", help="open a pull request instead")
    where.add_argument(
        "--overwrite", action="store_true", help="replace a model that hf_sparse did not push"
    )
    where.add_argument(
        "--dry-run", action="store_true", help="list what would be uploaded, and upload nothing"
    )
    add_printing(command.add_argument_group("output"))
    command.set_defaults(gguf_file=None)


def _add_convert(commands: Any) -> None:
    command = command_parser(
        commands,
        "convert",
        "convert a sparse-bitmask checkpoint of compressed-tensors",
        "FOLDER OUTPUT",
        ["OLD_FOLDER NEW_FOLDER"],
    )
    add_folder(command, "what to convert", "the old checkpoint folder")
    output = output_group(command, "folder to save the converted model in")
    output.add_argument(
        "--format", default="auto", choices=FORMATS, metavar="NAME", help="storage (default auto)"
    )
    add_overwrite(output)
    add_printing(output)
