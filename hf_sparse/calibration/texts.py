"""Texts that are given to a call: what counts as one document, and what is refused."""

from __future__ import annotations

import io
import os
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from hf_sparse.suggestions import shortened

# As many documents that are single lines look like the lines of one text.
_MANY_LINES = 8


def documents_of(texts: Any) -> Iterator[str]:
    """The documents in what a call was given as texts: a single string is one document.

    Documents without a visible character are left out. Texts are read only as far as they are
    needed.

    Args:
        texts: a string, or an iterable of strings.

    Raises:
        ValueError: the texts are of another type, or one of them is; the message says how to get
            texts out of it.
    """
    if isinstance(texts, str):
        texts = [texts]
    if isinstance(texts, io.IOBase):
        raise ValueError(
            "found an open file, which gives single lines; wanted its text: file.read()."
        )
    if isinstance(texts, bytes | bytearray | Mapping | os.PathLike) or not isinstance(
        texts, Iterable
    ):
        raise ValueError(
            f"found {_described(texts)}; wanted a text, or a list of texts.{_way_out(texts)}"
        )
    return _checked(texts)


def _checked(texts: Iterable[Any]) -> Iterator[str]:
    lines = 0
    for index, text in enumerate(texts):
        if not isinstance(text, str):
            raise ValueError(f"text {index} is {_described(text)}; wanted a text.{_way_out(text)}")
        check_unicode(text)
        if not text.strip():
            continue
        lines = lines + 1 if text.find("\n") == len(text) - 1 else -_MANY_LINES
        if lines == _MANY_LINES:
            warnings.warn(
                f"the first {lines} texts are single lines that end with a line break. Each is taken "
                "as a document of its own, with a separator before the next. If they are the lines "
                'of one text, give that: "".join(lines), or open(file).read().',
                stacklevel=4,
            )
        yield text


def check_unicode(text: str) -> None:
    """Refuse halves of characters, which tokenizers do not take.

    Raises:
        ValueError: the text.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"found {shortened(text)}; wanted a text of whole Unicode characters: {error}."
        ) from error


def _described(value: Any) -> str:
    if isinstance(value, Mapping):
        return f"a {type(value).__name__} with the fields {', '.join(map(str, value)) or 'none'}"
    return f"{shortened(value)} ({type(value).__name__})"


def _way_out(value: Any) -> str:
    """How to get texts out of what was given instead."""
    if isinstance(value, Mapping):
        for field, part in value.items():
            if isinstance(part, str):
                return (
                    f" Of the rows of a data set give the texts: [row[{field!r}] for row in rows]."
                )
            if isinstance(part, Sequence) and part and isinstance(part[0], str):
                return f" Give the texts alone: rows[{field!r}]."
        return ' Of a data set give the texts of one split: data["train"]["text"].'
    if isinstance(value, bytes | bytearray):
        return ' Decode it: data.decode("utf-8").'
    if isinstance(value, os.PathLike):
        return " Read the file: path.read_text()."
    if isinstance(value, list | tuple):
        return (
            ' Documents are not nested: give one list of texts, or "\\n\\n".join(parts) for each.'
        )
    return ""


def check_tokenizer(tokenizer: Any) -> None:
    """Refuse what is no tokenizer: a name, or the texts in its place.

    Raises:
        ValueError: what was found.
    """
    if not callable(tokenizer) or not hasattr(tokenizer, "eos_token_id"):
        name = tokenizer if isinstance(tokenizer, str) and len(tokenizer) < 40 else "..."
        raise ValueError(
            f"tokenizer is {shortened(tokenizer)}; wanted the model's tokenizer: "
            f"AutoTokenizer.from_pretrained({name!r})."
        )
