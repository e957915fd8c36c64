"""Checkpoints whose config.json and files do not belong together: refused, never a wrong model."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    BertForMaskedLM,
    BertModel,
)

import hf_sparse
from hf_sparse import FormatError, SparsityConfig
from hf_sparse.checkpoint import reading
from tests.support.tiny_models import CONFIGS, tiny_batches, tiny_model

READERS = (AutoModelForCausalLM.from_pretrained, hf_sparse.inspect_checkpoint)


def saved(folder: Path, family: str = "llama", pattern: str = "2:4", **saving: Any) -> Path:
    changes = {key: saving.pop(key) for key in ("tie_word_embeddings",) if key in saving}
    seed = saving.pop("seed", 0)
    model = tiny_model(family, seed, **changes)
    config = SparsityConfig(pattern, 0.5)
    hf_sparse.prune_(model, config, "magnitude")
    return hf_sparse.save_pretrained(model, folder, config, **saving)


def change_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def change_json(file: Path, change: Callable[[dict[str, Any]], object]) -> None:
    values = json.loads(file.read_text())
    change(values)
    file.write_text(json.dumps(values))


def drop(prefix: str) -> Callable[[dict[str, torch.Tensor]], object]:
    def apply(tensors: dict[str, torch.Tensor]) -> None:
        names = [name for name in tensors if name.startswith(prefix)]
        assert names
        for name in names:
            del tensors[name]

    return apply


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.1.mlp.up_proj.weight",  # with its layout and positions
        "model.layers.0.input_layernorm.weight",
        "model.embed_tokens.weight",
        "model.norm.weight",
        "lm_head.weight",
    ],
)
def test_whole_tensors_that_are_missing_are_named(tmp_path: Path, name: str) -> None:
    folder = saved(tmp_path / "model", tie_word_embeddings=False)
    change_tensors(folder, drop(name))
    for read in READERS:
        with pytest.raises(FormatError, match=f"lacks 1 tensors of the LlamaForCausalLM.*{name}"):
            read(folder)


@pytest.mark.few(4)
@pytest.mark.parametrize("family", sorted(CONFIGS))
def test_another_number_of_blocks_is_refused(tmp_path: Path, family: str) -> None:
    folder = saved(tmp_path / "model", family)
    config = folder / "config.json"
    original = config.read_text()
    key = {"gpt2": "n_layer", "albert": "num_hidden_groups"}.get(family, "num_hidden_layers")
    auto_class = AutoModel if family in ("bert", "albert") else AutoModelForCausalLM
    stored = json.loads(original)[key]
    # A hundred million blocks would take hours to build before anything is compared.
    for wanted in (stored + 1, stored - 1, 10**8, "3", None):
        change_json(config, lambda values, wanted=wanted: values.update({key: wanted}))
        with pytest.raises(FormatError, match=f"has {key}=.*but {stored} are stored"):
            hf_sparse.inspect_checkpoint(folder)
        if isinstance(wanted, int) and wanted < 10**8:
            with pytest.raises(FormatError, match=f"has {key}={wanted}, but {stored} are stored"):
                auto_class.from_pretrained(folder)
        config.write_text(original)
    change_json(
        config, lambda values: values.pop({"gpt2": "n_layer"}.get(family, "num_hidden_layers"))
    )
    for read in (auto_class.from_pretrained, hf_sparse.inspect_checkpoint):
        with pytest.raises(FormatError, match=r"config.json has no n"):
            read(folder)


@pytest.mark.few(3)
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": 64}, "shape mismatch"),
        ({"vocab_size": 12_000_000}, r"embed_tokens.*\(256, 32\) is stored.*\(12000000, 32\)"),
        ({"intermediate_size": 32}, "shape mismatch"),
        ({"num_key_value_heads": 4}, "shape mismatch"),
        ({"attention_bias": True}, "lacks 12 tensors.*q_proj.bias"),
        ({"tie_word_embeddings": False}, "lacks 1 tensors.*lm_head.weight"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "lacks 1 tensors.*score.weight"),
        ({"model_type": "sparse_nothing"}, "model_type is 'sparse_nothing'"),
        ({"rope_parameters": 3}, "describes no model"),
    ],
)
def test_configs_of_another_model_are_refused(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    folder = saved(tmp_path / "model")
    change_json(folder / "config.json", lambda values: values.update(changes))
    with pytest.raises(FormatError, match=message):
        hf_sparse.inspect_checkpoint(folder)
    if "model_type" not in changes and "rope_parameters" not in changes:  # transformers' own errors
        with pytest.raises(FormatError, match=message):
            AutoModelForCausalLM.from_pretrained(folder)


def test_biases_that_the_config_does_not_want_are_refused(tmp_path: Path) -> None:
    model = tiny_model("llama", attention_bias=True)
    folder = hf_sparse.save_pretrained(
        model, tmp_path / "model", SparsityConfig("unstructured", 0.0)
    )
    change_json(folder / "config.json", lambda values: values.update(attention_bias=False))
    for read in READERS:
        with pytest.raises(FormatError, match=r"_proj.bias.*has no such tensor"):
            read(folder)


def test_heads_may_be_new_and_missing_blocks_may_not(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = SparsityConfig("2:4")
    base = BertModel(CONFIGS["bert"]).eval()
    hf_sparse.prune_(base, config, "magnitude")
    folder = hf_sparse.save_pretrained(base, tmp_path / "base", config)
    weight = base.encoder.layer[2].output.dense.weight
    classifier = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=5)
    assert classifier.classifier.weight.shape == (5, 32)
    assert torch.equal(classifier.bert.encoder.layer[2].output.dense.weight, weight)

    # A checkpoint of a masked language model has no pooler; the classes that have one make it anew.
    masked = BertForMaskedLM(CONFIGS["bert"]).eval()
    hf_sparse.prune_(masked, config, "magnitude")
    folder = hf_sparse.save_pretrained(masked, tmp_path / "masked", config)
    weight = masked.bert.encoder.layer[2].output.dense.weight
    for auto_class in (AutoModel, AutoModelForSequenceClassification, AutoModelForMaskedLM):
        loaded = auto_class.from_pretrained(folder)
        found = loaded.base_model.encoder.layer[2].output.dense.weight
        assert torch.equal(found, weight)
    crossed = hf_sparse.SparseBertLMHeadModel.from_pretrained(
        folder, add_cross_attention=True, is_decoder=True
    )
    assert torch.equal(crossed.bert.encoder.layer[2].output.dense.weight, weight)
    with pytest.raises(FormatError, match=r"encoder.layer.3.*no tensor is stored"):
        AutoModel.from_pretrained(folder, num_hidden_layers=5)


def test_dense_checkpoints_start_sparse_classes(tmp_path: Path) -> None:
    model = tiny_model("bert")
    model.save_pretrained(tmp_path)
    loaded = hf_sparse.SparseBertForSequenceClassification.from_pretrained(tmp_path)
    wanted = model.encoder.layer[0].output.dense.weight
    assert torch.equal(loaded.bert.encoder.layer[0].output.dense.weight, wanted)


@pytest.mark.filterwarnings("ignore:.*which transformers does not have")
def test_a_class_of_ones_own_loads(tmp_path: Path) -> None:
    folder = saved(tmp_path / "model")
    change_json(folder / "config.json", lambda values: values.update(architectures=["MyOwn"]))
    for read in READERS:
        read(folder)
    change_tensors(folder, drop("model.layers.1.mlp.up_proj.weight"))
    for read in READERS:
        with pytest.raises(FormatError, match=r"layers.1.mlp.up_proj.weight"):
            read(folder)


def test_a_compressed_tensor_under_a_dense_config_is_refused(tmp_path: Path) -> None:
    folder = saved(tmp_path / "model")
    change_json(folder / "config.json", lambda values: values.pop("quantization_config"))
    with pytest.raises(FormatError, match="is compressed, but the quantization_config"):
        hf_sparse.inspect_checkpoint(folder)


@pytest.mark.parametrize("format", ["gap4", "gap8"])
def test_a_layout_cannot_ask_for_memory(tmp_path: Path, format: str) -> None:
    model = tiny_model("llama")
    config = SparsityConfig("unstructured", 0.9, format=format)
    hf_sparse.prune_(model, config, "magnitude")
    folder = hf_sparse.save_pretrained(model, tmp_path / "model", config)
    name = "model.layers.0.mlp.up_proj.weight.layout"
    change_tensors(folder, lambda t: t.update({name: torch.tensor([2**20, 2**20, 0])}))
    for read in READERS:  # 4 TB
        with pytest.raises(FormatError, match="shape mismatch"):
            read(folder)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("pattern", ["2:4", "block:4x4"])
def test_a_layout_in_the_wrong_direction_is_refused(
    tmp_path: Path, family: str, pattern: str
) -> None:
    folder = saved(tmp_path / "model", family, pattern)
    layer = "transformer.h.0.attn.c_proj" if family == "gpt2" else "model.layers.0.self_attn.o_proj"

    def flip(tensors: dict[str, torch.Tensor]) -> None:  # of a square weight
        layout = tensors[f"{layer}.weight.layout"]
        layout[2] = 1 - layout[2]

    change_tensors(folder, flip)
    for read in READERS:
        with pytest.raises(FormatError, match=rf"{layer}.*transposed=.*its layer wants"):
            read(folder)


def test_the_promise_holds_for_other_formats_and_for_dense_weights(tmp_path: Path) -> None:
    """A block layout of 2 x 4 has the parameters of 2:4, and a dense weight has none."""
    name = "model.layers.0.self_attn.o_proj.weight"
    weight = tiny_model("llama").state_dict()[name]
    as_block = hf_sparse.formats.compress(weight, "block", hf_sparse.patterns.Block(2, 4))
    for parts in (as_block, {"": weight}):
        folder = saved(tmp_path / "model")

        def exchange(tensors: dict[str, torch.Tensor], parts: Any = parts) -> None:
            drop(name)(tensors)
            tensors |= {f"{name}.{part}".rstrip("."): value for part, value in parts.items()}

        change_tensors(folder, exchange)
        with pytest.raises(FormatError, match=f"{name}.*promises pattern '2:4'"):
            AutoModelForCausalLM.from_pretrained(folder)
        assert hf_sparse.inspect_checkpoint(folder).config is not None


def test_shards_of_two_saves_are_refused(tmp_path: Path) -> None:
    old = saved(tmp_path / "old", seed=0, max_shard_size="20KB")
    new = saved(tmp_path / "new", seed=1, max_shard_size="20KB")
    again = saved(tmp_path / "again", seed=0, max_shard_size="20KB")
    shards = sorted(path.name for path in old.glob("*.safetensors"))
    for name in (*shards, "model.safetensors.index.json"):  # equal models are equal files
        assert (old / name).read_bytes() == (again / name).read_bytes()
    for shard in (shards[0], shards[-1]):
        mixed = Path(shutil.copytree(old, tmp_path / f"mixed-{shard}"))
        shutil.copy(new / shard, mixed)
        for read in READERS:
            with pytest.raises(FormatError, match=f"{shard} is not the shard"):
                read(mixed)
    shutil.copy(new / "model.safetensors.index.json", again)
    for read in READERS:
        with pytest.raises(FormatError, match="different saves"):
            read(again)


def test_digests_are_those_of_the_specification(tmp_path: Path) -> None:
    folder = saved(tmp_path / "model", max_shard_size="20KB")
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    digests = index["metadata"]["hf_sparse_digests"]
    assert digests.keys() == set(index["weight_map"].values())
    for name, digest in digests.items():
        with safe_open(folder / name, "pt") as reader:
            assert reader.metadata() == {"format": "pt", "hf_sparse_digest": digest}
        text = b""
        for key, tensor in sorted(load_file(folder / name).items()):
            text += f"{key} {tensor.dtype} {tuple(tensor.shape)}\n".encode()
            text += tensor.numpy().tobytes()
        assert hashlib.sha256(text).hexdigest() == digest


def test_shards_without_digests_load(tmp_path: Path) -> None:
    """Saves of earlier versions have none."""
    folder = saved(tmp_path / "model", max_shard_size="20KB")
    wanted = AutoModelForCausalLM.from_pretrained(folder).state_dict()
    for shard in folder.glob("*.safetensors"):
        save_file(load_file(shard), shard, metadata={"format": "pt"})
    with pytest.raises(FormatError, match="digest None"):
        AutoModelForCausalLM.from_pretrained(folder)
    index = folder / "model.safetensors.index.json"
    change_json(index, lambda values: values["metadata"].pop("hf_sparse_digests"))
    found = AutoModelForCausalLM.from_pretrained(folder).state_dict()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    (folder / "model-00009-of-00009.safetensors").write_bytes(b"no shard of this model")
    assert hf_sparse.inspect_checkpoint(folder).config is not None


def test_a_tensor_in_two_shards_is_refused(tmp_path: Path) -> None:
    folder = saved(tmp_path / "model", max_shard_size="20KB")
    index = folder / "model.safetensors.index.json"
    change_json(index, lambda values: values["metadata"].pop("hf_sparse_digests"))
    first, *_, last = sorted(folder.glob("*.safetensors"))
    for shard in folder.glob("*.safetensors"):
        tensors = load_file(shard) | (load_file(last) if shard == first else {})
        save_file(tensors, shard, metadata={"format": "pt"})
    for read in READERS:
        with pytest.raises(FormatError, match=f"{first.name} has it, too"):
            read(folder)


def test_a_single_file_beside_shards_is_refused(tmp_path: Path) -> None:
    folder = saved(tmp_path / "model", max_shard_size="20KB")
    shutil.copy(saved(tmp_path / "other", seed=1) / "model.safetensors", folder)
    for read in READERS:
        with pytest.raises(FormatError, match="weights of two saves"):
            read(folder)


@pytest.mark.few(1)
@pytest.mark.parametrize("sharded", [False, True])
def test_a_checkpoint_that_is_replaced_while_it_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sharded: bool
) -> None:
    size = "20KB" if sharded else "5GB"
    folder = saved(tmp_path / "model", max_shard_size=size)
    for module, read in zip(("quantizer", "inspect"), READERS, strict=True):
        other = tiny_model("llama", 1)

        def exchange(files: Any, other: Any = other) -> Any:
            tensors = reading.read_headers(files)
            hf_sparse.save_pretrained(
                other, folder, SparsityConfig("unstructured", 0.0), max_shard_size=size
            )
            return tensors

        with monkeypatch.context() as patch:
            patch.setattr(f"hf_sparse.checkpoint.{module}.read_headers", exchange)
            with pytest.raises(FormatError):
                read(folder)
        read(folder)
        saved(tmp_path / "model", max_shard_size=size)


def test_a_dense_source_that_lacks_weights_is_not_streamed(tmp_path: Path) -> None:
    tiny_model("llama").save_pretrained(tmp_path / "dense")
    change_tensors(tmp_path / "dense", drop("model.layers.1.mlp.up_proj.weight"))
    with pytest.raises(FormatError, match="lacks 1 weights of the LlamaForCausalLM"):
        hf_sparse.prune_checkpoint(
            tmp_path / "dense",
            tmp_path / "out",
            SparsityConfig("2:4"),
            batches=tiny_batches("llama"),
        )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dense"]


@pytest.mark.few(2)
@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.complex64])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_parameters_that_are_no_floats_are_refused(
    tmp_path: Path, family: str, dtype: torch.dtype
) -> None:
    folder = saved(tmp_path / "model", family)
    [norm, *_] = [
        name for name in load_file(folder / "model.safetensors") if "norm" in name or "ln_1" in name
    ]
    change_tensors(folder, lambda tensors: tensors.update({norm: tensors[norm].to(dtype)}))
    for read in (AutoModelForCausalLM.from_pretrained, hf_sparse.inspect_checkpoint):
        with pytest.raises(FormatError, match=f"{norm} in .*wants floats"):
            read(folder)
