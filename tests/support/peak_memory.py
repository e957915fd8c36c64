"""The most memory that a call takes beyond what the process had before it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path


def memory(kind: str) -> int:
    """What the system tells of this process: VmRSS now, VmHWM at the most; in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(kind))


def extra(call: Callable[[], object]) -> float:
    """Megabytes beyond those before the call."""
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = memory("VmRSS")
    call()
    return (memory("VmHWM") - before) / 1e6
