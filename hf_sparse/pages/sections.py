"""What a page is made of: tables, pictures with a table each, and sections of them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from hf_sparse.pages.drawing import Picture

# Rows that a table of a page has at most; the rest is told as a number.
MOST_ROWS = 400
_NUMBERS, _NONE = "0123456789+-", ("", "not measured", "in memory", "inf", "nan")


@dataclass(frozen=True)
class Table:
    """A table: its first column is a header. `folded` tables open when they are asked for."""

    caption: str
    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    folded: bool = True

    @property
    def columns(self) -> tuple[str, ...]:
        """Of each column `"number"` or `"text"`: how its cells are aligned."""
        return tuple(
            "number" if all(cell[:1] in _NUMBERS or cell in _NONE for cell in cells) else "text"
            for cells in zip(*self.rows, strict=True)
        )


@dataclass(frozen=True)
class Shown:
    """A picture, with the table that says the same exactly."""

    picture: Picture
    table: Table


@dataclass(frozen=True)
class Section:
    """One part of a page."""

    key: str
    title: str
    words: tuple[str, ...] = ()
    shown: tuple[Shown, ...] = ()
    tables: tuple[Table, ...] = ()


@dataclass(frozen=True)
class ModelPage:
    """The sections of one model, and its most important figures, each with what it is."""

    key: str
    title: str
    subtitle: str
    figures: tuple[tuple[str, str], ...]
    sections: tuple[Section, ...] = field(default_factory=tuple)


def grid(
    pooled: Mapping[str, Mapping[int, float]], rows: Sequence[str], columns: Sequence[int]
) -> torch.Tensor:
    """The values `(rows, columns)`, NaN where there is none."""
    nothing = float("nan")
    return torch.tensor([[pooled[row].get(column, nothing) for column in columns] for row in rows])


def grid_table(
    caption: str, across: str, rows: Sequence[str], columns: Sequence[int], values: torch.Tensor
) -> Table:
    """The values of a heat map, a row for each column of it: there are more of them."""
    lines = [
        (str(column), *("" if value != value else f"{value:.2%}" for value in cells))
        for column, cells in zip(columns, values.T.tolist(), strict=True)
    ]
    return Table(caption, (across, *rows), cut(lines))


def cut(lines: Sequence[tuple[str, ...]]) -> tuple[tuple[str, ...], ...]:
    """The first rows, and how many more there are."""
    if len(lines) <= MOST_ROWS:
        return tuple(lines)
    rest = (f"and {len(lines) - MOST_ROWS} more", *[""] * (len(lines[0]) - 1))
    return (*lines[:MOST_ROWS], rest)


def all_pictures(sections: Iterable[Section]) -> list[Picture]:
    """The pictures of sections, in order."""
    return [shown.picture for section in sections for shown in section.shown]
