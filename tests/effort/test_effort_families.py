"""Every kind of model by effort: encoders, decoders, both, and classifiers with labels."""

from __future__ import annotations

import pytest

import hf_sparse
from hf_sparse import SparsityConfig
from tests.support.tiny_models import (
    prose,
    tiny_batches,
    tiny_classifier,
    tiny_model,
    tiny_tokenizer,
)


@pytest.mark.slow
@pytest.mark.parametrize("effort", ["seconds", "minutes", "hours"])
@pytest.mark.parametrize("family", ["bert", "albert", "gpt2", "opt", "mistral", "qwen3", "t5"])
def test_every_family(family: str, effort: str) -> None:
    model = tiny_model(family)
    report = hf_sparse.sparsify_(model, SparsityConfig("2:4"), tiny_batches(family, 40, 32), effort)
    assert (report.sparsity, report.violations) == (0.5, 0)


@pytest.mark.few(1)
@pytest.mark.parametrize(("pattern", "method"), [("column", "taylor"), ("2:4", "sparsegpt")])
def test_a_classifier_with_labels(pattern: str, method: str) -> None:
    model, words = tiny_classifier(), prose().split()
    texts = [" ".join(words[i * 9 : i * 9 + 9]) for i in range(24)]
    labels = [i % 3 for i in range(24)]
    batches = hf_sparse.labelled_batches(model, tiny_tokenizer(), texts, labels, batch_size=4)
    sparsity = None if pattern == "2:4" else 0.5
    report = hf_sparse.sparsify_(model, SparsityConfig(pattern, sparsity), batches, "seconds")
    assert report.method == method
    assert report.sparsity == pytest.approx(0.5, abs=0.01)
    plan = hf_sparse.plan_sparsify(tiny_classifier(), SparsityConfig("2:4"), batches * 8, "hours")
    assert [stage.kind for stage in plan.stages] == ["prune"]
    assert "recovery was measured for causal language models alone" in str(plan)
