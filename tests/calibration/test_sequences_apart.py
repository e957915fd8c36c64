"""No sequence of a batch, and no call, sees what another one has."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, GPT2Config, GPT2Model, PreTrainedModel

import hf_sparse
from hf_sparse.runtime.llvm import target
from hf_sparse.runtime.llvm.jit import DEFAULT_CACHE
from hf_sparse.runtime.model.compiled import stack_of
from hf_sparse.runtime.model.single_layers import CompiledHead, CompiledLinear
from hf_sparse.runtime.programs.pool import Pool
from hf_sparse.runtime.weights.linear import pack_linear
from hf_sparse.runtime.weights.memory import Shelf
from hf_sparse.runtime.weights.rates import NOMINAL
from tests.support.crosses import pairwise

TOLERANCE = {"atol": 2e-5, "rtol": 1e-4}
FULL = {"heads": 4, "key_heads": 2, "neurons": 50}
# Sizes that are no whole vectors: hidden, heads, heads of keys, head_dim, intermediate, block sizes.
LLAMAS = {
    "8 modulo 16": (40, 5, 5, 8, 64, None),
    "4 modulo 8": (36, 3, 1, 12, 50, None),
    "2 modulo 4": (30, 2, 1, 4, 33, None),
    "less than a vector": (6, 1, 1, 4, 3, None),
    "shrunk": (48, 4, 2, 16, 50, [{"heads": 2, "key_heads": 1, "neurons": 7}, FULL]),
}


def targets() -> list[str]:
    known = list(target.targets())
    return known[known.index(target.host().name) :]


def llama(sizes: tuple, sparsity: float) -> PreTrainedModel:
    hidden, heads, key_heads, head_dim, intermediate, blocks = sizes
    config = hf_sparse.SparseQwen3Config(
        hidden_size=hidden,
        num_attention_heads=heads,
        num_key_value_heads=key_heads,
        head_dim=head_dim,
        intermediate_size=intermediate,
        num_hidden_layers=2,
        vocab_size=16,
        block_sizes=blocks,
    )
    return prepared(hf_sparse.SparseQwen3Model(config), sparsity)


def prepared(model: PreTrainedModel, sparsity: float) -> PreTrainedModel:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.2 * torch.randn(parameter.shape, generator=generator)
            if parameter.ndim == 2:
                parameter[torch.rand(parameter.shape, generator=generator) < sparsity] = 0
    return model.eval()


def outputs(model: PreTrainedModel, inputs: Tensor) -> Tensor:
    """Of six tokens at once, then of single ones, from a cache."""
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        parts = [
            model(inputs_embeds=part, past_key_values=cache)[0]
            for part in inputs.split((6, 1, 1, 1), dim=1)
        ]
    return torch.cat(parts, dim=1)


def check(model: PreTrainedModel, name: str) -> None:
    inputs = torch.randn(3, 9, model.config.hidden_size, generator=torch.Generator().manual_seed(1))
    poisoned = inputs.clone()
    poisoned[1] = float("nan")
    wanted = outputs(model, inputs)
    compiled = hf_sparse.compile(model, target=name)
    torch.testing.assert_close(outputs(compiled, inputs), wanted, **TOLERANCE)
    beside = outputs(compiled, poisoned)
    assert beside[1].isnan().all()
    torch.testing.assert_close(beside[[0, 2]], wanted[[0, 2]], **TOLERANCE)
    # The same buffers again, which held NaN.
    torch.testing.assert_close(outputs(compiled, inputs), wanted, **TOLERANCE)


@pytest.mark.few(4)
@pairwise("sizes, sparsity, name", LLAMAS, [0.0, 0.6], targets())
def test_nan_stays_in_its_sequence(sizes: str, sparsity: float, name: str) -> None:
    torch.set_num_threads(1)
    check(llama(LLAMAS[sizes], sparsity), name)


@pytest.mark.parametrize("name", targets())
def test_nan_stays_in_its_sequence_with_layer_norms_and_two_threads(name: str) -> None:
    config = GPT2Config(n_embd=36, n_head=3, n_layer=2, n_inner=150, vocab_size=16)
    torch.set_num_threads(2)
    try:
        check(prepared(GPT2Model(config), 0.6), name)
    finally:
        torch.set_num_threads(1)


@pytest.mark.parametrize("name", targets())
@pytest.mark.parametrize("shape", [(7, 5), (24, 40), (33, 50)], ids=str)
def test_nan_stays_in_its_token_of_a_single_layer(shape: tuple[int, int], name: str) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(shape, generator=generator)
    weight[torch.rand(shape, generator=generator) < 0.6] = 0
    bias = torch.randn(shape[0], generator=generator)
    packed = pack_linear("layer", weight, bias, shelf=Shelf(), rates=NOMINAL["avx512"])
    layer = CompiledLinear(packed, target.targets()[name], DEFAULT_CACHE, Pool(1 << 20)).eval()
    x = torch.randn(5, shape[1], generator=generator)
    poisoned = x.clone()
    poisoned[2] = float("nan")
    with torch.no_grad():
        wanted = torch.nn.functional.linear(x, weight, bias)
        found = layer(poisoned)
        kept = [0, 1, 3, 4]
        torch.testing.assert_close(found[kept], wanted[kept], **TOLERANCE)
        torch.testing.assert_close(layer(x), wanted, **TOLERANCE)


def test_nan_stays_in_its_token_of_a_head() -> None:
    linear = torch.nn.Linear(48, 36)
    for name in targets():
        head = CompiledHead(linear, target.targets()[name], DEFAULT_CACHE).eval()
        x = torch.randn(3, 48, generator=torch.Generator().manual_seed(0))
        poisoned = x.clone()
        poisoned[1] = float("nan")
        with torch.no_grad():
            found = head(poisoned)
            torch.testing.assert_close(found[[0, 2]], linear(x)[[0, 2]], **TOLERANCE)


def test_tokens_that_were_cropped_are_forgotten() -> None:
    model = llama(LLAMAS["8 modulo 16"], 0.6)
    compiled = hf_sparse.compile(model)
    inputs = torch.randn(1, 9, 40, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        wanted = compiled(inputs_embeds=inputs).last_hidden_state[:, 6:]
        for tokens in (3, 200):
            cache = DynamicCache(config=compiled.config)
            compiled(inputs_embeds=inputs[:, :6], past_key_values=cache)
            rejected = torch.full((1, tokens, 40), float("nan"))
            compiled(inputs_embeds=rejected, past_key_values=cache)
            cache.crop(-tokens)
            found = compiled(inputs_embeds=inputs[:, 6:], past_key_values=cache).last_hidden_state
            torch.testing.assert_close(found, wanted, **TOLERANCE)


def test_a_shrunk_stack_has_blocks_of_two_sizes() -> None:
    """Which the test above is about."""
    stack = stack_of(hf_sparse.compile(llama(LLAMAS["shrunk"], 0.6)))
    assert [block.up.rows for block in stack.blocks] == [7, 50]
