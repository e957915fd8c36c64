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
        encoded: an encoder's tokens for which there are masks and tables; 0 without any.
        filling: it puts the keys and values of an encoder's states into a cache, and does nothing else.
    """

    batch: int
    tokens: int
    threads: int
    cached: bool
    capacity: int
    states: bool
    encoded: int = 0
    filling: bool = False
