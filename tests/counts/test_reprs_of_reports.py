"""What a notebook shows of an explanation and of an export: one line; `print` shows the rest."""

from __future__ import annotations

from pathlib import Path

from hf_sparse.exporters.onnx_export import ExportReport
from hf_sparse.exporters.packing import Packing
from hf_sparse.exporters.verification import Difference
from hf_sparse.runtime.model.explain import Explanation, LayerExplanation


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
    packing = Packing({"gap8": 9}, 4_000_000, 1_100_000, 1_000_000, 900_000)
    difference = Difference(2e-6, 1e-6, "last_hidden_state")
    report = ExportReport(tmp_path, "feature-extraction", 1_300_000, packing, difference, 1e-4)
    assert repr(report) == (
        f"<ExportReport: feature-extraction in {str(tmp_path)!r}, 1.3 MB, 9 weights packed, differs "
        "from torch by 2.0e-06; print it for more>"
    )
    assert "9 weights packed (9 gap8): 1.1 MB instead of 4.0, 1.10x of nonzeros" in str(report)
    assert "last_hidden_state" in str(report)
