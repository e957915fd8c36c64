"""What every weight for single tokens, and every compiled decoder, must do with them."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import torch

from hf_sparse.runtime.kernels.call import run
from hf_sparse.runtime.llvm.jit import Code


def check_rows(
    code: Code, packed: Any, x: int, product: np.ndarray, middle: Sequence[int], atol: float
) -> None:
    """Multiply all rows at once and in parts, onto what is there and not, with a bias and without.

    Args:
        code: has the kernel.
        packed: the weight.
        x: address of the token's features, as the kernel reads them.
        product: what is wanted of each row.
        middle: rows between which the parts are cut, as two threads do.
        atol: how far from `product`.
    """
    rows = len(product)
    bias, before = torch.randn(2, -(-rows // 4) * 4)
    for edges in ((0, rows), (0, *middle, rows)):
        for add in (False, True):
            y = before.clone()
            for first, last in pairwise(edges):
                ends = x, y.data_ptr(), bias.data_ptr()
                run(code, packed.operation(*ends, first, last, add=add))
            wanted = product + bias[:rows].numpy() + (before[:rows].numpy() if add else 0)
            np.testing.assert_allclose(y[:rows].numpy(), wanted, atol=atol)
    y = before.clone()
    run(code, packed.operation(x, y.data_ptr(), 0, 0, rows, add=False))
    np.testing.assert_allclose(y[:rows].numpy(), product, atol=atol)
    assert not y[rows:].any()  # what the next weight reads behind the last feature


def check_nan_stays_in_its_sequence(compiled: Any) -> None:
    """A token whose embedding is NaN spoils its own sequence, and no other of the batch."""
    ids = torch.arange(12).view(2, 6)
    with torch.no_grad():
        compiled.get_input_embeddings().weight[30] = torch.nan
        first = compiled(input_ids=ids, use_cache=True)
        token = torch.tensor([[30], [3]])
        both = compiled(input_ids=token, past_key_values=first.past_key_values).logits
        alone = compiled(input_ids=ids[1:], use_cache=True)
        one = compiled(input_ids=token[1:], past_key_values=alone.past_key_values).logits
    assert both[0].isnan().all()
    torch.testing.assert_close(both[1:], one)
