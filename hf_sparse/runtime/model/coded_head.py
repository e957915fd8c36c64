"""An output head in eight bits for a few tokens. The weight stays, for embeddings and more tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hf_sparse.runtime.kernels.call import Operation, Slot
from hf_sparse.runtime.kernels.code_formats import BLOCK, RECORD
from hf_sparse.runtime.kernels.code_rows import QUANTISE_ROW
from hf_sparse.runtime.kernels.extents import rounded_up
from hf_sparse.runtime.kernels.single_token import GROUP
from hf_sparse.runtime.kernels.weight_types import WEIGHT_TYPES
from hf_sparse.runtime.llvm.target import Target
from hf_sparse.runtime.model.plain import why_not_plain
from hf_sparse.runtime.model.single_layers import CompiledHead
from hf_sparse.runtime.programs.program import Program
from hf_sparse.runtime.weights.codes import CodeWeight
from hf_sparse.runtime.weights.memory import Shelf, aligned
from hf_sparse.runtime.weights.rates import nominal
from hf_sparse.runtime.weights.rounding import Coding, pack_nearest
from hf_sparse.runtime.weights.rows import DECODE_ROWS, share_rows
from hf_sparse.upstream.torch import times_written


class CodedHead(CompiledHead):
    """A head whose weight is read as codes of eight bits.

    The codes are a copy, a quarter or half as large as the weight, that is made here. They serve as
    long as the weight is the one that they were made of; otherwise torch multiplies with the weight.

    Args:
        linear: the head; its weight may be shared with the embeddings.
        target: what the code is for.
        cache: folder of the machine code, or None.
        coding: how the codes were made.
        codes: of this weight.
    """

    CODES = True

    def __init__(
        self,
        linear: nn.Linear,
        target: Target,
        cache: Path | None,
        coding: Coding,
        codes: CodeWeight,
    ) -> None:
        super().__init__(linear, target, cache)
        self.coding, self.codes, self._made_of = coding, codes, _state(linear.weight)

    @classmethod
    def of(
        cls, linear: Any, target: Target, cache: Path | None, coding: Coding
    ) -> CodedHead | None:
        """A head as codes; None if it is no plain layer, or kernels have no room for its codes.

        Raises:
            OffGridError: its weight should lie on a grid, and does not.
        """
        if not cls.suits(linear) or why_not_plain(linear) is not None:
            return None
        rates = nominal(target).rows
        codes = pack_nearest(coding.codes(linear.weight), coding.grid, rates, Shelf(0))
        return None if codes is None else cls(linear, target, cache, coding, codes)

    @classmethod
    def suits(cls, linear: nn.Module | None) -> bool:
        """As `CompiledHead`'s; of any size if it has no bias."""
        if type(linear) is nn.Linear and linear.bias is None:
            weight = linear.weight
            return weight.dtype in WEIGHT_TYPES and weight.is_contiguous() and weight.numel() > 0
        return super().suits(linear)

    @property
    def read_bytes(self) -> int:
        """Bytes that kernels read for a token."""
        return self.codes.nbytes

    def _as_compiled(self) -> bool:
        return super()._as_compiled() and _state(self.weight) == self._made_of

    def _with(self, linear: nn.Linear) -> CompiledHead:
        twin = CodedHead(linear, self.target, self._cache, self.coding, self.codes)
        if _state(self.weight) != self._made_of:  # the codes are of another weight, also there
            twin._made_of = (0, 0)
        return twin

    def multiply(self, x: Tensor) -> Tensor:
        """The operation itself."""
        rows, columns = self.out_features, self.in_features
        flat = x.detach().reshape(-1, columns).float()
        flat = nn.functional.pad(flat, (0, -columns % BLOCK)).contiguous()
        tokens, threads = len(flat), torch.get_num_threads()
        output = torch.empty(tokens, rounded_up(rows, GROUP), dtype=torch.float32, device="cpu")
        bias = None if self.bias is None else self.bias.data_ptr()
        with self._programs.borrow(
            (tokens, threads, bias), lambda: self._program(tokens, threads)
        ) as program:
            program.run(lambda: [flat, output], x=flat.data_ptr(), y=output.data_ptr())
        return output[:, :rows].reshape(*x.shape[:-1], rows).to(x.dtype)

    def _program(self, tokens: int, threads: int) -> Program:
        """Multiplies a few tokens by a thread's rows; each thread makes records of all of them."""
        rows, blocks = self.out_features, self.codes.blocks
        bias = 0 if self.bias is None else self.bias.data_ptr()
        room = aligned(threads, tokens, RECORD // 4 * blocks)
        lists: list[list[Operation]] = []
        for records, (first, last) in zip(room, share_rows(rows, threads), strict=True):
            lists.append(
                [
                    QUANTISE_ROW.operation(
                        "quantise_row",
                        x=Slot("x", 4 * token * blocks * BLOCK),
                        records=own.data_ptr(),
                        blocks=blocks,
                    )
                    for token, own in enumerate(records)
                ]
            )
            # Few rows at a time where there are several tokens: they are read from the cache then.
            unit = max(last - first, 1) if tokens == 1 else DECODE_ROWS
            lists[-1] += [
                self.codes.operation(
                    own.data_ptr(),
                    Slot("y", 4 * token * rounded_up(rows, GROUP)),
                    bias,
                    start,
                    min(start + unit, last),
                    add=False,
                )
                for start in range(first, last, unit)
                for token, own in enumerate(records)
            ]
        own = [record for records in room for record in records]
        return Program(self.code, [lists], [self.codes, own, self.bias])


def _state(weight: Tensor) -> tuple[int, int]:
    """What changes when a weight is replaced or written to."""
    return weight.data_ptr(), times_written(weight)
