"""Let every system call that writes fail in turn: `python -m tests.faults.system_calls`.

A library that is loaded before the process (`shim.c`, built by gcc) counts the calls on files in a
folder, and lets one fail: with ENOSPC and all calls behind it, once with EIO, EXDEV or EACCES, or by a
write that writes the half. The work must raise an OSError and leave the old artefact, or be done and
leave the new one; done again it gives the new one, and nothing is left beside it.
"""

from __future__ import annotations

import argparse
import ctypes
import errno
import os
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

from tests.faults.operations import OPERATIONS, Operation, quietly

ERRORS = {
    "ENOSPC": (errno.ENOSPC, True),
    "EIO": (errno.EIO, False),
    "EXDEV": (errno.EXDEV, False),
    "EACCES": (errno.EACCES, False),
    "short write": (-1, False),
}
_SHIM = Path(__file__).with_name("shim.c")
# How a process of the work ends.
_DONE, _REFUSED, _OTHER = 0, 3, 4


def main() -> int:
    """Run; the exit status is 1 if a failure was not handled."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--operation", action="append", choices=list(OPERATIONS))
    parser.add_argument("--error", action="append", choices=list(ERRORS))
    parser.add_argument("--every", type=int, default=1, help="only every so many calls")
    asked = parser.parse_args()
    if "fault_arm" not in os.environ.get("HF_SPARSE_SHIM", ""):
        return run_with_shim(sys.argv[1:])
    wrong = 0
    with quietly():
        for name in asked.operation or OPERATIONS:
            for error in asked.error or ERRORS:
                with tempfile.TemporaryDirectory() as room:
                    wrong += _fail_each(name, error, Path(room), asked.every)
    return int(wrong > 0)


def run_with_shim(arguments: list[str]) -> int:
    """Run this program in a process that the shim is loaded into; its exit status."""
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder) / "shim.so"
        built = ["gcc", "-shared", "-fPIC", "-O1", "-w", "-o", str(library), str(_SHIM), "-ldl"]
        subprocess.run(built, check=True)
        more = {"LD_PRELOAD": str(library), "HF_SPARSE_SHIM": "fault_arm"}
        command = [sys.executable, "-m", "tests.faults.system_calls", *arguments]
        return subprocess.run(command, env={**os.environ, **more}, check=False).returncode


def _fail_each(name: str, error: str, room: Path, every: int) -> int:
    """Fail each call of an operation in turn; how often it was not handled."""
    operation = OPERATIONS[name]
    folder = room / "honest"
    folder.mkdir()
    operation.begin(folder)
    old = operation.state(folder)
    calls, status = _work(operation, folder, 0, "EIO")
    assert status == _DONE, f"{name} fails without a failure: {status}"
    new, wrong, ends = operation.state(folder), 0, Counter[str]()
    for number in range(1, calls + 1, every):
        folder = room / str(number)
        folder.mkdir()
        operation.begin(folder)
        _, status = _work(operation, folder, number, error)
        told = _judged(operation, folder, status, old, new)
        if told:
            wrong += 1
            print(f"{name:14} {error:12} call {number} of {calls}: {told}", flush=True)
        else:
            ends["done" if status == _DONE else "refused"] += 1
        shutil.rmtree(folder)
    told = ", ".join(f"{count} {end}" for end, count in ends.items())
    print(f"{name:14} {error:12} {calls:4} calls: {told}, {wrong} wrong", flush=True)
    return wrong


def _judged(operation: Operation, folder: Path, status: int, old: str, new: str) -> str:
    """What is wrong behind a failure; nothing is told of what is as it should be."""
    if status not in (_DONE, _REFUSED):
        return "no OSError" if status == _OTHER else f"exit status {status}"
    try:
        state = operation.state(folder)
    except Exception as error:
        return f"left what cannot be read: {error!r}"
    if state != new and (status == _DONE or state != old):
        return f"left {state}; wanted {old} or {new}"
    try:
        operation.work(folder)
        if operation.state(folder) != new:
            return "the next run gives another state"
    except Exception as error:
        return f"the next run fails: {error!r}"
    left = sorted({path.name for path in folder.iterdir()} - set(operation.kept))
    left += [path.name for path in folder.rglob("*") if ".saving-" in path.name]
    return f"the next run leaves {left}" if left else ""


def _work(operation: Operation, folder: Path, number: int, error: str) -> tuple[int, int]:
    """Do the work in a process of its own, whose call `number` fails; its calls, and how it ended."""
    receive, send = os.pipe()
    child = os.fork()
    if child == 0:
        os._exit(_child(operation, folder, number, error, send))
    os.close(send)
    told = os.read(receive, 64)
    os.close(receive)
    _, status = os.waitpid(child, 0)
    return int(told or 0), os.waitstatus_to_exitcode(status)


def _child(operation: Operation, folder: Path, number: int, error: str, send: int) -> int:
    shim: Any = ctypes.CDLL(None)
    shim.fault_count.restype = ctypes.c_long
    code, lasts = ERRORS[error]
    shim.fault_arm(os.fsencode(folder), ctypes.c_long(number), code, int(lasts))
    try:
        operation.work(folder)
        status = _DONE
    except OSError:
        status = _REFUSED
    except BaseException as found:
        print(f"{found!r}"[:500], flush=True)
        status = _OTHER
    os.write(send, str(shim.fault_count()).encode())
    return status


if __name__ == "__main__":
    sys.exit(main())
