"""prune_: exact counts, independent references, and models of every kind."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
import torch.nn.utils.prune
from accelerate import cpu_offload, dispatch_model
from torch import Tensor, nn
from transformers import BertLMHeadModel

import hf_sparse
from hf_sparse import Pattern, SparsityConfig, measure_sparsity, prune_
from hf_sparse.pruning.methods import METHODS
from hf_sparse.pruning.wanda import wanda_mask
from hf_sparse.selection import kth_smallest
from hf_sparse.structure.layers import find_stacks, target_layers
from tests.support.closeness import nearly_same
from tests.support.crosses import cross
from tests.support.tiny_models import CONFIGS, UNKNOWN, tiny_batches, tiny_config, tiny_model

ALL = [*CONFIGS, *UNKNOWN]
PATTERNS = [
    ("unstructured", 0.5),
    ("unstructured", 0.83),
    ("2:4", None),
    ("4:8", None),
    ("block:4x1", 0.5),
    ("block:2x4", 0.75),
    ("row", 0.25),
    ("column", 0.25),
]


def dense_weights(model: nn.Module) -> dict[str, Tensor]:
    return {layer.name: layer.weight.clone() for layer in target_layers(model)}


def config_for(method: str) -> SparsityConfig:
    return SparsityConfig("2:4" if METHODS[method].nm_only else "unstructured", 0.5)


@pytest.mark.few(2)
@cross("family, method", ALL, METHODS)
def test_every_family_gets_exact_counts_and_keeps_the_rest(family: str, method: str) -> None:
    model = tiny_model(family)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    if METHODS[method].trains and family in ("bert", "albert", "t5"):
        with pytest.raises(ValueError, match="the batches have no labels"):
            prune_(model, config_for(method), method, tiny_batches(family))
        return
    report = prune_(model, config_for(method), method, tiny_batches(family))
    assert report.sparsity == 0.5
    assert all(tensor.zeros * 2 == tensor.numel for tensor in report.tensors)
    targets = {layer.weight_name for layer in target_layers(model)}
    for name, value in model.state_dict().items():
        if name in targets:
            kept = value != 0
            assert METHODS[method].updates or (value == before[name])[kept].all()
        elif not any(
            value.data_ptr() == layer.parameter.data_ptr() for layer in target_layers(model)
        ):
            assert torch.equal(value, before[name]), name


@pytest.mark.few(2)
@cross("pattern, sparsity, method, family", PATTERNS, METHODS, ["gpt2", "llama"])
def test_every_pattern_is_followed(
    family: str, method: str, pattern: str, sparsity: float | None
) -> None:
    config = SparsityConfig(pattern, sparsity)
    model = tiny_model(family)
    if METHODS[method].nm_only and sparsity is not None:
        with pytest.raises(ValueError, match="learns N:M masks"):
            prune_(model, config, method, tiny_batches(family))
        return
    report = prune_(model, config, method, tiny_batches(family))
    assert report.violations == 0
    assert report.sparsity == pytest.approx(config.sparsity, abs=0.02)
    assert measure_sparsity(model, config).zeros == report.zeros


def naive_wanda(model: nn.Module, batches: list[dict[str, Tensor]], sparsity: float) -> None:
    """Wanda by running the whole model for every block: slow, and shares no code with the walk."""
    for stack in find_stacks(model):
        for block in dict.fromkeys(stack.blocks):
            layers = [m for m in block.modules() if isinstance(m, nn.Linear) or hasattr(m, "nf")]
            sums: dict[nn.Module, Tensor] = {}

            def add(module: nn.Module, args: tuple[Tensor, ...], sums: dict = sums) -> None:
                x = args[0].reshape(-1, args[0].shape[-1]).double()
                sums[module] = sums.get(module, 0) + (x**2).sum(0)

            hooks = [layer.register_forward_pre_hook(add) for layer in layers]
            for batch in batches:
                model(**batch)
            for hook in hooks:
                hook.remove()
            for layer in layers:
                conv = hasattr(layer, "nf")
                weight = layer.weight.data.T if conv else layer.weight.data
                scores = (weight.abs().double() * sums[layer].sqrt()).float()
                order = scores.argsort(dim=1, stable=True)
                cut = order[:, : round(sparsity * weight.shape[1])]
                weight.scatter_(1, cut, 0.0)


@pytest.mark.few(2)
@pytest.mark.parametrize("family", ALL)
@torch.no_grad()
def test_wanda_equals_a_reference_that_runs_the_whole_model(family: str) -> None:
    model = tiny_model(family)
    reference, batches = copy.deepcopy(model), tiny_batches(family)
    prune_(model, SparsityConfig("unstructured", 0.5), "wanda", batches)
    naive_wanda(reference, batches, 0.5)
    same = [
        (a.weight == b.weight).float().mean()
        for a, b in zip(target_layers(model), target_layers(reference), strict=True)
    ]
    # Sums in another order may swap a few weights of nearly equal score.
    assert min(same) > 0.99
    assert sum(same) / len(same) > 0.999


@torch.no_grad()
def test_tokens_that_the_attention_mask_leaves_out_do_not_count() -> None:
    padded = tiny_batches("bert", padded=True)
    short = [
        part
        for batch in padded
        for part in (
            {"input_ids": batch["input_ids"][:1]},
            {"input_ids": batch["input_ids"][1:, :6]},
        )
    ]
    one, other = tiny_model("bert"), tiny_model("bert")
    prune_(one, SparsityConfig("unstructured", 0.5), "wanda", padded)
    prune_(other, SparsityConfig("unstructured", 0.5), "wanda", short)
    for a, b in zip(target_layers(one), target_layers(other), strict=True):
        assert (a.weight == b.weight).float().mean() > 0.99


@torch.no_grad()
def test_a_decoder_has_masks_of_its_own() -> None:
    """Encoder and decoder inputs of equal length, padded differently."""
    batch = tiny_batches("t5", count=1, padded=True)[0]
    batch["decoder_input_ids"] = batch["input_ids"].flip(1)
    batch["decoder_attention_mask"] = batch["attention_mask"].flip(0)
    model = tiny_model("t5")
    attention = model.decoder.block[0].layer
    weights = {
        "decoder_attention_mask": attention[0].SelfAttention.q,
        "attention_mask": attention[1].EncDecAttention.k,
    }
    seen: dict[nn.Module, Tensor] = {}
    hooks = [
        layer.register_forward_pre_hook(lambda module, args: seen.update({module: args[0]}))
        for layer in weights.values()
    ]
    model(**batch)
    for hook in hooks:
        hook.remove()
    expected = {
        name: wanda_mask(
            layer.weight, seen[layer][batch[name].bool()].norm(dim=0), Pattern.parse("2:4"), 0.5
        )
        for name, layer in weights.items()
    }
    targets = [
        "decoder.block.0.layer.0.SelfAttention.q",
        "decoder.block.0.layer.1.EncDecAttention.k",
    ]
    prune_(model, SparsityConfig("2:4", targets=targets), "wanda", [batch])
    for name, layer in weights.items():
        assert torch.equal(layer.weight != 0, expected[name]), name


def test_padding_of_a_decoder_with_cross_attention_changes_nothing() -> None:
    config = tiny_config("bert", is_decoder=True, add_cross_attention=True)
    masks = []
    for filling in (5, 9):
        torch.manual_seed(0)
        model = BertLMHeadModel(config).eval()
        batch = tiny_batches("bert", count=1, padded=True)[0]
        batch["encoder_hidden_states"] = torch.randn(2, 12, 32)
        batch["encoder_attention_mask"] = batch["attention_mask"].flip(0)
        batch["input_ids"][batch["attention_mask"] == 0] = filling
        batch["encoder_hidden_states"][batch["encoder_attention_mask"] == 0] = filling
        prune_(model, SparsityConfig("unstructured", 0.5), "wanda", [batch])
        masks.append([layer.weight != 0 for layer in target_layers(model)])
    assert all(torch.equal(a, b) for a, b in zip(*masks, strict=True))


@pytest.mark.parametrize("family", ["opt", "gpt2", "bert"])
def test_sequences_beyond_the_learned_positions_are_refused(family: str) -> None:
    with pytest.raises(ValueError, match="has learned 128 positions"):
        prune_(tiny_model(family), SparsityConfig("2:4"), "wanda", tiny_batches(family, length=129))


def test_a_cache_in_a_batch_changes_nothing() -> None:
    one, other = tiny_model("llama"), tiny_model("llama")
    batches = tiny_batches("llama")
    prune_(one, SparsityConfig("2:4"), "wanda", batches)
    prune_(other, SparsityConfig("2:4"), "wanda", [{**b, "use_cache": True} for b in batches])
    for a, b in zip(target_layers(one), target_layers(other), strict=True):
        assert torch.equal(a.weight, b.weight)


def test_adapters_are_left_alone(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    model = tiny_model("llama")
    peft.inject_adapter_in_model(peft.LoraConfig(r=4, target_modules=["q_proj"]), model)
    report = prune_(model, SparsityConfig("2:4"), "wanda", tiny_batches("llama"))
    names = [tensor.name for tensor in report.tensors]
    assert not any("lora" in name for name in names)
    assert "model.layers.0.self_attn.q_proj.base_layer.weight" in names
    with pytest.raises(ValueError, match="has adapters"):
        hf_sparse.save_pretrained(model, tmp_path, SparsityConfig("2:4"))


def test_weights_that_are_computed_are_refused(tmp_path: Path) -> None:
    model = tiny_model("llama")
    torch.nn.utils.prune.l1_unstructured(model.model.layers[0].mlp.up_proj, "weight", 0.5)
    for call in (measure_sparsity, lambda model: hf_sparse.save_pretrained(model, tmp_path)):
        with pytest.raises(ValueError, match=r"up_proj.weight is no parameter.*prune.remove"):
            call(model)


def test_wanda_mask_by_hand() -> None:
    weight = torch.tensor([[1.0, -2.0, 3.0, -4.0], [4.0, 3.0, 2.0, 1.0]])
    norms = torch.tensor([8.0, 4.0, 2.0, 1.0])
    mask = wanda_mask(weight, norms, Pattern.parse("unstructured"), 0.5)
    # Scores 8 8 6 4 and 32 12 4 1.
    assert mask.tolist() == [[True, True, False, False], [True, True, False, False]]


@pytest.mark.parametrize("pattern", ["unstructured", "block:4x2", "row"])
def test_global_magnitude_takes_the_smallest_of_all_layers(pattern: str) -> None:
    model = tiny_model("llama")
    before = dense_weights(model)
    report = prune_(model, SparsityConfig(pattern, 0.6), "magnitude", scope="global")
    assert report.options == {"scope": "global"}
    if pattern == "unstructured":
        assert report.zeros == round(0.6 * report.numel)
        values = torch.cat([weight.abs().reshape(-1) for weight in before.values()])
        threshold = values.sort().values[report.zeros]
        for layer in target_layers(model):
            assert torch.equal(layer.weight != 0, before[layer.name].abs() >= threshold)
    else:
        assert report.violations == 0
    assert len({tensor.sparsity for tensor in report.tensors}) > 1


def test_kth_smallest_equals_a_sort() -> None:
    generator = torch.Generator().manual_seed(0)
    parts = [torch.randint(0, 50, (37,), generator=generator) / 7 for _ in range(5)]
    parts.append(torch.rand(1000, generator=generator) * 1e-20)
    ordered = torch.cat(parts).sort().values
    for count in (1, 2, 400, 999, 1000, 1001, 1100, ordered.numel()):
        value, ties = kth_smallest(lambda: iter(parts), count)
        assert value == ordered[count - 1]
        assert ties == int((ordered[:count] == value).sum())


def test_shared_layers_are_pruned_once_on_all_their_calls() -> None:
    model = tiny_model("albert")
    report = prune_(model, SparsityConfig("unstructured", 0.5), "wanda", tiny_batches("albert"))
    assert len(report.tensors) == 6


def test_head_pattern_takes_its_size_from_the_model() -> None:
    model = tiny_model("llama")
    config = SparsityConfig("head", 0.5, targets=["q_proj"])
    report = prune_(model, config, "wanda", tiny_batches("llama"))
    assert (report.pattern, report.violations, report.sparsity) == ("head:8", 0, 0.5)
    with pytest.raises(ValueError, match="needs targets"):
        prune_(model, SparsityConfig("head:8", 0.5), "magnitude")


def test_layers_outside_the_blocks_can_be_named() -> None:
    model = tiny_model("opt", tie_word_embeddings=False)
    config = SparsityConfig("unstructured", 0.5, targets=["lm_head", "fc1"])
    report = prune_(model, config, "wanda", tiny_batches("opt"))
    assert [tensor.name for tensor in report.tensors][-1] == "lm_head.weight"
    assert report.sparsity == 0.5


def test_the_model_comes_back_in_its_mode_and_unhooked() -> None:
    model = tiny_model("llama").train()
    prune_(model, SparsityConfig("2:4"), "wanda", tiny_batches("llama"))
    assert model.training
    assert model.config.use_cache
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert not any("forward" in vars(module) for module in model.modules())


def test_tied_weights_stay_tied() -> None:
    model = tiny_model("llama")
    prune_(model, SparsityConfig("2:4"), "wanda", tiny_batches("llama"))
    assert model.lm_head.weight is model.model.embed_tokens.weight


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"method": "wandaa"}, "Known methods: magnitude, wanda"),
        ({"method": "wanda"}, "needs calibration data"),
        ({"method": "wanda", "batches": []}, "needs calibration data"),
        ({"method": "wanda", "batches": torch.ones(1, 4)}, "wanted a list"),
        ({"method": "wanda", "batches": ["text"]}, "a batch is str 'text'"),
        ({"method": "wanda", "batches": [torch.ones(4)]}, r"shape \(batch, tokens\)"),
        ({"method": "wanda", "batches": [{"input_ids": [[1, 2]]}]}, "wanted a dict of tensors"),
        ({"method": "magnitude", "scope": "everywhere"}, "wanted one of layer, global"),
        ({"method": "magnitude", "damping": 0.1}, "no option damping"),
    ],
)
def test_bad_arguments(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        prune_(tiny_model("llama"), SparsityConfig("unstructured", 0.5), **arguments)


def test_a_pattern_alone_is_no_config() -> None:
    with pytest.raises(ValueError, match=r"config is '2:4'; wanted a SparsityConfig"):
        prune_(tiny_model("llama"), "2:4", "magnitude")


def test_a_compiled_model_is_refused() -> None:
    with pytest.raises(ValueError, match="Prune it first"):
        prune_(torch.compile(tiny_model("llama")), SparsityConfig("2:4"), "magnitude")


def test_global_scope_has_no_meaning_for_nm() -> None:
    with pytest.raises(ValueError, match="no meaning"):
        prune_(tiny_model("llama"), SparsityConfig("2:4"), "magnitude", scope="global")


def test_what_cannot_be_pruned_is_named_before_anything_changes() -> None:
    model = tiny_model("llama")
    before = dense_weights(model)
    with pytest.raises(ValueError, match=r"q_proj.weight: in_features is 32.*divisible by M = 7"):
        prune_(model, SparsityConfig("3:7"), "magnitude")
    with torch.no_grad():
        model.model.layers[2].mlp.up_proj.weight[0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"layers.2.mlp.up_proj.weight has 1 values that are NaN"):
        prune_(model, SparsityConfig("unstructured", 0.5), "magnitude")
    for layer in target_layers(model):
        assert layer.weight.count_nonzero() == before[layer.name].count_nonzero()


def test_activations_that_are_not_finite_name_the_layer() -> None:
    model = tiny_model("llama")
    with torch.no_grad():
        model.model.layers[1].input_layernorm.weight.fill_(float("inf"))
    with pytest.raises(ValueError, match=r"inputs of model.layers.1.*not finite"):
        prune_(model, SparsityConfig("2:4"), "wanda", tiny_batches("llama"))


def test_blocks_that_are_not_a_chain_are_refused() -> None:
    class Zigzag(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(4, 4)) for _ in range(2))

        def forward(self, input_ids: Tensor) -> Tensor:
            x = input_ids.float()
            return self.blocks[1](self.blocks[0](x) + 1)

    with pytest.raises(ValueError, match="not a chain"):
        prune_(Zigzag(), SparsityConfig("2:4"), "wanda", [torch.ones(2, 4)])


@pytest.mark.parametrize("method", ["wanda", "sparsegpt"])
def test_models_placed_by_a_device_map_work(method: str) -> None:
    """Hooks on every module, as `device_map` puts them there; weights on the disk are refused."""
    placed, plain = tiny_model("llama"), tiny_model("llama")
    halves = {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu"}
    halves |= {"lm_head": "cpu", **{f"model.layers.{i}": "cpu" for i in range(3)}}
    placed = dispatch_model(placed, halves, force_hooks=True)
    batches, config = tiny_batches("llama"), SparsityConfig("unstructured", 0.5)
    for model in (placed, plain):
        prune_(model, config, method, batches)
    for one, other in zip(target_layers(placed), target_layers(plain), strict=True):
        assert nearly_same(one.weight, other.weight)
    offloaded = cpu_offload(tiny_model("llama"), torch.device("cpu"))
    with pytest.raises(ValueError, match=r"on the meta device.*prune_checkpoint"):
        prune_(offloaded, config, method, batches)
