"""evaluate_choices against lm-evaluation-harness: SmolLM2-135M on the same examples, figure by figure.

    python benchmarks/harness_agreement.py --data FOLDER --limit 24

FOLDER holds arc_easy.jsonl, piqa.jsonl, lambada.jsonl, winogrande.jsonl and blimp.jsonl in the layouts
of docs/evaluation.md. Their rows are written back as the data sets on the Hub have them, so that the
harness's own tasks make the prompts. Needs `pip install lm-eval`.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # help and wrong usage need no slow import
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--data", type=Path, required=True, help="folder with the tasks' files")
    parser.add_argument("--limit", type=int, default=24, help="examples of each task (default 24)")
    options = parser.parse_args()

from real_models import dense_smollm2, machine
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils.logging import disable_progress_bar

import hf_sparse
from hf_sparse.counts import format_table

try:
    import datasets
    import lm_eval
    from lm_eval.models.huggingface import HFLM
except ImportError as error:
    raise SystemExit("lm-eval is needed: pip install lm-eval") from error

_LETTERS = "ABCDEFGH"
_PARADIGM = "adjunct_island"
_MEASURES = ("acc", "acc_norm", "perplexity")


def asked(row: dict[str, Any]) -> str:
    """The question of a context."""
    return str(row["context"]).removeprefix("Question: ").removesuffix("\nAnswer:")


def arc_easy(row: dict[str, Any]) -> dict[str, Any]:
    letters = list(_LETTERS[: len(row["choices"])])
    choices = {"text": row["choices"], "label": letters}
    return {"question": asked(row), "choices": choices, "answerKey": letters[row["label"]]}


def piqa(row: dict[str, Any]) -> dict[str, Any]:
    first, second = row["choices"]
    return {"goal": asked(row), "sol1": first, "sol2": second, "label": row["label"]}


def lambada_openai(row: dict[str, Any]) -> dict[str, Any]:
    return {"text": f"{row['context']} {row['continuation']}"}


def winogrande(row: dict[str, Any]) -> dict[str, Any]:
    (before, first), (_, second) = (context.rsplit(" ", 1) for context in row["contexts"])
    sentence = f"{before} _ {row['continuation']}"
    answer = str(row["label"] + 1)
    return {"sentence": sentence, "option1": first, "option2": second, "answer": answer}


def blimp(row: dict[str, Any]) -> dict[str, Any]:
    pair = {f"sentence_{name}": row[name] for name in ("good", "bad")}
    return {**pair, "UID": row["paradigm"]}


# Ours, the harness's name, the file, and how a row is written back.
TASKS: list[tuple[str, str, str, Any]] = [
    ("arc_easy", "arc_easy", "arc_easy.jsonl", arc_easy),
    ("piqa", "piqa", "piqa.jsonl", piqa),
    ("lambada_openai", "lambada_openai", "lambada.jsonl", lambada_openai),
    ("winogrande", "winogrande", "winogrande.jsonl", winogrande),
    ("blimp", f"blimp_{_PARADIGM}", "blimp.jsonl", blimp),
]


def rows_of(file: Path, back: Any, limit: int) -> list[dict[str, Any]]:
    """The first rows of a file, as the Hub has them."""
    rows = [json.loads(line) for line in file.read_text().splitlines() if line.strip()]
    rows = [row for row in rows if row.get("paradigm", _PARADIGM) == _PARADIGM]
    return [back(row) for row in rows[:limit]]


def by_harness(model: Any, task: str, rows: list[dict[str, Any]]) -> dict[str, float]:
    """The figures of the harness, whose data set these rows become."""
    split = datasets.Dataset.from_list(rows)
    every = datasets.DatasetDict(dict.fromkeys(("train", "validation", "test"), split))
    load, datasets.load_dataset = datasets.load_dataset, lambda *_, **__: every
    try:
        found = lm_eval.simple_evaluate(model=model, tasks=[task], bootstrap_iters=0)
    finally:
        datasets.load_dataset = load
    return {name.split(",")[0]: value for name, value in found["results"][task].items()}


def main() -> None:
    """Print a row for each measure of each task."""
    disable_progress_bar()
    print(machine(), f"lm-eval {lm_eval.__version__}", sep="; ")
    with tempfile.TemporaryDirectory() as folder:
        source = dense_smollm2(Path(folder))
        model = AutoModelForCausalLM.from_pretrained(source)
        tokenizer = AutoTokenizer.from_pretrained(source)
    harness = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=8)
    table = []
    for ours, theirs, file, back in TASKS:
        rows = rows_of(options.data / file, back, options.limit)
        [score] = hf_sparse.evaluate_choices(model, tokenizer, {ours: rows}, batch_size=8).scores
        found = by_harness(harness, theirs, rows)
        for measure in _MEASURES:
            value = getattr(score, measure)
            if value is not None:
                row = (f"{ours}, {measure}", f"{len(rows)}", f"{value:.4f}")
                table.append((*row, f"{found[measure]:.4f}"))
    print(format_table(("task", "examples", "evaluate_choices", "lm-eval"), table))


if __name__ == "__main__":
    main()
