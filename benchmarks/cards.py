"""Render the cards of model_cards/ from what own_models.py has written down of each model.

    python benchmarks/cards.py            # or: make cards
    python benchmarks/cards.py --check    # tells which differ, and exits with 1 if any does

A result file holds the checkpoint's `config.json` (with its provenance and figures), exact counts of
its weights, and how they are stored: all that the card of the checkpoint was made of.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # help and wrong usage need no slow import
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--results", type=Path, default=Path("benchmarks/results/own_models"))
    parser.add_argument("--out", type=Path, default=Path("model_cards"))
    parser.add_argument("--check", action="store_true", help="write nothing")
    options = parser.parse_args()

import hf_sparse
from hf_sparse.checkpoint.bounds import Size
from hf_sparse.checkpoint.card import Card
from hf_sparse.checkpoint.described import class_named, describe
from hf_sparse.checkpoint.overview import Overview, patterns_by_weight
from hf_sparse.checkpoint.quantizer import SparseCheckpointConfig
from hf_sparse.counts import SparsityReport, TensorSparsity
from hf_sparse.provenance.entry import ENTRY, from_dict
from hf_sparse.structure.targets import Targets

# No checkpoint bounds the model that its config describes: the result files are our own.
ANY_SIZE = Size(10**6, 10**12)


def written_down(folder: Path, machine: str) -> str:
    """What the card of a checkpoint is made of, as JSON text.

    Args:
        folder: of the checkpoint.
        machine: that its figures were measured on.

    Raises:
        ValueError: a card made of this is not the checkpoint's own.
    """
    values = json.loads((folder / "config.json").read_text())
    found = hf_sparse.inspect_checkpoint(folder)
    stored = [
        f"{kind}, {found.bits[name]}-bit codes" if name in found.bits else kind
        for name, kind in found.formats.items()
    ]
    result = {
        "machine": machine,
        "config": values,
        "counts": [asdict(count) for count in found.report.tensors],
        "parameters": found.report.parameters,
        "other_zeros": found.report.other_zeros,
        "formats": dict(sorted(Counter(stored).items())),
    }
    text = json.dumps(result, indent=1) + "\n"
    own = (folder / "README.md").read_text().partition("\n## Pictures\n")[0]
    if card(json.loads(text)).strip() != own.strip():
        raise ValueError(
            f"{folder}: README.md is not the card that config.json and the counts give."
        )
    return text


def card(result: dict[str, Any]) -> str:
    """The card of a result file.

    Args:
        result: as `written_down` has it.
    """
    values, file = result["config"], Path("config.json")
    family, kind, _ = class_named(values, file)
    model = describe(values, kind, family, file, ANY_SIZE)
    config = SparseCheckpointConfig(**values["quantization_config"]).sparsity
    known = from_dict(values[ENTRY])
    counts = [TensorSparsity(**{**c, "shape": tuple(c["shape"])}) for c in result["counts"]]
    numbers = {name: result[name] for name in ("parameters", "other_zeros")}
    measured = SparsityReport(tuple(counts), str(config.pattern), **numbers)
    patterns = patterns_by_weight(model, Targets.of(model, config), known.steps)
    zeros = Overview.of(measured, (), patterns)
    return Card(model, config, zeros, result["formats"], known).text()


def main(options: argparse.Namespace) -> None:
    """Write every card, or tell which are old."""
    files = sorted(options.results.glob("*.json"))
    if not files:
        sys.exit(f"{options.results} has no result files: make them by benchmarks/own_models.py")
    cards = {f"{file.stem}.md": card(json.loads(file.read_text())) for file in files}
    there = {file.name: file.read_text() for file in sorted(options.out.glob("*.md"))}
    if options.check:
        wrong = sorted(name for name in {*cards, *there} if cards.get(name) != there.get(name))
        sys.exit(
            f"these differ from their results (make cards): {', '.join(wrong)}" if wrong else 0
        )
    options.out.mkdir(exist_ok=True)
    for name, text in cards.items():
        (options.out / name).write_text(text)
        print(options.out / name)


if __name__ == "__main__":
    main(options)
