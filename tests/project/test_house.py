"""Files for one sitting, functions for one screen, and patterns that know themselves."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import hf_sparse
from hf_sparse import patterns

ROOT = Path(hf_sparse.__file__).parents[1]
MOST_LINES_OF_A_FILE = 350
MOST_LINES_OF_A_FUNCTION = 60
# Places that ask a pattern for its class: the mathematics of N:M and of heads, and formats.
MOST_CHECKS_OF_PATTERNS = 19
FILES = [
    str(file.relative_to(ROOT))
    for package in ("hf_sparse", "hf_sparse_cli")
    for file in sorted((ROOT / package).rglob("*.py"))
]

Function = ast.FunctionDef | ast.AsyncFunctionDef


def lines_of(function: Function) -> int:
    """The lines from `def` to the end, without the docstring."""
    lines = (function.end_lineno or 0) - function.lineno + 1
    if ast.get_docstring(function, clean=False) is not None:
        docstring = function.body[0]
        lines -= (docstring.end_lineno or 0) - docstring.lineno + 1
    return lines


def functions(node: ast.AST, inside: str = "") -> Iterator[tuple[str, Function]]:
    """The functions below a node, under their qualified names."""
    for child in ast.iter_child_nodes(node):
        name = inside
        if isinstance(child, Function | ast.ClassDef):
            name = f"{inside}.{child.name}".removeprefix(".")
            if isinstance(child, Function):
                yield name, child
        yield from functions(child, name)


def long_functions(source: str) -> dict[str, int]:
    return {
        name: lines_of(function)
        for name, function in functions(ast.parse(source))
        if lines_of(function) > MOST_LINES_OF_A_FUNCTION
    }


def test_a_docstring_is_not_counted_and_an_inner_function_is() -> None:
    body = "    x = 1\n" * 59
    assert long_functions(f'def f():\n    """A\n    B"""\n{body}') == {}
    assert long_functions(f"def f():\n{body}    x = 2\n") == {"f": 61}
    inner = body.replace("    ", "        ")
    assert long_functions(f"class A:\n    def f(self):\n{inner}        x = 2\n") == {"A.f": 61}
    nested = f"def f():\n    def g():\n{inner}        x = 2\n"
    assert long_functions(nested) == {"f": 62, "f.g": 61}


def test_files_and_their_functions_are_short() -> None:
    sources = {file: (ROOT / file).read_text() for file in FILES}
    lengths = {file: len(source.splitlines()) for file, source in sources.items()}
    too_long = {file: lines for file, lines in lengths.items() if lines > MOST_LINES_OF_A_FILE}
    assert not too_long
    functions_too_long = {
        file: found for file, source in sources.items() if (found := long_functions(source))
    }
    assert not functions_too_long


def checks_of_patterns(source: str) -> int:
    """How often code asks whether something is of a class of patterns."""
    classes = {name for name, value in vars(patterns).items() if isinstance(value, type)}
    return sum(
        isinstance(node, ast.Call)
        and isinstance(node.func, ast.Name)
        and node.func.id == "isinstance"
        and any(isinstance(n, ast.Name) and n.id in classes for n in ast.walk(node.args[1]))
        for node in ast.walk(ast.parse(source))
    )


def test_patterns_are_seldom_asked_for_their_class() -> None:
    """What a pattern allows, and what its unit is, it tells by its own methods."""
    assert (
        checks_of_patterns("isinstance(p, NM)\nisinstance(p, Head | int)\nisinstance(3, int)") == 2
    )
    counts = {file: checks_of_patterns((ROOT / file).read_text()) for file in FILES}
    outside = {file: n for file, n in counts.items() if n and "/patterns/" not in file}
    assert outside, "none was found: are the classes still in hf_sparse.patterns?"
    assert sum(outside.values()) <= MOST_CHECKS_OF_PATTERNS, outside
