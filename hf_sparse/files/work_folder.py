"""The work folder of a run that can be killed and resumed.

It belongs to one run: `run.json` says which. The folder is locked while the run goes on (where the
system has `flock`). When the run ends it is renamed, and removed; an error or an interruption before
the first finished block removes it too, later ones leave it to be resumed. What kills leave of a folder
that was just begun, or done with, the next run removes.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from hf_sparse.files.atomic import lock, sync_file
from hf_sparse.files.single import write_file

HIDDEN_STATES = "hidden_states"
CONVERTED = "converted"
_RUN_FILE = "run.json"
_PIECES, _PIECE = 64, 1 << 14
# How many differences between two runs are told, and how long a value may be to be told.
_TOLD, _LONGEST_VALUE = 4, 60


@contextmanager
def work_folder(folder: Path, run: dict[str, Any], *, resume: bool) -> Iterator[Path]:
    """The work folder beside an output folder, with empty folders in it.

    They are for hidden states, and for weights that are converted; both go at the end.

    Args:
        folder: the output.
        run: what a run must share with the one that it resumes, as JSON has it; more may be told
            later, to `describe_run`.
        resume: go on with the folder that is there.

    Raises:
        ValueError: it is there without `resume`, is of another run, damaged, or in use.
    """
    shutil.rmtree(_done_with(folder), ignore_errors=True)
    work = check_work_folder(folder, run, resume=resume)
    work.mkdir(parents=True, exist_ok=True)
    with _locked(work):
        if not (work / _RUN_FILE).exists():
            _write_run(work, run)
        scratch = [work / HIDDEN_STATES, work / CONVERTED]
        for inner in scratch:
            shutil.rmtree(inner, ignore_errors=True)
            inner.mkdir()
        try:
            yield work
        except BaseException:  # an interruption too
            if not any(work.glob("*.safetensors")):
                shutil.rmtree(work)
            raise
        finally:
            for inner in scratch:
                shutil.rmtree(inner, ignore_errors=True)
        work.rename(_done_with(folder))
        shutil.rmtree(_done_with(folder))


def _done_with(folder: Path) -> Path:
    """What the work folder is called while it is removed."""
    return folder.with_name(f".{folder.name}.finished")


def _write_run(work: Path, run: dict[str, Any]) -> None:
    write_file(work / _RUN_FILE, json.dumps(run, indent=2).encode())


def describe_run(work: Path, run: dict[str, Any]) -> None:
    """Tell a work folder all of a run, or compare it with the run that is resumed.

    Raises:
        ValueError: the folder is of another run, or damaged.
    """
    known, run = read_json(work / _RUN_FILE), json.loads(json.dumps(run))
    if known.keys() < run.keys():
        _check_same(work, {key: run[key] for key in known})
        _write_run(work, run)
    else:
        _check_same(work, run)


def is_stopped(folder: Path) -> bool:
    """Whether a run into this output folder was stopped, and can be resumed."""
    return _beside(folder).exists()


def _beside(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}.unfinished")


def write_work(
    file: Path, tensors: dict[str, Tensor], metadata: Mapping[str, str] | None = None
) -> None:
    """Write finished work to a file of a work folder, so that a kill leaves the whole file, or none.

    Args:
        file: `.safetensors`.
        tensors: on the CPU, contiguous.
        metadata: texts beside them.

    Raises:
        OSError: the disk is full, say.
    """
    fresh = file.with_suffix(".new")
    try:
        save_file(tensors, fresh, None if metadata is None else dict(metadata))
    except SafetensorError as error:  # what safetensors makes of a full disk
        raise OSError(
            f"{file} cannot be written: {error}. Finished work is kept: free space, and resume."
        ) from error
    sync_file(fresh)
    fresh.replace(file)


def check_work_folder(folder: Path, run: dict[str, Any], *, resume: bool) -> Path:
    """The work folder beside an output folder, if a run may begin in it or go on with it.

    Args:
        folder: the output.
        run: what is known of the run, as JSON has it: what `work_folder` is given, or a part of it.
        resume: go on with the folder if it is there.

    Raises:
        ValueError: it is there without `resume`, is of another run, or damaged.
    """
    work = _beside(folder)
    if not work.exists() or _was_not_begun(work):
        return work
    if not resume:
        raise ValueError(
            f"{work} is there: a run was stopped. Go on with it by resume=True, or remove it."
        )
    _check_same(work, run)
    return work


def _was_not_begun(work: Path) -> bool:
    """Whether a folder holds nothing, but perhaps what a kill left of its first file."""
    return all(path.name.startswith(f".{_RUN_FILE}.") for path in work.iterdir())


def _check_same(work: Path, run: dict[str, Any]) -> None:
    known, run = read_json(work / _RUN_FILE), json.loads(json.dumps(run))
    changed = [key for key, value in run.items() if known.get(key) != value]
    if changed:
        told = [line for key in changed for line in _differences(key, known.get(key), run[key])]
        more = f", and {len(told) - _TOLD} more differences" if len(told) > _TOLD else ""
        raise ValueError(
            f"{work} is of a run with another {', '.join(changed)}: {'; '.join(told[:_TOLD])}{more}. "
            "Resume with the same arguments, or remove it."
        )


def _differences(key: str, old: Any, new: Any) -> list[str]:
    """What differs between two values of a run, each in a few words."""
    if isinstance(old, dict) and isinstance(new, dict):
        names = [name for name in {**old, **new} if old.get(name) != new.get(name)]
        return [line for name in names for line in _differences(name, old.get(name), new.get(name))]
    texts = [json.dumps(value) for value in (old, new)]
    if max(map(len, texts)) > _LONGEST_VALUE:  # hashes, and lists of many
        return [f"{key} has changed"]
    return [f"{key} was {texts[0]}, now {texts[1]}"]


@contextmanager
def _locked(work: Path) -> Iterator[None]:
    """Lock a folder; where the system has no locks, nothing happens."""
    try:
        held = lock(work)
    except OSError:
        yield
        return
    if held is None:
        raise ValueError(f"{work} is in use by a run that still goes on. Wait for it.")
    try:
        yield
    finally:
        os.close(held)


def read_json(file: Path) -> dict[str, Any]:
    """Read a file of a work folder.

    Raises:
        ValueError: it is missing or damaged.
    """
    try:
        stored = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{file} cannot be read ({error}): {file.parent} is damaged, or no work folder of "
            "hf_sparse. Remove the folder and start again."
        ) from error
    if not isinstance(stored, dict):
        raise ValueError(f"{file} holds a {type(stored).__name__}. Remove {file.parent}.")
    return stored


def sampled_hash(file: Path) -> str:
    """A hash of a file's size, its header and 64 pieces of 16 KB, by which a resumed run knows it."""
    size = file.stat().st_size
    digest = hashlib.sha256(str(size).encode())
    with file.open("rb") as opened:
        for piece in range(_PIECES + 1):
            opened.seek(max(size - _PIECE, 0) * piece // _PIECES)
            digest.update(opened.read(_PIECE))
    return digest.hexdigest()
