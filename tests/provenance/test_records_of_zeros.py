"""Config, card, class tell what zeros a model has: after prunings in turn, or when some are filled."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard
from transformers import AutoModelForCausalLM, LlamaForCausalLM

import hf_sparse
from hf_sparse import SparsityConfig
from hf_sparse.checkpoint.source import stored_in
from hf_sparse.provenance.record import provenance_of
from hf_sparse.provenance.values import FILLED
from hf_sparse.structure.layers import promised_config
from tests.support.tiny_models import tiny_batches, tiny_model


def save(model: Any, folder: Path, config: SparsityConfig | None = None) -> str:
    return (hf_sparse.save_pretrained(model, folder, config) / "README.md").read_text()


def rows(card: str) -> dict[str, str]:
    """The facts at the head of a card."""
    head = card.split("## What was done")[0]
    return dict(re.findall(r"^\| (.*?) \| (.*) \|$", head, flags=re.MULTILINE))


def promise_in(folder: Path) -> dict[str, Any]:
    values: dict[str, Any] = json.loads((folder / "config.json").read_text())
    found: dict[str, Any] = values["quantization_config"]
    return found


def pruned(*configs: SparsityConfig) -> Any:
    model = tiny_model("llama")
    for config in configs:
        hf_sparse.prune_(model, config, "magnitude")
    return model


def fill(model: Any, part: str) -> None:
    """Fill the zeros of the weights whose name has a part."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if part in name:
                parameter.add_(1e-3)


@pytest.mark.parametrize("pattern", ["unstructured", "column", "block:4x1"])
def test_a_lower_sparsity_than_there_is_promises_what_there_is(
    tmp_path: Path, pattern: str
) -> None:
    model = pruned(SparsityConfig(pattern, 0.5, "down_proj"))
    report = hf_sparse.prune_(model, SparsityConfig(pattern, 0.25, "down_proj"), "magnitude")
    assert "sparsity 0.25 was asked for" in report.summary()
    assert "0.5000 of pattern" in report.summary()
    assert promised_config(model).sparsity == 0.5  # type: ignore[union-attr]
    text = save(model, tmp_path)
    assert (promise_in(tmp_path)["sparsity"], promise_in(tmp_path)["pattern"]) == (0.5, pattern)
    assert rows(text)["sparsity of the target weights"] == "0.5000"
    # What was asked for is in the step.
    assert [step.sparsity for step in stored_in(tmp_path).steps] == [0.5, 0.25]


def test_a_given_config_promises_what_there_is_too(tmp_path: Path) -> None:
    model = pruned(SparsityConfig("unstructured", 0.6))
    save(model, tmp_path / "more", SparsityConfig("unstructured", 0.25))
    assert promise_in(tmp_path / "more")["sparsity"] == pytest.approx(0.6, abs=1e-3)
    with pytest.warns(UserWarning, match="given config promises 0.8000, but .* sparsity 0.(59|60)"):
        save(model, tmp_path / "less", SparsityConfig("unstructured", 0.8))
    assert promise_in(tmp_path / "less")["sparsity"] == pytest.approx(0.6, abs=1e-3)
    assert [step.method for step in stored_in(tmp_path / "less").steps] == ["magnitude"]


def test_a_streamed_pruning_tells_of_more_zeros(tmp_path: Path) -> None:
    model = pruned(SparsityConfig("unstructured", 0.6))
    model.save_pretrained(tmp_path / "dense")
    report = hf_sparse.prune_checkpoint(
        tmp_path / "dense", tmp_path / "a", SparsityConfig("unstructured", 0.25),
        batches=tiny_batches("llama"),
    )  # fmt: skip
    assert "sparsity 0.25 was asked for" in report.summary()
    assert promise_in(tmp_path / "a")["sparsity"] == pytest.approx(0.6, abs=1e-3)


def test_few_units_that_round_down_are_no_lost_zeros(tmp_path: Path) -> None:
    model = pruned(SparsityConfig("head", 0.4))  # of two heads of keys in each block: one
    config = promised_config(model)
    assert config is not None
    save(model, tmp_path)
    save(model, tmp_path / "given", SparsityConfig("head", 0.4))
    assert promise_in(tmp_path)["sparsity"] == config.sparsity


def test_prunings_of_different_targets_are_told_as_a_whole(tmp_path: Path) -> None:
    configs = [
        SparsityConfig("unstructured", 0.75, ["mlp.*"]),
        SparsityConfig("block:4x1", 0.5, ["q_proj", "k_proj"]),
        SparsityConfig("unstructured", 0.25, ["v_proj", "o_proj"]),
    ]
    model = pruned(*configs)
    text = save(model, tmp_path)
    facts = rows(text)
    blocks = [p for n, p in model.named_parameters() if "_proj" in n]
    zeros, numel = (sum(int(n) for n in each) for each in (
        ((p == 0).sum() for p in blocks), (p.numel() for p in blocks),
    ))  # fmt: skip
    assert facts["patterns"] == "block:4x1, unstructured"
    assert facts["sparsity of the weight matrices"] == f"{zeros / numel:.4f}"
    assert facts["zeros"] == f"{zeros:,} of {numel:,} weights in the matrices"
    assert ModelCard(text).data.tags == ["hf_sparse", "sparse", "block:4x1", "unstructured"]
    assert text.count("| method | magnitude |") == 3
    # The same from the file.
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert save(loaded, tmp_path / "again") == text


def test_a_broken_pattern_of_an_earlier_pruning_is_not_told(tmp_path: Path) -> None:
    model = pruned(SparsityConfig("2:4", targets="mlp.*"), SparsityConfig("row", 0.5, "q_proj"))
    assert rows(save(model, tmp_path / "a"))["patterns"] == "2:4, row"
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[0] = 1.0
    assert rows(save(model, tmp_path / "b"))["patterns"] == "2:4, row, unstructured"


@pytest.mark.few(2)
@pytest.mark.parametrize("loaded", [False, True])
@pytest.mark.parametrize("pattern", ["unstructured", "2:4", "column"])
def test_a_model_whose_zeros_are_all_filled_is_saved_as_dense(
    tmp_path: Path, pattern: str, loaded: bool
) -> None:
    config = SparsityConfig("2:4") if pattern == "2:4" else SparsityConfig(pattern, 0.5)
    model = pruned(config)
    if loaded:
        save(model, tmp_path / "sparse")
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "sparse")
    fill(model, "_proj")
    with pytest.warns(UserWarning, match=rf"was {pattern} with sparsity 0.5000.* as a dense model"):
        text = save(model, tmp_path / "filled")
    assert "sparsity 0.5 was promised, 0.0 was left when it was saved." in text
    assert "# LlamaForCausalLM" in text
    assert "pattern" not in rows(text)
    assert ModelCard(text).data.tags == ["hf_sparse"]
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "filled")
    assert type(again) is LlamaForCausalLM
    for name, value in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name
    methods = [step.method for step in provenance_of(again).steps]
    assert methods == ["magnitude", FILLED]
    # It is told once, however often it is saved, and a new pruning makes it history.
    with pytest.warns(UserWarning, match="fills zeros"):
        save(model, tmp_path / "filled")
    assert len(stored_in(tmp_path / "filled").steps) == 2
    hf_sparse.prune_(again, SparsityConfig("unstructured", 0.5), "magnitude")
    text = save(again, tmp_path / "pruned again")
    assert "were filled after" not in text
    assert [step.method for step in stored_in(tmp_path / "pruned again").steps] == [
        "magnitude", FILLED, "magnitude",
    ]  # fmt: skip


@pytest.mark.parametrize("given", [False, True])
def test_when_some_zeros_are_filled_the_file_promises_the_others(
    tmp_path: Path, given: bool
) -> None:
    config = SparsityConfig("unstructured", 0.5)
    model = pruned(config)
    save(model, tmp_path / "sparse")
    loaded: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "sparse")
    fill(loaded, "mlp")
    with pytest.warns(UserWarning, match=r"fills zeros"):
        text = save(loaded, tmp_path / "filled", config if given else None)
    found = hf_sparse.inspect_checkpoint(tmp_path / "filled")
    assert 0.1 < found.report.sparsity < 0.4
    assert promise_in(tmp_path / "filled")["sparsity"] == pytest.approx(
        found.report.sparsity, abs=2e-4
    )
    assert "the zeros are lost" not in str(found)
    assert "sparsity 0.5 was promised, 0.1" in text
    assert stored_in(tmp_path / "filled").steps[-1].method == FILLED


def test_figures_given_with_filled_zeros_are_those_of_the_weights(tmp_path: Path) -> None:
    model = pruned(SparsityConfig("unstructured", 0.5))
    fill(model, "mlp")
    metric = hf_sparse.Metric("perplexity", 2.0)
    with pytest.warns(UserWarning, match="fills zeros"):
        hf_sparse.save_pretrained(model, tmp_path, metrics=[metric])
    assert stored_in(tmp_path).metrics == (metric,)


def test_a_shrunk_dense_model_shows_no_pattern(tmp_path: Path) -> None:
    model = pruned(SparsityConfig("column", 0.5))
    hf_sparse.shrink_(model)
    text = save(model, tmp_path)
    facts = rows(text)
    assert "pattern" not in facts
    assert not any(name.startswith("sparsity of") for name in facts)
    assert "what is left of the blocks" not in facts  # the family's own config tells the sizes
    assert "# LlamaForCausalLM" in text
    AutoModelForCausalLM.from_pretrained(tmp_path)


def test_whole_heads_are_told_as_they_were_asked_for(tmp_path: Path) -> None:
    model = pruned(SparsityConfig("head", 0.5))
    text = save(model, tmp_path)
    assert "head_in" not in text
    assert rows(text)["pattern"] == "head"
    assert "[0-9]" not in text
    assert promise_in(tmp_path)["pattern"].startswith("head_in:")  # what files have always had
