"""Files and folders that a command is given, looked at before anything slow is imported."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path


def unfinished(output: str) -> Path:
    """The work folder of a streamed run (see `hf_sparse.files.work_folder`)."""
    folder = Path(output).absolute()
    return folder.with_name(f"{folder.name}.unfinished")


def check_files(files: Sequence[str]) -> None:
    for file in map(Path, files):
        if not file.exists():
            raise FileNotFoundError(f"no such file: {file}")
        if file.is_dir():
            raise IsADirectoryError(f"{file} is a folder; wanted a file of text.")


def check_model(source: str, local: bool = False) -> None:
    """Refuse the path of a folder that is not there; other names may be models of the Hub."""
    folder = Path(source)
    if not folder.exists():
        if local or source.startswith((".", "/", "~")) or source.count("/") > 1:
            raise FileNotFoundError(f"no such folder: {source}.{similar_folder(folder)}")
    elif not folder.is_dir():
        raise NotADirectoryError(f"{source} is a file; wanted a folder, or a model of the Hub.")


def similar_folder(folder: Path) -> str:
    """A question after an error: the checkpoint folder that was probably meant, if there is one."""
    if not folder.parent.is_dir():
        return ""
    models = {path.parent.name: str(path.parent) for path in folder.parent.glob("*/config.json")}
    close = get_close_matches(folder.name, models, n=1)
    return f" Did you mean {models[close[0]]}?" if close else ""


def check_output(options: argparse.Namespace, source: str, lost: str, asked: bool = False) -> None:
    """Refuse an output folder that is the source, is a file, or holds files, without --overwrite."""
    folder, given = Path(options.output), getattr(options, source)
    if folder.resolve() == Path(given).resolve():
        raise ValueError(f"OUTPUT is {source.upper()}, {given}: {lost} would be lost.")
    check_no_file(options.output)
    if options.overwrite or asked or not folder.is_dir():
        return
    names = sorted(path.name for path in folder.iterdir())
    # Nothing is saved over an ONNX export, see check_folder.
    if names and "export.json" not in names:
        first = "config.json" if "config.json" in names else names[0]
        others = f" and {len(names) - 1} more" if len(names) > 1 else ""
        raise ValueError(
            f"{options.output} is not empty: it holds {first}{others}. Give another OUTPUT, or "
            "--overwrite: the model in it is replaced, files of other names stay."
        )


def check_no_file(output: str) -> None:
    path = next(path for path in (Path(output), *Path(output).parents) if path.exists())
    if not path.is_dir():
        raise NotADirectoryError(f"{path} is a file; wanted a folder to save in.")
