"""What a card says beyond facts: how to make the model again, limits, papers, licence, pictures."""

from __future__ import annotations

import ast
import importlib
import re
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard
from transformers import LlamaForCausalLM

import hf_sparse
from hf_sparse import Metric, SparsityConfig
from hf_sparse.checkpoint.card_file import add_pictures
from hf_sparse.checkpoint.reproducing import COMPOSED, METHODS, reproduction
from hf_sparse.provenance.values import Provenance, Step
from hf_sparse.pruning.methods import METHODS as PRUNING_METHODS
from tests.support.closeness import same
from tests.support.tiny_models import tiny_batches, tiny_model

BASE_CARD = "---\nlicense: other\nlicense_name: mine\nlanguage: [en]\ndatasets: [x]\n---\n# Base\n"


@pytest.fixture
def base(tmp_path: Path) -> Path:
    tiny_model("llama").save_pretrained(tmp_path / "base")
    (tmp_path / "base" / "README.md").write_text(BASE_CARD)
    return tmp_path / "base"


def code_of(text: str) -> str:
    return re.findall(r"## How to make it.*?```python\n(.*?)```", text, re.DOTALL)[0]


@pytest.mark.few(2)
@pytest.mark.parametrize(
    ("config", "method", "options"),
    [
        (SparsityConfig("2:4"), "wanda", {}),
        (SparsityConfig("unstructured", 0.7), "sparsegpt", {"allocation": "owl"}),
        (
            SparsityConfig("block:4x1", 0.5, ["*proj"], ["*q_proj"]),
            "magnitude",
            {"scope": "global"},
        ),
        (SparsityConfig("column", 0.5), "wanda", {"refine": "refit"}),
        (SparsityConfig("head", 0.5, uniform=True), "magnitude", {}),
    ],
    ids=["2:4", "owl", "targets", "column", "head"],
)
def test_the_code_of_a_card_makes_the_same_model(
    base: Path, tmp_path: Path, config: SparsityConfig, method: str, options: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    model = LlamaForCausalLM.from_pretrained(base)
    batches = None if method == "magnitude" else tiny_batches("llama")
    hf_sparse.prune_(model, config, method, batches, **options)
    hf_sparse.save_pretrained(model, tmp_path / "model", base_model="someone/base")
    code = code_of((tmp_path / "model" / "README.md").read_text())
    monkeypatch.chdir(tmp_path)
    code = code.replace("'someone/base'", repr(str(base)))
    code = re.sub(r"batches = \.\.\. .*", "batches = given", code)
    exec(code, {"given": batches})
    made = LlamaForCausalLM.from_pretrained(tmp_path / "base").state_dict()  # the shapes
    again = hf_sparse.SparseLlamaForCausalLM.from_pretrained(tmp_path / "OUTPUT").state_dict()
    assert made.keys() == again.keys()
    for name, weight in model.state_dict().items():
        assert same(weight, again[name]), name


def test_steps_that_are_no_calls_are_left_open() -> None:
    hostile = "x```'''"  # entries are single lines
    steps = (Step("SparseAdamW"), Step("recovery by lora"), Step("shrink"), Step(hostile))
    text = reproduction(Provenance(steps, hostile), "AutoModel", "save()")
    code = text.split("```python\n")[1].rpartition("\n```")[0]
    assert "```" not in code.replace(repr(hostile), "")
    ast.parse(code)
    assert "...  # step 1: SparseAdamW" in code
    assert "the table of the step tells" in text


def test_every_method_has_its_paper() -> None:
    assert METHODS.keys() == PRUNING_METHODS.keys()
    for name, (title, number) in METHODS.items():
        page = " ".join(
            (importlib.import_module(f"hf_sparse.pruning.{name}").__doc__ or "").split()
        )
        assert number in page, name
        assert name == "prox_local" or title in page, name
    modules = ["allocation", "swaps", "refit"]
    pages = "".join(str(importlib.import_module(f"hf_sparse.pruning.{m}").__doc__) for m in modules)
    assert all(number in pages for _, number in COMPOSED.values())


def test_licence_and_language_come_from_the_base(base: Path, tmp_path: Path) -> None:
    model = LlamaForCausalLM.from_pretrained(base)
    hf_sparse.prune_(model, SparsityConfig("2:4"), "wanda", tiny_batches("llama"))
    hf_sparse.save_pretrained(model, tmp_path / "a", base_model="someone/base")
    text = (tmp_path / "a" / "README.md").read_text()
    data = ModelCard(text).data
    assert (data.license, data.license_name, data.language) == ("other", "mine", ["en"])
    assert data.datasets is None  # what the base saw is told by its own card
    assert (data.base_model, data.base_model_relation) == ("someone/base", "finetune")
    # Whoever gives another says so, and what was given stays.
    given = {"license": "mit"}
    hf_sparse.save_pretrained(model, tmp_path / "b", card_data=given)
    assert ModelCard((tmp_path / "b" / "README.md").read_text()).data.license == "mit"
    for part in ("## Limits", "No quality was measured", "## Papers", "2306.11695", "1911.05248"):
        assert part in text
    dense = hf_sparse.save_pretrained(tiny_model("llama"), tmp_path / "c")
    plain = (dense / "README.md").read_text()
    assert "## Papers" not in plain
    assert "Pruning loses" not in plain


def test_pictures_are_shown_until_the_model_changes(tmp_path: Path) -> None:
    model = tiny_model("llama")
    hf_sparse.prune_(model, SparsityConfig("2:4"), "magnitude")
    folder = hf_sparse.save_pretrained(model, tmp_path / "model")
    card, plain = folder / "README.md", (folder / "README.md").read_text()
    assert add_pictures(card, {"figures/a.png": "zeros ](http://x) |\n\n## y"})
    assert add_pictures(card, {"figures/b.png": "zeros"})
    assert card.read_text() == f"{plain}\n## Pictures\n\n![zeros](figures/b.png)\n"
    hf_sparse.save_pretrained(model, folder)
    assert "figures/b.png" in card.read_text()
    hf_sparse.save_pretrained(model, folder, metrics=[Metric("loss, x", 1.0)])
    assert "figures/b.png" not in card.read_text()
    (tmp_path / "mine.md").write_text("# Mine")
    assert not add_pictures(tmp_path / "mine.md", {"a": "b"})
    assert (tmp_path / "mine.md").read_text() == "# Mine"
