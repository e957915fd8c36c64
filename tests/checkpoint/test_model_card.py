"""The model card and its metadata, and the entry of config.json that both are made from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from huggingface_hub import ModelCard
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, LlamaForCausalLM

import hf_sparse
from hf_sparse import FormatError, Metric, SparsityConfig
from hf_sparse.checkpoint.source import stored_in
from hf_sparse.cli import main
from hf_sparse.provenance.entry import ENTRY, from_dict, to_dict
from hf_sparse.provenance.record import provenance_of
from hf_sparse.provenance.values import Calibration, Provenance, Step, line
from tests.support.tiny_models import tiny_batches, tiny_classifier, tiny_model, tiny_tokenizer

CONFIG = SparsityConfig("2:4")
DENSE = SparsityConfig("2:4", format="dense")
METRICS = (Metric("perplexity, prose", 12.5, 11.25), Metric("other", float("inf")))
OLD_CARD = """---
base_model: someone/tiny-llama
---

# Sparse LlamaForCausalLM

|  |  |
|---|---|
| base model | someone/tiny-llama |
| method | wanda |
| option scope | layer |
| then | recovery by finetune |
| option lr | 0.001 |
| pattern | 2:4 |
| zeros in the whole model | 0.4000 |

## Metrics

| metric | dense | sparse |
|---|---|---|
| perplexity, prose | 11.25 | 12.5 |

## How to load

| method | of somebody else |
"""


@pytest.fixture
def model() -> Any:
    model = tiny_model("llama")
    hf_sparse.prune_(model, CONFIG, "magnitude")
    return model


def card(folder: Path) -> str:
    return (folder / "README.md").read_text()


def load(folder: Path) -> Any:
    model = AutoModelForCausalLM.from_pretrained(folder)
    provenance_of(model)  # of a dense checkpoint it is read when it is asked for
    return model


def edit(folder: Path, entry: Any) -> None:
    """Replace the entry, None: take it out."""
    values = json.loads((folder / "config.json").read_text())
    values.pop(ENTRY, None)
    if entry is not None:
        values[ENTRY] = entry
    (folder / "config.json").write_text(json.dumps(values))


FULL = Provenance(
    (
        Step("wanda", (("block", ""), ("scope", "layer")), "2:4", 0.5, ("mlp.*",), ("x",),
             Calibration(16, 512, 8192, "0f"), (("logits", "0.5"),), 7,
             (("torch", "2.13"),), "2026-01-31", METRICS),
        Step("shrink"),
    ),
    "someone/model", METRICS, "00ff",
    (("language", ("en", "de")), ("license", "mit")),
)  # fmt: skip


def test_the_entry_is_read_back_as_it_was_written() -> None:
    stored = json.loads(json.dumps(to_dict(FULL), allow_nan=False))
    assert from_dict(stored) == FULL
    assert from_dict({"version": 1}) == Provenance()


STEP = {"method": "wanda"}
DAMAGED: list[Any] = [
    [],
    "steps",
    {},
    {"version": 2},
    {"version": True},
    {"version": 1, "more": 1},
    {"version": 1, "steps": STEP},
    {"version": 1, "steps": [STEP] * 201},
    {"version": 1, "steps": [{}]},
    {"version": 1, "steps": [{"method": "a\nb"}]},
    {"version": 1, "steps": [{"method": "a\u202eb"}]},
    {"version": 1, "steps": [{"method": "a" * 301}]},
    {"version": 1, "steps": [{"method": 5}]},
    {"version": 1, "steps": [STEP | {"sparsity": float("nan")}]},
    {"version": 1, "steps": [STEP | {"sparsity": 10**400}]},
    {"version": 1, "steps": [STEP | {"sparsity": True}]},
    {"version": 1, "steps": [STEP | {"seed": 10**5000}]},
    {"version": 1, "steps": [STEP | {"options": {"a": ["b"]}}]},
    {"version": 1, "steps": [STEP | {"options": {str(number): "" for number in range(201)}}]},
    {"version": 1, "steps": [STEP | {"date": "today"}]},
    {"version": 1, "steps": [STEP | {"calibration": {"windows": "all"}}]},
    {"version": 1, "steps": [STEP | {"calibration": {}}]},
    {"version": 1, "metrics": [{"name": "a|b", "sparse": 1.0}]},
    {"version": 1, "metrics": [{"name": "a", "sparse": "high"}]},
    {"version": 1, "metrics": [{"name": "a", "sparse": 10**400}]},
    {"version": 1, "card": {"license": {"a": "b"}}},
    {"version": 1, "card": {"license": ["a", "b"]}},
    {"version": 1, "card": {"library_name": "other"}},
    {"version": 1, "base_model": ""},
]


@pytest.mark.parametrize("entry", DAMAGED, ids=range(len(DAMAGED)))
def test_a_damaged_entry_is_refused(entry: Any) -> None:
    with pytest.raises(FormatError, match=r"the entry|reads version 1"):
        from_dict(entry)


@pytest.mark.parametrize("config", [CONFIG, DENSE], ids=["auto", "dense"])
def test_a_model_with_a_damaged_entry_loads_and_tells(
    tmp_path: Path, model: Any, config: SparsityConfig
) -> None:
    hf_sparse.save_pretrained(model, tmp_path, config)
    edit(tmp_path, {"version": 1, "steps": "all"})
    with pytest.warns(UserWarning, match="damaged, or of a newer hf_sparse .*steps is 'all'"):
        loaded = load(tmp_path)
    assert provenance_of(loaded) == Provenance()
    assert torch.equal(loaded.model.norm.weight, model.model.norm.weight)
    (tmp_path / "README.md").unlink()
    hf_sparse.save_pretrained(loaded, tmp_path / "again", config)
    assert "Nothing that was recorded." in card(tmp_path / "again")


def test_text_that_would_break_the_card_is_shown_as_it_is(tmp_path: Path, model: Any) -> None:
    hf_sparse.save_pretrained(model, tmp_path)
    hostile = "| x |<script>`[a](http://b)`\\|"
    edit(tmp_path, {"version": 1, "base_model": hostile, "steps": [
        {"method": hostile, "options": {hostile: hostile}, "versions": {"a": hostile}},
    ]})  # fmt: skip
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    text = card(hf_sparse.save_pretrained(loaded, tmp_path / "again"))
    shown = r"\| x \|\<script\>\`\[a\](http://b)\`\\\|"
    assert f"| base model | {shown} |" in text
    assert f"| method | {shown} |\n| option {shown} | {shown} |\n| made with | a {shown} |" in text
    assert ModelCard(text).data.base_model == hostile
    assert provenance_of(loaded).steps[0].method == hostile


def test_long_and_many_lined_options_are_cut() -> None:
    step = Step.of("a\nb", {"x": "y" * 500, "z": "\u202e\x00"})
    assert (step.method, dict(step.options)["z"]) == ("a b", "??")
    assert len(dict(step.options)["x"]) == 300
    assert from_dict(to_dict(Provenance((step,)))).steps == (step,)
    assert line("  a \t b\u2028c ") == "a b c"


def test_of_very_many_steps_the_last_stay() -> None:
    known = Provenance()
    for number in range(250):
        known = known.after(Step(f"step {number}"))
    assert [known.steps[0].method, known.steps[-1].method] == ["step 50", "step 249"]
    assert from_dict(to_dict(known)) == known


def test_stock_transformers_keeps_the_entry_of_a_dense_checkpoint(
    tmp_path: Path, model: Any
) -> None:
    hf_sparse.save_pretrained(model, tmp_path / "a", DENSE, metrics=METRICS)
    loaded = LlamaForCausalLM.from_pretrained(tmp_path / "a")
    loaded.save_pretrained(tmp_path / "b")  # transformers' own
    assert stored_in(tmp_path / "b") == stored_in(tmp_path / "a")
    loaded = LlamaForCausalLM.from_pretrained(tmp_path / "b")
    assert provenance_of(loaded).steps == provenance_of(model).steps
    hf_sparse.save_pretrained(loaded, tmp_path / "c", DENSE)
    assert card(tmp_path / "c") == card(tmp_path / "a")  # metrics, too: the same weights
    with torch.no_grad():
        loaded.model.norm.weight.mul_(2)
    hf_sparse.save_pretrained(loaded, tmp_path / "c", DENSE)
    assert stored_in(tmp_path / "c").metrics == ()
    assert "None were measured." in card(tmp_path / "c")


def test_metrics_follow_the_weights_wherever_they_are_saved(tmp_path: Path, model: Any) -> None:
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[0, :2] = torch.tensor([-0.0, 1.0])
    hf_sparse.save_pretrained(model, tmp_path / "a", metrics=METRICS)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "a")  # -0.0 came back as 0.0
    hf_sparse.save_pretrained(loaded, tmp_path / "b", max_shard_size="20KB")
    assert stored_in(tmp_path / "b").metrics == METRICS
    # An object that knows nothing of the folder it replaces.
    copy = tiny_model("llama")
    copy.load_state_dict(loaded.state_dict())
    hf_sparse.save_pretrained(copy, tmp_path / "b", CONFIG)
    assert stored_in(tmp_path / "b").metrics == METRICS
    # A later step takes them over as those of the step before.
    hf_sparse.prune_(loaded, SparsityConfig("1:4"), "magnitude")
    assert provenance_of(loaded).steps[0].metrics == METRICS
    text = card(hf_sparse.save_pretrained(loaded, tmp_path / "c"))
    assert "| perplexity, prose, after this step | 12.5 (dense 11.25) |" in text
    assert "None were measured." in text


@pytest.mark.parametrize("config", [CONFIG, DENSE], ids=["auto", "dense"])
def test_checkpoints_with_an_old_card_alone_still_tell(
    tmp_path: Path, model: Any, config: SparsityConfig
) -> None:
    folder = hf_sparse.save_pretrained(model, tmp_path / "old", config, tokenizer=tiny_tokenizer())
    edit(folder, None)
    (folder / "README.md").write_text(OLD_CARD)
    wanted = [
        Step("wanda", (("scope", "layer"),)),
        Step("recovery by finetune", (("lr", "0.001"),)),
    ]
    if config is CONFIG:
        loaded = AutoModelForCausalLM.from_pretrained(folder)
        assert list(provenance_of(loaded).steps) == wanted
        hf_sparse.save_pretrained(loaded, folder)
        assert stored_in(folder).metrics == METRICS[:1]  # measured with these weights
        assert "| perplexity, prose | 11.25 | 12.5 |" in card(folder)
        with torch.no_grad():
            loaded.model.norm.weight.mul_(2)
        hf_sparse.save_pretrained(loaded, folder)
        assert stored_in(folder).metrics == ()
    else:  # the command reads the card, too
        text = tmp_path / "text.txt"
        text.write_text("some words " * 300)
        arguments = ("--data", text, "--num-samples", "2", "--window", "16")
        command = ["recover", folder, tmp_path / "new", *arguments]
        assert main([str(argument) for argument in command]) == 0
        assert list(stored_in(tmp_path / "new").steps[:2]) == wanted


def test_a_card_of_somebody_else_stays_and_the_user_is_told(tmp_path: Path, model: Any) -> None:
    (tmp_path / "README.md").write_text("# Mine")
    with pytest.warns(UserWarning, match="the model card was not written. To get it, move") as told:
        hf_sparse.save_pretrained(model, tmp_path)
    assert told[0].filename == __file__
    assert card(tmp_path) == "# Mine"
    sparse = AutoModelForCausalLM.from_pretrained(tmp_path)
    with pytest.warns(UserWarning, match="not written") as told:
        sparse.save_pretrained(tmp_path)
    assert told[0].filename == __file__
    assert len(stored_in(tmp_path).steps) == 1  # config.json tells all the same


def test_metadata_that_the_hub_has_put_there_are_kept(tmp_path: Path, model: Any) -> None:
    (tmp_path / "README.md").write_text("---\nlicense: mit\nlanguage: [en]\ntags: [x]\n---\n")
    hf_sparse.save_pretrained(model, tmp_path)
    data = ModelCard(card(tmp_path)).data
    assert (data.license, data.language) == ("mit", ["en"])
    assert "| method | magnitude |" in card(tmp_path)
    (tmp_path / "README.md").write_text("---\n: {damaged\n---\n")
    hf_sparse.save_pretrained(model, tmp_path)
    assert "| method | magnitude |" in card(tmp_path)


def test_what_was_added_by_hand_stays_while_the_card_is_true(tmp_path: Path, model: Any) -> None:
    hf_sparse.save_pretrained(model, tmp_path)
    text = card(tmp_path).replace("license: mit\n", "") + "\nMy own words.\n"
    text = text.replace("library_name", "license: mit\nlibrary_name", 1)
    (tmp_path / "README.md").write_text(text)
    hf_sparse.save_pretrained(model, tmp_path)
    assert card(tmp_path) == text
    hf_sparse.save_pretrained(model, tmp_path, metrics=METRICS)
    assert "My own words." not in card(tmp_path)
    assert ModelCard(card(tmp_path)).data.license == "mit"


def test_given_metadata_stay_with_the_model(tmp_path: Path, model: Any) -> None:
    given = {"license": "apache-2.0", "language": ["en", "de"], "datasets": "wikitext"}
    hf_sparse.save_pretrained(model, tmp_path / "a", card_data=given, tags=["mine"])
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "a")
    hf_sparse.save_pretrained(loaded, tmp_path / "b")
    data = ModelCard(card(tmp_path / "b")).data
    assert {name: getattr(data, name) for name in given} == given
    assert data.tags == ["hf_sparse", "sparse", "2:4", "mine"]
    assert (data.library_name, data.pipeline_tag) == ("transformers", "text-generation")
    none = ModelCard(card(hf_sparse.save_pretrained(tiny_classifier(), tmp_path / "c"))).data
    assert (none.license, none.language, none.datasets) == (None, None, None)
    assert none.pipeline_tag == "text-classification"


@pytest.mark.parametrize(
    "given",
    [
        {"licence": "mit"},
        {"license": ["mit"]},
        {"language": 5},
        {"tags": ["a\nb"]},
        {"datasets": [1]},
    ],
)
def test_wrong_metadata_are_refused_before_anything_is_written(
    tmp_path: Path, model: Any, given: dict[str, Any]
) -> None:
    with pytest.raises(ValueError, match="card_data"):
        hf_sparse.save_pretrained(model, tmp_path / "new", card_data=given)
    assert not (tmp_path / "new").exists()


def test_a_dense_model_of_a_sparse_class_loads_without_hf_sparse(tmp_path: Path) -> None:
    tiny_classifier().save_pretrained(tmp_path / "start")
    model = hf_sparse.SparseBertForSequenceClassification.from_pretrained(tmp_path / "start")
    model.save_pretrained(tmp_path / "dense")
    values = json.loads((tmp_path / "dense" / "config.json").read_text())
    assert values["architectures"] == ["BertForSequenceClassification"]
    assert (values["model_type"], "quantization_config" in values) == ("bert", False)
    assert "import hf_sparse" not in card(tmp_path / "dense")
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "dense")
    assert type(loaded) is transformers.BertForSequenceClassification
    for name, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value), name
    # With zeros, or with a promise of some, it is a sparse checkpoint.
    hf_sparse.prune_(model, SparsityConfig("unstructured", 0.5, ["query"]), "magnitude")
    model.save_pretrained(tmp_path / "sparse")
    assert "sparse_bert" in (tmp_path / "sparse" / "config.json").read_text()


@pytest.mark.parametrize("pattern", ["column", "block:4x1", "head"])
def test_a_second_pruning_reports_no_violations_of_the_first(pattern: str, tmp_path: Path) -> None:
    model = tiny_model("llama")
    hf_sparse.prune_(model, SparsityConfig("unstructured", 0.8), "magnitude")
    report = hf_sparse.prune_(model, SparsityConfig(pattern, 0.5), "wanda", tiny_batches("llama"))
    assert report.violations == 0
    assert report.partial > 0
    assert f"0 violations, {report.partial:,} groups zero in part" in report.summary()
    hf_sparse.save_pretrained(model, tmp_path)
    found = hf_sparse.inspect_checkpoint(tmp_path).report
    assert (found.violations, found.partial) == (0, report.partial)
