"""The zero-shot tasks that are known by name, and where their examples come from.

A task's prompt is that of lm-evaluation-harness 0.4.13, written here as the row of a layout (see
`hf_sparse.zeroshot.examples`), so that the same examples give the same figures.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hf_sparse.calibration.documents import read_rows
from hf_sparse.suggestions import check_name, shortened
from hf_sparse.zeroshot.examples import Example, example_of, layout_of

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Task:
    """A task that is known by name.

    Attributes:
        path, config, split: of the data set on the Hub; without a config all that it has.
        convert: a row of the Hub's data set in one of our layouts.
        others: other names that files and people give it.
        normalised: whether `acc_norm` is reported.
    """

    path: str
    config: str | None
    split: str
    convert: Callable[[Row], Row]
    others: tuple[str, ...] = ()
    normalised: bool = True


def _asked(question: str) -> str:
    return f"Question: {question}\nAnswer:"


def _lettered(row: Row, context: str) -> Row:
    """A row whose choices have letters, of which the answer is one."""
    choices = row["choices"]
    label = list(choices["label"]).index(row["answerKey"].strip())
    return {"context": context, "choices": list(choices["text"]), "label": label}


def _arc(row: Row) -> Row:
    return _lettered(row, _asked(row["question"]))


def _openbookqa(row: Row) -> Row:
    return _lettered(row, row["question_stem"])


def _piqa(row: Row) -> Row:
    choices = [row["sol1"], row["sol2"]]
    return {"context": _asked(row["goal"]), "choices": choices, "label": row["label"]}


def _boolq(row: Row) -> Row:
    context = f"{row['passage']}\n{_asked(row['question'] + '?')}"
    return {"context": context, "choices": ["no", "yes"], "label": int(row["label"])}


def _hellaswag(row: Row) -> Row:
    def cleaned(text: str) -> str:
        """Without the marks that WikiHow's pages have left."""
        text = text.strip().replace(" [title]", ". ")
        return re.sub(r"\[.*?\]", "", text).replace("  ", " ")

    context = f"{row['activity_label']}: {row['ctx_a']} {row['ctx_b'].capitalize()}"
    choices = [cleaned(ending) for ending in row["endings"]]
    return {"context": cleaned(context), "choices": choices, "label": int(row["label"])}


def _winogrande(row: Row) -> Row:
    before, _, after = row["sentence"].partition("_")
    contexts = [before + row[name] for name in ("option1", "option2")]
    label = int(row["answer"]) - 1
    return {"contexts": contexts, "continuation": after.strip(), "label": label}


def _lambada(row: Row) -> Row:
    context, _, last = row["text"].rpartition(" ")
    return {"context": context, "continuation": last}


def _blimp(row: Row) -> Row:
    pair = {name: row[f"sentence_{name}"] for name in ("good", "bad")}
    return {**pair, "paradigm": row["UID"]}


TASKS = {
    "arc_easy": Task("allenai/ai2_arc", "ARC-Easy", "test", _arc),
    "arc_challenge": Task("allenai/ai2_arc", "ARC-Challenge", "test", _arc),
    "piqa": Task("baber/piqa", None, "validation", _piqa),
    "openbookqa": Task("allenai/openbookqa", "main", "test", _openbookqa, ("openbook_qa", "obqa")),
    "boolq": Task("aps/super_glue", "boolq", "validation", _boolq, normalised=False),
    "hellaswag": Task("Rowan/hellaswag", None, "validation", _hellaswag),
    "winogrande": Task(
        "allenai/winogrande", "winogrande_xl", "validation", _winogrande, normalised=False
    ),
    "lambada_openai": Task(
        "EleutherAI/lambada_openai", "default", "test", _lambada, ("lambada",), normalised=False
    ),
    "blimp": Task("nyu-mll/blimp", None, "train", _blimp, normalised=False),
}


def task_name(name: object) -> str:
    """The name of a task in the table, from that or one of its others.

    Raises:
        ValueError: it is none; the message names all.
    """
    known = {other: task for task, row in TASKS.items() for other in (task, *row.others)}
    check_name(name, known, "task", "tasks")
    return known[str(name)]


def examples_of(tasks: Any, data: str | os.PathLike[str] | None) -> dict[str, list[Example]]:
    """The examples of tasks, by their names.

    Args:
        tasks: a name, names, or a mapping from names to files or rows.
        data: folder with a file `NAME.jsonl` for each name; None: the Hub.

    Raises:
        ValueError: an unknown name, a row that is no example, or none at all.
        OSError: a file is missing, or the Hub cannot be reached.
    """
    if isinstance(tasks, Mapping):
        if data is not None:
            raise ValueError(
                "data is for tasks that are given by name; these have their rows already: leave it out."
            )
        sources = {str(name): source for name, source in tasks.items()}
    else:
        names = [tasks] if isinstance(tasks, str) else tasks
        if not isinstance(names, Iterable) or isinstance(names, bytes):
            raise ValueError(
                f"tasks is {shortened(tasks)}; wanted names of tasks ({', '.join(TASKS)}), or a "
                "mapping from names to files or rows."
            )
        sources = dict.fromkeys(map(task_name, names))
        if data is not None:
            sources = {name: _file(Path(data), name) for name in sources}
    if not sources:
        raise ValueError(f"no tasks were given; wanted some of {', '.join(TASKS)}.")
    return {name: _examples(name, source) for name, source in sources.items()}


def _file(folder: Path, name: str) -> Path:
    names = [f"{other}.jsonl" for other in (name, *TASKS[name].others)]
    found = next((folder / other for other in names if (folder / other).exists()), None)
    if found is None:
        there = ", ".join(sorted(path.name for path in folder.glob("*.jsonl"))) or "no .jsonl file"
        raise FileNotFoundError(
            f"{folder} has no {' or '.join(names)} for task '{name}'; it has {there}."
        )
    return found


def _examples(name: str, source: Any) -> list[Example]:
    """The examples of one task: from a file, from rows, or from the Hub (None)."""
    place = f"task '{name}', example {{}}"
    if source is None:
        rows: Iterable[Any] = _hub_rows(TASKS[name])
    elif isinstance(source, str | os.PathLike):
        if not Path(source).is_file():
            raise FileNotFoundError(f"no such file: {source}, which is to hold task '{name}'.")
        rows, place = read_rows(Path(source), ()), f"{source}, example {{}}"
    elif isinstance(source, Iterable) and not isinstance(source, Mapping | bytes):
        rows = source
    else:
        raise ValueError(
            f"task '{name}' is {shortened(source)}; wanted a .jsonl file, or a list of rows."
        )
    examples = [
        example_of(_in_layout(name, row), place.format(number))
        for number, row in enumerate(rows, start=1)
    ]
    if not examples:
        raise ValueError(f"task '{name}' has no examples.")
    kinds = {(example.label is None, bool(example.lengths)) for example in examples}
    if len(kinds) > 1:
        raise ValueError(
            f"task '{name}' has rows of different layouts; wanted one in all of them. Make two tasks."
        )
    return examples


def _in_layout(name: str, row: Any) -> Any:
    """A row in one of our layouts; one that a known task has on the Hub is converted."""
    known = next((task for key, task in TASKS.items() if name in (key, *task.others)), None)
    if known is None or not isinstance(row, Mapping):
        return row
    fields = layout_of(row)
    if fields is not None and all(
        isinstance(row[name], str | int | list | tuple) for name in fields
    ):
        return row
    try:
        return known.convert(row)
    except (KeyError, ValueError, TypeError, AttributeError):
        return row  # which is told as what it is


def _hub_rows(task: Task) -> Sequence[Any]:
    try:
        import datasets
    except ImportError as error:
        raise ImportError(
            "tasks of the Hub need the package datasets: pip install 'hf_sparse[train]'; files do not."
        ) from error
    configs: Sequence[str | None] = [task.config]
    if task.convert is _blimp:
        configs = datasets.get_dataset_config_names(task.path)
    return [
        row
        for config in configs
        for row in datasets.load_dataset(task.path, config, split=task.split)
    ]
