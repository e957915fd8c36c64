"""Compiled mixtures of experts: routing, experts without tokens, what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, DynamicCache
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

import hf_sparse
from hf_sparse.formats import FormatError
from hf_sparse.runtime.model.compiled import stack_of
from hf_sparse.upstream.transformers.caches import cache_name
from tests.support.compiled_families import inputs_of, model_of
from tests.support.compiled_folders import unsigned

MIXTURES = ["mixtral", "qwen3_moe"]
TOLERANCE = {"atol": 3e-5, "rtol": 1e-4}


def check(model: Any, tokens: int = 75) -> Any:
    """The compiled model gives what the model gives, at once and token by token."""
    compiled = hf_sparse.compile(model)
    ids = inputs_of(model.config.model_type, 2, tokens)["input_ids"]
    with torch.no_grad():
        wanted = model(ids).logits
        cache = DynamicCache(config=compiled.config)
        name = cache_name(model.forward)
        parts = [
            compiled(part, **{name: cache}).logits for part in ids.split((tokens - 2, 1, 1), 1)
        ]
        torch.testing.assert_close(compiled(ids, use_cache=False).logits, wanted, **TOLERANCE)
    torch.testing.assert_close(torch.cat(parts, dim=1), wanted, **TOLERANCE)
    return compiled


@pytest.mark.parametrize("family", MIXTURES)
def test_experts_that_get_no_token_or_all(family: str) -> None:
    """Logits that are multiples of the sum of a token's features: two orders of experts, no more."""
    chosen = 1 if family == "mixtral" else 2
    model = model_of(family, AutoModelForCausalLM, num_experts_per_tok=chosen)
    factors = torch.tensor([1.0, 30.0, -30.0, 2.0, 3.0, -2.0])
    with torch.no_grad():
        for layer in model.model.layers:
            weight = layer.mlp.gate.weight
            weight.copy_(factors[: len(weight), None].expand_as(weight))
    used: set[int] = set()
    router = model.model.layers[0].mlp.gate
    hook = router.register_forward_hook(lambda *given: used.update(given[-1][2].flatten().tolist()))
    with torch.no_grad():
        model(**inputs_of(family, 2, 75))
    hook.remove()
    assert used == ({1, 2} if chosen == 1 else {1, 2, 4, 5})
    check(model)


@pytest.mark.few(1)
@pytest.mark.parametrize("family", MIXTURES)
@pytest.mark.parametrize("chosen", [1, 4])
def test_any_number_of_experts_of_a_token(family: str, chosen: int) -> None:
    compiled = check(model_of(family, AutoModelForCausalLM, num_experts_per_tok=chosen), 20)
    assert stack_of(compiled).blocks[0].mixture.chosen == chosen


def test_weights_that_do_not_sum_up_to_one() -> None:
    for normalised in (True, False):
        check(model_of("qwen3_moe", AutoModelForCausalLM, norm_topk_prob=normalised), 20)


def test_no_token_sees_another_ones_numbers() -> None:
    """A sequence of NaN beside one that is none: they share tiles of experts' buffers in turn."""
    compiled = hf_sparse.compile(model_of("mixtral"))
    embeds = torch.randn(2, 40, 32)
    with torch.no_grad():
        wanted = compiled(inputs_embeds=embeds)[0][1]
        spoiled = embeds.clone()
        spoiled[0] = float("nan")
        torch.testing.assert_close(compiled(inputs_embeds=spoiled)[0][1], wanted)
        torch.testing.assert_close(compiled(inputs_embeds=embeds)[0][1], wanted)


def test_every_expert_is_explained_with_its_own_zeros() -> None:
    compiled = hf_sparse.compile(model_of("mixtral"))
    layers = compiled.explain(tokens=1).layers
    names = [layer.name for layer in layers]
    assert len(names) == 3 * (2 + 1 + 3 * 4)
    assert "layers.1.mlp.experts.3.down" in names
    assert all(layer.sparsity > 0.5 for layer in layers if ".experts." in layer.name)


@pytest.mark.parametrize("family", MIXTURES)
def test_router_logits_are_refused(family: str) -> None:
    compiled = hf_sparse.compile(model_of(family, AutoModelForCausalLM))
    with torch.no_grad(), pytest.raises(ValueError, match="output_router_logits: the routers"):
        compiled(**inputs_of(family, 1, 5), output_router_logits=True)


def test_dense_layers_among_mixtures_go_layer_by_layer() -> None:
    compiled = hf_sparse.compile(model_of("qwen3_moe", mlp_only_layers=[1]))
    assert "mlp_only_layers=[1]" in compiled.explain(tokens=1).reason


def test_a_function_of_experts_of_the_users_own_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    def mine(module: Any, hidden: torch.Tensor, *args: Any) -> torch.Tensor:
        return 2 * hidden

    monkeypatch.setitem(ALL_EXPERTS_FUNCTIONS._global_mapping, "mine", mine)
    model = model_of("mixtral")
    model.config._experts_implementation = "mine"
    compiled = hf_sparse.compile(model)
    assert "its function of experts is 'mine'" in compiled.explain(tokens=1).reason


@pytest.mark.few(2)
@pytest.mark.parametrize(
    "change",
    [
        lambda block: block.update(chosen=9),
        lambda block: block.update(chosen=1),
        lambda block: block.update(normalised=False),
        lambda block: block.update(normalised=1.5),
        lambda block: block.update(experts=3),
        lambda block: block.update(experts=-1),
        lambda block: block.pop("experts"),
        lambda block: block["linears"].pop("router"),
        lambda block: block["linears"].pop("experts.2.up"),
    ],
)
def test_damaged_descriptions_of_mixtures_are_refused(change: Any, tmp_path: Path) -> None:
    hf_sparse.save_compiled(hf_sparse.compile(model_of("mixtral")), tmp_path)
    file = tmp_path / "compiled.json"
    described = unsigned(tmp_path)
    change(described["blocks"][0])
    file.write_text(json.dumps(described))
    with pytest.raises(FormatError):
        hf_sparse.load_compiled(tmp_path)
