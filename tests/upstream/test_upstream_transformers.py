"""What stands in the rooms `upstream` for transformers and PEFT, tried on them."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    BertConfig,
    BertModel,
    GPT2Config,
    LlamaModel,
    MPNetConfig,
    MPNetModel,
    PreTrainedModel,
    ViTConfig,
)
from transformers.conversion_mapping import (
    get_checkpoint_conversion_mapping,
    get_model_conversion_mapping,
)

import hf_sparse
from hf_sparse.upstream import peft_by_name
from hf_sparse.upstream import torch as of_torch
from hf_sparse.upstream.transformers import (
    attention,
    auto,
    caches,
    configs,
    experts,
    exporting,
    files,
    loading,
    models,
    saving,
    training,
)
from tests.support.closeness import same
from tests.support.exporting import WHY_NOT
from tests.support.mixtures import tiny_mixture
from tests.support.tiny_models import CONFIGS, tiny_batches, tiny_model


def noting(*_: Any, **__: Any) -> None:
    """A hook that changes nothing."""


def test_transformers_tells_what_files_may_lack_and_have() -> None:
    model = tiny_model("llama")
    for read in (models.not_required_in_files, models.not_expected_in_files, models.not_saved):
        assert isinstance(read(model), list)
    for name in ("on_save", "on_load_missing", "on_load_unexpected"):
        assert hasattr(PreTrainedModel, f"_keys_to_ignore_{name}")
    assert models.tied_names(model) == {"lm_head.weight": "model.embed_tokens.weight"}
    kept = saving.without_ties(model.state_dict(), model)
    assert len(kept) == len(model.state_dict()) - 1
    assert saving.under_original_names(model, kept).keys() == kept.keys()
    assert all(
        isinstance(dtype, torch.dtype)
        for dtype in models.dtype_plan(model, torch.bfloat16).values()
    )


def test_transformers_hooks_blocks_to_collect_their_outputs() -> None:
    model: Any = tiny_model("llama")
    assert models.block_class(model.base_model) is type(model.model.layers[0])
    assert models.tells_outputs(model.base_model)

    def hooks() -> Iterator[Any]:
        return (hook for block in model.model.layers for _, hook in of_torch.forward_hooks(block))

    for wanted in (3, 6):
        for _ in range(2):  # the second time they are there
            model(**tiny_batches("llama")[0], output_hidden_states=True)
        found = list(hooks())
        assert len(found) == wanted
        assert all(map(models.collects_outputs, found))
        models.forget_output_hooks_(model)
    assert not models.collects_outputs(noting)


def test_transformers_keeps_these_on_modules() -> None:
    model: Any = tiny_model("llama")
    model.gradient_checkpointing_enable()
    kept = {name for module in model.modules() for name in vars(module)}
    assert set(models.KEPT_ON_MODULES) <= kept


def test_transformers_names_its_attention_and_the_masks_of_it() -> None:
    config = copy.deepcopy(CONFIGS["bert"])
    models.set_attention_(config, "eager")
    assert models.attention_of(config) == getattr(config, models.ATTENTION_SETTING) == "eager"
    assert callable(attention.attention_function("sdpa"))
    assert attention.attention_function("no such") is None
    attention.register_mask("hf_sparse_tried", noting)
    assert attention.mask_function("hf_sparse_tried") is noting


def test_transformers_names_the_function_of_experts_and_puts_one_on_their_classes() -> None:
    assert callable(attention.experts_function("grouped_mm"))
    assert attention.experts_function("no such") is None
    model: Any = tiny_mixture("mixtral")
    assert hasattr(model.config, models.EXPERTS_SETTING)
    kind = type(model.model.layers[0].mlp.experts)
    for name, origin in models.PUT_BY_DECORATORS.items():
        function = getattr(kind, name)
        assert (function.__module__, function.__qualname__) == origin
    assert models.modeling_name("gemma3_text") == "transformers.models.gemma3.modeling_gemma3"


def test_a_family_whose_own_loop_collects_hidden_states_has_a_class_of_blocks() -> None:
    base: Any = MPNetModel(
        MPNetConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, vocab_size=9)
    )
    assert models.block_class(base, "MPNetLayer") is type(base.encoder.layer[0])


def test_transformers_tells_who_quantized_a_model() -> None:
    settings = SimpleNamespace(quant_method=SimpleNamespace(value="gptq"))
    quantizer = SimpleNamespace(quantization_config=settings)
    assert models.quantized_by(tiny_model("bert")) is None
    assert models.quantized_by(SimpleNamespace(hf_quantizer=quantizer)) == "gptq"


def test_transformers_has_a_module_for_each_family() -> None:
    assert models.import_modeling(BertConfig).BertModel is BertModel
    assert models.modeling_name("bert") == BertModel.__module__
    assert models.is_from_transformers(BertModel.forward)
    assert not models.is_from_transformers(nn.Linear)
    assert {"BertModel", "BertForMaskedLM"} <= auto.head_names()
    assert AutoModel in list(auto.auto_classes())
    assert auto.mapped_classes(AutoModel, BertConfig) == (BertModel,)
    assert auto.mapped_classes(AutoModelForCausalLM, ViTConfig) == ()
    assert auto.tokenizers_of(GPT2Config) is not None
    assert "LlamaForCausalLM" in auto.CAUSAL_LM_NAMES


def test_transformers_caches_keys_and_values() -> None:
    model = tiny_model("llama")
    name = caches.cache_name(LlamaModel.forward)
    assert name in caches.CACHE_NAMES
    cache = caches.cache_in(model(**tiny_batches("llama")[0], use_cache=True))
    assert isinstance(cache, caches.Cache)
    assert all(isinstance(layer, caches.DynamicLayer) for layer in cache.layers)
    assert issubclass(caches.DynamicSlidingWindowLayer, caches.CacheLayerMixin)
    both = caches.EncoderDecoderCache(cache, type(cache)())
    assert caches.own_cache(both) is caches.own_cache(cache) is cache
    assert cache.layers[0].is_initialized
    assert not cache.layers[0].is_sliding
    assert cache.layers[0].keys.shape == cache.layers[0].values.shape


def test_transformers_names_the_settings_of_adapters_and_finds_files(tmp_path: Path) -> None:
    assert files.ADAPTER_CONFIG_NAME == "adapter_config.json"
    (tmp_path / "config.json").write_text("{}")
    assert files.cached_file(str(tmp_path), "config.json") == str(tmp_path / "config.json")
    assert not training.is_deepspeed_zero3_enabled()


def test_transformers_restores_weights_by_a_restorer_that_leaves_no_trace(tmp_path: Path) -> None:
    from hf_sparse.checkpoint.quantizer import SparseCheckpointConfig, SparseHfQuantizer

    for kind, base in (
        (SparseHfQuantizer, loading.Restorer),
        (SparseCheckpointConfig, loading.QuantizationConfigMixin),
    ):
        assert issubclass(kind, base)
    assert callable(loading.register_quantizer("hf_sparse_tried"))
    assert callable(loading.register_quantization_config("hf_sparse_tried"))
    model = tiny_model("llama")
    hf_sparse.prune_(model, hf_sparse.SparsityConfig("2:4"), "magnitude")
    hf_sparse.save_pretrained(model, tmp_path)
    loaded: Any = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert all(torch.equal(loaded.state_dict()[k], v) for k, v in model.state_dict().items())
    assert models.quantized_by(loaded) is None
    restorer: Any = SparseHfQuantizer(SparseCheckpointConfig(pattern="2:4", sparsity=0.5))
    conversion = loading.conversion_from_parts("weight", ["weight$"], restorer, restorer.restore)
    assert isinstance(conversion, loading.WeightConverter)
    loaded._weight_conversions = [conversion]
    loading.detach_(restorer, loaded)
    assert "_weight_conversions" not in vars(loaded)


def test_transformers_converts_dense_checkpoints_of_a_family() -> None:
    mixture = tiny_mixture("mixtral")
    count = loading.number_of_conversions(mixture)
    assert count > loading.number_of_conversions(tiny_model("llama"))
    known = get_model_conversion_mapping(mixture)
    assert len(loading.without_conversions(known, count)) == len(known) - count
    loading.convert_alike_("TriedForCausalLM", "MixtralForCausalLM")
    known_by_name = get_checkpoint_conversion_mapping("MixtralForCausalLM")
    assert get_checkpoint_conversion_mapping("TriedForCausalLM") == known_by_name


def test_transformers_knows_the_settings_of_quantized_models() -> None:
    assert loading.quantization_config_class("fp8").__name__ == "FineGrainedFP8Config"
    assert loading.quantization_config_class("no such method") is None


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_transformers_gates_what_enters_the_last_product_of_an_expert(family: str) -> None:
    model = tiny_mixture(family)
    [module, *_] = [each for name, each in model.named_modules() if name.endswith("mlp.experts")]
    assert not experts.is_spread(module)
    assert experts.runs_in_autocast(module)
    width = module.down_proj.shape[1 if family == "gpt_oss" else 2]
    given = torch.linspace(-2, 2, 3 * 2 * width).view(3, 2 * width)
    result = experts.gated(module, given)
    assert result.shape == (3, width)
    if family == "mixtral":
        wanted = nn.functional.silu(given[:, :width]) * given[:, width:]
        torch.testing.assert_close(result, wanted)


def test_transformers_finds_configs_by_their_types() -> None:
    class TriedConfig(BertConfig):
        model_type = "tried_bert"

    class TriedModel(BertModel):
        config_class = TriedConfig

    assert {"BertConfig", "LlamaConfig"} <= configs.config_names()
    assert hasattr(BertConfig(), configs.NAME_OR_PATH)
    configs.extend_types_(lambda types: types)
    AutoConfig.register("tried_bert", TriedConfig)
    try:
        assert TriedConfig in configs.registered_configs()
        auto.register_classes_(AutoModel, TriedConfig, [TriedModel])
        assert auto.mapped_classes(AutoModel, TriedConfig) == (TriedModel,)
    finally:
        configs.extend_types_(
            lambda types: type(types)({k: v for k, v in types.items() if k != "tried_bert"})
        )
    assert configs.with_special_floats(BertConfig, {"a": 1}) == {"a": 1}


def test_transformers_exports_and_quantizes() -> None:
    assert exporting.has_exporters() or WHY_NOT
    if WHY_NOT:
        pytest.skip(WHY_NOT)
    inputs = dict(tiny_batches("bert")[0])
    axes = exporting.dynamic_axes(inputs)
    assert axes["input_ids"].keys() == {0, 1}
    assert exporting.dynamic_quantizer() is not None
    assert exporting.static_quantizer([inputs], ["MatMul"]) is not None


def test_peft_makes_layers_of_ours_and_tells_what_it_wrapped() -> None:
    peft = pytest.importorskip("peft")
    from hf_sparse.upstream import peft as of_peft

    class OwnLayer(of_peft.LoraLinear):  # type: ignore[misc]
        pass

    model: Any = tiny_model("llama")
    config = peft.LoraConfig(target_modules=["q_proj"], modules_to_save=["o_proj"])
    of_peft.use_layers_(config, {nn.Linear: OwnLayer})
    assert of_peft.is_target(config, "model.layers.0.self_attn.q_proj")
    assert not of_peft.is_target(config, "model.layers.0.self_attn.k_proj")
    assert not peft_by_name.has_adapters(model)
    adapted = peft.get_peft_model(model, config, "first")
    layer = adapted.base_model.model.model.layers[0].self_attn.q_proj
    assert type(layer) is OwnLayer
    assert isinstance(layer, of_peft.BaseTunerLayer)
    assert of_peft.adapters_of(layer) == {"first"}
    assert layer.lora_variant == {}
    assert issubclass(of_peft.LoraVariant, object)
    assert len(of_peft.trained_whole(adapted)) == 3
    [(name, module), *_] = of_peft.wrapped_whole(adapted)
    assert name.endswith("o_proj")
    assert isinstance(module.original_module, nn.Linear)
    assert peft_by_name.is_peft_model(adapted)
    assert not peft_by_name.is_peft_model(model)
    assert peft_by_name.has_adapters(model)
    assert peft_by_name.is_of_peft(layer)
    assert not peft_by_name.is_of_peft(model)


def test_peft_trains_single_weights_at_places() -> None:
    peft = pytest.importorskip("peft")
    from hf_sparse.upstream import peft as of_peft

    config = peft.ShiraConfig(r=1, target_modules=["q_proj"])
    assert config.mask_fn is of_peft.random_mask
    adapted = peft.get_peft_model(tiny_model("llama"), config)
    layer = adapted.base_model.model.model.layers[0].self_attn.q_proj
    assert isinstance(layer, of_peft.ShiraLayer)
    assert layer.shira_indices["default"].shape == (2, layer.shira_weight["default"].numel())


def test_transformers_tells_whether_it_has_added_adapters() -> None:
    model = tiny_model("llama")
    assert PreTrainedModel._hf_peft_config_loaded is False
    assert not models.has_own_adapters(model)
    model._hf_peft_config_loaded = True  # as its add_adapter does, which may want a newer PEFT
    assert models.has_own_adapters(model)


def test_layers_inside_of_masked_adapters_are_left_to_torch() -> None:
    peft = pytest.importorskip("peft")
    pytest.importorskip("llvmlite")
    model = tiny_model("stablelm")
    hf_sparse.prune_(model, hf_sparse.SparsityConfig("unstructured", 0.6), "magnitude")
    hf_sparse.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"]))
    compiled = hf_sparse.compile(model.eval())
    batch = tiny_batches("stablelm")[0]
    assert same(compiled(**batch).logits, model(**batch).logits)
