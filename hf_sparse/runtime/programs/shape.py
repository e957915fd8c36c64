"""What a program is made for."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Shape:
    """The shape of an input, and what else decides which operations there are.

    Attributes:
        batch, tokens: of the input.
        threads: lists of operations.
        cached: keys and values go to a cache, behind those of `past` tokens.
        capacity: tokens for which there are masks and tables, a multiple of the tile's width.
        states: every block's output is written.
    """

    batch: int
    tokens: int
    threads: int
    cached: bool
    capacity: int
    states: bool
