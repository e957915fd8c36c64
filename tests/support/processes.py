"""Runs the programs of `tests/programs` in processes of their own."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

ROOT = Path(__file__).parents[2]
PROGRAMS = ROOT / "tests" / "programs"


def command(program: str, *arguments: object, processes: int = 0) -> list[str]:
    """What runs a program with arguments; with `processes`, in so many by torchrun."""
    launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    file = str(PROGRAMS / f"{program}.py")
    return [sys.executable, *(launch if processes else ()), file, *map(str, arguments)]


def environment(variables: Mapping[str, str] | None = None, **changes: str) -> dict[str, str]:
    """Variables (None: of this process), with which a program finds the package and the tests."""
    return {**(os.environ if variables is None else variables), "PYTHONPATH": str(ROOT), **changes}


def run(
    program: str,
    *arguments: object,
    processes: int = 0,
    variables: Mapping[str, str] | None = None,
    text: str | None = None,
) -> subprocess.CompletedProcess[str]:
    """Run a program to its end, which the caller has to look at.

    Args:
        program: the name of a file of `tests/programs`.
        *arguments: of the program.
        processes: so many run it, started by torchrun, each with one thread; 0: one without it.
        variables: of the environment, in place of those of this process.
        text: what the program reads from stdin.
    """
    threads = {"OMP_NUM_THREADS": "1"} if processes else {}
    return subprocess.run(
        command(program, *arguments, processes=processes),
        input=text,
        capture_output=True,
        text=True,
        env=environment(variables, **threads),
        check=False,
    )
