"""drop_hidden_: features that are zero go without a trace, and the plain models that are left."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForCausalLM, PreTrainedModel

import hf_sparse
from hf_sparse import SparsityConfig, drop_hidden_
from hf_sparse.cli import main
from hf_sparse.dropping.counts import number_of_some
from hf_sparse.provenance.record import provenance_of
from hf_sparse.structure.norms import norms_of
from hf_sparse.structure.units import find_units
from tests.support.any_models import tiny_config
from tests.support.deep_models import adapted
from tests.support.mixtures import tiny_mixture
from tests.support.plain_models import check_plain
from tests.support.tiny_models import (
    prose,
    tiny_batches,
    tiny_classifier,
    tiny_model,
    tiny_tokenizer,
)
from tests.support.unchanged import unchanged

# Of the 32 hidden features of the small models.
GONE = [1, 4, 5, 11, 17, 20, 30, 31]
KEPT = [number for number in range(32) if number not in GONE]


def model_of(family: str) -> PreTrainedModel:
    torch.manual_seed(0)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(copy.deepcopy(tiny_config(family)))
    return model.eval()


def ids() -> Tensor:
    return torch.randint(2, 250, (2, 12), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def without_features(model: Any, gone: list[int]) -> None:
    """Zero all that writes some hidden features: embeddings, and what enters the residual stream."""
    # All is large beside the eps of norms, which is added to another mean of squares afterwards.
    model.get_input_embeddings().weight.mul_(50)
    model.get_input_embeddings().weight[:, gone] = 0
    for block in model.base_model.layers:
        for name, module in block.named_modules():
            if name.endswith(("o_proj", "down_proj", "fc2", "c_proj", "self_attn.dense")):
                module.weight.mul_(50)
                module.weight[gone] = 0
                if getattr(module, "bias", None) is not None:
                    module.bias[gone] = 0
    for norm in norms_of(model, 32):
        if norm.name.endswith(("post_attention_layernorm", "post_feedforward_layernorm")):
            continue
        module: Any = norm.module
        module.weight[:] = 0.5 + torch.rand(32) - (norm.offset or 0)


@pytest.mark.few(5)
@pytest.mark.parametrize(
    "family",
    [
        *("llama", "qwen2", "qwen3", "mistral", "gemma", "gemma2", "smollm3", "phi3", "granite"),
        *("olmo2", "mixtral"),
    ],
)
def test_features_that_are_zero_go_without_a_trace(family: str) -> None:
    model = tiny_mixture("mixtral") if family == "mixtral" else model_of(family)
    without_features(model, GONE)
    if family == "mixtral":
        with torch.no_grad():
            for block in model.model.layers:  # type: ignore[union-attr, operator]
                block.mlp.experts.down_proj[:, GONE] = 0
    dense = copy.deepcopy(model)
    report = drop_hidden_(model, 8, [ids()])
    assert list(report.removed) == GONE
    assert report.size == (32, 24)
    assert report.heads[0] == report.heads[1]
    # Means of squares over all features, zeros among them, and over those that are left.
    for factor in report.gains.values():
        assert factor == pytest.approx((32 / 24) ** 0.5, rel=1e-4)
    with torch.no_grad():
        found, wanted = model(ids(), use_cache=False).logits, dense(ids(), use_cache=False).logits
    torch.testing.assert_close(found, wanted, atol=1e-3 * float(wanted.abs().max()), rtol=0)


@torch.no_grad()
def test_scores_are_the_mean_absolute_outputs_of_all_norms_but_of_padding() -> None:
    model: Any = tiny_model("llama")
    batch = tiny_batches("llama", padded=True)[0]
    mask = batch["attention_mask"].bool()
    sums = torch.zeros(model.config.hidden_size, dtype=torch.float64)
    for norm in [n for n in model.modules() if type(n).__name__ == "LlamaRMSNorm"]:
        seen: list[Tensor] = []
        hook = norm.register_forward_hook(lambda _, args, out, seen=seen: seen.append(out))
        model(**batch)
        hook.remove()
        sums += seen[0][mask].double().abs().mean(dim=0)
    report = drop_hidden_(model, 0.25, [batch])
    torch.testing.assert_close(torch.tensor(report.scores).double(), sums, atol=1e-6, rtol=1e-5)
    lowest = set(sums.argsort()[: len(report.removed)].tolist())
    assert set(report.removed) == lowest


@torch.no_grad()
def test_gains_keep_the_scale_of_what_norms_give() -> None:
    model: Any = model_of("llama")
    before = copy.deepcopy(model)
    report = drop_hidden_(model, 8, [ids()])
    left = [number for number in range(32) if number not in report.removed]
    norm, was = model.model.layers[0].input_layernorm, before.model.layers[0].input_layernorm
    entered = before.model.embed_tokens(ids())
    squares = entered.double().square()
    factor = (squares[..., left].mean(-1) / squares.mean(-1)).mean().sqrt()
    torch.testing.assert_close(norm.weight, was.weight[left] * float(factor), atol=1e-5, rtol=1e-4)
    assert report.gains["model.layers.0.input_layernorm"] == pytest.approx(float(factor), rel=1e-4)


@torch.no_grad()
def test_what_a_norm_multiplies_by_is_told_by_what_it_does() -> None:
    told = {
        "llama": (False, 0.0),
        "gemma": (False, 1.0),
        "opt": (True, 0.0),
        "gpt2": (True, 0.0),
        "cohere": (True, 0.0),
    }
    for family, expected in told.items():
        for norm in norms_of(model_of(family), 32):
            assert (norm.centred, norm.offset) == expected, norm.name


@pytest.mark.slow
def test_heads_go_along_where_their_size_follows_from_the_hidden_size() -> None:
    for family in ("gpt2", "opt", "bert"):
        model: Any = tiny_classifier() if family == "bert" else model_of(family)
        hidden, heads = model.config.hidden_size, model.config.num_attention_heads
        head = hidden // heads
        was = copy.deepcopy(model)
        report = drop_hidden_(model, head, [ids()])
        assert report.size == (hidden, hidden - head)
        assert report.heads == (heads, heads - 1)
        assert {units.size.heads for units in find_units(model)} == {heads - 1}
        left = [number for number in range(hidden) if number not in report.removed]
        embeddings = was.get_input_embeddings().weight
        torch.testing.assert_close(model.get_input_embeddings().weight, embeddings[:, left])
        with pytest.raises(ValueError, match=f"multiple of {head}.* nearest .* is {hidden - head}"):
            drop_hidden_(was, head + 1, [ids()])


@pytest.mark.slow
def test_what_is_left_loads_and_generates_without_the_package(tmp_path: Path) -> None:
    models: dict[str, Any] = {
        "llama": model_of("llama"),
        "gemma2": model_of("gemma2"),
        "qwen2": model_of("qwen2"),
        "gpt2": model_of("gpt2"),
        "opt": model_of("opt"),
        "bert": tiny_classifier(),
    }
    generated = {}
    for family, model in models.items():
        tied = model.get_output_embeddings()
        tied = tied is not None and tied.weight is model.get_input_embeddings().weight
        drop_hidden_(model, 0.25, [ids()])
        head = model.get_output_embeddings()
        assert tied == (head is not None and head.weight is model.get_input_embeddings().weight)
        with torch.no_grad():
            expected = {"input_ids": ids(), "output": model(input_ids=ids())[0]}
        save_file(expected, tmp_path / f"{family}.safetensors")
        hf_sparse.save_pretrained(model, tmp_path / family)
        settings: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 1}
        if family != "bert":
            generated[family] = model.generate(ids(), **settings).tolist()
    check_plain(tmp_path, models, generated)
    assert provenance_of(models["llama"]).steps[-1].method == "drop_hidden"
    card = (tmp_path / "llama" / "README.md").read_text()
    assert "drop_hidden" in card
    assert "24 of 32" in card


def pruned() -> PreTrainedModel:
    model = model_of("llama")
    hf_sparse.prune_(model, SparsityConfig("2:4"), "magnitude")
    return model


def on_a_grid() -> PreTrainedModel:
    model = model_of("llama")
    hf_sparse.quantize_(model, SparsityConfig("unstructured", 0.0, bits=8, format="dense"))
    return model


def nine_heads() -> PreTrainedModel:
    return tiny_model("llama", hidden_size=72, num_attention_heads=9, num_key_value_heads=3)


def shrunk() -> PreTrainedModel:
    model: Any = model_of("llama")
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight[:, :5] = 0
    hf_sparse.shrink_(model)
    return model


REFUSED: list[tuple[Any, dict[str, Any], str]] = [
    (lambda: model_of("llama"), {"count": 32}, "every hidden feature of 32"),
    (lambda: model_of("llama"), {"count": 0}, "no hidden feature of 32"),
    (lambda: model_of("llama"), {"count": 1.5}, r"count is 1\.5; wanted at most 31"),
    (lambda: model_of("llama"), {"count": "2"}, "count is '2'"),
    (lambda: model_of("llama"), {"batches": []}, "needs calibration data"),
    (lambda: model_of("bloom"), {}, "config of type 'bloom'"),
    (lambda: adapted(model_of("llama")), {}, "has adapters"),
    (pruned, {}, "promises zeros of pattern '2:4'"),
    (on_a_grid, {}, "grid of 8 bits"),
    (nine_heads, {}, r"nearest hidden size that it can tell is 63 \(remove 9\)"),
    (shrunk, {}, "sizes of their own"),
    (lambda: model_of("llama").to("meta"), {}, "meta device"),
    (lambda: nn.Linear(2, 2), {}, "takes a transformers model"),
]


@pytest.mark.few(2)
@pytest.mark.parametrize(("make", "changes", "message"), REFUSED, ids=[row[2] for row in REFUSED])
def test_it_is_refused_before_work(make: Any, changes: dict[str, Any], message: str) -> None:
    model = make()
    arguments = {"count": 8, "batches": [ids()], **changes}
    with unchanged(model), pytest.raises(ValueError, match=message):
        drop_hidden_(model, **arguments)


def test_encoders_and_numbers_of_features() -> None:
    assert [number_of_some(count, 576, "hidden feature") for count in (1, 64, 0.25)] == [1, 64, 144]
    torch.manual_seed(0)
    model = AutoModel.from_config(copy.deepcopy(tiny_config("modernbert"))).eval()
    hidden = model.config.hidden_size
    heads = model.config.num_attention_heads
    with pytest.raises(ValueError, match="hidden size"):
        drop_hidden_(model, hidden // heads + 1, [ids()])


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    hf_sparse.save_pretrained(tiny_model("llama"), tmp_path / "dense", tokenizer=tiny_tokenizer())
    (tmp_path / "text.txt").write_text(prose()[:4000])
    names = [str(tmp_path / "dense"), str(tmp_path / "small")]
    data = ["--calibration", str(tmp_path / "text.txt"), "--num-samples", "2", "--window", "16"]
    assert main(["shrink", *names, "--hidden", "0.25", *data, "--json"]) == 0
    before, after = json.loads(capsys.readouterr().out)["size"]
    assert after == before - before // 4
    config = json.loads((tmp_path / "small" / "config.json").read_text())
    assert (config["model_type"], config["hidden_size"]) == ("llama", after)
    for arguments, message in (
        (["--hidden", str(before), *data], f"--hidden is {before}, which is every"),
        (["--hidden", "8"], "--hidden looks at data"),
        (["--hidden", "8", "--by", "loss", *data], "--by is for blocks and experts"),
        (["--hidden", "8", "--merge", *data], "--merge is for --experts"),
    ):
        assert main(["shrink", names[0], str(tmp_path / "none"), *arguments]) == 1
        assert message in capsys.readouterr().err
    assert not (tmp_path / "none").exists()
