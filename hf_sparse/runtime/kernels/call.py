"""How kernels are called: an operation is a kernel's name and its arguments.

Addresses and integers are given as int, floats as float. Addresses of tensors that come and go with
a call are `Slot`s, which a program fills in when it runs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Slot:
    """`offset` bytes behind the address that a call gives for `name`."""

    name: str
    offset: int = 0

    def __add__(self, offset: int) -> Slot:
        return Slot(self.name, self.offset + offset)


Argument = int | float | Slot
# A kernel's name, then its arguments.
Operation = tuple[Any, ...]
