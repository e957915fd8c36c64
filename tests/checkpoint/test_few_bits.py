"""Checkpoints of models of few bits: saved as codes, loaded as plain models, refused where they lie."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, AutoTokenizer

import hf_sparse
from hf_sparse import FormatError, SparsityConfig
from hf_sparse.checkpoint.can_save import check_can_save
from hf_sparse.checkpoint.on_grids import on_grids
from hf_sparse.formats import CODINGS
from hf_sparse.quantization import Grid, OffGridError, codes_of
from hf_sparse.structure.grids import gridded
from tests.support.crosses import pairwise
from tests.support.few_bits import INT4, quantise_, quantised
from tests.support.mixtures import tiny_mixture
from tests.support.tiny_models import prose, tiny_batches, tiny_tokenizer

EMBEDDINGS, TARGET = "model.embed_tokens.weight", "model.layers.1.mlp.up_proj.weight"
AUTO = {"bert": AutoModelForMaskedLM}


def stored_in(folder: Path) -> dict[str, torch.Tensor]:
    files = folder.glob("*.safetensors")
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


def assert_same_weights(one: Any, other: Any) -> None:
    mine, theirs = one.state_dict(), other.state_dict()
    assert mine.keys() == theirs.keys()
    for name, weight in mine.items():
        assert torch.equal(weight, theirs[name]), name


@pytest.mark.few(1)
@pairwise(
    "family, pattern, bits, size, symmetric, embedding_bits, dtype",
    ["llama", "gpt2", "opt", "mistral"],
    ["2:4", "unstructured", "block:1x4"],
    [8, 4, None],
    [None, 32],
    [True, False],
    [8, 4, None],
    [torch.float32, torch.float16],
)
def test_a_model_comes_back_from_its_codes(
    tmp_path, family, pattern, bits, size, symmetric, embedding_bits, dtype
):
    if bits is None and embedding_bits is None:
        return
    sparsity = None if pattern == "2:4" else 0.75
    config = SparsityConfig(
        pattern,
        sparsity,
        bits=bits,
        group_size=size,
        symmetric=symmetric,
        embedding_bits=embedding_bits,
    )
    model = quantised(config, family, num_hidden_layers=1).to(dtype)
    hf_sparse.save_pretrained(model, tmp_path, config)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert loaded.dtype == dtype
    assert_same_weights(model, loaded)
    assert loaded.config.sparsity_config["bits"] == bits if bits else True
    stored = stored_in(tmp_path)
    for name in on_grids(model, config):
        if name in stored:
            assert stored[name].dtype == torch.uint8, name
    first = {file.name: file.read_bytes() for file in tmp_path.glob("*.safetensors")}
    loaded.save_pretrained(tmp_path / "again")
    assert first == {p.name: p.read_bytes() for p in (tmp_path / "again").glob("*.safetensors")}


@pytest.mark.few(1)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("held", [torch.float32, torch.bfloat16])
def test_a_model_is_loaded_in_any_type_as_the_exact_products(tmp_path, dtype, held):
    exact = quantised()
    hf_sparse.save_pretrained(quantised().to(held), tmp_path, INT4)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype)
    assert loaded.dtype == dtype
    for name, on_grid in on_grids(exact, INT4).items():
        assert torch.equal(loaded.get_parameter(name), exact.get_parameter(name).to(dtype))
        on_grid.check(loaded.get_parameter(name).detach())


def test_the_codes_are_those_of_the_model(tmp_path):
    model = quantised()
    model.save_pretrained(tmp_path / "dense")
    hf_sparse.save_pretrained(model, tmp_path / "codes", INT4)
    dense = stored_in(tmp_path / "dense")
    stored = stored_in(tmp_path / "codes")
    parts = {name.removeprefix(f"{TARGET}"): t for name, t in stored.items() if TARGET in name}
    assert parts.keys() == {"", ".layout", ".nm", ".scales4"}
    found = codes_of(dense[TARGET], INT4.grid)
    assert torch.equal(parts[".scales4"].float(), found.scales)
    assert {f"{EMBEDDINGS}.scales8", f"{EMBEDDINGS}.layout"} <= stored.keys()
    assert f"{EMBEDDINGS}.bitmask" not in stored
    assert "lm_head.weight" not in stored  # tied


def test_an_output_head_of_its_own_is_coded_too(tmp_path):
    model = quantised(tie_word_embeddings=False)
    hf_sparse.save_pretrained(model, tmp_path, INT4)
    assert {f"{EMBEDDINGS}.scales8", "lm_head.weight.scales8"} <= stored_in(tmp_path).keys()
    assert_same_weights(model, AutoModelForCausalLM.from_pretrained(tmp_path))


@pytest.mark.slow
def test_an_encoder_and_its_config(tmp_path):
    config = SparsityConfig("unstructured", 0.8, bits=8, group_size=32, embedding_bits=8)
    model = quantise_(hf_sparse.SparseBertForMaskedLM(quantised(family="bert").config), config)
    model.eval()
    model.save_pretrained(tmp_path)
    loaded = AutoModelForMaskedLM.from_pretrained(tmp_path)
    assert_same_weights(model, loaded)
    stored = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert (stored["bits"], stored["group_size"], stored["embedding_bits"]) == (8, 32, 8)


@pytest.mark.few(1)
@pytest.mark.parametrize("ignore", [(), ("experts.down_proj.1",)])
def test_experts_are_coded_where_all_of_a_stack_are_targets(tmp_path, ignore):
    config = SparsityConfig("2:4", bits=8, ignore=ignore)
    model = quantise_(tiny_mixture("mixtral"), config)
    hf_sparse.save_pretrained(model, tmp_path, config)
    stored = stored_in(tmp_path)
    stack = "model.layers.0.mlp.experts"
    assert f"{stack}.gate_up_proj.scales8" in stored
    assert (f"{stack}.down_proj.scales8" in stored) is not bool(ignore)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert_same_weights(model, loaded)
    hf_sparse.inspect_checkpoint(tmp_path)
    if ignore:  # stored by values: compared with the grid when it is read
        rewrite(tmp_path, put(f"{stack}.down_proj", lambda t: t * 1.01))
        with pytest.raises(FormatError, match=r"down_proj\.\d+: .*not on the grid"):
            AutoModelForCausalLM.from_pretrained(tmp_path)


def test_shards_device_map_and_disk(tmp_path):
    model = quantised()
    hf_sparse.save_pretrained(model, tmp_path / "model", INT4, max_shard_size=8000)
    assert len(list((tmp_path / "model").glob("*.safetensors"))) > 2
    for places in ("cpu", {"": "cpu"}, "auto"):
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model", device_map=places)
        assert_same_weights(model, loaded)


def test_the_family_s_own_type_has_the_products(tmp_path):
    model = quantised()
    config = SparsityConfig("2:4", format="dense", bits=4, group_size=32, embedding_bits=8)
    hf_sparse.save_pretrained(model, tmp_path, config)
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())
    assert_same_weights(model, AutoModelForCausalLM.from_pretrained(tmp_path))


def test_compressed_tensors_of_a_state_dict_are_restored(tmp_path):
    model = quantised()
    hf_sparse.save_pretrained(model, tmp_path, INT4)
    other = AutoModelForCausalLM.from_pretrained(tmp_path)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    other.load_state_dict(stored_in(tmp_path), strict=False)
    assert_same_weights(model, other)


def test_weights_off_the_grid_are_an_error_before_anything_is_written(tmp_path):
    model = quantised()
    folder = tmp_path / "model"
    hf_sparse.save_pretrained(model, folder, INT4)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with torch.no_grad():
        model.get_parameter(TARGET)[3, 1] += 1e-3
    for place in (folder, tmp_path / "other"):
        with pytest.raises(OffGridError, match=rf"{TARGET}: 32 of 2,048 weights .*int4"):
            hf_sparse.save_pretrained(model, place, INT4)
    assert before == {path.name: path.read_bytes() for path in folder.iterdir()}
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    embeddings = quantised()
    with torch.no_grad():
        embeddings.get_parameter(EMBEDDINGS).mul_(1.001)
    with pytest.raises(OffGridError, match=EMBEDDINGS):
        hf_sparse.save_pretrained(embeddings, folder, INT4)


def test_without_a_config_lost_codes_are_a_warning(tmp_path):
    model = quantised()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        hf_sparse.save_pretrained(model, tmp_path / "held")
    held = json.loads((tmp_path / "held" / "config.json").read_text())["quantization_config"]
    assert held["bits"] == 4
    with torch.no_grad():
        weight = model.get_parameter(TARGET)
        weight.mul_(1 + torch.rand_like(weight) / 100)
    with pytest.warns(UserWarning, match=rf"was int4, groups of 32; embeddings int8.*{TARGET}"):
        hf_sparse.save_pretrained(model, tmp_path / "lost")
    lost = json.loads((tmp_path / "lost" / "config.json").read_text())["quantization_config"]
    assert "bits" not in lost
    assert lost["pattern"] == "2:4"
    assert_same_weights(model, AutoModelForCausalLM.from_pretrained(tmp_path / "lost"))


@pytest.mark.slow
def test_a_dense_model_of_few_bits_is_coded(tmp_path):
    config = SparsityConfig("unstructured", 0.0, bits=8, group_size=32, embedding_bits=8)
    model = quantised(config)
    hf_sparse.save_pretrained(model, tmp_path)
    found = hf_sparse.inspect_checkpoint(tmp_path)
    assert set(found.bits.values()) == {8}
    assert set(found.formats.values()) == {"dense"}
    weights, size = sum(found.weights.values()), sum(found.stored_bytes.values())
    assert size / weights == pytest.approx(1 + 2 / 32, abs=0.02)
    assert_same_weights(model, AutoModelForCausalLM.from_pretrained(tmp_path))


def test_inspect_and_card_tell_bits(tmp_path):
    model = quantised()
    hf_sparse.save_pretrained(model, tmp_path, INT4)
    found = hf_sparse.inspect_checkpoint(tmp_path)
    assert found.bits[TARGET] == 4
    assert found.bits[EMBEDDINGS] == 8
    assert "4-bit codes: 21 tensors, 27,648 weights, 0.4" in str(found)
    promised = "promises 2:4, sparsity 0.5000, int4, groups of 32; embeddings int8, groups of 32"
    assert promised in str(found)
    card = (tmp_path / "README.md").read_text()
    assert "- int4\n" in card
    assert "| bits | int4, groups of 32; embeddings int8, groups of 32 |" in card
    assert "nm, 4-bit codes (21)" in card


def test_groups_that_divide_nothing_are_refused_before_work(tmp_path):
    config = SparsityConfig("2:4", bits=8, group_size=128)
    with pytest.raises(ValueError, match="group_size 128 does not divide the 32 inputs"):
        check_can_save(quantised(), tmp_path / "x", config)
    with pytest.raises(ValueError, match="group_size 128 does not divide the 32 inputs"):
        hf_sparse.save_pretrained(quantised(), tmp_path / "x", config)
    assert not (tmp_path / "x").exists()


@pytest.mark.slow
def test_a_streamed_checkpoint_is_stored_as_codes(tmp_path):
    source = quantised(SparsityConfig("unstructured", 0.0, bits=8, group_size=32, embedding_bits=8))
    source.save_pretrained(tmp_path / "dense")
    config = SparsityConfig("2:4", bits=8, group_size=32, embedding_bits=8)
    batches = tiny_batches("llama")
    hf_sparse.prune_checkpoint(tmp_path / "dense", tmp_path / "out", config, "wanda", batches)
    found = hf_sparse.inspect_checkpoint(tmp_path / "out")
    assert set(found.bits.values()) == {8}
    assert len(found.bits) == 22
    assert found.report.violations == 0
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    for layer, grid in gridded(loaded, config):
        codes_of(layer.weight, grid)
    hf_sparse.prune_(source, config, "wanda", batches)
    assert_same_weights(source, loaded)


def test_a_tokenizer_beside_codes(tmp_path):
    hf_sparse.save_pretrained(quantised(), tmp_path, INT4, tokenizer=tiny_tokenizer())
    text = prose()[0]
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert loaded(text)["input_ids"] == tiny_tokenizer()(text)["input_ids"]


def rewrite(folder: Path, change: Callable[[dict], object]) -> None:
    file = folder / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


def put(name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[dict], object]:
    def apply(tensors: dict) -> None:
        tensors[name] = change(tensors[name]).contiguous()

    return apply


def with_one(value: float) -> Callable[[torch.Tensor], torch.Tensor]:
    def change(scales: torch.Tensor) -> torch.Tensor:
        scales = scales.clone()
        scales[1, 0] = value
        return scales

    return change


SCALES = f"{TARGET}.scales4"
DAMAGE = {
    "a scale is zero": (put(SCALES, with_one(0.0)), "1 of 64 scales"),
    "a scale is tiny and negative": (put(SCALES, with_one(-(2.0**-120))), "1 of 64 scales"),
    "a scale is NaN": (put(SCALES, with_one(float("nan"))), "1 of 64 scales"),
    "scales are missing": (lambda t: t.pop(SCALES), "floats|incomplete|wanted 1-D"),
    "scales of other rows": (
        put(SCALES, lambda t: t[:-1]),
        r"wanted bfloat16 of shape \(64, groups",
    ),
    "scales of another type": (put(SCALES, lambda t: t.float()), "wanted bfloat16"),
    "too many groups": (put(SCALES, lambda t: t.repeat(1, 3)), "3 groups for 32 columns"),
    "no groups": (put(SCALES, lambda t: t[:, :0]), "0 groups for 32 columns"),
    "values cut": (put(TARGET, lambda t: t[:-1]), "511 bytes of values are stored; wanted 512"),
    "values too many": (put(TARGET, lambda t: torch.cat([t, t])), "1024 bytes of values"),
    "values are floats": (put(TARGET, lambda t: t.float()), "wanted 1-D bytes"),
    "positions cut": (put(f"{TARGET}.nm", lambda t: t[:-1]), "positions have"),
    "positions missing": (lambda t: t.pop(f"{TARGET}.nm"), "shape|entries|wanted 3 int64"),
    "embedding code -128": (
        put(EMBEDDINGS, lambda t: torch.full_like(t, 128)),
        "the code -128; wanted codes in",
    ),
}


@pytest.mark.few(1)
@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_named_by_tensor_and_file(tmp_path, damage):
    hf_sparse.save_pretrained(quantised(), tmp_path, INT4)
    change, message = DAMAGE[damage]
    rewrite(tmp_path, change)
    for read in (AutoModelForCausalLM.from_pretrained, hf_sparse.inspect_checkpoint):
        with pytest.raises(FormatError, match=message) as caught:
            read(tmp_path)
        assert (TARGET if "embedding" not in damage else EMBEDDINGS) in str(caught.value)
        assert str(tmp_path / "model.safetensors") in str(caught.value)


@pytest.mark.few(2)
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bits": 8}, "codes of 4 bits in groups of 32 are stored, but config.json promises int8"),
        ({"embedding_bits": 4}, "codes of 8 bits in groups of 32 are stored"),
        ({"symmetric": False}, "promises int8, groups of 32, zero points"),
        ({"group_size": 64}, "group_size 64 does not divide the 32 inputs"),
    ],
)
def test_another_grid_than_is_promised_is_refused(tmp_path, change, message):
    hf_sparse.save_pretrained(quantised(), tmp_path, INT4)
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"] |= change
    (tmp_path / "config.json").write_text(json.dumps(config))
    for read in (AutoModelForCausalLM.from_pretrained, hf_sparse.inspect_checkpoint):
        with pytest.raises(FormatError, match=message):
            read(tmp_path)


@pytest.mark.few(2)
@pytest.mark.parametrize("change", [{"bits": 3}, {"bits": True}, {"group_size": 7}, {"bits": "4"}])
def test_bits_that_do_not_exist_are_refused(tmp_path, change):
    hf_sparse.save_pretrained(quantised(), tmp_path, INT4)
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"] |= change
    (tmp_path / "config.json").write_text(json.dumps(config))
    for read in (AutoModelForCausalLM.from_pretrained, hf_sparse.inspect_checkpoint):
        with pytest.raises(ValueError, match=next(iter(change))):
            read(tmp_path)


def test_plain_weights_that_are_promised_few_bits_are_looked_at(tmp_path):
    plain = SparsityConfig("2:4")
    hf_sparse.save_pretrained(quantised(), tmp_path, plain)
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"] |= {"bits": 4, "group_size": 32}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert_same_weights(quantised(), AutoModelForCausalLM.from_pretrained(tmp_path))
    rewrite(tmp_path, put(TARGET, lambda t: t * torch.linspace(1, 2, len(t))))
    with pytest.raises(FormatError, match=r"not on the grid .*config.json promises int4"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_every_coding_s_grid_has_a_name_in_files():
    assert {f"scales{bits}" for bits in (8, 4)} == CODINGS.keys()
    assert Grid(4, 32) == INT4.grid
