"""What a notebook shows of an explanation and of an export: one line; `print` shows the rest."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import hf_sparse
from hf_sparse import SparsityConfig
from hf_sparse.runtime.model.explain import Explanation, LayerExplanation
from tests.support.tiny_models import tiny_batches, tiny_model


def test_an_explanation_is_one_line_however_many_layers() -> None:
    layers = tuple(
        LayerExplanation(f"layer.{i}", (8, 4), "2:4", "sparse", 0.5, 100, 2.0, 3.0)
        for i in range(70)
    )
    assert repr(Explanation(layers, 1, 2, "avx512", None, ())) == (
        "<Explanation: 70 weights, the blocks compiled as a whole, 210 us measured for 1 token on 2 "
        "threads, target avx512; print it for a row each>"
    )
    apart = Explanation(layers, 64, 1, "avx2", "it is of another family", ())
    assert "single layers compiled, 210 us measured for 64 tokens on 1 thread," in repr(apart)
    assert len(str(apart).splitlines()) > 70


def test_an_export_is_one_line(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    model: Any = tiny_model("bert")
    hf_sparse.prune_(model, SparsityConfig("unstructured", 0.8), "wanda", tiny_batches("bert"))
    report = hf_sparse.export_onnx(model, tmp_path / "graph")
    shown = repr(report)
    assert shown.startswith("<ExportReport: feature-extraction in ")
    assert "weights packed, differs from torch by " in shown
    assert "Packing(" not in shown
    assert len(shown) < 250 + len(str(tmp_path))
    assert "\n" not in shown
    card = (tmp_path / "graph" / "README.md").read_text()
    assert "| sparsity of the target weights | 0.79" in card
