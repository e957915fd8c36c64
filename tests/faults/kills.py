"""Kill what writes at random moments: `python -m tests.faults.kills --count 200 [--operation NAME]`.

For each kill a process of its own begins the work, and is ended by SIGKILL between its begin and the
time that it takes. Then the old artefact or the new one must be whole, and the work, done again, must
give the same as if nothing had happened, and leave nothing else behind.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

from tests.faults.operations import NOTHING, OPERATIONS, Operation, quietly


class LostError(Exception):
    """What a kill must not do."""


def main() -> int:
    """Run; the exit status is 1 if something was lost."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--count", type=int, default=20, help="kills of each operation")
    parser.add_argument("--operation", action="append", choices=list(OPERATIONS))
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    lost = 0
    for name in asked.operation or OPERATIONS:
        with tempfile.TemporaryDirectory() as room:
            try:
                counts = kill(name, Path(room), asked.count, asked.seed)
                told = ", ".join(f"{count} left the {state}" for state, count in counts.items())
                print(
                    f"{name:14} {asked.count} kills: {told}; the next run gave the new one",
                    flush=True,
                )
            except LostError as error:
                lost += 1
                print(f"{name:14} LOST: {error}", flush=True)
    return int(lost > 0)


def kill(name: str, room: Path, count: int, seed: int = 0) -> dict[str, int]:
    """Kill an operation many times.

    Returns:
        How often the old state, and how often the new one was there.

    Raises:
        LostError: something else was there, or the next run did not give the same.
    """
    operation, chance = OPERATIONS[name], random.Random(f"{name} {seed}")
    with quietly():
        seconds, old, new = _measured(operation, room)
        counts = {"old one": 0, "new one": 0}
        for number in range(count):
            folder = room / str(number)
            folder.mkdir()
            operation.begin(folder)
            child = forked(operation, folder)
            time.sleep(chance.uniform(0, 1.1 * seconds))
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            state = _state(operation, folder)
            if state not in (old, new):
                raise LostError(f"kill {number} left {state}; wanted {old} or {new}")
            counts["old one" if state == old else "new one"] += 1
            finish(operation, folder, new)
            shutil.rmtree(folder)
    return counts


def _state(operation: Operation, folder: Path) -> str:
    try:
        return operation.state(folder)
    except Exception as error:
        return f"what cannot be read: {error!r}"


def _measured(operation: Operation, room: Path) -> tuple[float, str, str]:
    """The seconds that the work takes in a process, and the states before and behind it."""
    folder = room / "measured"
    folder.mkdir()
    operation.begin(folder)
    old, begun = operation.state(folder), time.monotonic()
    _, status = os.waitpid(forked(operation, folder), 0)
    seconds = time.monotonic() - begun
    assert status == 0, f"the work fails: {status}"
    new = operation.state(folder)
    assert new not in (old, NOTHING)
    return seconds, old, new


def forked(operation: Operation, folder: Path) -> int:
    """Begin the work in a process of its own; its number."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            operation.work(folder)
            code = 0
        finally:
            os._exit(code)
    return child


def finish(operation: Operation, folder: Path, new: str) -> None:
    """Do the work once more: it gives the new state, and nothing lies beside it.

    Raises:
        LostError: it fails, gives another state, or leaves something.
    """
    try:
        operation.work(folder)
    except Exception as error:
        raise LostError(f"the next run fails: {error!r}") from error
    if (state := _state(operation, folder)) != new:
        raise LostError(f"the next run gives {state}; wanted {new}")
    left = sorted({path.name for path in folder.iterdir()} - set(operation.kept))
    inside = [path.name for path in folder.rglob("*") if ".saving-" in path.name]
    if left or inside:
        raise LostError(f"the next run leaves {left + inside}")


if __name__ == "__main__":
    sys.exit(main())
