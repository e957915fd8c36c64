"""Parts of the page without pictures: places of names, the front, samples, tables for notebooks."""

from __future__ import annotations

import itertools
import random
import sys
from pathlib import Path

import pytest
import torch

import hf_sparse
from hf_sparse import Metric, SparsityConfig
from hf_sparse.pages.comparison import Point, better, front
from hf_sparse.pages.facts import MOST_OF_A_MATRIX, Looking, Mask
from hf_sparse.pages.names import Place
from tests.support.tiny_models import tiny_model


def test_names_tell_places() -> None:
    for name, place in {
        "model.layers.3.mlp.up_proj.weight": Place("model.layers", 3, "mlp.up_proj"),
        "bert.encoder.layer.0.attention.self.query.weight": Place(
            "bert.encoder.layer", 0, "attention.self.query"
        ),
        "model.layers.1.mlp.experts.down_proj.7": Place(
            "model.layers", 1, "mlp.experts.down_proj", 7
        ),
        "layers.1.block_sparse_moe.experts.7.w1.weight": Place(
            "layers", 1, "block_sparse_moe.experts.w1", 7
        ),
        "decoder.block.0.layer.2.DenseReluDense.wo.weight": Place(
            "decoder.block", 0, "layer.2.DenseReluDense.wo"
        ),
        "classifier.weight": Place("", None, "classifier"),
        "weight": Place("", None, "weight"),
    }.items():
        assert Place.of(name) == place


def test_the_front_is_what_nothing_beats() -> None:
    draw = random.Random(3)
    points = [Point(str(n), draw.randint(1, 9), draw.randint(1, 9)) for n in range(60)]
    for way, sign in (("lower", -1), ("higher", 1)):
        found = front(points, way)
        # By definition: for every point, one of the front costs no more and is no worse.
        for point in points:
            assert any(
                f.cost <= point.cost and sign * f.quality >= sign * point.quality for f in found
            )
        for first, second in itertools.pairwise(found):
            assert first.cost < second.cost
            assert sign * first.quality < sign * second.quality
    names = ("perplexity, x", "Accuracy on SST-2", "seconds of fun")
    assert [better(name) for name in names] == ["lower", "higher", None]


def test_a_mask_is_counted_as_its_weight_is() -> None:
    weight = torch.arange(1.0, 401.0).reshape(20, 20)
    weight[3] = 0
    weight[:, 5:7] = 0
    mask = Mask.of("w", weight)
    assert (mask.empty_rows, mask.empty_columns) == (1, 2)
    # 5 groups in each of 20 rows; of 19 rows the second group lacks three weights: 5, 6 and none more.
    assert mask.groups == (5, 0, 19, 0, 76)
    large = torch.ones(300, 500)
    large[:150] = 0
    tiles = Mask.of("w", large).tiles
    assert tiles.shape == (128, 128)
    assert float(tiles.mean()) == pytest.approx(0.5)


def test_large_matrices_are_sampled_over_rows_and_columns() -> None:
    weight = torch.arange(1.0, 1024.0 * 1024 + 1).reshape(1024, 1024)
    looking = Looking(None, lambda name: weight * 2)
    looking("layers.0.up.weight", weight)
    spread = looking.spreads()["up"]
    assert spread.sampled
    assert MOST_OF_A_MATRIX // 2 < len(spread.after) <= MOST_OF_A_MATRIX
    columns = (spread.after.long() - 1) % 1024
    assert len(columns.unique()) > 900
    assert looking.changes[0].relative == pytest.approx(0.5)


def test_notebooks_show_tables() -> None:
    model = tiny_model("llama")
    report = hf_sparse.prune_(model, SparsityConfig("2:4"), "magnitude")
    html = report._repr_html_()
    assert f"{report.zeros:,}" in html
    rows = str(report).removesuffix(report.summary()).strip().split("\n")
    assert html.count("<tr>") == len(rows) - 1  # in the terminal a line is below the head
    assert "&lt;b&gt;" in Metric("<b>", 1.0)._repr_html_()
    for kind in ("Explanation", "Benchmark"):
        module = {"Explanation": "hf_sparse.runtime.model.explain", "Benchmark": "hf_sparse.timing"}
        __import__(module[kind])
        assert hasattr(getattr(sys.modules[module[kind]], kind), "_repr_html_")


def test_without_matplotlib_the_install_line_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r"pip install 'hf_sparse\[plots\]'"):
        hf_sparse.report(tmp_path / "not looked at", tmp_path / "page.html")
    assert not (tmp_path / "page.html").exists()
