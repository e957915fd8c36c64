"""The tasks that are known by name: their prompts, their files, and rows that are no examples."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from hf_sparse.zeroshot.examples import Example
from hf_sparse.zeroshot.tasks import TASKS, examples_of, task_name

# A row of each data set on the Hub, and what is asked: contexts and continuations as
# lm-evaluation-harness 0.4.13 writes them.
LETTERS = {"text": ["ice", "fire"], "label": ["A", "B"]}
HUB: dict[str, tuple[dict[str, Any], Example]] = {
    "arc_easy": (
        {"question": "What is cold?", "choices": LETTERS, "answerKey": "A"},
        Example(
            (
                ("Question: What is cold?\nAnswer:", " ice"),
                ("Question: What is cold?\nAnswer:", " fire"),
            ),
            0,
            (3, 4),
        ),
    ),
    "piqa": (
        {"goal": "To cool", "sol1": "use ice", "sol2": "burn it", "label": 1},
        Example(
            (
                ("Question: To cool\nAnswer:", " use ice"),
                ("Question: To cool\nAnswer:", " burn it"),
            ),
            1,
            (7, 7),
        ),
    ),
    "openbookqa": (
        {"question_stem": "Cold is", "choices": LETTERS, "answerKey": " B"},
        Example((("Cold is", " ice"), ("Cold is", " fire")), 1, (3, 4)),
    ),
    "boolq": (
        {"passage": "Ice is cold.", "question": "is ice cold", "label": 1},
        Example(
            (
                ("Ice is cold.\nQuestion: is ice cold?\nAnswer:", " no"),
                ("Ice is cold.\nQuestion: is ice cold?\nAnswer:", " yes"),
            ),
            1,
            (2, 3),
        ),
    ),
    "hellaswag": (
        {
            "activity_label": "Cooling",
            "ctx_a": "A man [header] has ice.",
            "ctx_b": "he",
            "endings": ["eats  it [title] Then more.", "runs.", "a", "b"],
            "label": "1",
        },
        Example(
            tuple(
                ("Cooling: A man has ice. He", f" {ending}")
                for ending in ("eats it. Then more.", "runs.", "a", "b")
            ),
            1,
            (19, 5, 1, 1),
        ),
    ),
    "winogrande": (
        {
            "sentence": "Ann saw Eve, so _ waved at her.",
            "option1": "Ann",
            "option2": "Eve",
            "answer": "2",
        },
        Example(
            (
                ("Ann saw Eve, so Ann", " waved at her."),
                ("Ann saw Eve, so Eve", " waved at her."),
            ),
            1,
        ),
    ),
    "lambada_openai": (
        {"text": "She took the ice"},
        Example((("She took the", " ice"),), None),
    ),
    "blimp": (
        {"sentence_good": "She runs.", "sentence_bad": "She run.", "UID": "agreement"},
        Example((("", " She runs."), ("", " She run.")), 0, group="agreement"),
    ),
}


@pytest.mark.parametrize("name", [name for name in TASKS if name != "arc_challenge"])
def test_a_row_of_the_hub_is_asked_as_the_harness_asks_it(name: str) -> None:
    row, expected = HUB[name]
    assert examples_of({name: [row]}, None) == {name: [expected]}


def test_examples_come_from_the_hub_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def load_dataset(path: str, config: str | None, split: str) -> list[Any]:
        asked.append((path, config, split))
        return [HUB["blimp" if path.endswith("blimp") else "piqa"][0]]

    fake = SimpleNamespace(
        load_dataset=load_dataset, get_dataset_config_names=lambda path: ["one", "two"]
    )
    monkeypatch.setitem(sys.modules, "datasets", fake)
    found = examples_of(["piqa", "blimp"], None)
    assert [len(examples) for examples in found.values()] == [1, 2]
    assert asked == [
        ("baber/piqa", None, "validation"),
        ("nyu-mll/blimp", "one", "train"),
        ("nyu-mll/blimp", "two", "train"),
    ]
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ImportError, match="need the package datasets: pip install"):
        examples_of("piqa", None)


def test_files_are_found_under_the_names_of_a_task(tmp_path: Path) -> None:
    row = {"context": "a", "choices": ["b", "c"], "label": 0}
    (tmp_path / "openbook_qa.jsonl").write_text(json.dumps(row) + "\n\n")
    (tmp_path / "own.jsonl").write_text(json.dumps(row))
    [[example]] = examples_of(["obqa"], tmp_path).values()
    assert example == Example((("a", " b"), ("a", " c")), 0, (1, 1))
    assert list(examples_of({"any name": tmp_path / "own.jsonl"}, None)) == ["any name"]
    with pytest.raises(
        FileNotFoundError, match=r"no arc_easy\.jsonl for task 'arc_easy'; it has op"
    ):
        examples_of("arc_easy", tmp_path)
    with pytest.raises(FileNotFoundError, match="no such file"):
        examples_of({"x": tmp_path / "none.jsonl"}, None)
    with pytest.raises(ValueError, match="leave it out"):
        examples_of({"x": [row]}, tmp_path)


def test_unknown_tasks_are_refused() -> None:
    assert task_name("lambada") == "lambada_openai"
    with pytest.raises(ValueError, match=r"unknown task 'arc_esay'.*Did you mean 'arc_easy'\?"):
        examples_of(["piqa", "arc_esay"], None)
    for wrong in (3, None, b"piqa"):
        with pytest.raises(ValueError, match="wanted names of tasks"):
            examples_of(wrong, None)
    with pytest.raises(ValueError, match="no tasks were given"):
        examples_of([], None)


CHOICES = {"context": "a", "choices": ["b", "c"], "label": 0}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"text": "a"}, "has text; wanted the fields context, choices, label; or contexts"),
        ("a", "has 'a'; wanted the fields"),
        ({**CHOICES, "label": 2}, "label is 2; wanted the index of the right one of 2, 0 to 1"),
        ({**CHOICES, "label": "0"}, "label is '0'; wanted the index"),
        ({**CHOICES, "label": True}, "label is True; wanted the index"),
        ({**CHOICES, "choices": ["b"]}, "wanted a list of two texts or more"),
        ({**CHOICES, "choices": "bc"}, "wanted a list of two texts or more"),
        ({**CHOICES, "choices": ["b", ""]}, r"choices\[1\] is ''; wanted a text"),
        ({**CHOICES, "context": 3}, "context is 3; wanted a text"),
        ({"good": "a", "bad": None}, "bad is None; wanted a text"),
        ({"context": "a", "continuation": ""}, "continuation is ''; wanted a text"),
    ],
)
def test_rows_that_are_no_examples_are_told(row: Any, message: str) -> None:
    with pytest.raises(ValueError, match=f"task 'mine', example 2.*{message}"):
        examples_of({"mine": [CHOICES, row]}, None)


def test_a_task_has_one_layout_and_at_least_one_row() -> None:
    with pytest.raises(ValueError, match="rows of different layouts"):
        examples_of({"mine": [CHOICES, {"good": "a", "bad": "b"}]}, None)
    with pytest.raises(ValueError, match="'mine' has no examples"):
        examples_of({"mine": []}, None)
    with pytest.raises(ValueError, match=r"wanted a \.jsonl file, or a list of rows"):
        examples_of({"mine": 3}, None)
