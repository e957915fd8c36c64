"""What was exchanged in classes, configs and tensors: compile refuses it, or computes the same."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama import modeling_llama

import hf_sparse
from hf_sparse.runtime.model.exchanged import why_not_own, why_not_own_function
from hf_sparse.runtime.model.families import COMPILED
from tests.runtime.model.test_faithful import blocks_of, check, check_same, model_of, result
from tests.support.tiny_models import CONFIGS, tiny_model

Patch = pytest.MonkeyPatch


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def twice(function: Any) -> Any:
    """A function whose result counts twice, and that says that it is the one it wraps."""

    @functools.wraps(function)
    def mine(*args: Any, **kwargs: Any) -> Any:
        found = function(*args, **kwargs)
        return (2 * found[0], *found[1:]) if isinstance(found, tuple) else 2 * found

    return mine


@pytest.mark.few(2)
@pytest.mark.parametrize(
    ("owner", "name", "match"),
    [
        (modeling_llama.LlamaMLP, "forward", r"mlp is a LlamaMLP, whose forward was exchanged"),
        (modeling_llama, "rotate_half", "whose apply_rotary_pos_emb calls rotate_half, which is"),
        (modeling_llama, "repeat_kv", "whose eager_attention_forward calls repeat_kv, which is"),
        (functional, "linear", r"_proj is a Linear, whose forward calls linear, which is"),
        (nn.Module, "__call__", "whose __call__ was exchanged for|computes something else"),
        (nn.Module, "_call_impl", "whose _call_impl was exchanged for|computes something else"),
        (
            modeling_llama.LlamaModel,
            "forward",
            "model is a .*LlamaModel, whose forward was exchanged",
        ),
        (modeling_llama, "create_causal_mask", "LlamaModel, .*calls create_causal_mask, which is"),
    ],
)
def test_functions_that_say_that_they_are_others_are_refused(
    owner: Any, name: str, match: str, monkeypatch: Patch
) -> None:
    model = model_of("llama")
    with monkeypatch.context() as change:
        change.setattr(owner, name, twice(getattr(owner, name)))
        check(model, match)
    check_same(model)


def test_a_function_of_torch_that_was_exchanged_is_refused(monkeypatch: Patch) -> None:
    model = model_of("bert")
    with monkeypatch.context() as change:
        change.setattr(functional, "layer_norm", twice(functional.layer_norm))
        check(
            model,
            f"LayerNorm, whose forward calls layer_norm, which is {__name__}",
        )
    with monkeypatch.context() as change:
        change.setattr(functional, "linear", functools.partial(twice(functional.linear)))
        check(model, f"Linear, whose forward calls linear, which is {__name__}")
        check(model_of("stablelm"), "left to torch: it is no plain Linear")
    check_same(model)


class Whatever:
    """A descriptor that hides what instances have."""

    def __get__(self, instance: Any, owner: Any = None) -> float:
        return 3.0

    def __set__(self, instance: Any, value: Any) -> None:
        pass


@pytest.mark.parametrize("how", ["property", "descriptor", "getattribute"])
def test_attributes_that_a_class_computes_are_refused(how: str, monkeypatch: Patch) -> None:
    model, kind = model_of("llama"), modeling_llama.LlamaAttention

    def read(self: Any, name: str) -> Any:
        return 3.0 if name == "scaling" else object.__getattribute__(self, name)

    if how == "getattribute":
        monkeypatch.setattr(kind, "__getattribute__", read, raising=False)
    else:
        mine = (
            Whatever() if how == "descriptor" else property(lambda self: 3.0, lambda self, v: None)
        )
        monkeypatch.setattr(kind, "scaling", mine, raising=False)
    check(
        model,
        rf"self_attn is a LlamaAttention, whose \w+ was exchanged for {__name__}",
    )


@pytest.mark.few(2)
@pytest.mark.parametrize("how", ["torch", "wraps", "partial", "object", "mask"])
def test_attention_that_was_exchanged_is_left_to_torch(how: str, monkeypatch: Patch) -> None:
    model, before = model_of("llama"), ALL_ATTENTION_FUNCTIONS["sdpa"]
    if how == "torch":  # as kernels for attention that are packages of their own do it
        name = "scaled_dot_product_attention"
        monkeypatch.setattr(functional, name, twice(getattr(functional, name)))
    elif how == "mask":
        mask = ALL_MASK_ATTENTION_FUNCTIONS["sdpa"]
        mine = {"sdpa": lambda *args, **kwargs: mask(*args, **{**kwargs, "attention_mask": None})}
        monkeypatch.setattr(AttentionMaskInterface, "_global_mapping", mine)
    else:
        mine = twice(before)
        if how == "partial":
            mine = functools.partial(mine)
        elif how == "object":
            mine = type("Mine", (), {"__call__": staticmethod(mine)})()
        changed = {**AttentionInterface._global_mapping, "sdpa": mine}
        monkeypatch.setattr(AttentionInterface, "_global_mapping", changed)
    compiled = check_same(model)
    assert "of attention is 'sdpa'" in compiled.explain(tokens=8).reason or how != "mask"
    assert "attention is 'sdpa', the function" in compiled.explain(tokens=8).reason or how == "mask"


@pytest.mark.parametrize("family", CONFIGS)
def test_nothing_was_exchanged_in_transformers_own_classes(family: str) -> None:
    model = tiny_model(family)
    for kind in {type(module) for block in blocks_of(model) for module in block.modules()}:
        assert why_not_own(kind) is None
    for name in ("eager", "sdpa", "flash_attention_2", "flex_attention"):
        for functions in (ALL_ATTENTION_FUNCTIONS, ALL_MASK_ATTENTION_FUNCTIONS):
            if (function := functions.get(name)) is not None:
                assert why_not_own_function(function) is None
    assert set(COMPILED) >= set(CONFIGS)


@pytest.mark.parametrize("when", ["made", "changed"])
@pytest.mark.filterwarnings("ignore")
def test_layer_types_that_a_family_does_not_read_change_nothing(when: str) -> None:
    """Mistral's blocks have all the same window."""
    kinds = ["full_attention", "sliding_attention", "full_attention"]
    model = model_of("mistral", **({"layer_types": kinds} if when == "made" else {}))
    model.config.layer_types = kinds
    assert "layer_types" in check_same(model).explain(tokens=8).reason
    other = model_of("llama")
    other.config.layer_types, other.config.sliding_window = kinds, 3
    check_same(other)


@pytest.mark.parametrize("family", ["albert", "bert", "opt"])
def test_a_config_of_the_owner_of_blocks_is_the_models(family: str) -> None:
    model = model_of(family)
    owner = model.model.decoder if family == "opt" else model.encoder
    owner.config = copy.deepcopy(owner.config)
    owner.config.num_hidden_layers = 2
    check(model, "config is not the config of the")


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "sparse_coo": Tensor.to_sparse,
    "sparse_csr": Tensor.to_sparse_csr,
    "_mkldnn": Tensor.to_mkldnn,
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("family", ["llama", "stablelm"])
@pytest.mark.filterwarnings("ignore")
def test_other_layouts_than_rows_are_refused(family: str, layout: str) -> None:
    model = model_of(family)
    layer = model.model.layers[1].mlp.up_proj
    layer.weight = nn.Parameter(LAYOUTS[layout](layer.weight.detach()), requires_grad=False)
    check(model, rf"layers\.1\.mlp\.up_proj\.weight has the layout torch\.{layout}; wanted")


@pytest.mark.few(2)
@pytest.mark.parametrize("kind", ["LoraConfig", "DoRA", "LoHaConfig", "BOFTConfig", "HRAConfig"])
@pytest.mark.filterwarnings("ignore")
def test_layers_inside_adapters_are_left_to_torch(kind: str) -> None:
    """Many adapters compute with the weight that they change, and do not call the layer."""
    import peft

    options = {"init_lora_weights": False} if kind in ("LoraConfig", "DoRA") else {}
    options |= {"use_dora": True} if kind == "DoRA" else {}
    config = getattr(peft, "LoraConfig" if kind == "DoRA" else kind)
    model = model_of("stablelm")
    peft.inject_adapter_in_model(config(target_modules=["up_proj"], **options), model)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad and parameter.is_floating_point():
                parameter += 0.1
    compiled = check_same(model.eval())
    assert not any("up_proj" in layer.name for layer in compiled.explain(tokens=8).layers)
    linears = r".*(q|k|v|o|up|gate|down)_proj"
    every = peft.inject_adapter_in_model(
        peft.LoraConfig(target_modules=linears), model_of("stablelm")
    )
    check(every.eval(), "lies in an adapter. Merge that first")


@pytest.mark.parametrize("how", ["type", "shape", "stride"])
def test_a_head_reads_no_bias_that_is_not_what_it_was(how: str) -> None:
    model = model_of("llama", tie_word_embeddings=False)
    model.lm_head = nn.Linear(32, 256)
    compiled = check_same(model)
    ids = torch.tensor([[5]])
    with torch.no_grad():
        wanted = model(input_ids=ids).logits
        if how == "stride":
            wide = torch.zeros(256, 2)
            wide[:, 0] = compiled.lm_head.bias
            compiled.lm_head.bias = nn.Parameter(wide[:, 0])
            torch.testing.assert_close(compiled(input_ids=ids).logits, wanted, atol=1e-4, rtol=1e-3)
            return
        bias = torch.zeros(3) if how == "shape" else compiled.lm_head.bias.bfloat16()
        compiled.lm_head.bias = nn.Parameter(bias)
        with pytest.raises(RuntimeError, match=r"size|dtype"):  # as torch's own layer
            compiled(input_ids=ids)


def test_a_compiled_model_of_a_patched_class_is_that_of_before(monkeypatch: Patch) -> None:
    """What is patched afterwards does not reach machine code, nor break it."""
    model = model_of("llama")
    compiled, wanted = hf_sparse.compile(model), result(model)
    monkeypatch.setattr(modeling_llama.LlamaMLP, "forward", twice(modeling_llama.LlamaMLP.forward))
    torch.testing.assert_close(result(compiled), wanted, atol=1e-4, rtol=1e-3)
