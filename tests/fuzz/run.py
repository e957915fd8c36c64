"""Fuzz for some minutes, and tell what was found.

    python -m tests.fuzz.run --minutes 10 [--subject NAME] [--seed N] [--guided]

Each subject gets its share of the time, in processes of their own: one that crashes, or takes longer
than ten seconds of the CPU for an input, is a finding as well. Inputs that found something are kept in
`tests/fuzz/corpus/SUBJECT/`, where the tests read them again. With --guided the fast subjects are
driven by the coverage that atheris sees (`pip install atheris`), the others by chance.
"""

from __future__ import annotations

import argparse
import hashlib
import mmap
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

CORPUS = Path(__file__).parent / "corpus"
_SECONDS = 10  # for one input
_LONGEST = 96  # bytes of an input
_VERDICTS = ("refused", "same", "other", "finding")


def main() -> int:
    """Run; the exit status is 1 if something was found."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--subject", action="append", help="only this one; may be given again")
    parser.add_argument("--seed", type=int, default=None)
    parser.add_argument("--guided", action="store_true")
    asked = parser.parse_args()
    from tests.fuzz.subjects import SUBJECTS, be_quiet

    be_quiet()

    names = asked.subject or list(SUBJECTS)
    seed = int(time.time()) if asked.seed is None else asked.seed
    share, findings, total = 60 * asked.minutes / len(names), 0, 0
    print(f"{len(names)} subjects, {share:.0f} s each, seed {seed}")
    for name in names:
        if asked.guided and SUBJECTS[name].fast:
            findings += guided(name, share)
            continue
        counts = fuzz(name, share, seed)
        findings, total = findings + counts["finding"], total + sum(counts.values())
        told = ", ".join(f"{counts[verdict]:,} {verdict}" for verdict in _VERDICTS)
        print(f"{name:36} {sum(counts.values()):>9,} inputs: {told}", flush=True)
    print(f"{total:,} inputs by chance, {findings} findings, {CORPUS}")
    return int(findings > 0)


def guided(name: str, seconds: float) -> int:
    """Let atheris choose inputs for some seconds; 1 if it found something."""
    folder = CORPUS / name
    folder.mkdir(parents=True, exist_ok=True)
    known = set(folder.iterdir())
    command = [sys.executable, "-m", "tests.fuzz.guided", name, str(folder), str(int(seconds))]
    status = subprocess.run(command, check=False).returncode
    print(f"{name:36} guided: {'nothing found' if status == 0 else f'exit status {status}'}")
    for file in set(folder.iterdir()) - known:
        if status == 0 or not file.name.startswith("crash-"):
            file.unlink()
    return int(status != 0)


def fuzz(name: str, seconds: float, seed: int) -> Counter[str]:
    """Try random inputs for some seconds."""
    counts: Counter[str] = Counter()
    end = time.monotonic() + seconds
    shared = mmap.mmap(-1, 4096)
    while (left := end - time.monotonic()) > 0:
        seed += 1
        shared[:] = bytes(4096)
        child = os.fork()
        if child == 0:
            os._exit(_child(name, left, seed, shared))
        _, status = os.waitpid(child, 0)
        for number, verdict in enumerate(_VERDICTS):
            counts[verdict] += int.from_bytes(shared[8 * number : 8 * number + 8], "little")
        if os.WIFSIGNALED(status):
            number = os.WTERMSIG(status)
            told = "takes too long" if number == signal.SIGPROF else signal.Signals(number).name
            _keep(name, _last_input(shared), told)
            counts["finding"] += 1
        elif os.WEXITSTATUS(status):
            raise SystemExit(f"{name}: the honest files cannot be read")
    return counts


def _last_input(shared: mmap.mmap) -> bytes:
    length = int.from_bytes(shared[64:72], "little")
    return bytes(shared[72 : 72 + length])


def _child(name: str, seconds: float, seed: int, shared: mmap.mmap) -> int:
    from tests.fuzz.trial import FindingError, honest, trial

    chance = random.Random(f"{name} {seed}")
    end = time.monotonic() + seconds
    try:
        honest(name)
    except Exception as error:
        print(f"{name}: {error!r}")
        return 1
    while time.monotonic() < end:
        data = chance.randbytes(chance.randrange(8, _LONGEST))
        shared[64 : 72 + len(data)] = len(data).to_bytes(8, "little") + data
        signal.setitimer(
            signal.ITIMER_PROF, _SECONDS
        )  # of this process, however busy the machine is
        try:
            verdict = trial(name, data)
        except FindingError as error:
            verdict = "finding"
            _keep(name, data, str(error))
        signal.setitimer(signal.ITIMER_PROF, 0)
        place = 8 * _VERDICTS.index(verdict)
        count = int.from_bytes(shared[place : place + 8], "little") + 1
        shared[place : place + 8] = count.to_bytes(8, "little")
    return 0


def _keep(name: str, data: bytes, told: str) -> None:
    folder = CORPUS / name
    folder.mkdir(parents=True, exist_ok=True)
    # One input for each kind of finding: what is told, but for numbers and names of files.
    kind = re.sub(r"\d+|\[.*?\] changed", "", told)
    file = folder / hashlib.sha256(kind.encode()).hexdigest()[:12]
    if not file.exists():
        file.write_bytes(data)
        print(f"FOUND {file.relative_to(CORPUS)}: {told[:600]}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
