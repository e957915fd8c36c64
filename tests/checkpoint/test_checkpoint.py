"""Compressed checkpoints: what is saved comes back, however it is saved and loaded."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertModel,
    Trainer,
    TrainingArguments,
    ViTConfig,
    ViTModel,
)

import hf_sparse
from hf_sparse import FormatError, SparsityConfig
from hf_sparse.checkpoint.reading import checkpoint_files
from hf_sparse.formats import FORMATS
from tests.support.closeness import nearly_same, same
from tests.support.crosses import pairwise
from tests.support.tiny_models import CONFIGS, ENCODERS, tiny_model, tiny_tokenizer

PATTERN_OF = {"nm": "2:4", "block": "block:4x1"}


def pruned(family: str = "llama", pattern: str = "2:4", **changes: object) -> nn.Module:
    model = tiny_model(family, **changes)
    sparsity = None if ":" in pattern and pattern[0].isdigit() else 0.5
    hf_sparse.prune_(model, SparsityConfig(pattern, sparsity), "magnitude")
    return model


def config_for(pattern: str, format: str = "auto") -> SparsityConfig:
    return SparsityConfig(pattern, None if pattern[0].isdigit() else 0.5, format=format)


def load(folder: Path, family: str = "llama", **arguments: object) -> nn.Module:
    auto_class = AutoModel if family in ENCODERS else AutoModelForCausalLM
    return auto_class.from_pretrained(folder, **arguments)


def assert_same(model: nn.Module, other: nn.Module) -> None:
    first, second = model.state_dict(), other.state_dict()
    assert list(first) == list(second)
    for name, value in first.items():
        assert value.dtype == second[name].dtype, name
        assert torch.equal(value, second[name]), name


@pytest.mark.few(3)
@pairwise(
    "family, format, dtype",
    ["llama", "gpt2", "albert"],
    FORMATS,
    [torch.float32, torch.float16, torch.bfloat16],
)
def test_round_trip_is_exact(tmp_path: Path, family: str, format: str, dtype: torch.dtype) -> None:
    pattern = PATTERN_OF.get(format, "unstructured")
    model = pruned(family, pattern).to(dtype)
    hf_sparse.save_pretrained(model, tmp_path, config_for(pattern, format))
    assert_same(model, load(tmp_path, family))
    formats = (
        set() if format == "dense" else set(hf_sparse.inspect_checkpoint(tmp_path).formats.values())
    )
    assert format == "dense" or formats == {"bitmask" if format == "auto" else format}


@pytest.mark.few(2)
@pytest.mark.parametrize("family", CONFIGS)
def test_every_family_loads_as_its_sparse_class(tmp_path: Path, family: str) -> None:
    model = pruned(family)
    hf_sparse.save_pretrained(model, tmp_path, SparsityConfig("2:4"), tokenizer=tiny_tokenizer())
    loaded = load(tmp_path, family)
    assert type(loaded).__name__ == f"Sparse{type(model).__name__}"
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == f"sparse_{family}"
    assert_same(model, loaded)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert tokenizer("prose")["input_ids"] == tiny_tokenizer()("prose")["input_ids"]
    ids = torch.arange(2, 14)[None]
    with torch.no_grad():
        assert same(model(ids)[0], loaded(ids)[0])


def test_shards_load_and_hold_whole_tensors(tmp_path: Path) -> None:
    model = pruned("llama")
    hf_sparse.save_pretrained(model, tmp_path, SparsityConfig("2:4"), max_shard_size="20KB")
    files = checkpoint_files(tmp_path)
    assert len(files) > 2
    for file in files:
        names = set(load_file(file))
        assert all(name.removesuffix(".nm").removesuffix(".layout") in names for name in names)
    assert_same(model, load(tmp_path))


def test_resaving_with_fewer_shards_removes_the_old_ones(tmp_path: Path) -> None:
    model = pruned("llama")
    hf_sparse.save_pretrained(model, tmp_path, SparsityConfig("2:4"), max_shard_size="20KB")
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "checkpoint-1").mkdir()
    load(tmp_path).save_pretrained(tmp_path)
    assert [file.name for file in checkpoint_files(tmp_path)] == ["model.safetensors"]
    assert not list(tmp_path.glob("model*-of-*"))
    assert (tmp_path / "notes.txt").read_text() == "mine"
    assert (tmp_path / "checkpoint-1").is_dir()
    assert_same(model, load(tmp_path))


def test_tied_weights_are_stored_once_and_stay_tied(tmp_path: Path) -> None:
    model = pruned("llama")
    hf_sparse.save_pretrained(model, tmp_path, SparsityConfig("2:4"))
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")
    loaded = load(tmp_path)
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight


def test_a_tied_weight_can_be_a_target(tmp_path: Path) -> None:
    model = tiny_model("llama")
    config = SparsityConfig("unstructured", 0.5, targets=["lm_head"])
    hf_sparse.prune_(model, config, "magnitude")
    hf_sparse.save_pretrained(model, tmp_path, config)
    assert "model.embed_tokens.weight.bitmask" in load_file(tmp_path / "model.safetensors")
    assert_same(model, load(tmp_path))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_dtype_casts_as_for_a_dense_model(tmp_path: Path, dtype: torch.dtype) -> None:
    model = pruned("llama")
    hf_sparse.save_pretrained(model, tmp_path, SparsityConfig("2:4"))
    assert_same(model.to(dtype), load(tmp_path, dtype=dtype))


def test_half_float_and_state_dict_work_after_loading(tmp_path: Path) -> None:
    hf_sparse.save_pretrained(pruned("llama"), tmp_path / "a", SparsityConfig("2:4"))
    model = load(tmp_path / "a")
    assert model.half().dtype == torch.float16
    assert model.float().dtype == torch.float32
    other = {name: 2 * value for name, value in model.state_dict().items()}
    model.save_pretrained(tmp_path / "b", state_dict=other)
    for name, value in load(tmp_path / "b").state_dict().items():
        assert torch.equal(value, other[name])


def test_loading_leaves_a_plain_model(tmp_path: Path) -> None:
    hf_sparse.save_pretrained(pruned("llama"), tmp_path, SparsityConfig("2:4"))
    model = load(tmp_path)
    assert getattr(model, "hf_quantizer", None) is None
    assert not model.is_quantized
    assert not hasattr(model.config, "quantization_config")
    assert model.config.sparsity_config["pattern"] == "2:4"
    assert not getattr(model, "_weight_conversions", None)


@pytest.mark.parametrize("device_map", ["cpu", "auto", {"": "cpu"}])
def test_device_map(tmp_path: Path, device_map: object) -> None:
    model = pruned("llama")
    hf_sparse.save_pretrained(model, tmp_path, SparsityConfig("2:4"))
    assert_same(model, load(tmp_path, device_map=device_map))


def test_weights_on_disk_run_and_are_saved_again(tmp_path: Path) -> None:
    model = pruned("llama", tie_word_embeddings=False)
    hf_sparse.save_pretrained(model, tmp_path / "a", SparsityConfig("2:4"))
    layers = {f"model.layers.{i}": "disk" if i else "cpu" for i in range(3)}
    rest = dict.fromkeys(("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head"), "cpu")
    placed = load(
        tmp_path / "a", device_map={**layers, **rest}, offload_folder=tmp_path / "offload"
    )
    ids = torch.arange(2, 14)[None]
    with torch.no_grad():
        torch.testing.assert_close(placed(ids).logits, model(ids).logits)
    hf_sparse.save_pretrained(placed, tmp_path / "c")
    assert_same(model, load(tmp_path / "c"))
    with pytest.raises(ValueError, match="meta device"):
        hf_sparse.prune_(placed, SparsityConfig("2:4"), "magnitude")
    placed.save_pretrained(tmp_path / "b")
    assert_same(model, load(tmp_path / "b"))


def test_dense_format_loads_without_the_package(tmp_path: Path) -> None:
    model = pruned("bert")
    hf_sparse.save_pretrained(model, tmp_path, SparsityConfig("2:4", format="dense"))
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["model_type"] == "bert"
    assert "quantization_config" not in config
    assert config["architectures"] == ["BertModel"]
    assert_same(model, BertModel.from_pretrained(tmp_path))


def test_a_sparse_model_can_be_saved_dense(tmp_path: Path) -> None:
    hf_sparse.save_pretrained(pruned("bert"), tmp_path / "a", SparsityConfig("2:4"))
    model = load(tmp_path / "a", "bert")
    hf_sparse.save_pretrained(model, tmp_path / "b", SparsityConfig("2:4", format="dense"))
    config = json.loads((tmp_path / "b" / "config.json").read_text())
    assert (config["model_type"], config["architectures"]) == ("bert", ["BertModel"])
    assert "auto_map" not in config
    assert "sparsity_config" not in config
    assert type(load(tmp_path / "b", "bert")) is BertModel


def broken(folder: Path) -> nn.Module:
    """A loaded 2:4 model that training has filled."""
    hf_sparse.save_pretrained(pruned("llama"), folder, SparsityConfig("2:4"))
    loaded = load(folder)
    with torch.no_grad():
        loaded.model.layers[0].self_attn.q_proj.weight.fill_(1.0)
    return loaded


def test_a_broken_promise_is_not_saved(tmp_path: Path) -> None:
    model = broken(tmp_path / "a")
    before = (tmp_path / "a" / "model.safetensors").read_bytes()
    message = r"q_proj.weight: 256 groups have more than 2 nonzeros in 4"
    with pytest.raises(ValueError, match=message):
        hf_sparse.save_pretrained(model, tmp_path / "a", SparsityConfig("2:4"))
    assert (tmp_path / "a" / "model.safetensors").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_training_may_break_a_promise_that_nobody_repeats(tmp_path: Path) -> None:
    model = broken(tmp_path / "a")
    with pytest.warns(UserWarning, match="It is saved as 'unstructured'"):
        model.save_pretrained(tmp_path / "b")
    again = load(tmp_path / "b")
    assert_same(model, again)
    assert again.config.sparsity_config["pattern"] == "unstructured"
    sparsity = hf_sparse.measure_sparsity(model).sparsity
    assert again.config.sparsity_config["sparsity"] == pytest.approx(sparsity)


@pytest.mark.parametrize("format", ["nm", "dense"])
def test_a_broken_promise_keeps_the_format_where_it_can(tmp_path: Path, format: str) -> None:
    model = tiny_model("llama")
    hf_sparse.prune_(model, SparsityConfig("2:4", format=format), "magnitude")
    filled = {
        name: value + 0.01 if "q_proj" in name else value
        for name, value in model.state_dict().items()
    }
    with pytest.warns(UserWarning, match="It is saved as 'unstructured'"):
        hf_sparse.save_pretrained(model, tmp_path, state_dict=filled)
    model.load_state_dict(filled)
    again = load(tmp_path)
    assert_same(model, again)
    assert type(again).__name__.startswith("Sparse") == (format == "nm")


def test_a_plain_model_remembers_what_it_was_pruned_with(tmp_path: Path) -> None:
    hf_sparse.save_pretrained(pruned("llama"), tmp_path)
    assert load(tmp_path).config.sparsity_config["pattern"] == "2:4"


def test_a_checkpoint_of_another_family_is_refused(tmp_path: Path) -> None:
    hf_sparse.save_pretrained(pruned("llama"), tmp_path, SparsityConfig("2:4"))
    with pytest.raises(ValueError, match="type 'sparse_llama', but SparseBertConfig is of"):
        hf_sparse.SparseBertModel.from_pretrained(tmp_path)
    with pytest.raises(FormatError, match=r"none of the weights.*belongs to BertModel"):
        BertModel.from_pretrained(tmp_path)


def test_lost_zeros_are_warned_about(tmp_path: Path) -> None:
    model = pruned("llama", "unstructured")
    hf_sparse.save_pretrained(model, tmp_path / "a", SparsityConfig("unstructured", 0.5))
    loaded = load(tmp_path / "a")
    with torch.no_grad():
        loaded.model.layers[0].self_attn.q_proj.weight.fill_(1.0)
    with pytest.warns(UserWarning, match=r"with sparsity 0.5000, but 0.4815 is left"):
        loaded.save_pretrained(tmp_path / "b")
    assert_same(loaded, load(tmp_path / "b"))


def test_without_a_config_the_sparsity_is_measured(tmp_path: Path) -> None:
    hf_sparse.save_pretrained(pruned("llama", "unstructured"), tmp_path)
    assert load(tmp_path).config.sparsity_config["sparsity"] == 0.5


def test_a_dense_checkpoint_loads_into_a_sparse_class(tmp_path: Path) -> None:
    dense = tiny_model("bert")
    dense.save_pretrained(tmp_path / "dense")
    model = hf_sparse.SparseBertModel.from_pretrained(tmp_path / "dense")
    assert_same(dense, model)
    hf_sparse.prune_(model, SparsityConfig("2:4"), "magnitude")
    model.save_pretrained(tmp_path / "sparse")
    assert load(tmp_path / "sparse", "bert").config.sparsity_config["pattern"] == "2:4"
    assert_same(model, load(tmp_path / "sparse", "bert"))


def test_the_base_class_reads_a_compressed_checkpoint(tmp_path: Path) -> None:
    model = pruned("bert")
    hf_sparse.save_pretrained(model, tmp_path, SparsityConfig("2:4"))
    assert_same(model, BertModel.from_pretrained(tmp_path))


def test_a_base_model_loads_into_a_model_with_a_head(tmp_path: Path) -> None:
    model = pruned("bert")
    hf_sparse.save_pretrained(model, tmp_path, SparsityConfig("2:4"))
    with_head = AutoModelForSequenceClassification.from_pretrained(tmp_path, num_labels=3)
    assert type(with_head).__name__ == "SparseBertForSequenceClassification"
    assert torch.equal(
        with_head.bert.encoder.layer[1].output.dense.weight,
        model.encoder.layer[1].output.dense.weight,
    )


class Rows(torch.utils.data.Dataset):
    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        ids = torch.arange(8) + index
        return {"input_ids": ids, "labels": ids}


@pytest.mark.slow
@pytest.mark.parametrize("shard_size", [None, "20KB"])
def test_trainer_checkpoints_resume(tmp_path: Path, shard_size: str | None) -> None:
    hf_sparse.save_pretrained(
        pruned("llama", "unstructured", tie_word_embeddings=False), tmp_path / "sparse"
    )
    if shard_size:
        save = hf_sparse.SparseLlamaForCausalLM.save_pretrained

    def train(max_steps: int, resume: str | None) -> nn.Module:
        arguments = TrainingArguments(
            tmp_path / "run",
            max_steps=max_steps,
            save_steps=2,
            per_device_train_batch_size=4,
            report_to="none",
            learning_rate=1e-3,
            seed=0,
            use_cpu=True,
            disable_tqdm=True,
        )
        model = load(tmp_path / "sparse")
        if shard_size:
            model.save_pretrained = lambda folder, **kw: save(
                model, folder, **kw, max_shard_size=shard_size
            )
        Trainer(model=model, args=arguments, train_dataset=Rows()).train(
            resume_from_checkpoint=resume
        )
        return model

    with pytest.warns(UserWarning, match="training without a mask"):
        straight = train(4, None)
    config = json.loads((tmp_path / "run/checkpoint-2/config.json").read_text())
    assert config["model_type"] == "llama"  # all zeros are gone: it loads with transformers alone
    with pytest.warns(UserWarning, match="training without a mask"):
        resumed = train(4, str(tmp_path / "run/checkpoint-2"))
    for name, value in straight.state_dict().items():
        assert nearly_same(value, resumed.state_dict()[name]), name
    for name, value in load(tmp_path / "run/checkpoint-4").state_dict().items():
        assert nearly_same(value, resumed.state_dict()[name]), name


def test_load_state_dict_restores_compressed_tensors(tmp_path: Path) -> None:
    model = pruned("llama")
    hf_sparse.save_pretrained(model, tmp_path, SparsityConfig("2:4"))
    other = hf_sparse.SparseLlamaForCausalLM(hf_sparse.SparseLlamaConfig(**model.config.to_dict()))
    state_dict = load_file(tmp_path / "model.safetensors")
    other.load_state_dict(state_dict, strict=False)
    assert_same(model, other)
    state_dict["model.layers.0.mlp.up_proj.weight.nm"][0] = 255
    with pytest.raises(FormatError, match=r"model.layers.0.mlp.up_proj.weight"):
        other.load_state_dict(state_dict, strict=False)


def test_inspect_counts_what_measure_counts(tmp_path: Path) -> None:
    model = pruned("gpt2")
    hf_sparse.save_pretrained(model, tmp_path, SparsityConfig("2:4"))
    found = hf_sparse.inspect_checkpoint(tmp_path)
    measured = hf_sparse.measure_sparsity(model, SparsityConfig("2:4"))
    assert {t.name: (t.shape, t.zeros, t.violations) for t in found.report.tensors} == {
        t.name: (t.shape, t.zeros, t.violations) for t in measured.tensors
    }
    assert found.config == SparsityConfig("2:4")
    assert found.file_bytes == os.path.getsize(tmp_path / "model.safetensors")


def test_the_card_tells_only_what_is_known(tmp_path: Path) -> None:
    model = tiny_model("llama")
    model.config.name_or_path = "someone/tiny-llama"
    report = hf_sparse.prune_(model, SparsityConfig("2:4"), "magnitude")
    metrics = [hf_sparse.Metric("perplexity, prose", 12.5, 11.25), hf_sparse.Metric("other", 1.0)]
    hf_sparse.save_pretrained(
        model, tmp_path, SparsityConfig("2:4"), report=report, metrics=metrics
    )
    card = (tmp_path / "README.md").read_text()
    for text in (
        "base_model: someone/tiny-llama",
        "| method | magnitude |",
        "| pattern | 2:4 |",
        "0.5000",
        "| perplexity, prose | 11.25 | 12.5 |",
        "| other | not measured | 1 |",
        "AutoModelForCausalLM.from_pretrained",
    ):
        assert text in card, text
    load(tmp_path).save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_text() == card


def test_a_card_that_has_become_false_is_written_anew(tmp_path: Path) -> None:
    model = pruned("llama")
    hf_sparse.save_pretrained(model, tmp_path, SparsityConfig("2:4"))
    config = SparsityConfig("unstructured", 0.9)
    hf_sparse.prune_(model, config, "magnitude")
    hf_sparse.save_pretrained(model, tmp_path, config)
    assert "| pattern | unstructured |" in (tmp_path / "README.md").read_text()
    (tmp_path / "README.md").write_text("# Mine")
    hf_sparse.save_pretrained(model, tmp_path, config)
    assert (tmp_path / "README.md").read_text() == "# Mine"


def test_names_of_the_original_checkpoint_are_checked_and_restored(tmp_path: Path) -> None:
    config = ViTConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        image_size=8, patch_size=4,
    )  # fmt: skip
    model = ViTModel(config)
    with pytest.raises(ValueError, match="promises pattern '2:4'"):
        hf_sparse.save_pretrained(model, tmp_path, SparsityConfig("2:4", format="dense"))
    hf_sparse.prune_(model, SparsityConfig("2:4"), "magnitude")
    hf_sparse.save_pretrained(model, tmp_path, SparsityConfig("2:4", format="dense"))
    model.save_pretrained(tmp_path / "plain")
    names = load_file(tmp_path / "plain" / "model.safetensors").keys()
    assert load_file(tmp_path / "model.safetensors").keys() == names
    assert_same(model, AutoModel.from_pretrained(tmp_path))


def test_incomplete_state_dicts_and_unknown_arguments_are_refused(tmp_path: Path) -> None:
    model = pruned("llama")
    wrapped = {f"module.{name}": value for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=r"lacks 29 of 29 weights.*it has 'module"):
        hf_sparse.save_pretrained(model, tmp_path, SparsityConfig("2:4"), state_dict=wrapped)
    with pytest.raises(TypeError, match="no argument max_shard"):
        hf_sparse.save_pretrained(model, tmp_path, SparsityConfig("2:4"), max_shard="1GB")
    assert not list(tmp_path.iterdir())
