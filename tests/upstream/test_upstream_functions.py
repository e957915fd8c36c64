"""What stands in the rooms `upstream` for Python, argparse, accelerate and torch, tried on them."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    BertModel,
    LlamaForCausalLM,
)

from hf_sparse.upstream import accelerate as on_modules
from hf_sparse.upstream import python
from hf_sparse.upstream import torch as of_torch
from hf_sparse.upstream.transformers import (
    models,
    saving,
)
from hf_sparse_cli import upstream as of_argparse
from tests.support.closeness import same
from tests.support.tiny_models import CONFIGS, tiny_batches, tiny_model


def small() -> nn.Sequential:
    return nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))


def noting(*_: Any, **__: Any) -> None:
    """A hook that changes nothing."""


def test_python_parses_expressions() -> None:
    [(kind, (least, _, body))] = python.parse_expression("(?:ab){2,}")
    assert (str(kind), least, len(body)) == ("MAX_REPEAT", 2, 2)


def test_argparse_tells_flags_and_commands_and_asks_for_choices() -> None:
    asked = []

    class Asking(of_argparse.ChoosyParser):
        def check_choice(self, action: argparse.Action, value: Any) -> None:
            asked.append(value)
            super().check_choice(action, value)

    parser = Asking()
    parser.add_argument("--kind", choices=["one", "two"])
    assert of_argparse.flags_of(parser) == ["-h", "--help", "--kind"]
    assert of_argparse.commands_of(parser) == {}
    assert [action.dest for action in of_argparse.actions_of(parser)] == ["help", "kind"]
    command = parser.add_subparsers().add_parser("run")
    assert of_argparse.commands_of(parser) == {"run": command}
    parser.parse_args(["--kind", "two", "run"])
    assert asked == ["two", "run"]
    with pytest.raises(SystemExit):
        parser.parse_args(["--kind", "three"])


def test_accelerate_hooks_that_move_inputs_are_told_from_others() -> None:
    model = small()
    assert on_modules.hook_of(model[0]) is None
    assert not on_modules.has_hooks(model)
    hook = AlignDevicesHook(execution_device="cpu")
    add_hook_to_module(model[0], hook)
    assert on_modules.hook_of(model[0]) is hook
    assert on_modules.has_hooks(model)
    assert on_modules.moves_inputs_alone(model[0])
    assert not on_modules.moves_inputs_alone(model[1])
    add_hook_to_module(model[1], AlignDevicesHook(execution_device="cpu", offload=True))
    assert not on_modules.moves_inputs_alone(model[1])


def test_accelerate_reads_weights_on_the_disk_by_their_names(tmp_path: Path) -> None:
    whole, batch = tiny_model("llama"), tiny_batches("llama")[0]
    whole.save_pretrained(tmp_path)
    with on_modules.expecting_weights_on_disk():
        model = AutoModelForCausalLM.from_pretrained(
            tmp_path, device_map={"": "disk"}, offload_folder=tmp_path / "offload"
        )
    on_disk: list[Any] = []

    def with_zeros(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        on_disk.append(weights)
        return {name: torch.zeros_like(weights[name]) for name in weights}

    zeros = on_modules.read_through_(model, with_zeros)
    [weights] = on_disk
    assert on_modules.files_of(weights) == {tmp_path / "model.safetensors"}
    name = "model.layers.0.mlp.up_proj.weight"
    assert torch.equal(weights[name], whole.state_dict()[name])
    assert zeros[name].shape == weights[name].shape
    assert not model(**batch).logits.any()


def test_transformers_fetches_the_weights_of_a_model_that_is_elsewhere() -> None:
    with torch.device("meta"):
        model = models.build(LlamaForCausalLM, CONFIGS["llama"])
    name = "model.layers.0.mlp.up_proj.weight"
    on_modules.fetch_weights_from_(model, {name: torch.ones(64, 32)})
    assert torch.equal(saving.fetched(model, name), torch.ones(64, 32))
    assert models.attention_of(model.config) == "eager"


def test_the_warning_of_weights_on_the_disk_is_kept_back(caplog: pytest.LogCaptureFixture) -> None:
    logger = logging.getLogger("accelerate.big_modeling")
    with on_modules.expecting_weights_on_disk():
        logger.warning("Some parameters were offloaded to the disk.")
        logger.warning("another")
    logger.warning("later ones, also of what is offloaded to the disk")
    told = [record.getMessage().split()[0] for record in caplog.records]
    assert told == ["another", "later"]


def test_accelerate_still_warns_in_these_words() -> None:
    from accelerate import big_modeling

    assert "they were offloaded to the" in Path(str(big_modeling.__file__)).read_text()
    assert big_modeling.logger.name == "accelerate.big_modeling"


def test_torch_keeps_what_is_in_a_module_in_places_by_name() -> None:
    model = small()
    assert of_torch.children_of(model) == dict(model.named_children())
    assert of_torch.parameters_of(model[0]).keys() == {"weight", "bias"}
    assert of_torch.parameters_of(nn.Linear(2, 2, bias=False))["bias"] is None
    assert of_torch.buffers_of(model[1]).keys() == dict(model[1].named_buffers()).keys()
    model[1].register_buffer("scratch", torch.zeros(1), persistent=False)
    assert of_torch.saved_tensors(model[1]).keys() == model[1].state_dict().keys()
    of_torch.set_children_(model, {"1": model[1]})
    assert [name for name, _ in model.named_children()] == ["1"]


def test_torch_counts_writes_into_a_tensor() -> None:
    weight = nn.Linear(2, 2).weight
    before = of_torch.times_written(weight)
    with torch.no_grad():
        weight[0] = 1.0
    assert of_torch.times_written(weight) > before
    with torch.inference_mode():
        assert of_torch.times_written(torch.zeros(2)) == 0


def test_torch_tells_of_parameters_as_they_are_registered() -> None:
    names: list[str] = []
    hook = of_torch.on_parameters(lambda module, name, parameter: names.append(name))
    nn.Linear(2, 2)
    hook.remove()
    nn.Linear(2, 2)
    assert names == ["weight", "bias"]


def test_torch_tells_of_buffers_as_they_are_registered() -> None:
    sizes: list[tuple[str, int]] = []
    hook = of_torch.on_buffers(
        lambda module, name, buffer: sizes.append((name, 0 if buffer is None else buffer.numel()))
    )
    nn.BatchNorm1d(3)
    hook.remove()
    nn.BatchNorm1d(3)
    assert sizes == [("running_mean", 3), ("running_var", 3), ("num_batches_tracked", 1)]


def test_torch_tells_the_hooks_of_a_module() -> None:
    plain, module = small(), small()
    assert not of_torch.has_hooks(plain)
    assert not of_torch.has_forward_hooks(plain)
    module.register_forward_pre_hook(noting, with_kwargs=True)
    module.register_forward_hook(noting, always_call=True)
    assert list(of_torch.forward_hooks(module)) == [
        ("forward pre hook", noting),
        ("forward hook", noting),
    ]
    assert of_torch.has_forward_hooks(module)
    module.register_state_dict_post_hook(noting)
    module.register_load_state_dict_pre_hook(noting)
    assert of_torch.all_hooks(module) == [noting] * 4
    of_torch.copy_forward_hooks_(module, plain)
    assert list(of_torch.forward_hooks(plain)) == list(of_torch.forward_hooks(module))
    for name in ("_forward_pre_hooks_with_kwargs", "_forward_hooks_always_called"):
        assert getattr(plain, name).keys() == getattr(module, name).keys() != set()
    for register in ("register_full_backward_hook", "register_full_backward_pre_hook"):
        trained = small()
        getattr(trained, register)(noting)
        assert of_torch.has_hooks(trained)
        assert not of_torch.has_forward_hooks(trained)


def test_torch_tells_hooks_on_all_modules_and_on_all_optimizers() -> None:
    stepped = []
    assert not of_torch.has_global_forward_hooks()
    handles = [
        nn.modules.module.register_module_forward_hook(noting),
        of_torch.register_optimizer_step_post_hook(lambda *given: stepped.append(given[0])),
    ]
    try:
        assert of_torch.has_global_forward_hooks()
        optimizer = torch.optim.SGD(small().parameters())
        optimizer.step()
        assert stepped == [optimizer]
    finally:
        for handle in handles:
            handle.remove()


def test_torch_tells_models_that_it_compiled() -> None:
    model = small()
    assert not of_torch.is_compiled(model)
    assert of_torch.wrapped_by_compile(model) is None
    wrapped: Any = torch.compile(model)
    assert of_torch.wrapped_by_compile(wrapped) is model
    assert of_torch.is_compiled(wrapped)
    model[0].compile()
    assert of_torch.is_compiled(model)


def test_torch_runs_these_methods_around_a_forward() -> None:
    assert set(of_torch.AROUND_FORWARD) <= set(dir(nn.Module))
    called = {"_call_impl", "_wrapped_call_impl"}
    assert called <= set(of_torch.AROUND_FORWARD)
    assert nn.Module.__call__.__name__ in called
    assert of_torch.is_layer_of_torch(nn.LayerNorm)
    assert not of_torch.is_layer_of_torch(BertModel)


def test_torch_computes_on_lists_of_tensors() -> None:
    values = [torch.tensor([1.0, -4.0]), torch.tensor([6.0])]
    [clipped, _] = of_torch.foreach_clamp_max(values, 0.5)
    assert clipped.tolist() == [0.5, -4.0]
    of_torch.foreach_clamp_min_(values, -2.0)
    of_torch.foreach_mul_(values, [torch.tensor(4.0), torch.tensor(1.0)])
    of_torch.foreach_div_(values, [torch.tensor(2.0), torch.tensor(3.0)])
    of_torch.foreach_sub_(values, of_torch.foreach_neg([torch.ones(2), torch.ones(1)]))
    assert [value.tolist() for value in values] == [[3.0, -3.0], [3.0]]


def test_torch_shrinks_in_place() -> None:
    soft, hard = torch.tensor([3.0, -1.0, 0.25]), torch.tensor([3.0, -1.0, 0.25])
    of_torch.softshrink_into(soft, 0.5, out=soft)
    of_torch.hardshrink_into(hard, 0.5, out=hard)
    assert soft.tolist() == [2.5, -0.5, 0.0]
    assert hard.tolist() == [3.0, -1.0, 0.0]


def test_torch_makes_a_step_of_adam_on_single_tensors() -> None:
    weight, gradient = nn.Parameter(torch.ones(3)), torch.tensor([1.0, -2.0, 0.5])
    weight.grad = gradient.clone()
    optimizer = torch.optim.AdamW([weight], lr=0.1, weight_decay=0.0, foreach=False)
    optimizer.step()
    value, first, second, steps = torch.ones(3), torch.zeros(3), torch.zeros(3), torch.zeros(())
    of_torch.adamw_step(
        [value], [gradient], [first], [second], [], [steps], foreach=False, amsgrad=False,
        beta1=0.9, beta2=0.999, lr=0.1, weight_decay=0.0, eps=1e-8, maximize=False,
    )  # fmt: skip
    assert same(value, weight.detach())
    assert of_torch.ParamsT is not None


def test_torch_takes_nested_values_apart() -> None:
    nested = ((1, {"a": [2, None]}),)
    leaves, structure = of_torch.tree_flatten(nested)
    assert (leaves, of_torch.tree_unflatten(leaves, structure)) == ([1, 2, None], nested)


def test_onednn_multiplies_and_tells_whether_in_bfloat16() -> None:
    if not torch.backends.mkldnn.is_available():
        pytest.skip("torch was built without oneDNN")
    product: Any = of_torch.onednn("_linear_pointwise")
    left, right = torch.randn(3, 4), torch.randn(5, 4)
    assert same(product(left, right, None, "none", [], ""), left @ right.T)
    supported: Any = of_torch.onednn("_is_mkldnn_bf16_supported")
    assert isinstance(supported(), bool)
    assert of_torch.onednn("no_such_operation") is None


def test_a_torch_that_was_built_without_onednn_has_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch._C, "_has_mkldnn", False)
    assert of_torch.onednn("_linear_pointwise") is None


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16, torch.bool, torch.int64], ids=str)
def test_torch_views_any_tensor_as_bytes(kind: torch.dtype) -> None:
    row = torch.arange(6).to(kind)
    one = torch.ones(1).to(kind).as_strided((1,), (0,))
    for tensor in (row, row.view(2, 3).T, row[::2], row[:1].expand(4), row[:0], one, one[0]):
        wanted = tensor.reshape(-1)
        found = of_torch.bytes_of(tensor)
        assert found.dtype == torch.uint8
        assert torch.equal(found.view(kind), wanted)
    assert of_torch.bytes_of(row).data_ptr() == row.data_ptr()
