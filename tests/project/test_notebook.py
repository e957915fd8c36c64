"""The notebook runs from its first cell to its last, on a tiny model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.support.processes import ROOT
from tests.support.tiny_models import tiny_model, tiny_tokenizer

NOTEBOOK = ROOT / "examples/quickstart.ipynb"
SETTINGS = "SAMPLES, WINDOW, TEXTS = 32, 512, 16"


def test_the_notebook_holds_no_outputs_and_its_code_is_formatted() -> None:
    notebook = json.loads(NOTEBOOK.read_text())
    assert notebook["nbformat"] == 4
    for cell in notebook["cells"]:
        assert not cell.get("outputs")
        assert cell.get("execution_count") is None
        if cell["cell_type"] == "code":
            compile("".join(cell["source"]), "cell", "exec")


@pytest.mark.slow
def test_the_notebook_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nbformat = pytest.importorskip("nbformat", reason="nbformat is not installed")
    nbclient = pytest.importorskip("nbclient", reason="nbclient is not installed")
    for package in ("ipykernel", "matplotlib", "llvmlite"):
        pytest.importorskip(package)
    tiny_model("llama", num_hidden_layers=2, hidden_size=64).save_pretrained(tmp_path / "tiny")
    tiny_tokenizer().save_pretrained(tmp_path / "tiny")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    notebook: Any = nbformat.read(NOTEBOOK, as_version=4)
    first = notebook.cells[1]
    assert SETTINGS in first.source
    first.source = first.source.replace(SETTINGS, "SAMPLES, WINDOW, TEXTS = 4, 32, 2")
    first.source = first.source.replace("HuggingFaceTB/SmolLM2-135M-Instruct", "tiny")
    done = nbclient.NotebookClient(
        notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}}
    ).execute()
    shown = [
        output["data"]
        for cell in done.cells
        for output in cell.get("outputs", [])
        if output.output_type == "execute_result"
    ]
    assert all("<table" in data["text/html"] for data in shown)
    assert "0.5000" in shown[0]["text/html"]
    assert len(shown) == 4
    assert (tmp_path / "report.html").stat().st_size > 10_000
