"""A compiled model computes what the model computes, or compile refuses it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from types import MethodType
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune
from transformers import AttentionInterface, DynamicCache, LlamaForCausalLM, PreTrainedModel
from transformers.activations import ACT2FN
from transformers.models.llama import modeling_llama

import hf_sparse
from hf_sparse.runtime.model.compiled import CompiledLayer
from hf_sparse.runtime.model.families import COMPILED
from tests.support.tiny_models import CONFIGS, tiny_model

TOLERANCE = {"atol": 1e-4, "rtol": 1e-3}
IDS = torch.arange(3, 27).view(2, 12)


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def model_of(family: str, sparsity: float = 0.6, **changes: Any) -> PreTrainedModel:
    """Blocks whose parts all matter."""
    model = tiny_model(family, **changes)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(8)
    hf_sparse.prune_(model, hf_sparse.SparsityConfig("unstructured", sparsity), "magnitude")
    return model


def result(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(input_ids=IDS)[0]


def blocks_of(model: Any) -> list[Any]:
    listed = list(model.base_model.get_submodule(COMPILED[model.config.model_type].stack))
    return [inner for item in listed for inner in getattr(item, "albert_layers", [item])]


def check(model: PreTrainedModel, match: str) -> None:
    """Compile refuses."""
    with pytest.raises(ValueError, match=match):
        hf_sparse.compile(model)


def check_same(model: PreTrainedModel) -> PreTrainedModel:
    """Compile gives what the model gives."""
    wanted, compiled = result(model), hf_sparse.compile(model)
    torch.testing.assert_close(result(compiled), wanted, **TOLERANCE)
    return compiled


def changed(value: Any) -> Any:
    """Another value of an attribute."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, float) and 0 <= value < 1:
        return 0.5 * value + 0.1
    if isinstance(value, int | float):
        return 2 * value + 1
    if isinstance(value, tuple | str) or value is None:
        return ("changed",)
    return torch.tanh


def change_each_attribute(
    model: PreTrainedModel, block: nn.Module, result: Callable[[nn.Module], Tensor]
) -> int:
    """How many are refused; compiled models of the others give the model's own results."""
    seen: set[Any] = {*vars(nn.Module()), "config"}
    refused = 0
    for module in block.modules():
        for name, value in list(vars(module).items()):
            if name in seen or (type(module), name) in seen:
                continue
            seen.add((type(module), name))
            vars(module)[name] = changed(value)
            try:
                compiled = hf_sparse.compile(model)
            except ValueError as error:
                refused += f".{name} is " in str(error)
            else:
                torch.testing.assert_close(result(compiled), result(model), **TOLERANCE)
            vars(module)[name] = value
    return refused


@pytest.mark.few(1)
@pytest.mark.parametrize("family", ["bert", "albert", "gpt2", "opt", "qwen3"])
def test_an_attribute_of_any_module_is_refused_or_makes_no_difference(family: str) -> None:
    model = model_of(family, use_cache=False)
    assert change_each_attribute(model, blocks_of(model)[-1], result) > 10
    check_same(model)


class Double(nn.Module):
    """A module around another one, whose result counts twice."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        found = self.inner(*args, **kwargs)
        return (2 * found[0], *found[1:]) if isinstance(found, tuple) else 2 * found


def part_that_does_more(model: PreTrainedModel, part: nn.Module, how: str) -> nn.Module:
    """A copy of a part of a model that may compute something else."""
    copied = copy.deepcopy(part, {id(model.config): model.config})
    if how == "subclass":
        copied.__class__ = type("Mine", (type(part),), {})
    elif how == "wrapped":
        return Double(copied)
    elif how == "hook":
        copied.register_forward_hook(lambda *given: None, with_kwargs=True)
    elif how == "pre-hook":
        copied.register_forward_pre_hook(lambda *given: None)
    elif how == "forward":
        vars(copied)["forward"] = copied.forward.__func__.__get__(part)
    else:
        vars(copied)["extra_repr"] = str
    return copied


def check_changed_parts(model: Any, block: Any, how: str) -> None:
    """Check that a model is refused for each module of a block that does more, and else is not."""
    for name in [name for name, _ in block.named_modules() if name]:
        before = block.get_submodule(name)
        block.set_submodule(name, part_that_does_more(model, before, how))
        with pytest.raises(ValueError, match=rf"\.{name} (is|has)"):
            hf_sparse.compile(model)
        block.set_submodule(name, before)
    hf_sparse.compile(model)


@pytest.mark.few(1)
@pytest.mark.parametrize("how", ["subclass", "wrapped", "hook", "pre-hook", "forward", "hidden"])
@pytest.mark.parametrize("family", ["bert", "albert", "gpt2", "opt", "qwen3"])
def test_any_module_that_is_changed_is_refused(family: str, how: str) -> None:
    """The block itself, attention, projections, norms, dropout, activations, all of them."""
    model = model_of(family, 0.0)
    block = blocks_of(model)[-1]
    names = [name for name, _ in block.named_modules() if name]
    for name in names:
        before = block.get_submodule(name)
        block.set_submodule(name, part_that_does_more(model, before, how))
        check(model, rf"\.{name} (is|has)|\.{name}\.extra_repr is")
        block.set_submodule(name, before)
    check_same(model)


def test_classes_and_functions_that_were_exchanged_are_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = model_of("llama")
    forward, rotate = modeling_llama.LlamaMLP.forward, modeling_llama.apply_rotary_pos_emb
    with monkeypatch.context() as change:
        change.setattr(modeling_llama.LlamaMLP, "forward", lambda self, x: 2 * forward(self, x))
        check(model, rf"mlp is a LlamaMLP, whose forward was exchanged for {__name__}")
    with monkeypatch.context() as change:
        change.setattr(modeling_llama, "apply_rotary_pos_emb", lambda *args: rotate(*args))
        check(model, rf"whose forward calls apply_rotary_pos_emb, which is {__name__}")
    with monkeypatch.context() as change:
        mine = type("LlamaMLP", (modeling_llama.LlamaMLP,), {})
        change.setattr(modeling_llama, "LlamaMLP", mine)
        check(model_of("llama"), rf"mlp is a {__name__}\.LlamaMLP, which was put in place")
    with monkeypatch.context() as change:
        change.setitem(ACT2FN, "silu", nn.Tanh)
        check(model_of("llama"), "activation 'silu' is a Tanh here")
    check_same(model)


def test_hooks_on_every_module_of_torch_are_refused() -> None:
    model = model_of("bert")
    hook = nn.modules.module.register_module_forward_hook(lambda *given: None)
    try:
        check(model, "global forward hooks")
    finally:
        hook.remove()
    check_same(model)


def a_bias(m: Any) -> None:
    m.model.layers[1].input_layernorm.bias = nn.Parameter(torch.ones(32))


def another_buffer(m: Any) -> None:
    m.model.layers[1].mlp.register_buffer("scale", torch.ones(1))


def another_module(m: Any) -> None:
    m.model.layers[1].mlp.extra = nn.Linear(2, 2)


def a_smaller_value(m: Any) -> None:
    m.model.layers[1].self_attn.v_proj = nn.Linear(32, 8, bias=False)


def a_scalar_bias(m: Any) -> None:
    m.model.layers[1].mlp.up_proj.bias = nn.Parameter(torch.ones(1))


def one_block_twice(m: Any) -> None:
    m.model.layers[1] = m.model.layers[0]


def one_number_twice(m: Any) -> None:
    m.model.layers[1].self_attn.layer_idx = 0


def another_config(m: Any) -> None:
    m.model.layers[1].self_attn.config = copy.deepcopy(m.config)


def another_config_inside(m: Any) -> None:
    m.config = copy.deepcopy(m.config)


def another_list(m: Any) -> None:
    m.model.layers.__class__ = type("Mine", (nn.ModuleList,), {})


def another_stack(m: Any) -> None:
    m.model.layers = nn.Sequential(*m.model.layers)


def a_mask_of_zeros(m: Any) -> None:
    prune.l1_unstructured(m.model.layers[1].mlp.up_proj, "weight", 0.5)


def integers(m: Any) -> None:
    layer = m.model.layers[1].mlp.up_proj
    layer.weight = nn.Parameter(layer.weight.to(torch.int8), requires_grad=False)


def another_kind_of_tensor(m: Any) -> None:
    layer = m.model.layers[1].mlp.up_proj
    layer.weight = nn.Parameter(layer.weight.data.as_subclass(type("Mine", (Tensor,), {})))


def on_no_device(m: Any) -> None:
    m.model.norm.to("meta")


def dropout_in_training(m: Any) -> None:
    m.model.layers[1].self_attn.attention_dropout = 0.5
    m.model.layers[1].self_attn.train()


def other_loop(m: Any) -> None:
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        return modeling_llama.LlamaModel.forward(self, *args, **kwargs)

    m.model.__class__ = type("Mine", (modeling_llama.LlamaModel,), {"forward": forward})


def other_forward(m: Any) -> None:
    before = m.model.forward
    m.model.forward = lambda *args, **kwargs: before(*args, **kwargs)


def other_forward_of_all(m: Any) -> None:
    before = m.forward
    m.forward = lambda *args, **kwargs: before(*args, **kwargs)


@pytest.mark.few(8)
@pytest.mark.parametrize(
    ("change", "match"),
    [
        (a_bias, r"layers\.1\.input_layernorm has other parameters.*: bias"),
        (another_buffer, r"layers\.1\.mlp has other parameters.*: scale"),
        (another_module, r"layers\.1\.mlp has other modules.*: extra"),
        (a_smaller_value, r"v_proj\.out_features is 8; its config makes it 16"),
        (a_scalar_bias, r"up_proj\.bias is of the shape \(1,\)"),
        (one_block_twice, "same layer_idx, 0"),
        (one_number_twice, "same layer_idx, 0"),
        (another_config, r"layers\.1\.self_attn\.config is not the config"),
        (another_config_inside, r"LlamaModel\.config is not the config"),
        (another_list, "wanted a ModuleList"),
        (another_stack, "layers is a Sequential"),
        (a_mask_of_zeros, r"up_proj has"),
        (integers, r"up_proj has a weight of torch\.int8: it is quantized"),
        (another_kind_of_tensor, "up_proj has a weight of type Mine"),
        (on_no_device, r"norm\.weight is on the meta device"),
        (dropout_in_training, r"self_attn is in training mode"),
        (other_loop, "whose forward is not that of LlamaModel"),
        (other_forward, "model has a forward of its own"),
        (other_forward_of_all, "LlamaForCausalLM has a forward of its own"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
@pytest.mark.filterwarnings("ignore")
def test_what_is_not_transformers_own_is_refused(change: Callable, match: str) -> None:
    model = model_of("llama")
    change(model)
    check(model, match)


def no_biases(m: Any) -> None:
    for module in m.modules():
        if isinstance(module, nn.Linear):
            module.bias = None


def identities_for_dropout(m: Any) -> None:
    for name, module in list(m.named_modules()):
        if isinstance(module, nn.Dropout):
            m.set_submodule(name, nn.Identity())


def more_dropout(m: Any) -> None:
    for module in m.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.5


def shared_weights(m: Any) -> None:
    first, second, _ = blocks_of(m)
    second.intermediate.dense.weight = first.intermediate.dense.weight


def the_same_block(m: Any) -> None:
    m.encoder.layer[1] = m.encoder.layer[0]


def other_embeddings(m: Any) -> None:
    m.set_input_embeddings(Double(m.get_input_embeddings()))


def training(m: Any) -> None:
    m.train()


def hidden_states_before(m: Any) -> None:
    with torch.no_grad():
        m(input_ids=IDS, output_hidden_states=True, output_attentions=False)


@pytest.mark.parametrize(
    "change",
    [
        no_biases,
        identities_for_dropout,
        more_dropout,
        shared_weights,
        the_same_block,
        other_embeddings,
        hidden_states_before,
    ],
    ids=lambda value: value.__name__,
)
def test_what_makes_no_difference_is_taken(change: Callable) -> None:
    model = model_of("bert", 0.0)
    change(model)
    check_same(model)


def test_rotary_embeddings_are_the_models() -> None:
    model = model_of("llama")
    model.model.rotary_emb.inv_freq.mul_(0.3)
    check_same(model)
    model.model.rotary_emb = Double(model.model.rotary_emb)
    check_same(model)


def test_hooks_on_what_stays_act_and_are_those_of_the_model() -> None:
    """Also those that are objects or methods, which a deep copy would copy."""

    class Recorder:
        def __init__(self) -> None:
            self.seen: list[Tensor] = []

        def __call__(self, module: nn.Module, args: Any, output: Tensor) -> Tensor:
            self.seen.append(output)
            return 2 * output

        def before(self, module: nn.Module, args: Any, kwargs: Any) -> None:
            self.seen.append(args)

    model = model_of("llama", tie_word_embeddings=False)
    recorder = Recorder()
    model.model.embed_tokens.register_forward_hook(recorder)
    model.model.norm.register_forward_hook(recorder)
    model.lm_head.register_forward_hook(recorder)
    model.model.register_forward_pre_hook(recorder.before, with_kwargs=True)
    compiled = check_same(model)
    recorder.seen.clear()
    result(compiled)
    assert len(recorder.seen) == 4


def test_a_method_of_a_module_becomes_the_copys() -> None:
    model = model_of("llama")
    norm = model.model.norm
    norm.__class__ = type(
        "Scaled", (type(norm),), {"scale": lambda self, _, __, output: self.factor * output}
    )
    norm.factor = 3.0
    norm.register_forward_hook(norm.scale)
    compiled = check_same(model)
    norm.factor = 1.0
    assert not torch.allclose(result(compiled), result(model), **TOLERANCE)


def test_methods_that_were_put_on_the_model_become_the_copys() -> None:
    """As accelerate's mixed precision does it."""
    model = model_of("llama")
    called: list[nn.Module] = []
    for module in (model, model.model):
        forward = type(module).forward

        def wrapped(self: Any, *args: Any, forward: Any = forward, **kwargs: Any) -> Any:
            called.append(self)
            return forward(self, *args, **kwargs)

        module.forward = MethodType(wrapped, module)
    compiled = check_same(model)
    called.clear()
    result(compiled)
    assert called == [compiled, compiled.model]


def do_more(layer: nn.Linear, how: str) -> None:
    """Let a layer compute more than its product, in one of the ways that there are."""
    if how == "hook":
        layer.register_forward_hook(lambda module, args, output: output + 1)
    elif how == "pre-hook":
        layer.register_forward_pre_hook(lambda module, args: (3 * args[0],))
    elif how == "forward":
        before = layer.forward
        layer.forward = lambda x: 2 * before(x)
    else:
        doubled = {"forward": lambda self, x: 2 * nn.Linear.forward(self, x)}
        layer.__class__ = type("Mine", (nn.Linear,), doubled)


@pytest.mark.parametrize("how", ["hook", "pre-hook", "forward", "subclass"])
def test_a_head_that_does_more_is_left_to_torch(how: str) -> None:
    model = model_of("llama", tie_word_embeddings=False)
    head = model.lm_head
    do_more(head, how)
    compiled = check_same(model)
    with torch.no_grad():
        wanted, found = (one(input_ids=IDS[:, :1])[0] for one in (model, compiled))
    torch.testing.assert_close(found, wanted, **TOLERANCE)


@pytest.mark.few(2)
@pytest.mark.parametrize("how", ["hook", "pre-hook", "forward", "subclass", "twice"])
def test_single_layers_that_do_more_are_left_to_torch(how: str) -> None:
    model = model_of("stablelm")
    layers = model.base_model.layers
    layer = layers[1].mlp.get_submodule("up_proj")
    if how != "twice":
        do_more(layer, how)
    else:  # one layer at two places
        name = "up_proj"
        layers[0].mlp.set_submodule(name, layer)
    compiled = check_same(model)
    assert compiled.explain(tokens=8).layers


def test_a_forward_around_single_layers_is_refused() -> None:
    model = model_of("stablelm")
    before = model.model.layers[1].mlp.forward
    model.model.layers[1].mlp.forward = lambda x: 2 * before(x)
    check(model, r"layers\.1\.mlp has a forward of its own")


def test_attention_of_the_users_own_is_kept() -> None:
    def mine(module: Any, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any):
        return value.repeat_interleave(2, dim=1).transpose(1, 2), None

    AttentionInterface.register("mine", mine)
    model = model_of("llama")
    model.set_attn_implementation("mine")
    compiled = check_same(model)
    assert "its attention is 'mine'" in compiled.explain(tokens=8).reason
    check(model_of("llama", 0.0, attn_implementation="mine"), "its attention is 'mine'")


def test_encoders_that_look_back_only_are_left_to_torch() -> None:
    for family in ("bert", "albert"):
        model = model_of(family)
        model.config.is_causal = True
        assert "is_causal=True" in check_same(model).explain(tokens=8).reason


def test_the_implementation_of_attention_is_built_in() -> None:
    compiled = check_same(model_of("llama"))
    compiled.set_attn_implementation("eager")
    with pytest.raises(ValueError, match=r"config\._attn_implementation is eager"):
        result(compiled)


@pytest.mark.few(1)
@pytest.mark.parametrize("window", [4, 2**31, 2**32, 2**32 + 4, 10**12])
def test_windows_of_any_length(window: int) -> None:
    check_same(model_of("mistral", sliding_window=window))


@pytest.mark.parametrize("window", [0, -3])
def test_windows_that_no_kernel_computes_are_left_to_torch(window: int) -> None:
    model = model_of("mistral")
    model.config.sliding_window = window
    assert f"sliding_window={window}" in hf_sparse.compile(model).explain(tokens=8).reason


@pytest.mark.parametrize("family", ["llama", "bert"])
def test_arguments_that_change_attention_are_refused(family: str) -> None:
    model = model_of(family)
    compiled = check_same(model)
    causal = family == "llama"
    with torch.no_grad():
        found = compiled(input_ids=IDS, is_causal=causal)[0]
        torch.testing.assert_close(found, result(compiled), **TOLERANCE)
        with pytest.raises(ValueError, match="is_causal="):
            compiled(input_ids=IDS, is_causal=not causal)
        compiled.config.is_causal = not causal
        with pytest.raises(ValueError, match=r"config\.is_causal is"):
            compiled(input_ids=IDS)
        del compiled.config.is_causal
        with pytest.raises(ValueError, match="position_bias: what it changes"):
            compiled(input_ids=IDS, position_bias=torch.ones(1))


@pytest.mark.filterwarnings("ignore")
def test_a_model_that_was_trained_with_checkpoints_runs_without_gradients() -> None:
    """Its embeddings' results need gradients, even inside no_grad."""
    model = model_of("llama").train()
    model.gradient_checkpointing_enable()
    model.enable_input_require_grads()
    model(input_ids=IDS, labels=IDS).loss.backward()
    compiled = check_same(model.eval())
    with torch.inference_mode():
        assert compiled.generate(IDS, max_new_tokens=2, do_sample=False).shape == (2, 14)
    with pytest.raises(ValueError, match="no gradients"):
        compiled(input_ids=IDS)


def test_a_compiled_model_keeps_the_size_of_its_embeddings() -> None:
    compiled = hf_sparse.compile(model_of("llama", tie_word_embeddings=False))
    for one in (compiled, copy.deepcopy(compiled)):
        with pytest.raises(ValueError, match="keep their size"):
            one.resize_token_embeddings(300)


def test_hooks_of_accelerate_that_move_nothing_are_taken(tmp_path: Any) -> None:
    from accelerate import dispatch_model
    from accelerate.hooks import ModelHook, add_hook_to_module

    model = model_of("llama")
    wanted = result(model)
    dispatch_model(model, {"": "cpu"}, main_device="cpu", force_hooks=True)
    torch.testing.assert_close(result(check_same(model)), wanted, **TOLERANCE)
    places = {"model.embed_tokens": "cpu", "model.norm": "cpu", "lm_head": "cpu"}
    places |= {"model.rotary_emb": "cpu", "model.layers": "cpu", "model.layers.1": "disk"}
    offloaded = model_of("llama", tie_word_embeddings=False)
    dispatch_model(offloaded, places, main_device="cpu", offload_dir=tmp_path, force_hooks=True)
    check(offloaded, r"layers\.1\.\S+ is on the meta device, it has no values")
    hooked = model_of("llama")
    add_hook_to_module(hooked.model.layers[1].mlp, ModelHook())
    check(hooked, r"layers\.1\.mlp has a forward of its own")


@pytest.mark.filterwarnings("ignore")
def test_adapters_of_any_kind_are_refused() -> None:
    import peft

    for config in (
        peft.LoraConfig(target_modules=["up_proj"]),
        peft.IA3Config(target_modules=["up_proj"], feedforward_modules=[]),
        peft.LNTuningConfig(target_modules=["input_layernorm"]),
    ):
        model = model_of("llama")
        peft.inject_adapter_in_model(config, model)
        check(model.eval(), r"layers\.0\.\S+ is a peft.*merge adapters")
    prompts = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    with pytest.raises(ValueError, match="merge_and_unload"):
        hf_sparse.compile(peft.get_peft_model(model_of("llama"), prompts))


def test_a_subclass_of_transformers_own_model_is_taken() -> None:
    class Mine(LlamaForCausalLM):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            found = super().forward(*args, **kwargs)
            found.logits = found.logits / 7
            return found

    model = model_of("llama")
    model.__class__ = Mine
    check_same(model)


def test_blocks_run_in_their_loop_only() -> None:
    compiled = check_same(model_of("llama"))
    layers, states = compiled.model.layers, torch.zeros(1, 4, 32)
    for use in (
        lambda: layers[0](states),
        lambda: layers[1](states),
        lambda: [layer(states) for layer in layers[:1]],
        lambda: [layer(states) for layer in list(layers)],
    ):
        with torch.no_grad(), pytest.raises(ValueError, match="by itself"):
            use()
    check_again = copy.deepcopy(compiled)
    torch.testing.assert_close(result(check_again), result(compiled), **TOLERANCE)


def test_copies_keep_hooks_with_keywords() -> None:
    compiled = hf_sparse.compile(model_of("llama"))
    seen: list[Any] = []
    layer = next(module for module in compiled.modules() if isinstance(module, CompiledLayer))
    layer.register_forward_pre_hook(lambda *given: seen.append(given), with_kwargs=True)
    compiled.lm_head.register_forward_hook(lambda *given: seen.append(given), with_kwargs=True)
    result(copy.deepcopy(compiled))
    assert [len(given) for given in seen] == [3, 4]


def test_random_numbers_are_not_used_up() -> None:
    model = model_of("bert")
    torch.manual_seed(5)
    wanted = torch.rand(1)
    torch.manual_seed(5)
    hf_sparse.compile(model)
    assert torch.equal(torch.rand(1), wanted)


def test_the_cache_goes_on_after_the_checks() -> None:
    """Blocks that were deleted keep their numbers, and need not be renumbered."""
    model = tiny_model("llama")
    del model.model.layers[1]
    model.config.num_hidden_layers = 2  # of three
    compiled = hf_sparse.compile(model)
    with torch.no_grad():
        wanted = model(input_ids=IDS, use_cache=False).logits
        cache = DynamicCache(config=compiled.config)
        parts = [compiled(input_ids=part, past_key_values=cache).logits for part in IDS.split(6, 1)]
    torch.testing.assert_close(torch.cat(parts, dim=1), wanted, **TOLERANCE)


@pytest.mark.few(3)
@pytest.mark.parametrize("family", CONFIGS)
def test_a_shrunk_model_is_taken(family: str) -> None:
    model = tiny_model(family)
    for pattern in ("head", "column"):
        hf_sparse.prune_(model, hf_sparse.SparsityConfig(pattern, 0.5), "magnitude")
    assert hf_sparse.shrink_(model) is not None
    check_same(model)
