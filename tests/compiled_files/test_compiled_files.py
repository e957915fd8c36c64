"""save_compiled and load_compiled: the same model back, and no machine code on damaged data."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AlbertConfig, AutoModelForCausalLM, PreTrainedModel

import hf_sparse
from hf_sparse.formats import FormatError
from hf_sparse.runtime.model.compiled import linears_of
from hf_sparse.runtime.model.families import COMPILED
from tests.support.closeness import same
from tests.support.compiled_folders import unsigned
from tests.support.sparse_models import inputs, random_model
from tests.support.tiny_models import CONFIGS

FAMILIES = list(CONFIGS)


def compiled_model(family: str) -> PreTrainedModel:
    return hf_sparse.compile(random_model(CONFIGS[family]))


@pytest.mark.few(2)
@pytest.mark.parametrize("family", FAMILIES)
def test_the_same_model_comes_back(family: str, tmp_path: Path) -> None:
    model = compiled_model(family)
    assert hf_sparse.save_compiled(model, tmp_path / "new") == tmp_path / "new"
    loaded = hf_sparse.load_compiled(tmp_path / "new")
    given = inputs(2, 19)
    with torch.no_grad():
        assert same(loaded(**given).logits, model(**given).logits)
    assert type(loaded) is type(model)
    assert loaded.config.to_dict() == model.config.to_dict()
    if COMPILED[family].causal:
        length = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 1}
        assert torch.equal(loaded.generate(**given, **length), model.generate(**given, **length))


def test_rounded_rotary_frequencies_come_back(tmp_path: Path) -> None:
    model = hf_sparse.compile(random_model(CONFIGS["llama"]).bfloat16())
    hf_sparse.save_compiled(model, tmp_path)
    loaded = hf_sparse.load_compiled(tmp_path)
    assert loaded.model.rotary_emb.inv_freq.dtype == torch.bfloat16
    with torch.no_grad():
        assert same(loaded(**inputs(2, 19)).logits, model(**inputs(2, 19)).logits)


@pytest.mark.few(2)
@pytest.mark.parametrize("family", ["bert", "llama", "albert"])
def test_sparse_classes_come_back(family: str, tmp_path: Path) -> None:
    config = hf_sparse.SparsityConfig("block:4x1", 0.75)
    model = random_model(CONFIGS[family], 0.0)
    hf_sparse.prune_(model, config, "magnitude")
    hf_sparse.save_pretrained(model, tmp_path / "sparse", config)
    sparse = type(hf_sparse.compile(model))
    loaded = getattr(hf_sparse, f"Sparse{sparse.__name__}").from_pretrained(tmp_path / "sparse")
    compiled = hf_sparse.compile(loaded)
    hf_sparse.save_compiled(compiled, tmp_path / "compiled")
    again = hf_sparse.load_compiled(tmp_path / "compiled")
    assert type(again) is type(loaded)
    given = inputs(2, 9)
    with torch.no_grad():
        wanted = model(**given).logits
        for found in (compiled, again):
            torch.testing.assert_close(found(**given).logits, wanted, atol=2e-5, rtol=1e-4)


def test_it_lies_beside_a_checkpoint(tmp_path: Path) -> None:
    model = random_model(CONFIGS["bert"])
    hf_sparse.save_pretrained(model, tmp_path / "both")
    before = {file.name: file.read_bytes() for file in (tmp_path / "both").iterdir()}
    hf_sparse.save_compiled(hf_sparse.compile(model), tmp_path / "both")
    after = {file.name: file.read_bytes() for file in (tmp_path / "both").iterdir()}
    assert {name: after[name] for name in before} == before
    assert set(after) - set(before) == {"compiled.json", "compiled.safetensors"}
    hf_sparse.load_compiled(tmp_path / "both")


def test_it_goes_when_another_checkpoint_is_saved(tmp_path: Path) -> None:
    hf_sparse.save_compiled(compiled_model("bert"), tmp_path)
    hf_sparse.save_pretrained(random_model(CONFIGS["bert"]), tmp_path)
    with pytest.raises(FormatError, match="no compiled model"):
        hf_sparse.load_compiled(tmp_path)
    (tmp_path / "compiled.json").write_text('{"mine": 1}')
    hf_sparse.save_pretrained(random_model(CONFIGS["bert"]), tmp_path)
    assert (tmp_path / "compiled.json").read_text() == '{"mine": 1}'


def test_what_is_not_compiled_is_not_saved(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not compiled"):
        hf_sparse.save_compiled(random_model(CONFIGS["bert"]), tmp_path)
    assert not list(tmp_path.iterdir())


def rewrite(folder: Path, change) -> None:  # type: ignore[no-untyped-def]
    file = folder / "compiled.safetensors"
    tensors = {name: tensor.clone() for name, tensor in load_file(file).items()}
    change(tensors)
    save_file(tensors, file)
    (folder / "compiled.json").write_text(json.dumps(unsigned(folder)))


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("compiled")
    return hf_sparse.save_compiled(compiled_model("llama"), folder / "llama")


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    for file in saved.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    return tmp_path


STREAMS = {
    # A tensor, what is written into it, and what the error says.
    "a row": ("blocks.0.qkv.0.order", lambda t: t.fill_(10**6), "row is out of range"),
    "a negative row": ("blocks.0.qkv.0.order", lambda t: t.fill_(-4), "row is out of range"),
    "a column": ("blocks.1.down.0.indices", lambda t: t.fill_(255), "column is out of range"),
    "a count": ("blocks.0.out.0.groups", lambda t: t.add_(1), "groups|remainder"),
    "a negative count": ("blocks.0.out.0.groups", lambda t: t.neg_(), "negative|too large"),
    "a panel": ("blocks.0.up.0.panels", lambda t: t.add_(1), "panel|column"),
    "chunks": ("blocks.0.up.0.chunks", lambda t: t.add_(3), "chunks"),
    "chunk rows": ("blocks.0.up.0.chunk_rows", lambda t: t.add_(3), "chunk"),
    "bits": ("blocks.2.gate.words", lambda t: t.fill_(2**64 - 1), "bits"),
    "starts": ("blocks.2.gate.starts", lambda t: t.add_(7), "bits"),
}


@pytest.mark.few(5)
@pytest.mark.parametrize("name", STREAMS)
def test_damaged_streams_are_found(folder: Path, name: str) -> None:
    tensor, change, message = STREAMS[name]
    rewrite(folder, lambda tensors: change(tensors[f"stack.{tensor}"]))
    with pytest.raises(hf_sparse.FormatError, match=message):
        hf_sparse.load_compiled(folder)


@pytest.mark.parametrize("part", ["values", "indices", "order", "groups", "panels"])
@pytest.mark.parametrize("how", ["shorter", "missing", "other type"])
def test_streams_that_are_cut_off_are_found(folder: Path, part: str, how: str) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        name = f"stack.blocks.0.qkv.0.{part}"
        stream = tensors.pop(name)
        if how == "shorter":
            tensors[name] = stream[:0].clone()
        elif how == "other type":
            tensors[name] = stream.to(torch.int64)

    rewrite(folder, change)
    with pytest.raises(hf_sparse.FormatError, match="damaged"):
        hf_sparse.load_compiled(folder)


@pytest.mark.few(13)
@pytest.mark.parametrize(
    "change",
    [
        lambda d: d["stack"].update(hidden=64),
        lambda d: d["stack"].update(heads=400),
        lambda d: d["stack"].update(head_dim=-8),
        lambda d: d.update(order=[0, 1]),
        lambda d: d.update(order=[0, 1, 9]),
        lambda d: d["blocks"].pop(),
        lambda d: d["blocks"][0]["linears"].pop("out"),
        lambda d: d["blocks"][0]["linears"]["down"].update(edges=[0, 9]),
        lambda d: d["config"].update(vocab_size=99),
        lambda d: d["config"].update(model_type="t5"),
        lambda d: d.update({"class": "AutoConfig"}),
        lambda d: d.update(layout=[0]),
        lambda d: d["stack"].update(rotary=False),
        lambda d: d["stack"].update(activation="worker_alone"),
        lambda d: d["stack"].update(scale=1),
        lambda d: d["blocks"][0].update(window=-3),
        lambda d: d["blocks"][0]["epsilons"].update(norms=[float("nan"), 1e-5]),
        lambda d: d["blocks"][1]["linears"].pop("gate"),
        lambda d: d["config"].update(num_attention_heads=0),
        lambda d: d.update(order=[0, 0, 0]),
        lambda d: d.update(order=[-1, -2, -3]),
        lambda d: d.update(order=[1, 0, 2]),
        lambda d: d["config"].update(rms_norm_eps=0.5),
        lambda d: d["blocks"][0]["epsilons"].update(norms=[0.5, 0.5]),
        lambda d: d.pop("generation"),
        lambda d: d.update(generation="greedy"),
        lambda d: d.update(generation=None),
        lambda d: d.update({"class": "MistralForCausalLM"}),
        lambda d: d["config"].update(model_type="qwen2"),
        lambda d: d.pop("types"),
    ],
)
def test_damaged_descriptions_are_found(folder: Path, change) -> None:  # type: ignore[no-untyped-def]
    file = folder / "compiled.json"
    described = unsigned(folder)
    change(described)
    file.write_text(json.dumps(described))
    with pytest.raises(hf_sparse.FormatError):
        hf_sparse.load_compiled(folder)


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_dense_layers_come_back_and_are_checked(family: str, tmp_path: Path) -> None:
    model = hf_sparse.compile(random_model(CONFIGS[family], 0.0))
    hf_sparse.save_compiled(model, tmp_path)
    given = inputs(1, 7)
    with torch.no_grad():
        found = hf_sparse.load_compiled(tmp_path)(**given).logits
        assert same(found, model(**given).logits)

    def shorten(tensors: dict[str, torch.Tensor]) -> None:
        name = "stack.blocks.0.qkv.dense"
        tensors[name] = tensors[name][:-4].clone()

    rewrite(tmp_path, shorten)
    with pytest.raises(hf_sparse.FormatError, match="shape"):
        hf_sparse.load_compiled(tmp_path)


@pytest.mark.few(2)
@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("sparsity", [0.0, 0.6])
def test_weights_of_two_bytes_come_back_and_are_checked(
    kind: torch.dtype, sparsity: float, tmp_path: Path
) -> None:
    random_model(CONFIGS["llama"], sparsity).save_pretrained(tmp_path / "model")
    narrow = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=kind)
    model = hf_sparse.compile(narrow)
    hf_sparse.save_compiled(model, tmp_path)
    loaded = hf_sparse.load_compiled(tmp_path)
    for one, other in zip(linears_of(loaded), linears_of(model), strict=True):
        assert one.dtype == kind
        assert one.nbytes == other.nbytes
    given = inputs(1, 7)
    with torch.no_grad():
        assert same(loaded(**given).logits, model(**given).logits)
    file = tmp_path / "compiled.json"
    whole = json.dumps(unsigned(tmp_path))
    for wrong in ("torch.float32", "torch.int8"):
        file.write_text(
            whole.replace(f'"dtype": "{kind}", "parts"', f'"dtype": "{wrong}", "parts"')
        )
        assert file.read_text() != whole
        with pytest.raises(hf_sparse.FormatError, match=r"weight is|values are|int8"):
            hf_sparse.load_compiled(tmp_path)


@pytest.mark.parametrize("name", ["compiled.json", "compiled.safetensors"])
@pytest.mark.parametrize("how", ["missing", "cut", "foreign"])
def test_damaged_files_are_found(folder: Path, name: str, how: str) -> None:
    file = folder / name
    content = file.read_bytes()
    file.unlink()
    if how == "cut":
        file.write_bytes(content[: len(content) // 2])
    elif how == "foreign":
        file.write_bytes(b"something else")
    with pytest.raises(hf_sparse.FormatError):
        hf_sparse.load_compiled(folder)


def test_deeply_nested_descriptions_are_found(folder: Path) -> None:
    (folder / "compiled.json").write_text("[" * 100_000)
    with pytest.raises(hf_sparse.FormatError, match="recursion"):
        hf_sparse.load_compiled(folder)


def test_shared_blocks_come_back_and_their_order_is_checked(tmp_path: Path) -> None:
    changed = {"num_hidden_layers": 5, "num_hidden_groups": 2, "inner_group_num": 2}
    config = AlbertConfig(**CONFIGS["albert"].to_diff_dict() | changed)
    model = hf_sparse.compile(random_model(config))
    hf_sparse.save_compiled(model, tmp_path)
    given = inputs(1, 9)
    with torch.no_grad():
        found = hf_sparse.load_compiled(tmp_path)(**given).logits
        assert same(found, model(**given).logits)
    file = tmp_path / "compiled.json"
    described = unsigned(tmp_path)
    assert described["order"] == [0, 1, 0, 1, 0, 1, 2, 3, 2, 3]
    described["order"] = [0, 1, 0, 1, 2, 3, 2, 3, 2, 3]
    file.write_text(json.dumps(described))
    with pytest.raises(hf_sparse.FormatError, match="order"):
        hf_sparse.load_compiled(tmp_path)


@pytest.mark.few(2)
@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("sparsity", [0.0, 0.6])
@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_values_that_are_not_finite_are_found(
    kind: torch.dtype, sparsity: float, value: float, tmp_path: Path
) -> None:
    model = random_model(CONFIGS["opt"], sparsity).to(kind)
    hf_sparse.save_compiled(hf_sparse.compile(model), tmp_path)
    whole = (tmp_path / "compiled.safetensors").read_bytes()
    ends = ["norms.1.weight", "norms.0.bias", "up.bias", "embed_tokens.weight"]
    ends += ["qkv.0.values", "down.single_values"] if sparsity else ["up.dense"]
    for end in ends:

        def spoil(tensors: dict[str, torch.Tensor], end: str = end) -> None:
            name = next(name for name in tensors if name.endswith(end))
            stored = tensors[name]
            stored.view(kind if stored.dtype == torch.uint16 else stored.dtype).view(-1)[3] = value

        rewrite(tmp_path, spoil)
        with pytest.raises(hf_sparse.FormatError, match="NaN or infinite"):
            hf_sparse.load_compiled(tmp_path)
        (tmp_path / "compiled.safetensors").write_bytes(whole)
    hf_sparse.load_compiled(tmp_path)


@pytest.mark.parametrize("kind", [torch.float16, torch.float64, torch.int32], ids=str)
@pytest.mark.parametrize("name", ["model.model.embed_tokens.weight", "model.model.norm.weight"])
def test_dense_tensors_of_another_type_are_found(
    folder: Path, kind: torch.dtype, name: str
) -> None:
    rewrite(folder, lambda tensors: tensors.update({name: tensors[name].to(kind)}))
    with pytest.raises(hf_sparse.FormatError, match="saved as torch"):
        hf_sparse.load_compiled(folder)


def test_dense_tensors_may_have_several_types(tmp_path: Path) -> None:
    model = random_model(CONFIGS["llama"]).bfloat16()
    model.model.norm.float()
    hf_sparse.save_compiled(hf_sparse.compile(model), tmp_path)
    loaded = hf_sparse.load_compiled(tmp_path)
    assert loaded.model.norm.weight.dtype == torch.float32
    assert loaded.model.embed_tokens.weight.dtype == torch.bfloat16


def test_a_config_that_was_changed_is_not_saved(tmp_path: Path) -> None:
    model = compiled_model("llama")
    model.config.rms_norm_eps = 0.25
    with pytest.raises(ValueError, match="epsilon"):
        hf_sparse.save_compiled(model, tmp_path)
    assert not list(tmp_path.iterdir())
