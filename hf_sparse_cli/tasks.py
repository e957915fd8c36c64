"""The flags of `eval` for zero-shot tasks, and their checks."""

from __future__ import annotations

import argparse
from pathlib import Path

from hf_sparse_cli.choices import TASK_ALIASES, TASKS
from hf_sparse_cli.flags import named_list
from hf_sparse_cli.names import did_you_mean


def add_tasks(command: argparse.ArgumentParser) -> None:
    """Where the examples of zero-shot tasks are, and how many of them are asked."""
    tasks = command.add_argument_group("zero-shot tasks", named_list("tasks", TASKS))
    tasks.add_argument(
        "--task-data", metavar="FOLDER", help="with a file NAME.jsonl for each (default: the Hub)"
    )
    tasks.add_argument("--limit", type=int, help="the first so many examples of each task only")


def check_tasks(options: argparse.Namespace) -> None:
    """Raise a ValueError or an OSError for tasks that cannot be measured."""
    if options.record and not Path(options.model).is_dir():
        raise ValueError(
            f"--record writes into MODEL's folder, and {options.model} is none here: leave it out."
        )
    if options.tasks is None:
        for name in ("task_data", "limit"):
            if getattr(options, name):
                raise ValueError(f"--{name.replace('_', '-')} is for --tasks alone: leave it out.")
        return
    for task in task_names(options):
        if task not in TASKS:
            raise ValueError(
                f"unknown task '{task}'. Known tasks: {', '.join(TASKS)}."
                f"{did_you_mean(task, [*TASKS, *TASK_ALIASES])}"
            )
    if options.task_data is not None and not Path(options.task_data).is_dir():
        raise FileNotFoundError(f"no such folder: {options.task_data}")


def task_names(options: argparse.Namespace) -> list[str]:
    """The names in `--tasks`, as the table has them."""
    names = [name.strip() for name in options.tasks.split(",")]
    return [TASK_ALIASES.get(name, name) for name in names]
