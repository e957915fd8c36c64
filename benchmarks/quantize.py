"""Zeros and few bits together on SmolLM2-135M: perplexity, bits a weight, time.

    python benchmarks/quantize.py                  # text: prose that Python ships
    python benchmarks/quantize.py --data FOLDER    # WikiText-2 and C4, see real_models.texts
    python benchmarks/quantize.py --table          # the results so far as Markdown

Results go into a file of JSON lines; groups that it has are skipped, so that a run can be stopped and
started again. A group prunes once, and rounds copies of what that leaves: so "then" is one after the
other, and what has bits and zeros in one word is `prune_` with bits. Models are pruned and rounded in
float32, and measured in bfloat16, the dense one too: CPUs with its products are several times faster.
"""

from __future__ import annotations

import argparse
import copy
import json
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # help and wrong usage need no slow import
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--data", type=Path, help="folder with WikiText-2 and C4 texts")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/quantize.jsonl"))
    parser.add_argument("--table", action="store_true", help="print what is there and stop")
    parser.add_argument("--only", nargs="+", metavar="GROUP", help='such as "alps 2:4"')
    parser.add_argument("--num-samples", type=int, default=64, help="calibration windows")
    parser.add_argument("--max-windows", type=int, default=32, help="windows of each text")
    options = parser.parse_args()

import torch
from real_models import dense_smollm2, machine, texts
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.utils.logging import disable_progress_bar

import hf_sparse
from hf_sparse import SparsityConfig

WINDOW = 512
INT8: dict[str, Any] = {"bits": 8}
INT4: dict[str, Any] = {"bits": 4, "group_size": 32}
EMBEDDINGS: dict[str, Any] = {"embedding_bits": 8}


@dataclass(frozen=True)
class Rounding:
    """What `quantize_` does to a copy.

    Attributes:
        name: for the table.
        grid: its arguments.
        method: of rounding; None: no rounding.
        data: whether it is given batches.
    """

    name: str
    grid: dict[str, Any]
    method: str = "nearest"
    data: bool = False


ALONE = Rounding("", {})
AFTER = (
    ALONE,
    Rounding("then int4 g32, nearest", INT4),
    Rounding("then int4 g32, gptq", INT4, "gptq", data=True),
)
JOINT = (ALONE, Rounding("int8 embeddings", EMBEDDINGS))


@dataclass(frozen=True)
class Group:
    """A model that is pruned once, and what is rounded of it.

    Attributes:
        method: of pruning; "dense": none.
        config: of pruning.
        roundings: of copies.
    """

    method: str
    config: SparsityConfig | None
    roundings: tuple[Rounding, ...]

    @property
    def name(self) -> str:
        """What `--only` takes."""
        if self.config is None:
            return self.method
        bits = (
            "" if self.config.bits is None else f" int{self.config.bits} g{self.config.group_size}"
        )
        return f"{self.method} {self.config.pattern}{bits}"


def groups() -> Iterator[Group]:
    """All groups, those that say most first."""
    dense = (
        ALONE,
        Rounding("int8", INT8),
        Rounding("int8, embeddings too", {**INT8, **EMBEDDINGS}),
        Rounding("int4 g32, nearest", INT4),
        Rounding("int4 g32, gptq", INT4, "gptq", data=True),
    )
    yield Group("dense", None, dense)
    for method in ("alps", "sparsegpt"):
        yield Group(method, SparsityConfig("2:4", **INT4), JOINT)
        yield Group(method, SparsityConfig("2:4"), AFTER)
    yield Group("wanda", SparsityConfig("2:4", **INT4), (ALONE,))
    yield Group("wanda", SparsityConfig("2:4"), AFTER)


def main(options: argparse.Namespace) -> None:
    """Fill the file, and print it."""
    disable_progress_bar()
    if not options.table:
        with tempfile.TemporaryDirectory() as temporary:
            fill(options, dense_smollm2(Path(temporary) / "SmolLM2"))
    print_table(read(options.out))


def fill(options: argparse.Namespace, folder: Path) -> None:
    """Measure the groups that are missing."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    calibration, held_out = texts(options.data)
    batches = hf_sparse.calibration_batches(
        tokenizer, calibration, num_samples=options.num_samples, window=WINDOW
    )
    done = {row["group"] for row in read(options.out)}
    for group in groups():
        if group.name in done or (options.only and group.name not in options.only):
            continue
        rows = []
        for row, model in measured(group, folder, batches):
            measured_one = copy.deepcopy(model).to(torch.bfloat16)
            row["perplexity"] = {
                name: hf_sparse.perplexity(
                    measured_one, tokenizer, documents, WINDOW, max_windows=options.max_windows
                )
                for name, documents in held_out.items()
            }
            row |= {"windows": options.max_windows, "calibration": options.num_samples}
            rows.append({**row, "machine": machine()})
            print(row, flush=True)
        with options.out.open("a") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)


def measured(
    group: Group, folder: Path, batches: list[dict[str, torch.Tensor]]
) -> Iterator[tuple[dict[str, Any], PreTrainedModel]]:
    """Each model of a group, with what is known of it."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    seconds, notes = 0.0, ()
    if group.config is not None:
        report = hf_sparse.prune_(model, group.config, group.method, batches)
        seconds, notes = report.seconds or 0.0, report.notes
    for rounding in group.roundings:
        row = {"group": group.name, "rounding": rounding.name, "seconds": seconds, "notes": notes}
        if not rounding.grid:
            yield row, model
            continue
        rounded = copy.deepcopy(model)
        found = hf_sparse.quantize_(
            rounded,
            **rounding.grid,
            method=rounding.method,
            batches=batches if rounding.data else None,
        )
        row |= {"bits": found.bits, "error": found.error, "rounding_seconds": found.seconds}
        yield row, rounded


def read(file: Path) -> list[dict[str, Any]]:
    """The lines of the results."""
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def print_table(rows: list[dict[str, Any]]) -> None:
    """Print the results as Markdown, in the order of the groups."""
    if not rows:
        print("no results yet")
        return
    print("\n".join(dict.fromkeys(row["machine"] for row in rows)), end="\n\n")
    names = list(rows[0]["perplexity"])
    head = ["model", *(f"perplexity {name}" for name in names), "bits a weight", "windows"]
    print("| " + " | ".join(head) + " |\n|" + "---|" * len(head))
    for row in rows:
        figures = [f"{row['perplexity'][name]:.2f}" for name in names]
        bits = f"{row['bits']:.2f}" if "bits" in row else "-"
        label = " ".join(filter(None, (row["group"], row["rounding"])))
        print("| " + " | ".join([label, *figures, bits, str(row["windows"])]) + " |")


if __name__ == "__main__":
    main(options)
