"""What a stack from a file must be like before machine code runs on it.

    kernel            reads                                             checked by
    spmm              the five streams of a chunk, and up to 64 bytes   panel_checks.check
                      behind them; x and y at the columns and rows
                      that they name
    sparse_rows       words of all groups of rows, a value for each     rows.check_decode
                      bit, and up to 64 bytes behind them
    shuffled_rows     values and words of all groups and windows; x at  shuffled.check_shuffled
                      places within a window
    dense             rows in groups of 4, a part's columns             check_linear
    dense_rows        rows in groups of 4, columns in groups of 16      check_linear
    spmm, dense       a bias for each row                               check_linear
    sparse_rows,      a bias for each group of 4 rows                   check_linear
    shuffled_rows,
    dense_rows
    norms             weight and bias for each feature                  stack_shapes
    route, when       logits and tokens of each expert; no more are     stack_shapes
                      chosen than there are
    scored_attention  a bias for each head and distance: memory of the  stack_shapes
                      program, by heads and tokens
    all               x, y: buffers by the sizes of the stack           stack_shapes

All of these are compared with the memory that is handed over.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hf_sparse.arguments import check_finite
from hf_sparse.runtime.kernels.code_formats import BLOCK
from hf_sparse.runtime.kernels.single_token import COLUMNS, GROUP
from hf_sparse.runtime.kernels.weight_types import WEIGHT_TYPES
from hf_sparse.runtime.model.stack_shapes import check_stack, norm_sizes, require_floats
from hf_sparse.runtime.weights.code_checks import check_codes
from hf_sparse.runtime.weights.code_part import CodePart
from hf_sparse.runtime.weights.codes import CodeWeight
from hf_sparse.runtime.weights.damage import require
from hf_sparse.runtime.weights.dense_weight import DenseWeight
from hf_sparse.runtime.weights.linear import Linear
from hf_sparse.runtime.weights.panel_checks import check
from hf_sparse.runtime.weights.rows import check_decode
from hf_sparse.runtime.weights.shuffled import ShuffledWeight, check_shuffled
from hf_sparse.runtime.weights.stack import Stack


def check_restored(stack: Stack) -> None:
    """Check all weights of a stack, and that they are those that a stack has.

    Raises:
        ValueError: something does not fit; the message names it.
    """
    for number, block in enumerate(stack.blocks):
        for name, linear in block.named_linears.items():
            place = f"blocks.{number}.{name}"
            check_linear(linear, place)
            one = name.endswith("down") or len(linear.parts) == 1
            require(one, place, f"it is cut into {len(linear.parts)} parts")
            single = linear.single is not None or not stack.causal or name == "cross.keys"
            require(single, place, "its weight for single tokens is missing")
        for norm, size in norm_sizes(stack, block):
            lengths = {len(norm.weight), len(norm.bias)}
            require(lengths == {size}, f"blocks.{number}.norms", f"{lengths} numbers, not {size}")
    check_stack(stack)
    most = max(block.up.rows for block in stack.blocks)
    require(stack.intermediate == most, "stack", f"{stack.intermediate} neurons, and {most}")


def check_linear(linear: Linear, place: str) -> None:
    """Check one weight: its parts, its bias, and the weight for single tokens.

    Raises:
        ValueError: something does not fit; the message names it.
    """
    weight_type, edges, first = WEIGHT_TYPES[linear.dtype], linear.edges, linear.parts[0][0]
    texts = isinstance(linear.name, str) and isinstance(linear.pattern, str)
    require(texts, place, f"it is called {linear.name!r}, with {linear.pattern!r}")
    straight = all(type(edge) is int for edge in edges) and edges[0] == 0
    require(straight and len(edges) == len(linear.parts) + 1, place, f"its edges {edges}")
    for number, part in enumerate(linear.parts):
        for packed in part:
            if isinstance(packed, CodePart):
                own = len(part) == 1 and packed.weight is linear.codes
                require(own, place, "its codes are one of several weights")
                begins = type(packed.first_column) is int and packed.first_column == edges[number]
                fits = begins and not packed.first_column % BLOCK
                require(fits and type(packed.columns) is int, place, "the columns of its codes")
            elif isinstance(packed, DenseWeight):
                require(len(part) == 1, place, "a dense weight is one of several")
                require_matrix(packed.weight, linear.dtype, place)
                require(DenseWeight.suits(packed.weight), place, f"{packed.rows} dense rows")
                begins = type(packed.first_column) is int and packed.first_column == edges[number]
                fits = begins and packed.weight.shape[1] == edges[-1]
                require(fits and type(packed.columns) is int, place, "its dense columns")
            else:
                check(packed, weight_type)
            width = edges[number + 1] - edges[number]
            same = packed.rows == first.rows and 0 < packed.columns == width
            require(same, place, f"a part is {packed.rows} x {packed.columns}")
    rows, columns = linear.rows, linear.columns
    require(rows > 0, place, "it has no rows")
    zeros = type(linear.zeros) is int and 0 <= linear.zeros <= rows * columns
    require(zeros, place, f"{linear.zeros} zeros of {rows} x {columns}")
    whole = -(-rows // GROUP) * GROUP, -(-columns // COLUMNS) * COLUMNS
    if linear.bias is not None:
        length = len(linear.bias)
        require(length == whole[0], place, f"its bias has {length} numbers, not {whole[0]}")
        require_floats(linear.bias, place, whole[0])
    if linear.codes is not None:
        same = linear.codes.columns == columns and linear.single in (None, linear.codes)
        require(same, place, "its codes have another shape, or single tokens have other ones")
        check_codes(linear.codes)
    elif isinstance(linear.single, Tensor):
        require_matrix(linear.single, linear.dtype, place)
        fits = tuple(linear.single.shape) == whole
        require(fits, place, f"its weight for single tokens is not {whole}")
    elif linear.single is not None:
        same = (linear.single.rows, linear.single.columns) == (rows, columns)
        require(same, place, "its weight for single tokens has another shape")
        if isinstance(linear.single, CodeWeight):
            require(False, place, "only single tokens have codes")
        elif isinstance(linear.single, ShuffledWeight):
            check_shuffled(linear.single, weight_type)
        else:
            check_decode(linear.single, weight_type)


def require_matrix(tensor: Tensor, dtype: torch.dtype, place: str) -> None:
    """Raise a ValueError unless a tensor is a matrix of a type, row by row, all finite."""
    fits = tensor.dtype == dtype and tensor.is_contiguous() and tensor.ndim == 2
    require(fits, place, f"its weight is {tensor.dtype} {tuple(tensor.shape)}")
    check_finite(place, tensor)
