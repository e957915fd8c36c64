"""Graphs of models of few bits: codes in the file, the model's outputs, one operator a product."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

import hf_sparse
from hf_sparse import SparsityConfig
from tests.support.exporting import WHY_NOT
from tests.support.few_bits import INT4, quantised

pytestmark = pytest.mark.skipif(bool(WHY_NOT), reason=str(WHY_NOT))


def session(folder: Path, made: Path | None = None):
    ort = pytest.importorskip("onnxruntime")
    options = ort.SessionOptions()
    options.log_severity_level = 3
    if made is not None:
        options.optimized_model_filepath = str(made)
    return ort.InferenceSession(str(folder / "model.onnx"), options)


def operators(file: Path) -> Counter:
    onnx = pytest.importorskip("onnx")
    graph = onnx.load(file, load_external_data=False).graph
    return Counter(node.op_type for node in graph.node)


def logits(graph, model, ids: np.ndarray) -> np.ndarray:
    heads = model.config.num_key_value_heads
    feed = {}
    for value in graph.get_inputs():
        if value.name == "input_ids":
            feed[value.name] = ids
        elif value.name == "attention_mask":
            feed[value.name] = np.ones_like(ids)
        elif value.name == "position_ids":
            feed[value.name] = np.arange(ids.shape[1])[None].repeat(len(ids), 0)
        else:
            feed[value.name] = np.zeros((len(ids), heads, 0, value.shape[3]), np.float32)
    return graph.run(["logits"], feed)[0]


@pytest.mark.few(1)
@pytest.mark.parametrize(
    "config",
    [
        INT4,
        SparsityConfig("unstructured", 0.0, bits=8, group_size=32, embedding_bits=8),
        pytest.param(
            SparsityConfig("2:4", bits=4, group_size=32, symmetric=False, embedding_bits=8),
            marks=pytest.mark.slow,
        ),
        pytest.param(SparsityConfig("2:4", bits=8), marks=pytest.mark.slow),
    ],
    ids=repr,
)
def test_a_graph_holds_codes_and_gives_what_the_model_gives(tmp_path, config):
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1}
    model = quantised(config, **sizes, vocab_size=300).eval()
    report = hf_sparse.export_onnx(model, tmp_path / "graph")
    assert report.difference.relative < 1e-5
    products = 7 + (config.embedding_bits is not None)
    lookups = int(config.embedding_bits is not None)
    kind = f"int{config.bits}"
    assert sum(report.codes.values()) == products + lookups
    assert kind in str(report)
    ids = np.arange(3, 19)[None].astype(np.int64)
    graph = session(tmp_path / "graph", tmp_path / "made.onnx")
    made = operators(tmp_path / "made.onnx")
    assert made["MatMulNBits"] == products
    with torch.no_grad():
        wanted = model(torch.from_numpy(ids)).logits.numpy()
    found = logits(graph, model, ids)  # ONNX Runtime rounds inputs of products to 8 bits
    assert np.abs(found - wanted).max() < 0.1 * np.abs(wanted).max()


@pytest.mark.slow
def test_a_graph_is_smaller_by_its_codes(tmp_path):
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1}
    config = SparsityConfig("2:4", bits=4, group_size=32, embedding_bits=8)
    report = hf_sparse.export_onnx(quantised(config, **sizes, vocab_size=4000), tmp_path / "graph")
    coded = 2 * 4000 * 64 * (1 + 4 / 32)  # tied embeddings are looked up, and multiplied with
    assert report.bytes < 1.2 * coded < 4000 * 64 * 4


@pytest.mark.slow
def test_without_bits_nothing_is_coded(tmp_path):
    model = quantised()
    del model._hf_sparse_pruned_with
    report = hf_sparse.export_onnx(model, tmp_path / "graph")
    assert report.codes == {}
    assert "DequantizeLinear" not in operators(tmp_path / "graph" / "model.onnx")
