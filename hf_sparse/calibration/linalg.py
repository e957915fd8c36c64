"""Linear algebra of the layer solvers: Gram matrices, their factors, fast products on CPUs.

`torch.matmul` in fp32 goes to MKL, which runs at less than half speed on AMD CPUs; oneDNN, which
torch also ships, does not (measured on Zen 5: 205 against 450 GFLOP/s). `matmul` and
`FastProducts` therefore go through oneDNN on the CPU. Results differ in summation order alone.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from hf_sparse.upstream.torch import onednn

_ONEDNN = onednn("_linear_pointwise")  # a linear layer that does not reorder its weight
_PANEL = 256  # rows of a Gram matrix that are computed together
_RETRIES = 6


def matmul(left: Tensor, right_transposed: Tensor) -> Tensor:
    """`left @ right_transposed.T` for `(m, k)` and `(n, k)`: the form in which CPUs are fastest."""
    if not _is_fast(left, right_transposed):
        return left @ right_transposed.T
    product: Tensor = _ONEDNN(  # type: ignore[misc]
        left.contiguous(), right_transposed.contiguous(), None, "none", [], ""
    )
    return product


class FastProducts(TorchFunctionMode):
    """Inside `with FastProducts():` fp32 linear layers on the CPU run through oneDNN, without grad."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if func is nn.functional.linear and not torch.is_grad_enabled() and not kwargs:
            inputs, weight, *bias = args
            if _is_fast(inputs, weight) and all(b is None or _is_fast(b) for b in bias):
                return _ONEDNN(inputs, weight, bias[0] if bias else None, "none", [], "")  # type: ignore[misc]
        return func(*args, **(kwargs or {}))


def _is_fast(*tensors: Tensor) -> bool:
    return _ONEDNN is not None and all(
        tensor.device.type == "cpu"
        and tensor.dtype == torch.float32
        and tensor.layout is torch.strided
        and tensor.numel() > 0
        for tensor in tensors
    )


def add_gram_(gram: Tensor, inputs: Tensor) -> None:
    """Add `inputsᵀ inputs` to the lower triangle of a Gram matrix.

    Products are in fp32. With an fp64 sum the order in which batches come, or the process that they
    come to, makes no difference after rounding to fp32. (In fp32 it does: SparseGPT amplified the
    last bits to 2 % of other masks in 30 blocks.)

    Args:
        gram: `(in_features, in_features)`; above its diagonal panels nothing is written.
        inputs: `(tokens, in_features)`, of any float dtype.
    """
    columns = inputs.float().T.contiguous()
    for start in range(0, len(gram), _PANEL):
        stop = min(start + _PANEL, len(gram))
        gram[start:stop, :stop] += matmul(columns[start:stop], columns[:stop])


def mirror_(gram: Tensor) -> Tensor:
    """Copy the lower triangle, which `add_gram_` fills, to the upper one."""
    for start in range(0, len(gram), _PANEL):
        stop = min(start + _PANEL, len(gram))
        gram[start:stop, stop:] = gram[stop:, start:stop].T
    return gram


def regularised(gram: Tensor, damping: float) -> Tensor:
    """`gram + damping * mean(diagonal) I`, and 1 on the diagonal of inputs that are always zero."""
    damped = gram.clone()
    diagonal = damped.diagonal()
    diagonal += damping * diagonal.mean()
    diagonal[gram.diagonal() == 0] = 1
    return damped


def cholesky(gram: Tensor, damping: float, *, reverse: bool = False) -> tuple[Tensor, float]:
    """The lower Cholesky factor of `regularised(gram, damping)`, with more damping if it fails.

    Args:
        gram: `(in_features, in_features)`.
        damping: share of the mean diagonal.
        reverse: factorise the matrix with its rows and columns in reverse order.

    Returns:
        The factor, and the damping that was needed.

    Memory: twice the Gram matrix, beside it.

    Raises:
        ValueError: no damping up to `1e6` times the one asked for makes it positive definite.
    """
    tried = damping
    for _ in range(_RETRIES + 1):
        damped = regularised(gram, tried)
        damped = damped.flip(0, 1) if reverse else damped
        factor, failed = torch.linalg.cholesky_ex(damped)
        if not failed:
            return factor, tried
        tried = max(tried, 1e-8) * 10
    raise ValueError(
        f"a Gram matrix of the inputs is not positive definite, even with damping {tried / 10:g}. The "
        "calibration data are damaged: check them, or load the model in float32."
    )


def inverse_factor(gram: Tensor, damping: float) -> tuple[Tensor, float]:
    """The upper triangular `U` with `Uᵀ U = regularised(gram)⁻¹`, and the damping that was needed.

    With the factor of the reversed matrix, `P H P = L Lᵀ`, it takes one triangular inverse:
    `U = P L⁻¹ P`, which avoids the inverse of H and its second factorisation. Memory: as `cholesky`.
    """
    lower, used = cholesky(gram, damping, reverse=True)
    inverse = torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    torch.linalg.solve_triangular(lower, inverse, upper=False, out=inverse)
    del lower
    return inverse.flip(0, 1), used
