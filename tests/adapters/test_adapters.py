"""Adapters for sparse models: masked LoRA and ShiRA, against their formulas and stock PEFT."""

from __future__ import annotations

import copy
import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

import hf_sparse
from hf_sparse import Distillation, get_peft_model, load_adapter, measure_sparsity, merge_adapters_
from hf_sparse.upstream.peft_by_name import has_adapters
from tests.support.closeness import same
from tests.support.sparse_models import assert_same, places, sparse_model
from tests.support.tiny_models import tiny_batches, tiny_model

peft = pytest.importorskip("peft")

LAYERS = {"llama": ["q_proj", "down_proj"], "gpt2": ["c_attn", "mlp.c_proj"]}


def lora(family: str = "llama", **changes: Any) -> Any:
    return peft.LoraConfig(**{"r": 4, "target_modules": LAYERS[family], **changes})


def shira(**changes: Any) -> Any:
    return peft.ShiraConfig(
        **{"r": 3, "target_modules": LAYERS["llama"], "random_seed": 0, **changes}
    )


def train(model: Any, family: str = "llama", steps: int = 4) -> None:
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=3e-2)
    model.train()
    for batch in (tiny_batches(family) * steps)[:steps]:
        model(**batch, labels=batch["input_ids"]).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()


@torch.no_grad()
def outputs(model: Any, family: str = "llama") -> Tensor:
    return model(**tiny_batches(family)[0]).logits


def reference(x: Tensor, layer: Any, adapters: list[str]) -> Tensor:
    """The formula by autograd, in the layer's own precision."""
    base = layer.base_layer
    weight = base.weight.detach().T if layer.fan_in_fan_out else base.weight.detach()
    whole = weight.clone()
    for name in adapters:
        delta = layer.lora_B[name].weight @ layer.lora_A[name].weight * layer.scaling[name]
        whole = whole + (weight != 0) * delta
    return nn.functional.linear(x, whole, base.bias)


@pytest.mark.few(4)
@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("adapters", [["default"], ["default", "second"]])
def test_the_layer_and_its_gradients_are_the_formula(
    family: str, rslora: bool, adapters: list[str]
) -> None:
    model = get_peft_model(sparse_model(family).double(), lora(family, use_rslora=rslora))
    if len(adapters) > 1:
        get_peft_model(model, lora(family, r=2), "second")
        model.base_model.set_adapter(adapters)
    path = LAYERS[family][0]
    layer = next(m for name, m in model.named_modules() if name.endswith(path)).double()
    torch.manual_seed(0)
    for name in adapters:
        nn.init.normal_(layer.lora_B[name].weight)
    x = torch.randn(2, 5, layer.in_features, dtype=torch.double, requires_grad=True)
    factors = [part[name].weight for part in (layer.lora_A, layer.lora_B) for name in adapters]
    found, wanted = layer(x), reference(x, layer, adapters)
    torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-12)
    up = torch.randn_like(found)
    for mine, right in zip(
        torch.autograd.grad(found, [x, *factors], up),
        torch.autograd.grad(wanted, [x, *factors], up),
        strict=True,
    ):
        torch.testing.assert_close(mine, right)


@pytest.mark.few(2)
@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("changes", [{}, {"use_rslora": True, "lora_dropout": 0.2}])
def test_masked_lora_keeps_zeros_through_everything(
    family: str, changes: dict, tmp_path: Path
) -> None:
    base = sparse_model(family)
    zeros, dense = places(base), outputs(base, family)
    model = get_peft_model(copy.deepcopy(base), lora(family, **changes))
    train(model, family)
    found = outputs(model, family)
    assert (found - dense).abs().max() > 1e-2
    with model.disable_adapter():
        assert same(outputs(model, family), dense)
    weights = {k: v.clone() for k, v in model.state_dict().items() if "base_layer" in k}

    model.merge_adapter()
    torch.testing.assert_close(outputs(model, family), found, atol=1e-5, rtol=0)
    assert measure_sparsity(model).zeros == sum(int(v.sum()) for v in zeros.values())
    model.unmerge_adapter()
    for name, weight in weights.items():
        torch.testing.assert_close(model.state_dict()[name], weight, atol=1e-6, rtol=0)
    torch.testing.assert_close(outputs(model, family), found, atol=1e-5, rtol=0)

    model.save_pretrained(tmp_path)
    again = load_adapter(copy.deepcopy(base), tmp_path)
    assert same(outputs(again, family), found)
    merged = merge_adapters_(again)
    torch.testing.assert_close(outputs(merged, family), found, atol=1e-5, rtol=0)
    assert_same(places(merged), zeros)
    safely = model.merge_and_unload(safe_merge=True)
    assert_same(places(safely), zeros)
    torch.testing.assert_close(outputs(safely, family), found, atol=1e-5, rtol=0)


def test_dropout_drops_inputs_of_the_update_alone() -> None:
    model = get_peft_model(sparse_model(), lora(lora_dropout=0.5))
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    nn.init.normal_(layer.lora_B["default"].weight)
    x = torch.randn(3, 32)
    layer.train()
    torch.manual_seed(7)
    found = layer(x)
    torch.manual_seed(7)
    dropped = layer.lora_dropout["default"](x)
    base = layer.base_layer(x)
    torch.testing.assert_close(found, base + dropped @ layer.get_delta_weight("default").T)


def test_a_bias_of_the_update() -> None:
    base = sparse_model("gpt2")
    model = get_peft_model(base, lora("gpt2", lora_bias=True))
    train(model, "gpt2")
    found = outputs(model, "gpt2")
    torch.testing.assert_close(outputs(merge_adapters_(model), "gpt2"), found, atol=1e-5, rtol=0)


def test_stock_peft_refuses_a_masked_adapter(tmp_path: Path) -> None:
    base = sparse_model()
    get_peft_model(copy.deepcopy(base), lora()).save_pretrained(tmp_path)
    described = json.loads((tmp_path / "adapter_config.json").read_text())
    assert described["masked"] is True
    with pytest.raises(KeyError, match="HF_SPARSE_MASKED_LORA"):
        peft.PeftModel.from_pretrained(base, tmp_path)


def test_several_adapters_side_by_side(tmp_path: Path) -> None:
    base = sparse_model()
    model = get_peft_model(copy.deepcopy(base), lora())
    train(model)
    first = outputs(model)
    get_peft_model(model, lora(r=2, target_modules=["up_proj"]), "second")
    model.set_adapter("second")
    train(model)
    second = outputs(model)
    model.save_pretrained(tmp_path)
    again = load_adapter(copy.deepcopy(base), tmp_path)
    load_adapter(again, tmp_path / "second", "second")
    again.set_adapter("default")
    assert same(outputs(again), first)
    again.set_adapter("second")
    assert same(outputs(again), second)
    merged = merge_adapters_(again, ["default", "second"])
    assert_same(places(merged), places(base))
    with pytest.raises(ValueError, match="no adapter third"):
        merge_adapters_(model, ["third"])


def test_shira_trains_kept_weights_and_loads_with_stock_peft(tmp_path: Path) -> None:
    base = sparse_model()
    model = get_peft_model(copy.deepcopy(base), shira())
    train(model)
    found = outputs(model)
    assert (found - outputs(base)).abs().max() > 1e-3
    for name, module in model.named_modules():
        if hasattr(module, "shira_indices"):
            rows, columns = module.shira_indices["default"]
            assert (module.base_layer.weight[rows, columns] != 0).all(), name
            assert len(rows) == 3 * sum(module.base_layer.weight.shape)
    model.save_pretrained(tmp_path)
    stock = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
    torch.testing.assert_close(outputs(stock), found)
    merged = stock.merge_and_unload()
    torch.testing.assert_close(outputs(merged), found, atol=1e-5, rtol=0)
    assert_same(places(merged), places(base))
    ours = merge_adapters_(load_adapter(copy.deepcopy(base), tmp_path))
    torch.testing.assert_close(outputs(ours), found, atol=1e-5, rtol=0)
    assert_same(places(ours), places(base))


def test_shira_without_a_seed_is_the_same_in_all_processes() -> None:
    one, other = (get_peft_model(sparse_model(), shira(random_seed=None)) for _ in range(2))
    layers = [m for m in one.modules() if hasattr(m, "shira_indices")]
    others = [m for m in other.modules() if hasattr(m, "shira_indices")]
    for mine, theirs in zip(layers, others, strict=True):
        assert torch.equal(mine.shira_indices["default"], theirs.shira_indices["default"])


def test_weights_that_are_not_here_whole_are_told() -> None:
    model = get_peft_model(sparse_model(), lora())
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    layer.base_layer.weight.data = torch.empty(0)  # as FSDP1 and DeepSpeed ZeRO-3 leave it
    with pytest.raises(ValueError, match=r"cut into shards .* Shard whole blocks"):
        model(**tiny_batches("llama")[0])
    with pytest.raises(ValueError, match=r"q_proj is cut into shards. To merge, gather"):
        merge_adapters_(model)


@pytest.mark.few(1)
@pytest.mark.parametrize("config", [lora(), shira()])
def test_saving_merges_and_leaves_the_adapter(config: Any, tmp_path: Path) -> None:
    base = sparse_model()
    model = get_peft_model(copy.deepcopy(base), config)
    train(model)
    found = outputs(model)
    hf_sparse.save_pretrained(model, tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    torch.testing.assert_close(outputs(loaded), found, atol=1e-5, rtol=0)
    assert_same(places(loaded), places(base))
    assert hf_sparse.inspect_checkpoint(tmp_path).report.violations == 0
    assert same(outputs(model), found)
    assert model.peft_config


def test_a_stock_lora_is_not_merged_into_zeros(tmp_path: Path) -> None:
    base = sparse_model()
    model = peft.get_peft_model(copy.deepcopy(base), lora(init_lora_weights=False))
    found = outputs(model)
    for refused in (merge_adapters_, lambda m: hf_sparse.save_pretrained(m, tmp_path / "out")):
        with pytest.raises(ValueError, match=r"would fill .* trained without a mask"):
            refused(model)
        assert same(outputs(model), found)
    assert not (tmp_path / "out").exists()
    model.save_pretrained(tmp_path / "adapter")
    with pytest.raises(ValueError, match="type LORA without a mask"):
        load_adapter(base, tmp_path / "adapter")


def test_a_stock_lora_beside_a_masked_one_is_told_apart() -> None:
    model = get_peft_model(sparse_model(), lora())
    model.add_adapter("stock", lora(init_lora_weights=False))
    model.base_model.set_adapter(["default", "stock"])
    train(model)
    with pytest.raises(ValueError, match="'stock' would fill"):
        merge_adapters_(model)
    merge_adapters_(model, ["default"])
    stock = peft.get_peft_model(sparse_model(), lora())
    with pytest.raises(ValueError, match="masked"):
        get_peft_model(stock, lora(), "second")


def test_another_model_than_the_adapters_is_refused(tmp_path: Path) -> None:
    base, other = sparse_model(), sparse_model(seed=3)
    for name, config in (("lora", lora()), ("shira", shira())):
        model = get_peft_model(copy.deepcopy(base), config)
        model.save_pretrained(tmp_path / name)
    with pytest.raises(ValueError, match="zeros are at other places"):
        load_adapter(copy.deepcopy(other), tmp_path / "lora")
    with pytest.raises(ValueError, match="weights that are zero in this model"):
        load_adapter(copy.deepcopy(other), tmp_path / "shira")
    with pytest.raises(FileNotFoundError, match=r"no adapter_config\.json"):
        load_adapter(base, tmp_path)


def test_an_adapter_for_other_shapes_or_a_damaged_one(tmp_path: Path) -> None:
    for name, config in (("lora", lora()), ("shira", shira())):
        get_peft_model(sparse_model(), config).save_pretrained(tmp_path / name)
        other = sparse_model(hidden_size=64)
        with pytest.raises(
            ValueError, match=r"made for a model of other shapes \(size mismatch .*"
        ):
            load_adapter(other, tmp_path / name)
        assert not has_adapters(other)
    (tmp_path / "lora/adapter_model.safetensors").rename(tmp_path / "weights")
    with pytest.raises(FileNotFoundError, match=r"has no adapter_model\.safetensors"):
        load_adapter(sparse_model(), tmp_path / "lora")
    for text, message in (("{", "is no JSON: "), ("[]", "is no JSON object")):
        (tmp_path / "lora/adapter_config.json").write_text(text)
        with pytest.raises(ValueError, match=message):
            load_adapter(sparse_model(), tmp_path / "lora")


def test_a_state_with_other_zeros_under_an_adapter_is_told() -> None:
    model = get_peft_model(sparse_model(), lora(init_lora_weights=False))
    other = tiny_model("llama", seed=3).state_dict()
    names = {name: name.replace(".base_layer", "") for name in model.base_model.model.state_dict()}
    model.base_model.model.load_state_dict(
        {name: other[plain] for name, plain in names.items() if plain in other}, strict=False
    )
    with pytest.raises(ValueError, match="zeros are not those that adapter 'default' was made for"):
        merge_adapters_(model)
    assert model.peft_config


def test_only_linear_and_conv1d_are_targets() -> None:
    for config in (lora, shira):
        for target in ("embed_tokens", "input_layernorm"):
            model = sparse_model()
            with pytest.raises(ValueError, match=rf"{target} is of class .* Leave it out"):
                get_peft_model(model, config(target_modules=["q_proj", target]))
            assert not has_adapters(model)
    model = get_peft_model(sparse_model(), lora(target_modules=r".*q_proj.*"))
    get_peft_model(model, lora(target_modules=r".*(q_proj|k_proj)"), "second")


def test_dense_layers_get_a_plain_adapter_with_a_warning() -> None:
    model = tiny_model("llama")
    config = hf_sparse.SparsityConfig("2:4", targets=["q_proj"])
    hf_sparse.prune_(model, config, "magnitude")
    with pytest.warns(UserWarning, match="3 of 6 adapted layers have no zeros"):
        adapted = get_peft_model(copy.deepcopy(model), lora())
    train(adapted)
    found = outputs(adapted)
    merged = merge_adapters_(adapted)
    torch.testing.assert_close(outputs(merged), found, atol=1e-5, rtol=0)
    assert_same(places(merged), places(model))
    with pytest.raises(ValueError, match="none of the 6 layers"):
        get_peft_model(tiny_model("llama"), lora())


@pytest.mark.parametrize("config", [shira(r=11, target_modules="all-linear"), lora(r=2)])
def test_a_refused_adapter_leaves_the_model_as_it_was(config: Any) -> None:
    model = sparse_model()
    if isinstance(config, peft.LoraConfig):
        model = tiny_model("llama")
    before, kinds = copy.deepcopy(model.state_dict()), [type(m) for m in model.modules()]
    with pytest.raises(ValueError, match=r"weights that can be trained|none of the 6 layers"):
        get_peft_model(model, config)
    assert [type(module) for module in model.modules()] == kinds
    assert before.keys() == model.state_dict().keys()
    assert all(parameter.requires_grad for parameter in model.parameters())


class FakeQuantized(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, (self.weight * 8).round() / 8)


def test_bad_input() -> None:
    with pytest.raises(ValueError, match="config is a IA3Config"):
        get_peft_model(sparse_model(), peft.IA3Config())
    with pytest.raises(ValueError, match="use_dora cannot be combined with a mask"):
        get_peft_model(sparse_model(), lora(use_dora=True))
    with pytest.raises(ValueError, match="'pissa' changes the base weights"):
        get_peft_model(sparse_model(), lora(init_lora_weights="pissa"))
    with pytest.raises(ValueError, match=r"q_proj .* has 512 weights .* r=20 .* Wanted r <= 8"):
        get_peft_model(sparse_model(), shira(r=20))
    with pytest.raises(ValueError, match="Conv1D, which PEFT's ShiRA does not adapt"):
        get_peft_model(sparse_model("gpt2"), shira(target_modules=["c_attn"]))
    with pytest.raises(ValueError, match="has no adapters to merge"):
        merge_adapters_(sparse_model())


def test_quantized_bases_are_refused(tmp_path: Path) -> None:
    model = sparse_model()
    layer = model.model.layers[0].self_attn.q_proj
    layer.__class__ = FakeQuantized
    get_peft_model(sparse_model(), lora()).save_pretrained(tmp_path)
    for adapt in (lambda: get_peft_model(model, lora()), lambda: load_adapter(model, tmp_path)):
        with pytest.raises(ValueError, match="FakeQuantized with a forward of its own"):
            adapt()
        assert not has_adapters(model)
    model = sparse_model()
    layer = model.model.layers[0].self_attn.q_proj
    layer.weight = nn.Parameter(layer.weight.detach().to(torch.float8_e4m3fn), requires_grad=False)
    with pytest.raises(ValueError, match="float8_e4m3fn, quantized"):
        get_peft_model(model, lora())
    model = sparse_model()
    model.hf_quantizer = type(
        "Q", (), {"quantization_config": type("C", (), {"quant_method": "bnb"})}
    )
    with pytest.raises(ValueError, match=r"model is quantized \(bnb\)"):
        get_peft_model(model, lora())


@pytest.mark.parametrize("config", [lora(), lora(lora_dropout=0.1)])
def test_a_frozen_bfloat16_base_has_no_gradients_and_no_state(config: Any) -> None:
    model = get_peft_model(sparse_model().to(torch.bfloat16), config)
    zeros = places(model)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert all(parameter.dtype == torch.float32 for parameter in trained)
    optimizer = torch.optim.AdamW(trained, lr=1e-2)
    saved: list[Tensor] = []

    def note(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    model.train()
    batch = tiny_batches("llama")[0]
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        loss = model(**batch, labels=batch["input_ids"]).loss
    loss.backward()
    optimizer.step()
    layers = dict(model.named_modules())
    name = "base_model.model.model.layers.0.mlp.down_proj"
    base = layers[name].base_layer.weight
    # nothing of a base weight's shape is kept for the backward pass but the weight itself
    alike = [t for t in saved if t.shape == base.shape and t.data_ptr() != base.data_ptr()]
    own = {p.data_ptr() for p in model.parameters()}
    assert not [t for t in alike if t.data_ptr() not in own]
    for key, parameter in model.named_parameters():
        if "lora_" not in key:
            assert parameter.grad is None, key
            assert parameter not in optimizer.state
    assert_same(places(model), zeros)
    found = outputs(model.eval())
    merged = merge_adapters_(model)
    torch.testing.assert_close(outputs(merged), found, atol=2e-2, rtol=0)
    assert sum(int(v.sum()) for v in places(merged).values()) == sum(
        int(v.sum()) for v in zeros.values()
    )


def test_trainer_resumes_an_adapter_bit_for_bit(tmp_path: Path) -> None:
    rows = [
        {"input_ids": row, "labels": row}
        for batch in tiny_batches("llama", count=8)
        for row in batch["input_ids"]
    ]

    def run(**resume: Any) -> Any:
        torch.manual_seed(0)
        model = get_peft_model(sparse_model(), lora())
        args = TrainingArguments(
            str(tmp_path), max_steps=4, save_steps=2, report_to=[], use_cpu=True, learning_rate=1e-2,
            disable_tqdm=True,
        )  # fmt: skip
        Trainer(model, args, train_dataset=rows).train(**resume)
        return model.eval()

    whole = run()
    assert json.loads((tmp_path / "checkpoint-2/adapter_config.json").read_text())["masked"]
    again = run(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert same(outputs(whole), outputs(again))


@pytest.mark.parametrize("task_type", [None, "CAUSAL_LM"])
def test_a_teacher_for_an_adapter(task_type: str | None) -> None:
    teacher, base = tiny_model("llama"), sparse_model()
    model = get_peft_model(base, lora(task_type=task_type))
    distillation = Distillation(teacher, logits=1.0, hidden=1.0, temperature=1.0).attach(model)
    batch = tiny_batches("llama")[0]
    inputs = {**batch, "labels": batch["input_ids"]}
    found = model.train()(**inputs).loss
    distillation.remove()
    mine = model(**inputs, output_hidden_states=True)
    theirs = teacher(**batch, output_hidden_states=True)
    p, q = (o.logits[:, :-1].log_softmax(-1) for o in (theirs, mine))
    wanted = (p.exp() * (p - q)).sum(-1).mean()
    states = zip(mine.hidden_states, theirs.hidden_states, strict=True)
    wanted = wanted + torch.stack([(a - b).square().mean() for a, b in states]).mean()
    torch.testing.assert_close(found.detach(), wanted.detach(), rtol=1e-4, atol=1e-6)
    found.backward()
    assert all(p.grad is None for p in teacher.parameters())


def test_mixed_batches_of_adapters() -> None:
    model = get_peft_model(sparse_model(), lora())
    get_peft_model(model, lora(), "second")
    for _, layer in model.named_modules():
        if hasattr(layer, "lora_B"):
            nn.init.normal_(layer.lora_B["default"].weight, std=0.1)
            nn.init.normal_(layer.lora_B["second"].weight, std=0.1)
    model.eval()
    ids = tiny_batches("llama")[0]["input_ids"]
    with torch.no_grad():
        mixed = model(input_ids=ids, adapter_names=["default", "second"]).logits
        alone = []
        for index, name in enumerate(("default", "second")):
            model.set_adapter(name)
            alone.append(model(input_ids=ids[index : index + 1]).logits)
    torch.testing.assert_close(mixed, torch.cat(alone), atol=1e-5, rtol=1e-4)


def test_nothing_warns_without_a_reason() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        adapted = [get_peft_model(sparse_model(), lora())]
        adapted.append(get_peft_model(sparse_model("gpt2"), lora("gpt2")))
    for model in adapted:
        assert any("lora_A" in name for name, _ in model.named_parameters())


def test_a_model_with_adapters_inside_is_not_saved_exported_or_recovered(tmp_path: Path) -> None:
    model = sparse_model()
    hf_sparse.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj"]))
    with pytest.raises(ValueError, match="the model has adapters"):
        hf_sparse.save_pretrained(model, tmp_path / "saved")
    with pytest.raises(ValueError, match="the model has adapters"):
        hf_sparse.export_onnx(model, tmp_path / "graph")
    with pytest.raises(ValueError, match="the model has adapters"):
        hf_sparse.recover_(model, tiny_batches("llama"))
    assert not list(tmp_path.iterdir())


def test_a_refused_adapter_is_taken_off(tmp_path: Path) -> None:
    adapted = hf_sparse.get_peft_model(
        sparse_model(), peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    )
    adapted.save_pretrained(tmp_path)
    other = tiny_model("llama", seed=3)
    hf_sparse.prune_(other, hf_sparse.SparsityConfig("unstructured", 0.6), "magnitude")
    ids = tiny_batches("llama")[0]["input_ids"]
    with torch.no_grad():
        before = other(ids).logits
        with pytest.raises(ValueError, match="zeros are at other places"):
            hf_sparse.load_adapter(other, tmp_path)
        assert same(other(ids).logits, before)
    with pytest.raises(ValueError, match="is tied to another layer"):
        hf_sparse.get_peft_model(adapted, peft.LoraConfig(target_modules=["lm_head"]), "b")
    assert list(adapted.peft_config) == ["default"]


def test_what_fills_zeros_beside_adapters_is_refused() -> None:
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["down_proj"])
    with pytest.raises(ValueError, match="modules_to_save"):
        hf_sparse.get_peft_model(sparse_model(), config)
    with pytest.raises(ValueError, match="is tied to another layer"):
        hf_sparse.get_peft_model(
            sparse_model(), peft.LoraConfig(r=2, target_modules=["q_proj", "lm_head"])
        )
    stock = peft.get_peft_model(
        sparse_model(), peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    )
    stock.merge_adapter()
    with pytest.raises(ValueError, match="would fill"):
        hf_sparse.merge_adapters_(stock)
