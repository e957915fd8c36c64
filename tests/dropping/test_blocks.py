"""drop_blocks_: which blocks go, against a slow reference, and the plain models that are left."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

import hf_sparse
from hf_sparse import SparsityConfig, drop_blocks_
from hf_sparse.dropping.blocks import METHODS
from hf_sparse.dropping.counts import number_of_some
from hf_sparse.provenance.record import provenance_of
from hf_sparse.structure.layers import promised_config
from hf_sparse.structure.units import find_units
from hf_sparse_cli.choices import BLOCK_CHOICES
from tests.support.deep_models import adapted, deep_model, loss_of, quantized
from tests.support.dense_folders import calibration, check_refused, shrunk
from tests.support.plain_models import check_plain
from tests.support.tiny_models import (
    tiny_batches,
    tiny_classifier,
    tiny_model,
)
from tests.support.unchanged import unchanged

SETTINGS: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 1}


def without(model: PreTrainedModel, numbers: list[int]) -> PreTrainedModel:
    """A Llama whose list of blocks lacks some, without a cache."""
    other: Any = copy.deepcopy(model)
    blocks = other.model.layers
    other.model.layers = nn.ModuleList(b for n, b in enumerate(blocks) if n not in numbers)
    other.config.num_hidden_layers = len(other.model.layers)
    other.config.use_cache = False
    return other


def test_the_blocks_go_without_which_the_loss_is_lowest() -> None:
    model, batches = deep_model(), tiny_batches("llama")
    wanted: list[int] = []
    for _ in range(2):
        left = [number for number in range(4) if number not in wanted]
        losses = {number: loss_of(without(model, [*wanted, number]), batches) for number in left}
        wanted.append(min(losses, key=losses.__getitem__))
    best = losses[wanted[-1]]
    dense = copy.deepcopy(model)
    report = drop_blocks_(model, 0.5, batches)
    assert list(report.removed) == wanted
    assert report.scores[-1] == pytest.approx(best, abs=1e-5)
    assert report.loss == pytest.approx((loss_of(dense, batches), best), abs=1e-5)
    assert loss_of(model, batches) == pytest.approx(best, abs=1e-5)
    assert report.blocks == (4, 2)
    assert report.parameters == (dense.num_parameters(), model.num_parameters())
    assert "removed (2)" in report.table()
    assert json.loads(report.to_json())["by"] == "loss"


@torch.no_grad()
def test_influence_is_that_of_the_paper_over_all_tokens_but_padding() -> None:
    model, batches = deep_model(), tiny_batches("llama", padded=True)
    sums, tokens = torch.zeros(3, dtype=torch.float64), 0
    for batch in batches:
        mask = batch["attention_mask"].bool()
        states = model(**batch, output_hidden_states=True).hidden_states
        for number in range(3):  # a norm follows the last block
            pair = (state[mask].double() for state in states[number : number + 2])
            sums[number] += torch.cosine_similarity(*pair, dim=-1).sum()
        tokens += int(mask.sum())
    report = drop_blocks_(model, 1, batches, by="similarity")
    found = torch.tensor(report.all_scores[:3], dtype=torch.float64)
    torch.testing.assert_close(found, 1 - sums / tokens, atol=1e-6, rtol=1e-5)
    every = list(report.all_scores)
    assert report.removed == (every.index(min(every)),)  # type: ignore[type-var]
    assert report.loss is None


@pytest.mark.slow
def test_what_is_left_loads_and_generates_without_the_package(tmp_path: Path) -> None:
    ids = tiny_batches("llama")[0]["input_ids"]
    labelled = [{"input_ids": ids, "labels": torch.tensor([0, 2])}]
    models = {
        "llama": deep_model(),
        "gpt2": tiny_model("gpt2"),
        "qwen2": tiny_model("qwen2"),  # its config has the kind of attention of each block
        "gemma": tiny_model("gemma"),
        "bert": tiny_classifier(),
    }
    generated = {}
    for family, model in models.items():
        model(input_ids=ids, output_hidden_states=True)  # transformers hooks what it collects
        drop_blocks_(model, 1, labelled if family == "bert" else tiny_batches(family))
        states = model(input_ids=ids, output_hidden_states=True).hidden_states
        assert len(states) == model.config.num_hidden_layers + 1
        with torch.no_grad():
            expected = {"input_ids": ids, "output": model(input_ids=ids)[0]}
        save_file(expected, tmp_path / f"{family}.safetensors")
        hf_sparse.save_pretrained(model, tmp_path / family)
        if family != "bert":
            generated[family] = model.generate(ids, **SETTINGS).tolist()
    check_plain(tmp_path, models, generated)
    config = json.loads((tmp_path / "qwen2" / "config.json").read_text())
    assert config["num_hidden_layers"] == len(config["layer_types"]) == 2


def test_a_promise_of_zeros_stays_and_the_model_is_stored_sparse(tmp_path: Path) -> None:
    model = deep_model()
    hf_sparse.prune_(model, SparsityConfig("2:4"), "magnitude")
    drop_blocks_(model, 1, tiny_batches("llama"), by="similarity")
    hf_sparse.save_pretrained(model, tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert loaded.config.num_hidden_layers == 3
    report = hf_sparse.measure_sparsity(loaded)
    assert (report.pattern, report.violations) == ("2:4", 0)
    again = drop_blocks_(loaded, 1, tiny_batches("llama"), by="similarity")
    assert again.blocks == (3, 2)
    assert [step.method for step in provenance_of(loaded).steps] == [
        *("magnitude", "drop_blocks", "drop_blocks")
    ]
    hf_sparse.save_pretrained(loaded, tmp_path / "again")
    card = (tmp_path / "again" / "README.md").read_text()
    assert "drop_blocks" in card
    assert "similarity" in card


def test_a_promise_that_names_blocks_by_number_is_forgotten() -> None:
    model = deep_model(num_hidden_layers=3)
    config = SparsityConfig("unstructured", 0.5, ["layers.0.*", "layers.1.*"])
    hf_sparse.prune_(model, config, "magnitude")
    report = drop_blocks_(model, 1, tiny_batches("llama"), by="similarity")
    assert (promised_config(model) is None) == (report.removed[0] != 2)


def test_sizes_of_shrunk_blocks_stay_with_their_blocks(tmp_path: Path) -> None:
    model = deep_model()
    with torch.no_grad():
        for number, units in enumerate(find_units(model)):
            units.down.weight[:, : 4 + number] = 0
    hf_sparse.shrink_(model)
    report = drop_blocks_(model, 1, tiny_batches("llama"))
    wanted = [60 - number for number in range(4) if number not in report.removed]
    assert [units.size.neurons for units in find_units(model)] == wanted
    hf_sparse.save_pretrained(model, tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert [units.size.neurons for units in find_units(loaded)] == wanted


def test_blocks_that_would_be_others_at_another_place_have_to_stay() -> None:
    model = tiny_model("gpt2", scale_attn_by_inverse_layer_idx=True)
    report = drop_blocks_(model, 1, tiny_batches("gpt2"))
    assert report.removed == (2,)
    assert report.all_scores[:2] == (None, None)
    assert "has to stay" in str(report)


def sharing() -> PreTrainedModel:
    model: Any = deep_model()
    model.model.layers[1].mlp = model.model.layers[0].mlp
    return model


def compiled() -> PreTrainedModel:
    model = deep_model()
    model.compile()
    return model


REFUSED: list[tuple[Any, dict[str, Any], str]] = [
    (deep_model, {"count": 4}, "every block of 4"),
    (deep_model, {"count": 0.9}, "every block of 4"),
    (deep_model, {"count": 0}, "no block of 4"),
    (deep_model, {"count": 0.1}, r"no block of 4; .* fraction that is a block is 0\.25"),
    (deep_model, {"count": 1.5}, r"count is 1\.5; wanted at most 3"),
    (deep_model, {"count": True}, "count is True"),
    (deep_model, {"count": "2"}, "count is '2'"),
    (deep_model, {"by": "losss"}, "Did you mean 'loss'"),
    (deep_model, {"batches": []}, "needs calibration data"),
    (tiny_classifier, {}, "and the batches have no labels"),
    (lambda: tiny_model("albert"), {}, "they run several times with the same weights"),
    (lambda: tiny_model("t5"), {}, "the batches have no labels"),
    (sharing, {}, "shares a weight"),
    (lambda: adapted(deep_model()), {}, "has adapters"),
    (lambda: quantized(deep_model()), {}, "is quantized"),
    (compiled, {}, r"compiled by torch\.compile"),
    (lambda: deep_model().to("meta"), {}, "meta device"),
    (lambda: nn.Linear(2, 2), {}, "takes a transformers model"),
]


@pytest.mark.few(2)
@pytest.mark.parametrize(("make", "changes", "message"), REFUSED, ids=[row[2] for row in REFUSED])
def test_it_is_refused_before_work(make: Any, changes: dict[str, Any], message: str) -> None:
    model = make()
    arguments = {"count": 1, "batches": tiny_batches("llama"), **changes}
    with unchanged(model), pytest.raises(ValueError, match=message):
        drop_blocks_(model, **arguments)


@torch.no_grad()
def test_a_loss_that_is_not_finite_is_refused_and_nothing_is_lost() -> None:
    model: Any = deep_model()
    weight: Tensor = model.model.layers[2].mlp.down_proj.weight
    weight[0, 0] = torch.nan
    for by, message in (("loss", "calibration data is nan"), ("similarity", "not finite")):
        with pytest.raises(ValueError, match=message):
            drop_blocks_(model, 1, tiny_batches("llama"), by=by)
    assert len(model.model.layers) == model.config.num_hidden_layers == 4


def test_a_number_or_a_fraction_of_blocks() -> None:
    assert [number_of_some(count, 30, "block") for count in (1, 29, 0.25, 0.125, 0.375)] == [
        1,
        29,
        8,
        4,
        11,
    ]


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert list(BLOCK_CHOICES) == list(METHODS)
    printed, config = shrunk(deep_model(), tmp_path, "--blocks 0.5 --by similarity", capsys)
    assert printed["blocks"] == [4, 2]
    assert (config["model_type"], config["num_hidden_layers"]) == ("llama", 2)
    data = calibration(tmp_path)
    cases = (
        (["--blocks", "4", *data], "every block of 4"),
        (["--blocks", "1"], "--calibration FILE"),
        (["--by", "loss"], "--by is for --blocks N, --experts N"),
        (["--blocks", "1.5", *data], "wanted how many go"),
        (["--blocks", "1", "--uniform", *data], "--uniform is for heads and neurons"),
    )
    check_refused(tmp_path, cases, capsys)
