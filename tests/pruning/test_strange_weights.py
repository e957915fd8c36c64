"""Weights of strange kinds are refused in words or pruned rightly, and never changed halfway."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import hf_sparse
from hf_sparse import SparsityConfig
from tests.support.tiny_models import tiny_batches, tiny_model

CONFIG = SparsityConfig("2:4")
# A weight for another one, and what the error says.
REFUSED: dict[str, tuple[Callable[[Tensor], Tensor], str]] = {
    "csr": (lambda w: w.to_sparse_csr(), "is stored as torch.sparse_csr; wanted a dense matrix"),
    "coo": (lambda w: w.to_sparse(), "is stored as torch.sparse_coo; wanted a dense matrix"),
    "nested": (lambda w: torch.nested.nested_tensor([w]), "is stored as a nested tensor"),
    "expanded": (lambda w: w[:1].expand(w.shape), "are one in memory"),
    "overlapping": (lambda w: torch.randn(96).as_strided((64, 32), (1, 1)), "are one in memory"),
    "complex": (lambda w: w.to(torch.complex64), "is of torch.complex64"),
    "int8": (lambda w: w.to(torch.int8), "is stored as torch.int8, quantized"),
    "qint8": (lambda w: torch.quantize_per_tensor(w, 0.1, 0, torch.qint8), "qint8, quantized"),
    "float8": (lambda w: w.to(torch.float8_e4m3fn), "float8_e4m3fn, quantized"),
    "stack": (lambda w: w[None], r"has the shape \(1, 64, 32\); wanted a matrix"),
    "vector": (lambda w: w[0], r"has the shape \(32,\); wanted a matrix"),
}
# Other views of the same values, and of their negatives.
RIGHT: dict[str, Callable[[Tensor], Tensor]] = {
    "column by column": lambda w: w.T.contiguous().T,
    "with gaps": lambda w: torch.cat([w, w], dim=1)[:, :32],
    "negative view": lambda w: torch._neg_view(-w),
    "imaginary part": lambda w: torch.complex(w, -w).conj().imag,
}


class Wrapper(Tensor):
    """A tensor that holds its values in its own way."""

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.detach.default:
            return args[0]
        raise AssertionError(f"{func} was called")


def prune(model: nn.Module, method: str) -> hf_sparse.SparsityReport:
    return hf_sparse.prune_(model, CONFIG, method, tiny_batches("llama"))


@pytest.mark.parametrize("kind", REFUSED)
def test_a_weight_that_is_no_matrix_of_floats_is_refused_by_name(kind: str) -> None:
    changed, wanted = REFUSED[kind]
    model = tiny_model("llama")
    layer = model.model.layers[1].mlp.up_proj
    layer.weight = nn.Parameter(changed(layer.weight.data), requires_grad=False)
    before = model.model.layers[0].mlp.up_proj.weight.clone()
    with pytest.raises(ValueError, match=f"model.layers.1.mlp.up_proj.weight.*{wanted}"):
        prune(model, "magnitude")
    assert (model.model.layers[0].mlp.up_proj.weight == before).all()


def test_a_tensor_that_stores_its_values_in_its_own_way_is_refused() -> None:
    model = tiny_model("llama")
    layer = model.model.layers[0].mlp.up_proj
    wrapped = Tensor._make_wrapper_subclass(Wrapper, layer.weight.shape)
    layer.weight = nn.Parameter(wrapped, requires_grad=False)
    with pytest.raises(ValueError, match="is a Wrapper, which stores its values in its own way"):
        prune(model, "magnitude")


@pytest.mark.few(4)
@pytest.mark.parametrize("method", ["magnitude", "sparsegpt"])
@pytest.mark.parametrize("kind", RIGHT)
def test_a_view_is_pruned_as_the_plain_weight_is(kind: str, method: str) -> None:
    plain, other = tiny_model("llama"), tiny_model("llama")
    layer = other.model.layers[0].mlp.up_proj
    layer.weight = nn.Parameter(RIGHT[kind](layer.weight.data), requires_grad=False)
    for model in (plain, other):
        report = prune(model, method)
        assert report.sparsity == 0.5
        assert not report.violations
    wanted = plain.model.layers[0].mlp.up_proj.weight
    assert ((layer.weight == 0) == (wanted == 0)).all()
    torch.testing.assert_close(layer.weight, wanted, rtol=1e-4, atol=1e-5, check_stride=False)


@pytest.mark.parametrize("shared", ["the same", "rows", "transposed", "inside of a long one"])
def test_weights_that_share_memory_without_being_tied_are_refused(shared: str) -> None:
    model = tiny_model("llama")
    mlp, attention = model.model.layers[0].mlp, model.model.layers[0].self_attn
    piece = torch.randn(96, 32)
    if shared == "the same":
        mlp.up_proj.weight = nn.Parameter(mlp.gate_proj.weight.data)
    elif shared == "rows":
        mlp.up_proj.weight, mlp.gate_proj.weight = (
            nn.Parameter(piece[:64]),
            nn.Parameter(piece[32:]),
        )
    elif shared == "inside of a long one":
        long = torch.randn(200, 32)
        mlp.up_proj.weight = nn.Parameter(torch.as_strided(long, (64, 32), (96, 1)))
        mlp.gate_proj.weight = nn.Parameter(torch.as_strided(long, (64, 32), (96, 1), 32))
        attention.q_proj.weight = nn.Parameter(torch.as_strided(long, (32, 32), (96, 1), 96))
    else:
        attention.o_proj.weight = nn.Parameter(attention.q_proj.weight.data.T)
    with pytest.raises(ValueError, match="share memory, and are not one parameter"):
        prune(model, "magnitude")


@pytest.mark.parametrize("dim", [0, 1])
def test_parts_of_one_tensor_that_do_not_overlap_are_pruned(dim: int) -> None:
    model = tiny_model("llama")
    mlp = model.model.layers[0].mlp
    both = torch.cat([mlp.up_proj.weight.data, mlp.gate_proj.weight.data], dim=dim)
    one, other = both.chunk(2, dim=dim)
    mlp.up_proj.weight, mlp.gate_proj.weight = nn.Parameter(one), nn.Parameter(other)
    assert prune(model, "sparsegpt").sparsity == 0.5


def test_tied_weights_are_pruned_once() -> None:
    model = tiny_model("llama")
    mlp = model.model.layers[0].mlp
    mlp.up_proj.weight = mlp.gate_proj.weight
    assert prune(model, "magnitude").sparsity == 0.5


def made_in_inference_mode(family: str) -> Any:
    with torch.inference_mode():
        return tiny_model(family)


@pytest.mark.few(2)
@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("method", ["magnitude", "wanda", "sparsegpt"])
def test_a_model_of_inference_mode_is_pruned_where_no_gradients_are_needed(
    family: str, method: str
) -> None:
    model, plain = made_in_inference_mode(family), tiny_model(family)
    for other in (model, plain):
        assert hf_sparse.prune_(other, CONFIG, method, tiny_batches(family)).sparsity == 0.5
    for name, weight in plain.named_parameters():
        assert ((model.get_parameter(name) == 0) == (weight == 0)).all()


@pytest.mark.parametrize(
    ("method", "options"), [("taylor", {}), ("proxsparse", {}), ("wanda", {"reconstruct": 1})]
)
def test_methods_that_train_refuse_a_model_of_inference_mode(
    method: str, options: dict[str, Any]
) -> None:
    with pytest.raises(ValueError, match=r"was made inside torch\.inference_mode\(\)"):
        hf_sparse.prune_(
            made_in_inference_mode("llama"), CONFIG, method, tiny_batches("llama"), **options
        )


@pytest.mark.parametrize("method", ["finetune", "lora"])
def test_recovery_refuses_a_model_of_inference_mode(method: str) -> None:
    model = made_in_inference_mode("llama")
    hf_sparse.prune_(model, CONFIG, "magnitude")
    with pytest.raises(ValueError, match=r"was made inside torch\.inference_mode\(\)"):
        hf_sparse.recover_(model, tiny_batches("llama"), method)
