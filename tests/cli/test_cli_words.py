"""The command line speaks of its own flags, also where an error comes from a Python call."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import hf_sparse
from hf_sparse_cli.words import in_flags

PACKAGE = Path(hf_sparse.__file__).parent
# Rooms that no command enters, or whose errors are about Python objects that commands make right.
UNREACHED = (
    *("optim/", "models/", "distillation.py", "budget.py", "byte_budget.py", "arguments.py"),
    *("suggestions.py", "runtime/", "cli/"),
)
CALLS = ("prune_", "prune_checkpoint", "recover_", "shrink_", "export_onnx", "calibration_batches")
# Errors about arguments that a command always makes right.
IMPOSSIBLE = ("batches is ", "a batch is ", "there are no gradients inside")


def flags_of_calls() -> set[str]:
    """The keyword arguments that the commands give to calls of the package."""
    names = set()
    for file in ("commands", "loading", "shrinking"):
        for node in ast.walk(ast.parse((PACKAGE / "cli" / f"{file}.py").read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func).startswith("hf_sparse."):
                names |= {keyword.arg for keyword in node.keywords if keyword.arg}
    return names | {"sparsity", "targets", "ignore", "method", "allocation", "refine", "scope"}


def messages() -> Iterator[tuple[str, str]]:
    """Every text of the package that is a part of an error, with x in the place of its values."""
    for file in sorted(PACKAGE.rglob("*.py")):
        place = file.relative_to(PACKAGE).as_posix()
        if place.startswith(UNREACHED):
            continue
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Raise) and node.exc is not None:
                texts = [text for text in _texts(node.exc) if not text.startswith(IMPOSSIBLE)]
                yield from ((place, text.replace("ignore=x", "ignore=['x']")) for text in texts)


def _texts(error: ast.expr) -> Iterator[str]:
    for argument in error.args if isinstance(error, ast.Call) else ():
        if isinstance(argument, ast.JoinedStr):
            parts = (v.value if isinstance(v, ast.Constant) else "x" for v in argument.values)
            yield "".join(map(str, parts))
        elif isinstance(argument, ast.Constant) and isinstance(argument.value, str):
            yield argument.value


def test_no_error_of_a_command_advises_a_call_or_an_argument_that_is_a_flag() -> None:
    names = flags_of_calls()
    assert {"num_samples", "resume", "overwrite", "quantize", "batch_size"} <= names
    told = re.compile(
        rf"(?<![\w-])(?:{'|'.join(names)})=|hf_sparse\.(?:{'|'.join(CALLS)})\b|prune_"
    )
    found = [(place, in_flags(text)) for place, text in messages()]
    assert len(found) > 150
    assert [line for line in found if told.search(line[1])] == []


@pytest.mark.parametrize(
    ("message", "told"),
    [
        ("Log in, or set HF_TOKEN, or give token=.", "Log in, or set HF_TOKEN."),
        ("2 windows, but num_samples is 9.", "2 windows, but --num-samples is 9."),
        ("Go on with it by resume=True, or remove it.", "Go on with it by --resume, or remove it."),
        ("Use method='magnitude', which needs none.", "Use --method magnitude, which needs none."),
        ("wrong. Use scope='layer'.", "wrong. Use --scope layer."),
        ("r=16 asks for 99.", "--r 16 asks for 99."),
        ("such as targets=['q_proj', 'k_proj'].", "such as --targets q_proj k_proj."),
        ("ignore=['*'] leaves out all.", "--ignore * leaves out all."),
        ("Load it with dtype=torch.float32, or", "Load it with --dtype float32, or"),
        (
            'Prune it again, or save with config=SparsityConfig("unstructured", sparsity=0.50).',
            "Prune it again.",
        ),
        (
            'wanted: SparsityConfig("column", sparsity=0.5).',
            "wanted: --pattern column --sparsity 0.5.",
        ),
        (
            'first: hf_sparse.prune_(model, SparsityConfig("head", 0.5), ...).',
            "first: hf-sparse prune MODEL OUTPUT --pattern head --sparsity 0.5.",
        ),
        ("or prune the model in memory with prune_.", "or leave --stream out."),
        # names of files and folders, and what no flag does, stay
        ("no such folder: ./num_samples", "no such folder: ./num_samples"),
        ("no such folder: runs/method=wanda", "no such folder: runs/method=wanda"),
        ("call model.dequantize() first.", "call model.dequantize() first."),
    ],
)
def test_advice_is_given_in_flags(message: str, told: str) -> None:
    assert in_flags(message) == told
