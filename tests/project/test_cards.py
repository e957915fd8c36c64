"""The cards of model_cards/ are what the results of our own models give."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard

from tests.support.processes import ROOT

RESULTS = sorted((ROOT / "benchmarks/results/own_models").glob("*.json"))
CARDS = ROOT / "model_cards"


@pytest.fixture
def cards(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The script that renders them."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import cards

    return cards


@pytest.mark.parametrize("file", RESULTS, ids=lambda file: file.stem)
def test_a_card_is_what_its_results_give(file: Path, cards: Any) -> None:
    result = json.loads(file.read_text())
    text = (CARDS / f"{file.stem}.md").read_text()
    assert cards.card(result) == text, "make cards"
    data = ModelCard(text).data
    assert data.library_name == "transformers"
    assert "hf_sparse" in data.tags
    assert "None were measured" not in text
    zeros = sum(count["zeros"] for count in result["counts"])
    assert f"zeros | {zeros:,} of" in text or "what is left of the blocks" in text


@pytest.mark.skipif(not RESULTS, reason="no results of our own models are kept")
def test_every_result_has_its_card() -> None:
    assert {file.stem for file in RESULTS} <= {file.stem for file in CARDS.glob("*.md")}
