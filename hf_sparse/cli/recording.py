"""What `eval --record` does: figures go into the config and the card of the measured folder."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from hf_sparse.checkpoint.measured import known_with, record_in_folder
from hf_sparse.provenance.values import Metric, Provenance


def record(options: argparse.Namespace, known: Provenance, metrics: Sequence[Metric]) -> None:
    """Write figures into the folder of the model, and tell where.

    Args:
        options: of `eval`.
        known: of the model that was measured, with the hash of its weights.
        metrics: the figures.
    """
    told = record_in_folder(Path(options.model), known_with(known, metrics))
    if not options.json:
        place = "config.json and its card" if told else "config.json; it has no card of hf_sparse"
        print(f"recorded in {options.model}: {place}")
