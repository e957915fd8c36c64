"""What the cards of older checkpoints tell: before `config.json` had an entry, they alone knew.

Their table of facts had a row "method" (of later steps "then") and rows of options below it;
metrics had a section, as they have today.
"""

from __future__ import annotations

import re
from pathlib import Path

from hf_sparse.checkpoint.card import CARD_NAME, METRICS_TITLE, OUR_FACT
from hf_sparse.provenance.values import Metric, Step

# A row that is longer was not written by us.
_LONGEST_ROW = 500
_STEP_ROW = re.compile(r"\| (method|then|option \S+) \| (.+) \|")
_METRIC_ROW = re.compile(r"\| (.+) \| (not measured|\S+) \| (\S+) \|")


def read_steps(folder: Path) -> tuple[Step, ...]:
    """The steps that the old card in a folder tells; none if there is no card of hf_sparse."""
    steps: list[Step] = []
    tables = re.split(r"\n\s*\n", _card(folder).split(METRICS_TITLE)[0])
    tables = [table for table in tables if f"\n| {OUR_FACT} |" in table]
    for row_text in tables[-1].split("\n") if tables else ():
        if len(row_text) > _LONGEST_ROW or (row := _STEP_ROW.fullmatch(row_text)) is None:
            continue
        title, value = row.groups()
        if title in ("method", "then"):
            steps.append(Step(value))
        elif steps:
            option = (title.removeprefix("option "), value)
            steps[-1] = Step(steps[-1].method, (*steps[-1].options, option))
    return tuple(step for step in steps if step.method != "not recorded")


def read_metrics(folder: Path) -> tuple[Metric, ...]:
    """The metrics that the card in a folder tells; none if there is no card of hf_sparse."""
    metrics = []
    for line in _card(folder).partition(METRICS_TITLE)[2].partition("\n## ")[0].splitlines():
        if (row := _METRIC_ROW.fullmatch(line)) is None:
            continue
        name, dense, sparse = row.groups()
        try:
            known = None if dense == "not measured" else float(dense)
            metrics.append(Metric(name, float(sparse), known))
        except ValueError:  # the table's head
            continue
    return tuple(metrics)


def _card(folder: Path) -> str:
    file = folder / CARD_NAME
    text = file.read_text(encoding="utf-8", errors="replace") if file.is_file() else ""
    return text if OUR_FACT in text else ""
