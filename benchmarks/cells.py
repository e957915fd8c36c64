"""Tables whose cells are measured one by one, in a process each, into a file of JSON lines."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar


def add_flags(parser: argparse.ArgumentParser, example: str, out: str) -> None:
    """Add the flags of such a table: its texts, its file, and which cells are measured."""
    parser.add_argument("--data", type=Path, help="folder with WikiText-2 and C4 texts")
    parser.add_argument("--out", type=Path, default=Path(out))
    parser.add_argument("--table", action="store_true", help="print what is there and stop")
    parser.add_argument("--only", nargs="+", metavar="CELL", help=f'such as "{example}"')
    parser.add_argument("--max-windows", type=int, default=32, help="windows of each text")
    parser.add_argument("--cell", help=argparse.SUPPRESS)


@dataclass(frozen=True)
class Keyed:
    """A cell, which its fields identify in the results."""

    @property
    def key(self) -> str:
        """Its fields as JSON; `--cell` takes it."""
        return json.dumps(asdict(self), sort_keys=True)


class Named(Protocol):
    """A cell that `--only` can name."""

    @property
    def name(self) -> str:
        """What `--only` takes."""


AnyCell = TypeVar("AnyCell", bound=Named)


def chosen(cells: Iterable[AnyCell], names: list[str] | None) -> list[AnyCell]:
    """The cells of these names; all without names."""
    by_name = {cell.name: cell for cell in cells}
    for name in names or ():
        if name not in by_name:
            raise SystemExit(f"no cell {name!r}; there are: {', '.join(by_name)}")
    return [cell for name, cell in by_name.items() if names is None or name in names]


def missing(kind: Any, cells: Iterable[Any], options: argparse.Namespace) -> list[Any]:
    """The cells that `--only` names, or all, but for those that the results have."""
    done = {kind(**row["cell"]).key for row in read(options.out)}
    return [cell for cell in chosen(cells, options.only) if cell.key not in done]


def measured(cell: Any, *arguments: str) -> dict[str, Any]:
    """What this script prints of a cell, started anew for it alone."""
    command = [sys.executable, sys.argv[0], *sys.argv[1:], "--cell", cell.key, *arguments]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise SystemExit(f"failed, see above: {cell.name}")
    return dict(json.loads(done.stdout.splitlines()[-1]))


def answer(kind: Any, options: argparse.Namespace, machine: str, measure: Any) -> bool:
    """Print what a cell of a kind measures, if `--cell` asks for one."""
    if not options.cell:
        return False
    cell = kind(**json.loads(options.cell))
    print(json.dumps({"cell": asdict(cell), "machine": machine, **measure(cell, options)}))
    return True


def table(
    kind: Any,
    options: argparse.Namespace,
    machine: str,
    *,
    measure: Callable[[Any, argparse.Namespace], dict[str, Any]],
    fill: Callable[[argparse.Namespace], None],
    show: Callable[[list[dict[str, Any]]], None],
) -> None:
    """Fill such a table and print it, or with `--cell` measure one line in this process.

    Args:
        kind: of the cells.
        options: flags.
        machine: what is told of it in each line.
        measure: a cell in this process.
        fill: the file with the cells that are missing.
        show: print the lines of the file.
    """
    if answer(kind, options, machine, measure):
        return
    if not options.table:
        fill(options)
    show(read(options.out))


def append(file: Path, row: dict[str, Any]) -> None:
    """Add a line to the results."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("a") as lines:
        lines.write(json.dumps(row) + "\n")


def read(file: Path) -> list[dict[str, Any]]:
    """The lines of the results."""
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def measured_texts(rows: list[dict[str, Any]]) -> list[str]:
    """Print the machines of the results; the texts whose perplexities they have, none without rows."""
    if not rows:
        print("no results yet")
        return []
    print("\n\n".join(dict.fromkeys(row["machine"] for row in rows)) + "\n")
    return list(rows[0]["perplexity"])


def print_head(columns: list[str]) -> None:
    """Print the head of a table in Markdown."""
    print("| " + " | ".join(columns) + " |\n|" + "---|" * len(columns))
