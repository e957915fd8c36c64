"""shrink: the smaller model against the model that it was made from, and against its files."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    PreTrainedModel,
    Trainer,
    TrainingArguments,
)

import hf_sparse
from hf_sparse import SparsityConfig, prune_, shrink_
from hf_sparse.cli import main
from hf_sparse.models.modeling import model_classes
from hf_sparse.structure.parts import PARTS, BlockSize
from hf_sparse.structure.removal import heads_to_remove
from hf_sparse.structure.units import find_units, unused_neurons
from hf_sparse.upstream.transformers.caches import cache_in
from tests.support.any_models import build, classes_of, tiny_config
from tests.support.closeness import same
from tests.support.exporting import needs_export
from tests.support.tiny_models import CONFIGS, tiny_batches, tiny_classifier, tiny_model

HEADS = [(family, name) for family in PARTS for name in model_classes(family)]
CAUSAL = ("gpt2", "opt", "llama", "mistral", "qwen2", "qwen3")
TOLERANCE = {"atol": 2e-5, "rtol": 1e-4}


@torch.no_grad()
def zero_units(model: PreTrainedModel) -> list[BlockSize]:
    """Zero some units of each block, others in each, and return the sizes that are left."""
    left = []
    for parameter in model.parameters():  # products and biases that matter
        parameter.mul_(3) if parameter.ndim > 1 else parameter.add_(
            0.1 * torch.randn_like(parameter)
        )
    for number, units in enumerate(find_units(model)):
        size = units.size
        queries = size.heads // size.key_heads
        gone = torch.arange(queries) + queries * (number % 2)
        units.out.weight[:, units.features(gone)] = 0
        units.down.weight[:, 3 + number : 20 + 5 * number : 2] = 0
        neurons = size.neurons - len(range(3 + number, 20 + 5 * number, 2))
        left.append(BlockSize(size.heads - queries, size.key_heads - 1, neurons))
    return left


def model_of(name: str, family: str) -> PreTrainedModel:
    torch.manual_seed(0)
    config = CONFIGS[family]
    sparse_class: Any = getattr(hf_sparse, name)
    return sparse_class.__mro__[2](type(config)(**config.to_dict())).eval()


def inputs_for(model: PreTrainedModel) -> dict[str, Tensor]:
    ids = torch.randint(2, 256, (2, 12), generator=torch.Generator().manual_seed(3))
    mask = torch.ones_like(ids)
    mask[1, 8:] = 0
    inputs = {"input_ids": ids, "attention_mask": mask}
    if type(model).__name__.endswith(("MultipleChoice", "DoubleHeadsModel")):
        inputs = {key: value[None] for key, value in inputs.items()}
    return inputs


@torch.no_grad()
def outputs_of(model: PreTrainedModel) -> list[Tensor]:
    found = model(**inputs_for(model), output_hidden_states=True)
    values = [v for v in found.values() if isinstance(v, Tensor)]
    return [*values, *found.hidden_states]


def assert_same(found: list[Tensor], wanted: list[Tensor]) -> None:
    assert len(found) == len(wanted) > 1
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, **TOLERANCE)


@pytest.mark.few(3)
@pytest.mark.parametrize(("family", "name"), HEADS)
def test_every_head_gives_the_same_and_comes_back(tmp_path: Path, family: str, name: str) -> None:
    model = model_of(name, family)
    left = zero_units(model)
    wanted = outputs_of(model)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    report = shrink_(model)
    assert list(report.after) == left == [units.size for units in find_units(model)]
    assert report.parameters == (parameters, sum(p.numel() for p in model.parameters()))
    assert report.parameters[1] < parameters
    assert_same(outputs_of(model), wanted)

    hf_sparse.save_pretrained(model, tmp_path)
    loaded, info = getattr(hf_sparse, name).from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert loaded.state_dict().keys() == model.state_dict().keys()
    for key, value in model.state_dict().items():
        assert torch.equal(value, loaded.state_dict()[key]), key
    for one, other in zip(outputs_of(loaded.eval()), outputs_of(model), strict=True):
        assert same(one, other)


@pytest.mark.few(1)
@pytest.mark.parametrize("family", PARTS)
def test_auto_classes_load_it_sharded_and_with_a_device_map(tmp_path: Path, family: str) -> None:
    model = tiny_model(family)
    zero_units(model)
    shrink_(model)
    hf_sparse.save_pretrained(model, tmp_path, max_shard_size="20KB")
    assert (tmp_path / "model.safetensors.index.json").exists()
    auto: Any = AutoModelForCausalLM if family in CAUSAL else AutoModel
    for device_map in (None, "auto", {"": "cpu"}):
        loaded = auto.from_pretrained(tmp_path, device_map=device_map)
        assert type(loaded).__name__ == f"Sparse{type(model).__name__}"
        for key, value in model.state_dict().items():
            assert torch.equal(value, loaded.state_dict()[key]), key
    # A model made from the config has the sizes too; saved once more it is the same.
    made = auto.from_config(loaded.config)
    assert {k: v.shape for k, v in made.state_dict().items()} == {
        k: v.shape for k, v in loaded.state_dict().items()
    }
    hf_sparse.save_pretrained(loaded, tmp_path / "again")
    first, second = (json.loads((tmp_path / p / "config.json").read_text()) for p in ("", "again"))
    assert first["block_sizes"] == second["block_sizes"]
    assert hf_sparse.inspect_checkpoint(tmp_path / "again").report.parameters > 0


@pytest.mark.few(1)
@pytest.mark.parametrize("family", CAUSAL)
def test_generation_with_every_kind_of_cache(family: str) -> None:
    model = tiny_model(family)
    zero_units(model)
    ids = tiny_batches(family)[0]["input_ids"]
    settings: dict[str, Any] = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 1}
    wanted = model.generate(ids, **settings)
    shrink_(model)
    assert torch.equal(model.generate(ids, **settings), wanted)
    assert torch.equal(model.generate(ids, use_cache=False, **settings), wanted)
    static = model.generate(ids, cache_implementation="static", **settings)
    assert torch.equal(static, wanted)
    beams = model.generate(ids, num_beams=3, **settings)
    assert beams.shape == wanted.shape
    for layer, units in zip(
        cache_in(model(ids, use_cache=True)).layers, find_units(model), strict=True
    ):
        assert layer.keys.shape[1] == units.size.key_heads


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("family", PARTS)
def test_both_kinds_of_attention(family: str, attention: str) -> None:
    model = tiny_model(family)
    model.set_attn_implementation(attention)
    zero_units(model)
    wanted = outputs_of(model)
    shrink_(model)
    assert_same(outputs_of(model), wanted)


@pytest.mark.parametrize("family", PARTS)
@torch.no_grad()
def test_constants_go_to_the_biases(family: str) -> None:
    """Zero rows into neurons and into a head's values, with biases that are not zero."""
    model = tiny_model(
        family, **({"attention_bias": True, "mlp_bias": True} if family == "llama" else {})
    )
    for units in find_units(model):
        for parameter in units.block.parameters():
            parameter.mul_(3) if parameter.ndim > 1 else parameter.add_(torch.randn_like(parameter))
        for layer in units.entries:
            layer.weight[:7] = 0
        values = units.projections[-1].weight
        count = units.size.key_heads * units.head_dim
        values[len(values) - count :][: units.head_dim] = 0
    sizes = [units.size for units in find_units(model)]
    folds = [units.down.module.bias is not None for units in find_units(model)]
    wanted = outputs_of(model)
    report = shrink_(model)
    for before, after, fold in zip(sizes, report.after, folds, strict=True):
        # Without biases a neuron of zero rows gives nothing, as it does where silu(0) = 0.
        assert after.neurons == before.neurons - 7
        # A head's values need a bias behind attention to go to, unless they are zero too.
        stays = model.config.model_type == "qwen2"
        assert after.key_heads == before.key_heads - (0 if stays else 1)
        assert fold == (model.config.model_type not in ("mistral", "qwen2", "qwen3"))
    for one, other in zip(outputs_of(model), wanted, strict=True):
        torch.testing.assert_close(one, other, atol=2e-5, rtol=1e-4)


@torch.no_grad()
def test_a_constant_without_a_bias_to_go_to_stays() -> None:
    """Qwen2's values have a bias and its projection behind attention has none."""
    model = tiny_model("qwen2")
    for units in find_units(model):
        values = units.projections[-1]
        values.weight[: units.head_dim] = 0
        values.module.bias[: units.head_dim] = 1
    with pytest.raises(ValueError, match="nothing to remove"):
        shrink_(model)
    for units in find_units(model):
        units.projections[-1].module.bias[: units.head_dim] = 0
    assert all(size.key_heads == 1 for size in shrink_(model).after)


@pytest.mark.parametrize(
    ("removable", "gone", "left"),
    [
        ([[1, 1], [0, 0]], [[1, 1], [0, 0]], 0),  # a whole group
        ([[1, 0], [0, 1]], [[1, 0], [0, 1]], 0),  # one of each
        ([[1, 0], [0, 0]], [[0, 0], [0, 0]], 1),  # unequal: none
        ([[1, 1], [0, 1], [1, 0]], [[1, 1], [0, 1], [1, 0]], 0),
        ([[1, 1, 0], [1, 0, 0]], [[1, 0, 0], [1, 0, 0]], 1),  # the first of those that can
        ([[1, 1], [1, 1]], [[0, 1], [1, 1]], 0),  # one head stays
        ([[1], [0], [1]], [[1], [0], [1]], 0),
    ],
)
def test_groups_keep_equally_many_heads(removable: list, gone: list, left: int) -> None:
    found, rest = heads_to_remove(torch.tensor(removable, dtype=torch.bool))
    assert found.int().tolist() == gone
    assert rest == left


@torch.no_grad()
def test_heads_of_queries_go_from_every_group() -> None:
    model = tiny_model("llama", num_attention_heads=8, num_key_value_heads=2, head_dim=4)
    for units in find_units(model):
        units.out.weight[:, units.features(torch.tensor([0, 2, 5]))] = 0
    wanted = outputs_of(model)
    report = shrink_(model)
    assert set(report.after) == {BlockSize(6, 2, 64)}
    assert "1 heads are zero and stay" in report.notes[0]
    assert_same(outputs_of(model), wanted)


@pytest.mark.few(2)
@pytest.mark.parametrize("family", PARTS)
@torch.no_grad()
def test_a_block_of_zeros_keeps_one_head_and_one_neuron(tmp_path: Path, family: str) -> None:
    model = tiny_model(family)
    units = find_units(model)[0]
    units.out.weight.zero_()
    units.down.weight.zero_()
    wanted = outputs_of(model)
    report = shrink_(model)
    assert report.after[0] == BlockSize(1, 1, 1)
    assert_same(outputs_of(model), wanted)
    hf_sparse.save_pretrained(model, tmp_path)
    loaded = AutoModel.from_pretrained(tmp_path)
    assert [u.size for u in find_units(loaded)] == list(report.after)


def test_it_can_be_done_twice_and_needs_something_to_do() -> None:
    model = tiny_model("bert")
    hf_sparse.prune_(model, SparsityConfig("head", 0.5), "magnitude")
    shrink_(model)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match="there is nothing to remove: no head and no neuron"):
        shrink_(model)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    hf_sparse.prune_(model, SparsityConfig("head", 0.5), "magnitude")
    report = shrink_(model)
    assert {size.heads for size in report.before} == {2}
    assert {size.heads for size in report.after} == {1}
    assert "3 of 6 heads" in report.summary()
    assert json.loads(report.to_json())["share"] == report.share < 1
    assert "1 of 2" in str(report)


@pytest.mark.parametrize("family", ["bloom", "mixtral"])
def test_unknown_families_are_told_the_known_ones(family: str) -> None:
    config = tiny_config(family)
    with pytest.raises(ValueError, match=", ".join(PARTS)):
        shrink_(build(config, classes_of(config)[0]))


def test_wrong_models_are_refused() -> None:
    with pytest.raises(ValueError, match="takes a transformers model, not a Linear"):
        shrink_(nn.Linear(2, 2))  # type: ignore[arg-type]
    model = tiny_model("llama")
    zero_units(model)
    with pytest.raises(ValueError, match="Take the model that was compiled"):
        shrink_(hf_sparse.compile(model))
    quantized = copy.deepcopy(model)
    layer: Any = quantized.model.layers[0].mlp.up_proj
    layer.weight = nn.Parameter(layer.weight.to(torch.int8), requires_grad=False)
    with pytest.raises(ValueError, match=r"up_proj\.weight is torch\.int8"):
        shrink_(quantized)
    with pytest.raises(ValueError, match="is on the meta device"):
        shrink_(copy.deepcopy(model).to("meta"))
    peft = pytest.importorskip("peft")
    peft.inject_adapter_in_model(peft.LoraConfig(r=2, target_modules=["up_proj"]), model)
    with pytest.raises(ValueError, match="has adapters"):
        shrink_(model)


@pytest.mark.parametrize("family", ["llama", "bert", "gpt2"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_not_lost(family: str, value: float) -> None:
    """Also those of units that go: what feeds a zero column."""
    for place in ("entries", "projections"):
        model = tiny_model(family)
        units = find_units(model)[0]
        prune_(model, SparsityConfig("column", 0.5), "magnitude")
        neuron = int(unused_neurons(units).nonzero()[0, 0])
        layer = getattr(units, place)[0]
        layer.weight[neuron % len(layer.weight), 3] = value
        before = {name: weight.clone() for name, weight in model.state_dict().items()}
        message = rf"{re.escape(layer.weight_name)} has 1 values that are NaN or infinite"
        with pytest.raises(ValueError, match=message):
            shrink_(model)
        with pytest.raises(ValueError, match=message):
            prune_(model, SparsityConfig("column", 0.75), "magnitude")
        for name, weight in model.state_dict().items():
            assert torch.equal(weight.nan_to_num(), before[name].nan_to_num()), name
    if family != "llama":  # whose layers have no biases
        model = tiny_model(family)
        find_units(model)[0].entries[0].module.bias.data[2] = value
        with pytest.raises(ValueError, match=r"\.bias has 1 values"):
            prune_(model, SparsityConfig("column", 0.5), "magnitude")


def test_sharded_weights_are_refused(tmp_path: Path) -> None:
    import torch.distributed as dist
    from torch.distributed.fsdp import fully_shard

    dist.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1
    )
    try:
        model = tiny_model("bert")
        zero_units(model)
        fully_shard(model)
        with pytest.raises(ValueError, match="cut into shards by FSDP"):
            shrink_(model)
    finally:
        dist.destroy_process_group()


@pytest.fixture
def shrunk(tmp_path: Path) -> Path:
    model = tiny_model("llama")
    zero_units(model)
    shrink_(model)
    hf_sparse.save_pretrained(model, tmp_path / "shrunk")
    return tmp_path / "shrunk"


def change(folder: Path, edit: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    edit(config)
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.few(4)
@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda c: c["block_sizes"].pop(), "2 sizes for the 3 blocks"),
        (lambda c: c["block_sizes"][1].update(heads=0), "block 1 has heads=0"),
        (lambda c: c["block_sizes"][1].update(heads=True), "block 1 has heads=True"),
        (lambda c: c["block_sizes"][1].update(heads=1.5), r"block 1 has heads=1\.5"),
        (lambda c: c["block_sizes"][0].update(neurons=65), "block 0 has neurons=65 of 64"),
        (lambda c: c["block_sizes"][0].update(heads=3, key_heads=2), "3 heads for 2 heads of keys"),
        (lambda c: c["block_sizes"][0].pop("heads"), "block_sizes in the config"),
        (lambda c: c.update(block_sizes=7), "block_sizes in the config"),
        (lambda c: c.update(block_sizes="ab"), "block_sizes in the config"),
        (lambda c: c["block_sizes"][2].update(neurons=30), r"51.* is stored, .*30"),
        (
            lambda c: c["block_sizes"][2].update(heads=4, key_heads=2),
            "is stored, the model of conf",
        ),
        (lambda c: c.pop("block_sizes"), "is stored, the model of config.json wants"),
    ],
)
def test_damaged_sizes_are_errors(shrunk: Path, edit: Any, message: str) -> None:
    change(shrunk, edit)
    with pytest.raises(ValueError, match=message):
        AutoModelForCausalLM.from_pretrained(shrunk)


def test_it_is_not_saved_under_the_familys_own_type(shrunk: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(shrunk)
    with pytest.raises(ValueError, match=r"made smaller by hf_sparse\.shrink_"):
        hf_sparse.save_pretrained(
            model, tmp_path / "out", SparsityConfig("unstructured", 0.0, format="dense")
        )
    assert not (tmp_path / "out").exists()


def test_what_transformers_saves_by_itself_is_refused_by_it(tmp_path: Path) -> None:
    model = tiny_model("llama")
    zero_units(model)
    shrink_(model)
    model.save_pretrained(tmp_path)  # transformers' own: LlamaForCausalLM is no Sparse class
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_promises_about_old_weights_are_forgotten(tmp_path: Path) -> None:
    model = tiny_model("bert")
    hf_sparse.prune_(model, SparsityConfig("column", 0.5), "magnitude")
    hf_sparse.save_pretrained(model, tmp_path / "pruned")
    model = AutoModel.from_pretrained(tmp_path / "pruned")
    assert shrink_(model).share == 0.75
    hf_sparse.save_pretrained(model, tmp_path / "shrunk")  # warnings are errors
    found = hf_sparse.inspect_checkpoint(tmp_path / "shrunk")
    assert found.config is None  # blocks of one size are the family's own: a plain dense checkpoint
    assert found.report.sparsity == 0
    assert set(found.formats.values()) == {"dense"}
    again = AutoModel.from_pretrained(tmp_path / "shrunk")
    assert_same(outputs_of(again), outputs_of(model))


@pytest.mark.parametrize("family", ["bert", "gpt2"])
@torch.no_grad()
def test_cross_attention_is_left_alone(tmp_path: Path, family: str) -> None:
    changes = {"is_decoder": True} if family == "bert" else {}
    config = type(CONFIGS[family])(
        **{**CONFIGS[family].to_dict(), **changes, "add_cross_attention": True}
    )
    model = AutoModelForCausalLM.from_config(config).eval()
    zero_units(model)
    inputs = {**inputs_for(model), "encoder_hidden_states": torch.randn(2, 5, 32)}
    wanted = model(**inputs).logits
    shrink_(model)
    torch.testing.assert_close(model(**inputs).logits, wanted, **TOLERANCE)
    hf_sparse.save_pretrained(model, tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert same(loaded(**inputs).logits, model(**inputs).logits)


def test_groups_of_alberts_layers(tmp_path: Path) -> None:
    model = tiny_model("albert", num_hidden_groups=3, inner_group_num=2, num_hidden_layers=6)
    left = zero_units(model)
    wanted = outputs_of(model)
    report = shrink_(model)
    assert list(report.after) == left
    assert report.names[-1] == "encoder.albert_layer_groups.2.albert_layers.1"
    assert_same(outputs_of(model), wanted)
    hf_sparse.save_pretrained(model, tmp_path)
    assert_same(outputs_of(AutoModel.from_pretrained(tmp_path)), outputs_of(model))
    card = (tmp_path / "README.md").read_text()
    assert (
        f"| what is left of the blocks | 18 of 24 heads, {sum(s.neurons for s in left)} of" in card
    )


def test_bfloat16(tmp_path: Path) -> None:
    model = tiny_model("opt").to(torch.bfloat16)
    zero_units(model)
    wanted = outputs_of(model)
    shrink_(model)
    for one, other in zip(outputs_of(model), wanted, strict=True):
        torch.testing.assert_close(one, other, atol=0.05, rtol=0.05)
    hf_sparse.save_pretrained(model, tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert loaded.dtype == torch.bfloat16
    assert_same(outputs_of(loaded), outputs_of(model))


@pytest.mark.slow
def test_trainer_fine_tunes_saves_and_resumes(tmp_path: Path) -> None:
    rows = [
        {"input_ids": torch.randint(2, 256, (8,)), "labels": number % 3} for number in range(16)
    ]
    hf_sparse.save_pretrained(tiny_classifier(), tmp_path / "dense")
    model = hf_sparse.SparseBertForSequenceClassification.from_pretrained(tmp_path / "dense")
    zero_units(model)
    report = shrink_(model)
    settings = {"save_steps": 2, "report_to": [], "use_cpu": True, "logging_strategy": "no"}
    args = TrainingArguments(
        str(tmp_path / "run"), max_steps=4, per_device_train_batch_size=4, **settings
    )
    before = model.bert.encoder.layer[0].output.dense.weight.clone()
    Trainer(model, args, train_dataset=rows).train()
    assert not torch.equal(before, model.bert.encoder.layer[0].output.dense.weight)
    loaded = type(model).from_pretrained(tmp_path / "run" / "checkpoint-4")
    assert [units.size for units in find_units(loaded)] == list(report.after)
    assert_same(outputs_of(loaded.eval()), outputs_of(model.eval()))
    other = type(model).from_pretrained(tmp_path / "run" / "checkpoint-2")
    Trainer(other, args, train_dataset=rows).train(
        resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2")
    )
    # Adam's steps make a last bit of a gradient grow.
    for one, wanted in zip(outputs_of(other.eval()), outputs_of(model.eval()), strict=True):
        assert same(one, wanted, rtol=1e-2, atol=1e-3)


@pytest.mark.few(2)
@pytest.mark.parametrize("family", PARTS)
def test_compiled_models_have_the_smaller_blocks(tmp_path: Path, family: str) -> None:
    model = tiny_model(family)
    zero_units(model)
    shrink_(model)
    compiled = hf_sparse.compile(model)
    for one, other in zip(outputs_of(compiled), outputs_of(model), strict=True):
        seen = inputs_for(model)["attention_mask"].bool()
        if one.shape[:2] == seen.shape:  # what is masked out may differ
            one, other = one[seen], other[seen]
            torch.testing.assert_close(one, other, atol=2e-5, rtol=1e-4)
    if family in CAUSAL:
        ids = tiny_batches(family)[0]["input_ids"]
        settings: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 1}
        wanted = model.generate(ids, **settings)
        assert torch.equal(compiled.generate(ids, **settings), wanted)
    hf_sparse.save_compiled(compiled, tmp_path)
    for one, other in zip(
        outputs_of(hf_sparse.load_compiled(tmp_path)), outputs_of(compiled), strict=True
    ):
        assert same(one, other)


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = tiny_model("llama")
    hf_sparse.prune_(model, SparsityConfig("column", 0.5), "magnitude")
    hf_sparse.save_pretrained(model, tmp_path / "pruned")
    names = [str(tmp_path / "pruned"), str(tmp_path / "shrunk")]
    assert main(["shrink", *names]) == 0
    assert "without a tokenizer" in capsys.readouterr().out
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "shrunk")
    assert {units.size.neurons for units in find_units(loaded)} == {32}
    assert main(["shrink", names[0], str(tmp_path / "again"), "--json"]) == 0
    described = json.loads(capsys.readouterr().out)
    assert described["after"][0]["neurons"] == 32
    assert described["folder"].endswith("again")
    assert main(["shrink", names[1], str(tmp_path / "more")]) == 1
    assert "nothing to remove" in capsys.readouterr().err
    assert not (tmp_path / "more").exists()
    assert main(["shrink", names[0], names[0]]) == 1
    assert "would be lost" in capsys.readouterr().err


@needs_export
@pytest.mark.parametrize("family", ["llama", "bert", "gpt2"])
@pytest.mark.slow
def test_it_is_exported_as_a_smaller_graph(tmp_path: Path, family: str) -> None:
    sizes = []
    for name in ("large", "small"):
        model = tiny_classifier() if family == "bert" else tiny_model(family)
        zero_units(model)
        if name == "small":
            shrink_(model)
        report = hf_sparse.export_onnx(model, tmp_path / name, pack=False)
        assert report.difference.relative < 1e-4
        sizes.append(report.bytes)
    assert sizes[1] < sizes[0]
    assert "block_sizes" not in json.loads((tmp_path / "small" / "config.json").read_text())


def test_blocks_that_share_weights_are_refused() -> None:
    model = tiny_model("gpt2")
    model.transformer.h[1].mlp = model.transformer.h[0].mlp
    with torch.no_grad():
        model.transformer.h[0].mlp.c_proj.weight[:10] = 0
    before = {name: value.shape for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match="shares a weight"):
        hf_sparse.shrink_(model)
    assert {name: value.shape for name, value in model.state_dict().items()} == before
