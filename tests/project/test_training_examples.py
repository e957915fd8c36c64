"""The training examples, each on a tiny model and tiny data; each leaves a sparse model."""

from __future__ import annotations

import importlib
import json
import random
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest
from transformers import (
    AlbertConfig,
    AutoModelForCausalLM,
    AutoModelForMultipleChoice,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
)

import hf_sparse
from tests.support.closeness import nearly_same
from tests.support.tiny_models import CONFIGS, prose, tiny_model, tiny_tokenizer

EXAMPLES = Path(__file__).parents[2] / "examples"
WORDS = ("good bad fine poor great awful " * 2).split()


@pytest.fixture(autouse=True)
def examples_on_the_path(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    importlib.import_module("datasets").config.HF_DATASETS_CACHE = tmp_path / "cache"


def run(example: str, *arguments: Any) -> Any:
    module = importlib.import_module(example)
    return module.main([str(argument) for argument in arguments])


def start_model(folder: Path, family: str) -> Path:
    tiny_model(family).save_pretrained(folder / "dense")
    tiny_tokenizer().save_pretrained(folder / "dense")
    return folder / "dense"


def write_lines(file: Path, rows: list[dict]) -> Path:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def common(folder: Path, family: str) -> list[Any]:
    return [
        *("--model_name_or_path", start_model(folder, family)),
        *("--output_dir", folder / "out"),
        *("--per_device_train_batch_size", 4),
        *("--learning_rate", 1e-3),
        *("--report_to", "none"),
        *("--use_cpu", "true"),
        *("--disable_tqdm", "true"),
        *("--save_strategy", "no"),
        "--smoke",
    ]


def labelled(count: int, regression: bool = False) -> list[dict]:
    chooser = random.Random(count)
    rows = []
    for _ in range(count):
        words = chooser.choices(WORDS, k=6)
        share = sum(word in ("good", "fine", "great") for word in words) / 6
        rows.append(
            {"sentence": " ".join(words), "label": share if regression else int(share > 0.5)}
        )
    return rows


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "arguments", "kind"),
    [
        pytest.param(
            "bert",
            ["--sparsity", 0.6],
            "SparseBertForSequenceClassification",
            marks=pytest.mark.slow,
        ),
        ("bert", ["--pattern", "2:4", "--distil", 1.0], "SparseBertForSequenceClassification"),
        (
            "albert",
            ["--pattern", "block:4x1", "--sparsity", 0.5, "--optimizer", "movement"],
            "SparseAlbertForSequenceClassification",
        ),
    ],
)
def test_run_glue(family: str, arguments: list, kind: str, tmp_path: Path, capsys: Any) -> None:
    files = [
        write_lines(tmp_path / f"{name}.jsonl", labelled(40 + i)) for i, name in enumerate("tv")
    ]
    scores = run(
        "run_glue",
        *common(tmp_path, family),
        *("--train_file", files[0], "--validation_file", files[1]),
        *arguments,
    )
    assert set(scores) == {"dense", "sparse"}
    assert set(scores["sparse"]) == {"accuracy", "matthews"}
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    assert type(model).__name__ == kind
    promised = 0.6 if arguments[1] == 0.6 else 0.5
    assert hf_sparse.measure_sparsity(model).sparsity == pytest.approx(promised, abs=1e-3)
    card = (tmp_path / "out" / "README.md").read_text()
    assert ("movement" if "movement" in arguments else "SparseAdamW") in card
    assert f"{scores['sparse']['accuracy']:.2f}"[:4] in card
    printed = capsys.readouterr().out
    assert "dense" in printed
    assert "sparse" in printed


@pytest.mark.slow
def test_run_glue_regression_and_magnitude(tmp_path: Path) -> None:
    files = [
        write_lines(tmp_path / f"{name}.jsonl", labelled(40 + i, regression=True))
        for i, name in enumerate("tv")
    ]
    data = ("--train_file", files[0], "--validation_file", files[1])
    wanted = ("--sparsity", 0.5, "--optimizer", "magnitude")
    scores = run("run_glue", *common(tmp_path, "bert"), *data, *wanted)
    assert set(scores["sparse"]) == {"pearson", "spearman"}
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    assert model.config.num_labels == 1


def test_run_glue_dense_only(tmp_path: Path) -> None:
    files = [
        write_lines(tmp_path / f"{name}.jsonl", labelled(40 + i)) for i, name in enumerate("tv")
    ]
    data = ("--train_file", files[0], "--validation_file", files[1], "--optimizer", "none")
    assert set(run("run_glue", *common(tmp_path, "bert"), *data)) == {"dense"}


@pytest.mark.slow
def test_run_clm(tmp_path: Path) -> None:
    for name, text in (("train", prose()[:30_000]), ("valid", prose()[30_000:40_000])):
        (tmp_path / f"{name}.txt").write_text(text)
    scores = run(
        "run_clm",
        *common(tmp_path, "gpt2"),
        *("--train_file", tmp_path / "train.txt", "--validation_file", tmp_path / "valid.txt"),
        *("--block_size", 32, "--sparsity", 0.5),
    )
    assert scores["sparse"]["perplexity"] < 260
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert type(model).__name__ == "SparseGPT2LMHeadModel"
    assert hf_sparse.measure_sparsity(model).sparsity == pytest.approx(0.5, abs=1e-4)


@pytest.mark.slow
def test_run_multiple_choice(tmp_path: Path) -> None:
    chooser = random.Random(0)
    rows = [
        {
            "article": " ".join(chooser.choices(WORDS, k=20)),
            "question": "it is _ ." if i % 2 else "what is it",
            "options": chooser.sample(WORDS[:6], 4),
            "answer": chooser.choice("ABCD"),
        }
        for i in range(40)
    ]
    file = write_lines(tmp_path / "race.jsonl", rows)
    scores = run(
        "run_multiple_choice",
        *common(tmp_path, "albert"),
        *("--train_file", file, "--validation_file", file, "--pattern", "2:4"),
    )
    assert 0 <= scores["sparse"]["accuracy"] <= 1
    model = AutoModelForMultipleChoice.from_pretrained(tmp_path / "out")
    assert type(model).__name__ == "SparseAlbertForMultipleChoice"
    assert isinstance(CONFIGS["albert"], AlbertConfig)
    assert hf_sparse.measure_sparsity(model, hf_sparse.SparsityConfig("2:4")).violations == 0


def squad(file: Path, version: int) -> Path:
    context = "The quick brown fox jumps over the lazy dog near the old stone bridge."
    questions = [
        {
            "id": str(i),
            "question": f"Who jumps {i} ?",
            "is_impossible": version == 2 and i % 2 == 1,
            "answers": [{"text": "brown fox", "answer_start": context.index("brown fox")}],
        }
        for i in range(12)
    ]
    article = {"paragraphs": [{"context": context, "qas": questions}]}
    file.write_text(json.dumps({"version": str(version), "data": [article]}))
    return file


@pytest.mark.slow
@pytest.mark.parametrize("version", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_run_qa(version: int, tmp_path: Path) -> None:
    file = squad(tmp_path / "squad.json", version)
    scores = run(
        "run_qa",
        *common(tmp_path, "bert"),
        *("--train_file", file, "--validation_file", file, "--sparsity", 0.5),
        *("--max_seq_length", 48, "--doc_stride", 8),
    )
    assert 0 <= scores["sparse"]["exact_match"] <= scores["sparse"]["f1"] <= 100
    model = AutoModelForQuestionAnswering.from_pretrained(tmp_path / "out")
    assert type(model).__name__ == "SparseBertForQuestionAnswering"


def test_squad_scores_and_targets() -> None:
    module = importlib.import_module("run_qa")
    found = ["The brown fox!", "", "a red fox", ""]
    answers = [["brown fox"], [], ["brown fox", "fox"], ["dog"]]
    scores = module.squad_scores(found, answers)
    assert scores["exact_match"] == 50
    assert scores["f1"] == pytest.approx(100 * (1 + 1 + 2 / 3 + 0) / 4)
    context = "one two three four five six seven eight nine ten " * 6
    rows = {
        "question": ["which"],
        "context": [context],
        "answers": [{"text": ["nine ten"], "answer_start": [context.index("nine ten")]}],
    }
    data = module.QuestionArguments(max_seq_length=24, doc_stride=6)
    cut = module.training_windows(rows, tiny_tokenizer(), data)
    spans = set(zip(cut["start_positions"], cut["end_positions"], strict=True))
    start, end = max(spans)
    tokens = cut["input_ids"][cut["start_positions"].index(start)][start : end + 1]
    assert tiny_tokenizer().decode(tokens).replace(" ", "") == "nineten"
    assert (0, 0) in spans  # windows without the answer


def test_accelerate_loop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "text.txt").write_text(prose()[:20_000])
    arguments = ["--model", start_model(tmp_path, "gpt2"), "--text", tmp_path / "text.txt"]
    arguments += ["--output", tmp_path / "out", "--steps", 20, "--window", 16, "--accumulate", 2]
    arguments += ["--pattern", "block:4x1", "--sparsity", 0.5]
    script = str(EXAMPLES / "accelerate_loop.py")
    monkeypatch.setattr(sys, "argv", [script, *map(str, arguments)])
    runpy.run_path(script, run_name="__main__")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    config = hf_sparse.SparsityConfig("block:4x1", 0.5)
    found = hf_sparse.measure_sparsity(model, config)
    assert found.violations == 0
    assert found.sparsity == pytest.approx(0.5, abs=1e-3)


def test_bad_arguments_are_told_before_anything_is_loaded(tmp_path: Path) -> None:
    arguments = ["--model_name_or_path", "nowhere", "--output_dir", tmp_path]
    with pytest.raises(ValueError, match="needs a sparsity"):
        run("run_glue", *arguments)
    with pytest.raises(ValueError, match="--distil is -1"):
        run("run_glue", *arguments, "--pattern", "2:4", "--distil", -1)
    with pytest.raises(ValueError, match="unknown penalty 'l9'"):
        run("run_glue", *arguments, "--pattern", "2:4", "--penalty", "l9")
    with pytest.raises(ValueError, match="there is no file nowhere"):
        run(
            "run_clm",
            *arguments,
            "--pattern",
            "2:4",
            "--train_file",
            "nowhere",
            "--validation_file",
            "x",
        )
    with pytest.raises(ValueError, match="wanted --dataset_name"):
        run("run_clm", *arguments, "--pattern", "2:4")


@pytest.mark.parametrize(
    ("example", "rows", "message"),
    [
        ("run_glue", [{"words": "a", "label": 1}], "columns are"),
        ("run_glue", [{"sentence": "a b", "label": 1}] * 3, "wanted the classes 0, 1"),
        (
            "run_glue",
            [{"sentence": "a", "label": "x"}, {"sentence": "b", "label": "y"}],
            "labels are",
        ),
        ("run_clm", [{"story": "a"}], "wanted `text`"),
        (
            "run_multiple_choice",
            [{"article": "a", "question": "b", "options": ["c", "d"], "answer": "C"}],
            "letters from A on",
        ),
    ],
)
def test_data_that_do_not_fit_are_refused(
    example: str, rows: list[dict], message: str, tmp_path: Path
) -> None:
    file = write_lines(tmp_path / "rows.jsonl", rows)
    data = ("--train_file", file, "--validation_file", file, "--pattern", "2:4")
    with pytest.raises(ValueError, match=message):
        run(example, *common(tmp_path, "bert"), *data)


@pytest.mark.slow
def test_an_interrupted_run_goes_on(tmp_path: Path) -> None:
    files = [
        write_lines(tmp_path / f"{name}.jsonl", labelled(40 + i)) for i, name in enumerate("tv")
    ]
    arguments = common(tmp_path, "bert")
    arguments[arguments.index("--save_strategy") + 1] = "steps"
    arguments += ["--train_file", files[0], "--validation_file", files[1], "--sparsity", 0.6]
    first = run("run_glue", *arguments, "--save_steps", 5)
    weights = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out").state_dict()
    checkpoint = tmp_path / "out" / "checkpoint-5"
    again = run("run_glue", *arguments, "--resume_from_checkpoint", checkpoint)
    assert again == first
    resumed = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out").state_dict()
    assert all(nearly_same(value, resumed[name]) for name, value in weights.items())


def test_every_example_is_tested() -> None:
    tests = [
        *("project/test_training_examples", "project/test_examples", "test_timing"),
        "project/test_serving",
        *("exporters/test_export", "project/test_slim_example"),
    ]
    folder = Path(__file__).parents[1]
    tested = "".join((folder / f"{name}.py").read_text() for name in tests)
    for file in EXAMPLES.glob("*.py"):
        if "__main__" in file.read_text():  # the others hold what some of these share
            assert file.stem in tested, file
