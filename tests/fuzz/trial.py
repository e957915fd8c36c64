"""One changed folder, read: what came of it."""

from __future__ import annotations

import json
import os
import resource
import tempfile
import warnings
from dataclasses import dataclass, field
from fnmatch import fnmatch
from functools import cache
from pathlib import Path
from typing import Any

import hf_sparse
from tests.fuzz.changes import change
from tests.fuzz.choices import Choices
from tests.fuzz.subjects import SUBJECTS, Subject

# Changes of one input, at most.
_MOST = 3
# Memory that a reading may take beyond what the honest files took, in KiB.
_MORE_KIB = 200 << 10
_SHARED = Path("/dev/shm")


class FindingError(Exception):
    """A changed file that was not handled as it should be."""


@dataclass
class Honest:
    """A folder as it was written.

    Attributes:
        files: the content of each file that may be changed, by its name.
        found: what reading it gives.
        most_kib: memory of this process at most, when it was read.
    """

    folder: Path
    files: dict[str, bytes]
    found: str
    most_kib: int
    room: Any = field(repr=False)


@cache
def honest(name: str) -> Honest:
    """The honest folder of a subject, in memory where that can be."""
    subject = SUBJECTS[name]
    room = tempfile.TemporaryDirectory(dir=_SHARED if _SHARED.is_dir() else None)
    folder = Path(room.name) / "files"
    folder.mkdir()
    subject.make(folder)
    files = {
        file.name: file.read_bytes()
        for file in sorted(folder.iterdir())
        if file.suffix in (".json", ".safetensors")
    }
    found = read(subject, folder)
    assert found == read(subject, folder), f"{name}: two readings differ"
    return Honest(folder, files, found, _most_kib(), room)


def read(subject: Subject, folder: Path) -> str:
    """Read a folder without warnings."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return subject.read(folder)


def trial(name: str, data: bytes) -> str:
    """Read a folder that is changed as `data` tells, and put it in order again.

    Returns:
        `refused`, `same`, or `other`: it gave another result, which no digest forbids.

    Raises:
        FindingError: it gave another result though a digest tells of the honest one, it took too much
            memory, or it raised what is no refusal.
    """
    subject, whole = SUBJECTS[name], honest(name)
    choices = Choices(data)
    changed: dict[str, bytes] = {}
    sealed = {file for file in whole.files if any(fnmatch(file, glob) for glob in subject.sealed)}
    unsealed = bool(sealed) and choices.once_in(2)
    if unsealed:
        changed |= {file: _unsealed(file, whole.files[file]) for file in sealed}
    for _ in range(1 + choices.number(_MOST)):
        file = choices.pick(list(whole.files))
        changed[file] = change(file, changed.get(file, whole.files[file]), choices)
    try:
        for file, content in changed.items():
            (whole.folder / file).write_bytes(content)
        found = read(subject, whole.folder)
    except subject.refuses:
        return "refused"
    except Exception as error:
        if not _is_ours(error):
            return "refused"
        raise FindingError(f"{name}: {sorted(changed)} changed: {error!r}") from error
    finally:
        for file in changed:
            (whole.folder / file).write_bytes(whole.files[file])
        grown = _most_kib() - whole.most_kib
        if grown > _MORE_KIB:
            whole.most_kib += grown
            raise FindingError(f"{name}: {sorted(changed)} changed: {grown >> 10} MiB more memory")
    if found == whole.found:
        return "same"
    if not unsealed and changed.keys() <= sealed:
        raise FindingError(f"{name}: {sorted(changed)} changed, and it loads as something else")
    return "other"


def _is_ours(error: BaseException) -> bool:
    """Whether this package called what failed: transformers reads config.json before it calls us."""
    frame, folder = error.__traceback__, f"{Path(hf_sparse.__file__).parent}{os.sep}"
    while frame is not None:
        if frame.tb_frame.f_code.co_filename.startswith(folder):
            return True
        frame = frame.tb_next
    return False


def _unsealed(file: str, content: bytes) -> bytes:
    """A file without the digests that would end a trial before it begins."""
    if file.endswith(".json"):
        values = json.loads(content)
        values.pop("digests", None)
        return json.dumps(values).encode()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    header["__metadata__"] = {"format": "pt"}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + content[8 + length :]


def _most_kib() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
