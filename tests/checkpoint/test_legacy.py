"""Old compressed-tensors checkpoints, written here by an encoder of our own."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    PreTrainedModel,
)

from hf_sparse import FormatError, SparsityConfig, convert_legacy, inspect_checkpoint
from hf_sparse.checkpoint.legacy import _decode
from hf_sparse.patterns import NM
from tests.support.closeness import same

SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
# 20 and 12 columns: the bitmasks have rows that do not fill their last byte.
SIZES = {
    "vocab_size": 40,
    "hidden_size": 20,
    "intermediate_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 10,
    "max_position_embeddings": 16,
}
Q_PROJ = "model.layers.0.self_attn.q_proj"
Parts = dict[str, Tensor]


def encode(weight: Tensor, layout: str) -> Parts:
    """The parts of a weight, by plain arithmetic on the definition of the layout."""
    kept = weight != 0
    if layout == "sparse-24-bitmask":  # two in each four, zeros where there are fewer nonzeros
        groups = kept.reshape(-1, 4)
        order = torch.argsort(groups.int(), dim=1, descending=True, stable=True)
        kept = torch.zeros_like(groups).scatter(1, order[:, :2], True).reshape(weight.shape)
    columns = weight.shape[-1]
    padded = torch.nn.functional.pad(kept.int(), (0, -columns % 8))
    worth = 2 ** torch.arange(8)
    packed = (padded.reshape(*weight.shape[:-1], -1, 8) * worth).sum(dim=-1).to(torch.uint8)
    parts = {"shape": torch.tensor(weight.shape), "compressed": weight[kept], "bitmask": packed}
    if layout == "sparse-24-bitmask":
        parts["shape"] = parts["shape"].reshape(-1, 1)
        parts["compressed"] = parts["compressed"].reshape(weight.shape[0], columns // 2)
    else:
        counts = kept.sum(dim=-1)
        parts["row_offsets"] = torch.cumsum(counts, 0) - counts
    return parts


def sparse_llama(
    pattern: str = "unstructured", dtype: torch.dtype = torch.float32, **config: Any
) -> LlamaForCausalLM:
    """A small model whose blocks are half zeros."""
    torch.manual_seed(0)
    model: LlamaForCausalLM = AutoModelForCausalLM.from_config(
        LlamaConfig(**{**SIZES, **config}), dtype=dtype
    )
    for name, parameter in model.named_parameters():
        parameter.data.copy_(torch.randn(parameter.shape))
        if name.endswith("proj.weight"):
            scores = torch.rand(parameter.shape)
            keep = NM(2, 4).keep(scores, 0.5) if pattern == "2:4" else scores > 0.5
            parameter.data[~keep] = 0.0
    return model


def write_legacy(
    folder: Path,
    model: PreTrainedModel,
    layout: str = "sparse-bitmask",
    structure: str = "unstructured",
    *,
    encoded: Callable[[str], bool] = lambda name: name.endswith("proj.weight"),
    sharded: bool = False,
    first_release: bool = False,
) -> Path:
    """Write a model as llm-compressor did."""
    folder.mkdir()
    tensors: Parts = {}
    tied = model.config.tie_word_embeddings
    for name, tensor in model.state_dict().items():
        if tied and name == "lm_head.weight":
            continue
        if layout == "dense" or not encoded(name):
            tensors[name] = tensor.clone()
            continue
        prefix = name if first_release else name.removesuffix(".weight")
        for part, value in encode(tensor, layout).items():
            tensors[f"{prefix}.{part}"] = value
    if sharded:  # every second key: the parts of a weight are in different files
        where = {key: SHARDS[number % 2] for number, key in enumerate(sorted(tensors))}
        for shard in SHARDS:
            part_of = {key: tensors[key] for key in tensors if where[key] == shard}
            save_file(part_of, folder / shard, metadata={"format": "pt"})
        index = {"metadata": {}, "weight_map": where}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    else:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads(model.config.to_json_string())
    config |= {"architectures": [type(model).__name__]}
    config["torch_dtype"] = str(config.pop("dtype", model.dtype)).removeprefix("torch.")
    config["compression_config" if first_release else "quantization_config"] = {
        "quant_method": "compressed-tensors",
        "version": "0.9.0",
        "sparsity_config": {
            "format": layout,
            "global_sparsity": 0.4,
            "ignore": ["lm_head"],
            "registry_requires_subclass": False,
            "sparsity_structure": structure,
            "targets": ["Linear"],
        },
    }
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def edit_config(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    config = json.loads((folder / "config.json").read_text())
    change(config)
    (folder / "config.json").write_text(json.dumps(config))


def edit_tensors(folder: Path, change: Callable[[Parts], None]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*.*")}


def same_bits(model: PreTrainedModel, other: PreTrainedModel) -> bool:
    mine, others = model.state_dict(), other.state_dict()
    return mine.keys() == others.keys() and all(
        tensor.dtype == others[name].dtype
        and torch.equal(tensor.view(torch.uint8), others[name].view(torch.uint8))
        for name, tensor in mine.items()
    )


def logits(model: PreTrainedModel) -> Tensor:
    with torch.no_grad():
        return model.eval()(torch.arange(12)[None]).logits


def test_layout_in_golden_bytes() -> None:
    weight = torch.tensor([[1.0, 0, 0, 2, 0, 0, 0, 0, 3], [0] * 9, [0, -4, 0, 0, 0, 0, 0, 5, 0]])
    parts = {
        "shape": torch.tensor([3, 9]),
        "compressed": torch.tensor([1.0, 2, 3, -4, 5]),
        "bitmask": torch.tensor([[0b1001, 1], [0, 0], [0b10000010, 0]], dtype=torch.uint8),
        "row_offsets": torch.tensor([0, 3, 3]),
    }
    assert torch.equal(_decode(parts, (3, 9)), weight)
    for part, value in encode(weight, "sparse-bitmask").items():
        assert torch.equal(value, parts[part])


def test_24_layout_in_golden_bytes() -> None:
    weight = torch.tensor([[1.0, 0, 0, 2, 0, 0, 0, 0], [0, 3, 0, 0, 0, 0, 4, 5]])
    parts = {
        "shape": torch.tensor([[2], [8]]),
        "compressed": torch.tensor([[1.0, 2, 0, 0], [0, 3, 4, 5]]),
        "bitmask": torch.tensor([[0b00111001], [0b11000011]], dtype=torch.uint8),
    }
    assert torch.equal(_decode(parts, (2, 8)), weight)
    for part, value in encode(weight, "sparse-24-bitmask").items():
        assert torch.equal(value, parts[part])


@pytest.mark.few(2)
@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("layout", "structure"),
    [
        ("sparse-bitmask", "unstructured"),
        ("sparse-bitmask", "2:4"),
        ("sparse-24-bitmask", "2:4"),
        ("dense", "0:0"),
        ("dense", "2:4"),
    ],
)
def test_same_weights_and_logits(
    layout: str, structure: str, dtype: torch.dtype, sharded: bool, tmp_path: Path
) -> None:
    model = sparse_llama(structure, dtype)
    old = write_legacy(tmp_path / "old", model, layout, structure, sharded=sharded)
    before = contents(old)
    new = convert_legacy(old, tmp_path / "new")
    assert new == tmp_path / "new"
    loaded = AutoModelForCausalLM.from_pretrained(new)
    assert type(loaded).__name__ == "SparseLlamaForCausalLM"
    assert same_bits(model, loaded)
    assert same(logits(model), logits(loaded), rtol=1e-3, atol=1e-3)
    assert contents(old) == before
    config = inspect_checkpoint(new).config
    assert config is not None
    assert str(config.pattern) == ("2:4" if structure == "2:4" else "unstructured")
    blocks = [t for name, t in model.state_dict().items() if name.endswith("proj.weight")]
    zeros = sum(int((block == 0).sum()) for block in blocks)
    assert config.sparsity == pytest.approx(zeros / sum(block.numel() for block in blocks))


@pytest.mark.parametrize("tied", [False, True])
def test_first_releases_stored_every_tensor_compressed(tied: bool, tmp_path: Path) -> None:
    model = sparse_llama(tie_word_embeddings=tied, attention_bias=True)
    old = write_legacy(tmp_path / "old", model, encoded=lambda name: True, first_release=True)
    keys = load_file(old / "model.safetensors")
    assert f"{Q_PROJ}.bias.bitmask" in keys
    assert keys["model.norm.weight.row_offsets"].shape == ()
    loaded = AutoModelForCausalLM.from_pretrained(convert_legacy(old, tmp_path / "new"))
    assert same_bits(model, loaded)
    assert same(logits(model), logits(loaded), rtol=1e-3, atol=1e-3)


def test_transposed_weights_of_another_family(tmp_path: Path) -> None:
    torch.manual_seed(0)
    sizes = {"vocab_size": 40, "n_positions": 16, "n_embd": 20, "n_layer": 2, "n_head": 2}
    model = GPT2LMHeadModel(GPT2Config(**sizes))
    for block in model.transformer.h:
        for layer in (block.attn.c_attn, block.attn.c_proj, block.mlp.c_fc, block.mlp.c_proj):
            weight = layer.weight.data.T  # (out_features, in_features)
            weight[~NM(2, 4).keep(torch.rand(weight.shape), 0.5)] = 0.0
    old = write_legacy(
        tmp_path / "old", model, structure="2:4", encoded=lambda name: "h.0.mlp" in name
    )
    edit_config(old, lambda c: c["quantization_config"]["sparsity_config"].update(ignore=None))
    loaded = AutoModelForCausalLM.from_pretrained(convert_legacy(old, tmp_path / "new"))
    assert type(loaded).__name__ == "SparseGPT2LMHeadModel"
    assert same_bits(model, loaded)
    config = inspect_checkpoint(tmp_path / "new").config
    assert config is not None
    assert str(config.pattern) == "2:4"


def test_stock_transformers_gives_random_weights_without_an_error(tmp_path: Path) -> None:
    """What the conversion is for. The newer key asks for a package that does no better."""
    model = sparse_llama()
    old = write_legacy(tmp_path / "old", model, first_release=True)
    loaded = AutoModelForCausalLM.from_pretrained(old)
    assert type(loaded) is LlamaForCausalLM
    assert not same_bits(model, loaded)
    assert (loaded.get_submodule(Q_PROJ).weight == 0).float().mean() < 0.01
    fixed = AutoModelForCausalLM.from_pretrained(convert_legacy(old, tmp_path / "new"))
    assert same_bits(model, fixed)


def test_dense_output_loads_as_the_base_class(tmp_path: Path) -> None:
    model = sparse_llama()
    old = write_legacy(tmp_path / "old", model)
    new = convert_legacy(old, tmp_path / "new", format="dense")
    config = json.loads((new / "config.json").read_text())
    assert config["model_type"] == "llama"
    assert "quantization_config" not in config
    loaded = AutoModelForCausalLM.from_pretrained(new)
    assert type(loaded) is LlamaForCausalLM
    assert same_bits(model, loaded)


def test_output_is_no_larger(tmp_path: Path) -> None:
    model = sparse_llama("2:4", torch.bfloat16, hidden_size=64, intermediate_size=256)
    old = write_legacy(tmp_path / "old", model, "sparse-24-bitmask", "2:4")
    new = convert_legacy(old, tmp_path / "new")
    assert set(inspect_checkpoint(new).formats.values()) == {"nm"}
    sizes = [(folder / "model.safetensors").stat().st_size for folder in (old, new)]
    assert sizes[1] < sizes[0]


def test_small_files_are_copied_and_code_is_not(tmp_path: Path) -> None:
    old = write_legacy(tmp_path / "old", sparse_llama())
    copied = {
        "generation_config.json": b'{"eos_token_id": 7}',
        "tokenizer.json": b"{}",
        "tokenizer.model": b"\x00sentencepiece",
        "tokenizer_config.json": b"{}",
        "special_tokens_map.json": b"{}",
        "vocab.json": b"{}",
        "merges.txt": b"a b",
        "chat_template.jinja": b"{{ messages }}",
    }
    left = {"tokenizer_evil.py": b"1/0", "vocab.pkl": b"x", "recipe.yaml": b"x"}
    for name, data in {**copied, **left}.items():
        (old / name).write_bytes(data)
    new = convert_legacy(old, tmp_path / "new")
    assert {name: (new / name).read_bytes() for name in copied} == copied
    assert not any((new / name).exists() for name in left)


def test_layers_stored_whole_are_ignored(tmp_path: Path) -> None:
    model = sparse_llama("2:4")
    model.get_submodule(Q_PROJ).weight.data.fill_(1.5)
    old = write_legacy(
        tmp_path / "old",
        model,
        "sparse-24-bitmask",
        "2:4",
        encoded=lambda name: name.endswith("proj.weight") and not name.startswith(Q_PROJ),
    )
    new = convert_legacy(old, tmp_path / "new")
    config = inspect_checkpoint(new).config
    assert config is not None
    assert config.ignore == (Q_PROJ,)
    assert same_bits(model, AutoModelForCausalLM.from_pretrained(new))


def test_ignore_of_the_old_config_counts(tmp_path: Path) -> None:
    model = sparse_llama("2:4")
    model.get_submodule(Q_PROJ).weight.data.fill_(1.5)
    old = write_legacy(tmp_path / "old", model, "dense", "2:4")
    with pytest.raises(FormatError, match=rf"{Q_PROJ}.weight in .*break .*2:4.*unstructured"):
        convert_legacy(old, tmp_path / "new")
    edit_config(
        old, lambda c: c["quantization_config"]["sparsity_config"].update(ignore=[Q_PROJ, 3, None])
    )
    new = convert_legacy(old, tmp_path / "new")
    assert same_bits(model, AutoModelForCausalLM.from_pretrained(new))
    assert inspect_checkpoint(new).config == SparsityConfig("2:4", ignore=[Q_PROJ])


def test_nan_and_infinity_are_kept_and_minus_zero_is_zero(tmp_path: Path) -> None:
    model = sparse_llama()
    row = torch.tensor([float("nan"), float("inf"), -float("inf"), -0.0, 1e-45])
    model.get_submodule(Q_PROJ).weight.data[0, :5] = row
    old = write_legacy(tmp_path / "old", model)
    loaded = AutoModelForCausalLM.from_pretrained(convert_legacy(old, tmp_path / "new"))
    model.get_submodule(Q_PROJ).weight.data[0, 3] = 0.0
    assert same_bits(model, loaded)


def _part(part: str, change: Callable[[Tensor], Tensor]) -> Callable[[Parts], None]:
    def edit(tensors: Parts) -> None:
        tensors[f"{Q_PROJ}.{part}"] = change(tensors[f"{Q_PROJ}.{part}"]).contiguous()

    return edit


def _set(tensor: Tensor, index: Any, value: int) -> Tensor:
    tensor[index] = value
    return tensor


ATTACKS = {
    "one value too few": (_part("compressed", lambda t: t[:-1]), "bitmask.*marks"),
    "one value too many": (_part("compressed", lambda t: t.repeat(2)), "bitmask.*marks"),
    "no values": (_part("compressed", lambda t: t[:0]), "bitmask.*marks"),
    "integer values": (_part("compressed", lambda t: t.to(torch.int8)), "wanted floats"),
    "2-D values": (_part("compressed", lambda t: t[None]), "'compressed' has shape"),
    "a bit moved to another row": (
        _part("bitmask", lambda t: t.flip(0)),
        "row_offsets' are not",
    ),
    "bits behind the last column": (
        _part("bitmask", lambda t: t | torch.tensor([0, 0, 128], dtype=torch.uint8)),
        "behind the last column, 19",
    ),
    "bitmask of another type": (_part("bitmask", lambda t: t.int()), "'bitmask' has shape"),
    "bitmask too short": (_part("bitmask", lambda t: t[:, :-1]), "'bitmask' has shape"),
    "bitmask flat": (_part("bitmask", lambda t: t.reshape(-1)), "'bitmask' has shape"),
    "offsets shifted": (_part("row_offsets", lambda t: t + 1), "row_offsets' are not"),
    "offsets negative": (_part("row_offsets", lambda t: -t), "row_offsets' are not"),
    "offsets too many": (_part("row_offsets", lambda t: t.repeat(2)), "'row_offsets' has shape"),
    "offsets floats": (_part("row_offsets", lambda t: t.float()), "'row_offsets' has shape"),
    "shape transposed": (_part("shape", lambda t: t.flip(0) + 1), "'shape' holds"),
    "shape huge": (_part("shape", lambda t: t * 2**40), "'shape' holds"),
    "shape negative": (_part("shape", lambda t: -t), "'shape' holds"),
    "shape empty": (_part("shape", lambda t: t[:0]), "'shape' holds"),
    "shape of floats": (_part("shape", lambda t: t.float()), "'shape' has shape"),
    "shape of int32": (_part("shape", lambda t: t.int()), "'shape' has shape"),
    "offsets missing": (lambda t: t.pop(f"{Q_PROJ}.row_offsets"), "found the parts"),
    "shape missing": (lambda t: t.pop(f"{Q_PROJ}.shape"), "found the parts"),
    "values missing": (lambda t: t.pop(f"{Q_PROJ}.compressed"), "found the parts"),
    "bitmask missing": (lambda t: t.pop(f"{Q_PROJ}.bitmask"), "found the parts"),
    "stored twice": (
        lambda t: t.update({f"{Q_PROJ}.weight": torch.zeros(20, 20)}),
        "found the parts",
    ),
}


@pytest.mark.few(11)
@pytest.mark.parametrize("attack", ATTACKS)
def test_damaged_tensors_are_refused(attack: str, tmp_path: Path) -> None:
    old = write_legacy(tmp_path / "old", sparse_llama())
    edit, message = ATTACKS[attack]
    edit_tensors(old, edit)
    with pytest.raises(FormatError, match=message) as error:
        convert_legacy(old, tmp_path / "new")
    assert f"tensor {Q_PROJ}.weight in " in str(error.value)
    assert "model.safetensors" in str(error.value)
    assert [path.name for path in tmp_path.iterdir()] == ["old"]


ATTACKS_24 = {
    "three in a group": (_part("bitmask", lambda t: _set(t, (0, 0), 0b01110001)), "2 of each 4"),
    "other number of bits": (_part("bitmask", lambda t: _set(t, (0, 0), 0b11110011)), "marks"),
    "flat values": (_part("compressed", lambda t: t.reshape(-1)), "'compressed' has shape"),
    "flat shape": (_part("shape", lambda t: t.reshape(-1)), "'shape' has shape"),
}


@pytest.mark.parametrize("attack", ATTACKS_24)
def test_damaged_24_tensors_are_refused(attack: str, tmp_path: Path) -> None:
    old = write_legacy(tmp_path / "old", sparse_llama("2:4"), "sparse-24-bitmask", "2:4")
    edit, message = ATTACKS_24[attack]
    edit_tensors(old, edit)
    with pytest.raises(FormatError, match=rf"tensor {Q_PROJ}.weight in .*{message}"):
        convert_legacy(old, tmp_path / "new")


def _rename(old: str, new: str) -> Callable[[Parts], None]:
    return lambda tensors: tensors.update({new: tensors.pop(old)})


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda t: t.pop("model.norm.weight"), "lacks the tensor model.norm.weight"),
        (
            lambda t: [t.pop(key) for key in list(t) if key.startswith(f"{Q_PROJ}.")],
            f"lacks the tensor {Q_PROJ}.weight",
        ),
        (_rename("model.norm.weight", "model.morn.weight"), "describes no such tensor"),
        (_rename("model.norm.weight", "shape"), "tensor .weight in .*describes no such tensor"),
        (
            lambda t: t.update({"model.norm.weight": torch.ones(21)}),
            r"tensor model.norm.weight in .*\(21,\); config.json implies \(20,\)",
        ),
    ],
)
def test_incomplete_checkpoints_are_refused(
    edit: Callable[[Parts], Any], message: str, tmp_path: Path
) -> None:
    old = write_legacy(tmp_path / "old", sparse_llama())
    edit_tensors(old, edit)
    with pytest.raises(FormatError, match=message):
        convert_legacy(old, tmp_path / "new")


def test_damaged_files_are_refused(tmp_path: Path) -> None:
    old = write_legacy(tmp_path / "old", sparse_llama(), sharded=True)
    data = (old / SHARDS[0]).read_bytes()
    (old / SHARDS[0]).write_bytes(data[:-1])
    with pytest.raises(FormatError, match=f"{SHARDS[0]} cannot be read"):
        convert_legacy(old, tmp_path / "new")
    (old / SHARDS[0]).write_bytes((old / SHARDS[1]).read_bytes())
    with pytest.raises(FormatError, match="a second time"):
        convert_legacy(old, tmp_path / "new")
    (old / SHARDS[0]).unlink()
    with pytest.raises(FormatError, match="missing"):
        convert_legacy(old, tmp_path / "new")


def test_weights_that_break_the_structure_are_refused(tmp_path: Path) -> None:
    old = write_legacy(tmp_path / "old", sparse_llama(), structure="2:4")
    with pytest.raises(FormatError, match=r"tensor .*proj.weight in .*break .*'2:4'"):
        convert_legacy(old, tmp_path / "new")


def _quantise(config: dict[str, Any]) -> None:
    group = {"targets": ["Linear"], "weights": {"num_bits": 8, "type": "float"}}
    config["quantization_config"] |= {"config_groups": {"g": group}, "format": "float-quantized"}


def test_quantised_checkpoints_are_refused_with_the_way_out(tmp_path: Path) -> None:
    old = write_legacy(tmp_path / "old", sparse_llama())
    edit_tensors(old, lambda t: t.update({f"{Q_PROJ}.weight_scale": torch.ones(1)}))
    with pytest.raises(ValueError, match=rf"{Q_PROJ}.weight_scale.*hf_sparse.save_pretrained"):
        convert_legacy(old, tmp_path / "new")
    edit_config(old, _quantise)
    with pytest.raises(ValueError, match=r"'float-quantized' quantisation.*run_compressed=False"):
        convert_legacy(old, tmp_path / "new")


@pytest.mark.parametrize(
    "change",
    [
        lambda c: c.pop("quantization_config"),
        lambda c: c["quantization_config"].pop("sparsity_config"),
        lambda c: c["quantization_config"].update(sparsity_config=[1]),
        lambda c: c["quantization_config"]["sparsity_config"].update(format="marlin-24"),
        lambda c: c["quantization_config"]["sparsity_config"].update(format=["dense"]),
        lambda c: c.update(quantization_config="compressed-tensors"),
    ],
)
def test_other_checkpoints_are_refused(
    change: Callable[[dict[str, Any]], None], tmp_path: Path
) -> None:
    old = write_legacy(tmp_path / "old", sparse_llama())
    edit_config(old, change)
    with pytest.raises(ValueError, match=r"config.json .*no sparse checkpoint.*sparse-bitmask"):
        convert_legacy(old, tmp_path / "new")


@pytest.mark.parametrize(
    "values",
    [
        {"architectures": ["pipeline"]},
        {"architectures": ["LlamaConfig"]},
        {"architectures": ["../evil"]},
        {"architectures": None},
        {"model_type": "unheard_of"},
        {"model_type": 3},
        {"hidden_size": "20"},
        {"num_attention_heads": 0},
        {"torch_dtype": "evil"},
    ],
)
def test_configs_that_describe_no_model_are_refused(values: dict[str, Any], tmp_path: Path) -> None:
    old = write_legacy(tmp_path / "old", sparse_llama())
    edit_config(old, lambda config: config.update(values))
    with pytest.raises(FormatError, match=r"config.json: it describes no model"):
        convert_legacy(old, tmp_path / "new")


@pytest.mark.slow
def test_a_config_of_far_more_blocks_than_are_stored_is_refused_at_once(tmp_path: Path) -> None:
    old = write_legacy(tmp_path / "old", sparse_llama())
    edit_config(old, lambda config: config.update(num_hidden_layers=10**7))
    with pytest.raises(FormatError, match=r"describes a model of more than .* parameters, and"):
        convert_legacy(old, tmp_path / "new")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("text", [b"{", b"[1]", b"\xff", b"[" * 100_000])
def test_config_that_is_no_json_object_is_refused(text: bytes, tmp_path: Path) -> None:
    old = write_legacy(tmp_path / "old", sparse_llama())
    (old / "config.json").write_bytes(text)
    with pytest.raises(ValueError, match=r"config.json"):
        convert_legacy(old, tmp_path / "new")


def test_wrong_folders_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"has no config\.json"):
        convert_legacy(tmp_path / "absent", tmp_path / "new")
    old = write_legacy(tmp_path / "old", sparse_llama())
    for output in (old, old / "new", tmp_path / "x" / ".." / "old"):
        with pytest.raises(ValueError, match="only read"):
            convert_legacy(old, output)
    with pytest.raises(ValueError, match="unknown format 'zip'"):
        convert_legacy(old, tmp_path / "new", format="zip")
    (old / "model.safetensors").unlink()
    with pytest.raises(FormatError, match=r"neither model.safetensors nor"):
        convert_legacy(old, tmp_path / "new")


def test_code_named_in_the_config_is_not_run(tmp_path: Path) -> None:
    old = write_legacy(tmp_path / "old", sparse_llama())
    (old / "evil.py").write_text("raise SystemExit")
    names = {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}
    edit_config(old, lambda config: config.update(auto_map=names))
    for format in ("auto", "dense"):
        new = convert_legacy(old, tmp_path / format, format=format)
        assert "evil" not in (new / "config.json").read_text()


def test_old_output_survives_a_failure_and_is_replaced_by_success(tmp_path: Path) -> None:
    old = write_legacy(tmp_path / "old", sparse_llama())
    new = convert_legacy(old, tmp_path / "new")
    before = contents(new)
    other = write_legacy(tmp_path / "other", sparse_llama(dtype=torch.bfloat16))
    norm = torch.ones(20, dtype=torch.bfloat16)
    edit_tensors(other, lambda t: t.update({"model.norm.weight": norm[:3]}))
    with pytest.raises(FormatError, match=r"model.norm.weight in .*implies"):
        convert_legacy(other, new, overwrite=True)
    assert contents(new) == before
    edit_tensors(other, lambda t: t.update({"model.norm.weight": norm}))
    with pytest.raises(ValueError, match=r"holds config.json and .*overwrite=True"):
        convert_legacy(other, new)
    assert contents(new) == before
    convert_legacy(other, new, overwrite=True)
    model = sparse_llama(dtype=torch.bfloat16)
    model.model.norm.weight.data.copy_(norm)
    assert same_bits(model, AutoModelForCausalLM.from_pretrained(new))


def test_families_without_known_parts_convert_too(tmp_path: Path) -> None:
    sizes = {**SIZES, "pad_token_id": 0, "num_key_value_heads": 2}
    model = Phi3ForCausalLM(Phi3Config(**sizes))
    old = write_legacy(tmp_path / "old", model)
    for format in ("auto", "dense"):
        new = convert_legacy(old, tmp_path / format, format=format)
        assert same_bits(model, AutoModelForCausalLM.from_pretrained(new))
