"""Texts and labelled rows from files."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def read_documents(files: Sequence[str]) -> list[str]:
    """Texts from files: each line's "text" of a .jsonl file, or a whole file of another kind."""
    documents = []
    for file in map(Path, files):
        if file.suffix == ".jsonl":
            documents += [row["text"] for row in read_rows(file, ["text"])]
        else:
            documents.append(_read_text(file))
    return documents


def _read_text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is no UTF-8 text: {error}") from error


def read_rows(file: Path, fields: Sequence[str]) -> list[dict[str, Any]]:
    """The JSON objects of a file, one a line; every text field must be a string."""
    rows = []
    for number, line in enumerate(_read_text(file).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{file}, line {number} is no JSON: {error}") from error
        if not isinstance(row, dict):
            raise ValueError(f"{file}, line {number} is no JSON object, but {line[:40]!r}.")
        for field in fields:
            if field not in row:
                raise ValueError(
                    f"{file}, line {number} has no field {field!r}; it has {', '.join(row)}."
                )
            if field != "label" and not isinstance(row[field], str):
                raise ValueError(
                    f"{file}, line {number}: {field} is {row[field]!r}; wanted a text."
                )
        rows.append(row)
    return rows
