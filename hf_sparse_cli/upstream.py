"""What Python's argparse keeps private."""

from __future__ import annotations

import argparse
from typing import Any

__all__ = ["ChoosyParser", "actions_of", "commands_of", "flags_of"]


def flags_of(parser: argparse.ArgumentParser) -> list[str]:
    """The flags of a parser, as they are written."""
    return list(parser._option_string_actions)


def actions_of(parser: argparse.ArgumentParser) -> list[argparse.Action]:
    """The arguments and flags of a parser."""
    return list(parser._actions)


def commands_of(parser: argparse.ArgumentParser) -> dict[str, Any]:
    """The parsers of a parser's commands, by name; none if it has no commands."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            return dict(action.choices)
    return {}


class ChoosyParser(argparse.ArgumentParser):
    """A parser that has a say in which values a flag or a command takes."""

    def check_choice(self, action: argparse.Action, value: Any) -> None:
        """Called with each value that was given for an action.

        Raises:
            ArgumentError: the value is refused.
        """
        super()._check_value(action, value)

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        self.check_choice(action, value)
