"""Names that the command line does not know, refused with the one that was probably meant.

argparse alone tells a wrong flag last: after arguments that seem to be missing because of it.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

from hf_sparse_cli.upstream import ChoosyParser, commands_of, flags_of


class Parser(ChoosyParser):
    """A parser that looks at the names of flags before it looks for what is missing."""

    def parse_args(  # type: ignore[override]
        self, args: Sequence[str] | None = None, namespace: Any = None
    ) -> argparse.Namespace:
        """As of argparse; an unknown flag of a command ends it with that command's usage."""
        given = list(sys.argv[1:] if args is None else args)
        self._check_flags(given)
        found: argparse.Namespace = super().parse_args(given, namespace)
        return found

    def _check_flags(self, given: Sequence[str]) -> None:
        """End the program if a flag is unknown, here or after the name of a command."""
        commands: dict[str, Parser] = commands_of(self)
        for place, text in enumerate(given):
            if text in ("-h", "--help", "--"):
                return  # help is given whatever follows
            if commands and text[:1] != "-":  # an unknown command is told by `check_choice`
                return commands[text]._check_flags(given[place + 1 :]) if text in commands else None
            if text[:2] != "--" or " " in text:
                continue
            name, known = text.partition("=")[0], flags_of(self)
            if not any(flag.startswith(name) for flag in known):  # a flag may be cut short
                self.error(f"unknown flag {name}.{did_you_mean(name, known)}")

    def check_choice(self, action: argparse.Action, value: Any) -> None:
        """Refuse a value that is not among an action's choices."""
        if action.choices is not None and value not in action.choices:
            known = [str(choice) for choice in action.choices]
            raise argparse.ArgumentError(
                action,
                f"invalid choice: {value!r}; wanted one of {', '.join(known)}."
                f"{did_you_mean(value, known)}",
            )


def fraction(text: str) -> float:
    """The number in a text, for a flag that takes a fraction.

    Raises:
        ArgumentTypeError: it is a percentage, has a decimal comma, or is no number.
    """
    try:
        return float(text)
    except ValueError:
        pass
    percent = text.strip().endswith("%")
    meant = ""
    try:
        number = float(text.strip().rstrip("% ").replace(",", ".")) / (100 if percent else 1)
        meant = f" Did you mean {number:g}?" if 0 <= number < 1 else ""
    except ValueError:
        pass
    raise argparse.ArgumentTypeError(
        f"{text!r} is no number; wanted a fraction of zeros, as 0.5.{meant}"
    )


def number_or_fraction(text: str) -> int | float:
    """The number in a text, for a flag that takes a count or a fraction: `4`, or `0.25`.

    Raises:
        ArgumentTypeError: it is neither.
    """
    try:
        return int(text)
    except ValueError:
        pass
    try:
        return float(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(
            f"{text!r} is no number; wanted a number of them, as 4, or a fraction, as 0.25."
        ) from error


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """A question after an error: the known name that is most like the one given, if one is."""
    question: str = suggestions().did_you_mean(name, known)
    return question


@cache
def suggestions() -> ModuleType:
    """The module `hf_sparse.suggestions`: it imports nothing, but its package imports torch."""
    package = importlib.util.find_spec("hf_sparse")
    assert package is not None
    assert package.submodule_search_locations is not None
    file = Path(package.submodule_search_locations[0]) / "suggestions.py"
    spec = importlib.util.spec_from_file_location("suggestions", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
