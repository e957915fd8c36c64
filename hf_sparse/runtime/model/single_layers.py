"""Single layers as machine code: for models that are not compiled whole, and for output heads.

Both are torch custom operations on a number that stands for the layer, so that `torch.compile` and
`torch.export` see one opaque call with a known shape.
"""

from __future__ import annotations

import copy
import itertools
import weakref
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hf_sparse.runtime.kernels.all import kernels
from hf_sparse.runtime.kernels.call import Argument, Operation, Slot
from hf_sparse.runtime.kernels.single_token import COLUMNS, DENSE_ROWS, GROUP
from hf_sparse.runtime.kernels.tiles import TRANSPOSE
from hf_sparse.runtime.kernels.weight_types import WEIGHT_TYPES
from hf_sparse.runtime.llvm.target import Target
from hf_sparse.runtime.programs.pool import Pool
from hf_sparse.runtime.programs.program import Program
from hf_sparse.runtime.programs.tiling import Tile, cut, share
from hf_sparse.runtime.weights.linear import Linear
from hf_sparse.runtime.weights.memory import aligned
from hf_sparse.runtime.weights.rows import DECODE_ROWS, share_rows
from hf_sparse.upstream.torch import copy_forward_hooks_

# Bytes of programs that a head keeps.
_HEAD_BYTES = 4 << 20
# Tokens that a head multiplies one by one; torch is faster for more.
_FEW = 4

_NUMBERS = itertools.count()
_LAYERS: weakref.WeakValueDictionary[int, CompiledLinear | CompiledHead] = (
    weakref.WeakValueDictionary()
)


@torch.library.custom_op("hf_sparse::linear", mutates_args=())
def _linear(x: Tensor, layer: int, out_features: int) -> Tensor:
    return _LAYERS[layer].multiply(x)


@_linear.register_fake
def _(x: Tensor, layer: int, out_features: int) -> Tensor:
    return x.new_empty(*x.shape[:-1], out_features)


def _refuse_state_dict(*_: Any) -> None:
    raise ValueError(
        "a compiled layer has packed weights, which state dicts cannot hold: save the model that was "
        "compiled instead."
    )


class _Layer(nn.Module):
    """What the two have in common: a number, its kernels, and checks."""

    in_features: int
    out_features: int

    def _register(
        self, dtype: torch.dtype, target: Target, cache: Path | None, codes: bool = False
    ) -> None:
        self._number = next(_NUMBERS)
        _LAYERS[self._number] = self  # type: ignore[assignment]
        self.target, self._cache = target, cache
        self.code = kernels(target, cache, WEIGHT_TYPES[dtype], codes)

    def __deepcopy__(self, memo: dict[int, Any]) -> _Layer:
        """Nothing in it changes: copies of a model share it."""
        return self

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise ValueError(
            "a compiled layer cannot be pickled: save the model that was compiled instead."
        )

    def _checked(self, x: Tensor) -> Tensor:
        if torch.jit.is_tracing():  # type: ignore[attr-defined]
            raise ValueError(
                "a compiled layer cannot be traced: its weight is known to this process alone. Trace "
                "the model that was compiled, or export it by hf_sparse.export_onnx."
            )
        if self.training:
            raise ValueError("a compiled model is for inference: call its eval() first.")
        if torch.is_grad_enabled() and x.requires_grad:
            raise ValueError("a compiled layer has no gradients: use torch.no_grad().")
        if x.device.type != "cpu" or x.shape[-1] != self.in_features:
            raise ValueError(
                f"the input is {tuple(x.shape)} on {x.device}; wanted (..., {self.in_features}) on "
                "the CPU."
            )
        return x


class CompiledLinear(_Layer):
    """A packed layer in place of a Linear or Conv1D.

    Args:
        packed: the weight `(out_features, in_features)`.
        target: what the code is for.
        cache: folder of the machine code, or None.
        pool: keeps programs and buffers, for all layers of a model together.
    """

    def __init__(
        self, packed: Linear, target: Target, cache: Path | None, pool: Pool[Program | Tensor]
    ) -> None:
        super().__init__()
        self.packed, self._pool = packed, pool
        self.in_features, self.out_features = packed.columns, packed.rows
        # Some models ask a layer for its weight's dtype and device; there is nothing else in it.
        self.register_buffer("weight", torch.empty(0), persistent=False)
        self._register(packed.dtype, target, cache)
        # A state dict without the weight would be saved, and no one would miss it.
        self.register_state_dict_pre_hook(_refuse_state_dict)

    def forward(self, x: Tensor) -> Tensor:
        """`x (..., in_features)` to `(..., out_features)`, computed in float32."""
        result: Tensor = torch.ops.hf_sparse.linear(
            self._checked(x), self._number, self.out_features
        )
        return result

    def multiply(self, x: Tensor) -> Tensor:
        """The operation itself."""
        flat = x.detach().reshape(-1, self.in_features).float().contiguous()
        output = torch.empty(len(flat), self.out_features, dtype=torch.float32, device="cpu")
        if len(flat):
            tokens, threads = len(flat), torch.get_num_threads()
            shape = (threads, self.in_features + self.out_features, self.target.widths[0])
            made: Any = self._pool.borrow(
                ("program", self._number, tokens, threads), lambda: self._program(tokens, threads)
            )
            # Layers of one shape share the tiles.
            tiles: Any = self._pool.borrow(("tiles", *shape), lambda: aligned(*shape))
            with made as program, tiles as buffer:
                places = {"x": flat.data_ptr(), "y": output.data_ptr(), "tiles": buffer.data_ptr()}
                program.run(lambda: [flat, output, *buffer], **places)
        return output.view(*x.shape[:-1], self.out_features).to(x.dtype)

    def _program(self, tokens: int, threads: int) -> Program:
        """Multiplies `tokens` tokens, in a buffer of a tile's input and output for each thread."""
        lists = share(cut(0, tokens, self.target.widths), threads)
        size = 4 * (self.in_features + self.out_features) * self.target.widths[0]
        operations = [
            [op for tile in part for op in self._operations(tile, Slot("tiles", thread * size))]
            for thread, part in enumerate(lists)
        ]
        return Program(self.code, [operations], [self.packed])

    def _operations(self, tile: Tile, x: Slot) -> list[Operation]:
        columns, rows = self.in_features, self.out_features
        y = x + 4 * columns * self.target.widths[0]
        source, goal = Slot("x", 4 * columns * tile.start), Slot("y", 4 * rows * tile.start)

        def transpose(kernel: str, x: Argument, y: Argument, features: int) -> Operation:
            sizes = {"features": features, "tokens": tile.tokens, "stride": 4 * features}
            return TRANSPOSE.operation(f"{kernel}{tile.vectors}", x=x, y=y, **sizes)

        return [
            transpose("to_tile", source, x, columns),
            *self.packed.operations(x, y, tile.vectors),
            transpose("from_tile", y, goal, rows),
        ]


def _is_readable(tensor: Tensor, shape: tuple[int, ...]) -> bool:
    """Whether kernels can read a tensor of a shape where it lies."""
    return tensor.device.type == "cpu" and tensor.shape == shape and tensor.is_contiguous()


class CompiledHead(_Layer):
    """An output head that reads torch's own weight: no copy, and faster for a few tokens.

    Args:
        linear: the head; its weight may be shared with the embeddings.
        target: what the code is for.
        cache: folder of the machine code, or None.
    """

    # Whether kernels read codes in place of the weight.
    CODES = False

    def __init__(self, linear: nn.Linear, target: Target, cache: Path | None) -> None:
        super().__init__()
        self.weight, self.bias = linear.weight, linear.bias
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self._dtype = linear.weight.dtype
        self._register(self._dtype, target, cache, self.CODES)
        self._programs: Pool[Program] = Pool(_HEAD_BYTES)

    @classmethod
    def suits(cls, linear: nn.Module | None) -> bool:
        """Whether a head is a Linear of whole vectors and groups of rows that kernels can read."""
        if type(linear) is not nn.Linear or linear.weight.dtype not in WEIGHT_TYPES:
            return False
        bias, size = linear.bias, (linear.out_features,)
        if bias is not None and not (bias.dtype == torch.float32 and _is_readable(bias, size)):
            return False
        whole = not (linear.in_features % COLUMNS or linear.out_features % GROUP)
        return whole and linear.weight.is_contiguous()

    @property
    def read_bytes(self) -> int:
        """Bytes that kernels read for a token."""
        return self.weight.nbytes

    def forward(self, x: Tensor) -> Tensor:
        """`x (..., in_features)` to `(..., out_features)`."""
        tokens = x.numel() // self.in_features
        if not self._as_compiled() or tokens > _FEW or not tokens or x.dtype != self._dtype:
            return nn.functional.linear(x, self.weight, self.bias)
        x = self._checked(x)
        if type(x) is Tensor and not torch.compiler.is_compiling():
            return self.multiply(x)  # a custom operation costs more than the rest of this call
        result: Tensor = torch.ops.hf_sparse.linear(x, self._number, self.out_features)
        return result

    def _as_compiled(self) -> bool:
        """Whether kernels can still read weight and bias: they may have been tied, cast or moved."""
        weight, bias, shape = self.weight, self.bias, (self.out_features, self.in_features)
        if weight.dtype != self._dtype or not _is_readable(weight, shape):
            return False
        return bias is None or (bias.dtype == torch.float32 and _is_readable(bias, shape[:1]))

    def __deepcopy__(self, memo: dict[int, Any]) -> CompiledHead:
        linear = nn.Linear(self.in_features, self.out_features, bias=False, device="meta")
        linear.weight = copy.deepcopy(self.weight, memo)
        linear.bias = copy.deepcopy(self.bias, memo)
        twin = self._with(linear).train(self.training)
        copy_forward_hooks_(self, twin)
        return twin

    def _with(self, linear: nn.Linear) -> CompiledHead:
        """Such a head with another weight and bias, of the same content."""
        return CompiledHead(linear, self.target, self._cache)

    def multiply(self, x: Tensor) -> Tensor:
        """The operation itself."""
        flat = x.detach().reshape(-1, self.in_features).float().contiguous()
        output = torch.empty(len(flat), self.out_features, dtype=torch.float32, device="cpu")
        bias = None if self.bias is None else self.bias.data_ptr()
        key = (len(flat), torch.get_num_threads(), self.weight.data_ptr(), bias)
        with self._programs.borrow(key, lambda: self._program(*key[:2])) as program:
            program.run(lambda: [flat, output], x=flat.data_ptr(), y=output.data_ptr())
        return output.view(*x.shape[:-1], self.out_features).to(x.dtype)

    def _program(self, tokens: int, threads: int) -> Program:
        """Multiplies a few tokens, one after the other, by a thread's rows."""
        rows, columns = self.out_features, self.in_features
        weight_type = WEIGHT_TYPES[self.weight.dtype]
        bias = 0 if self.bias is None else self.bias.data_ptr()
        weight, stride = self.weight.data_ptr(), weight_type.size * columns
        lists: list[list[Operation]] = []
        for first, last in share_rows(rows, threads):
            lists.append([])
            # Few rows at a time where there are several tokens: they are read from the cache then.
            unit = max(last - first, 1) if tokens == 1 else DECODE_ROWS
            for start in range(first, last, unit):
                groups = (min(start + unit, last) - start) // GROUP
                for token in range(tokens):
                    lists[-1].append(
                        DENSE_ROWS.operation(
                            f"dense_rows{weight_type.suffix}",
                            weight=weight + start * stride,
                            row_bytes=stride,
                            x=Slot("x", 4 * token * columns),
                            y=Slot("y", 4 * (token * rows + start)),
                            bias=bias and bias + 4 * start,
                            groups=groups,
                            columns=columns,
                            add=0,
                        )
                    )
        return Program(self.code, [lists], [self.weight, self.bias])
