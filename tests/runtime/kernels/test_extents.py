"""Kernels touch the memory that they declare, and no other: in memory of that size, by a page."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import pytest

from hf_sparse.runtime.kernels import checking, tiles
from hf_sparse.runtime.kernels.all import kernel_functions, kernels
from hf_sparse.runtime.kernels.extents import OutOfBoundsError
from hf_sparse.runtime.kernels.weight_types import FLOAT32, WEIGHT_TYPES, WeightType
from hf_sparse.runtime.llvm import target
from hf_sparse.runtime.llvm.code_cache import DEFAULT_CACHE
from hf_sparse.runtime.llvm.jit import Code
from hf_sparse.runtime.programs.program import Program
from tests.support.exact_memory import call_of, died, pointers_of, run_exactly
from tests.support.kernel_calls import (
    Example,
    attention_calls,
    code_calls,
    plain_calls,
    weight_calls,
)

TYPES = list(WEIGHT_TYPES.values())
Calls = Callable[[target.Target], Iterator[Example]]
# The calls, and the type of weights that the kernels are for; None: codes.
CALLS: dict[str, tuple[Calls, WeightType | None]] = {
    "plain": (plain_calls, FLOAT32),
    "attention": (attention_calls, FLOAT32),
    "codes": (code_calls, None),
    **{
        f"weights{kept.suffix}": (lambda chosen, kept=kept: weight_calls(chosen, kept), kept)
        for kept in TYPES
    },
}


def code_for(chosen: target.Target, kept: WeightType | None) -> Code:
    return kernels(chosen, DEFAULT_CACHE, kept or FLOAT32, codes=kept is None)


@pytest.mark.parametrize(
    "at_end",
    [
        pytest.param(True, id="before a page"),
        pytest.param(False, id="behind a page", marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("name", CALLS)
def test_kernels_stay_in_their_memory(chosen: target.Target, name: str, at_end: bool) -> None:
    calls, kept = CALLS[name]
    code, examples = code_for(chosen, kept), list(calls(chosen))

    def work(number: np.ndarray) -> None:
        for place, example in enumerate(examples):
            number[0] = place
            run_exactly(code, example, at_end=at_end)

    signal, place = died(work)
    assert not signal, f"{signal}: {call_of(examples[place].operation)}"


@pytest.mark.slow
@pytest.mark.parametrize("name", CALLS)
def test_kernels_need_what_they_declare(chosen: target.Target, name: str) -> None:
    """Without the last 64 bytes behind any pointer, some call of every kernel ends its process."""
    calls, kept = CALLS[name]
    code = code_for(chosen, kept)
    found: dict[tuple[str, str], bool] = {}
    for example in calls(chosen):
        for pointer in pointers_of(code, example):
            key = example.operation.kernel, pointer
            # Tables are rewritten here, guard page and all; the example of `when` runs nothing.
            if pointer in ("table", "operations"):
                continue
            if not found.get(key):
                signal, _ = died(
                    lambda _, one=example, short=pointer: run_exactly(
                        code, one, at_end=True, short=short
                    )
                )
                found[key] = signal == "SIGSEGV"
    assert [key for key, dies in found.items() if not dies] == []


@pytest.mark.slow
def test_every_kernel_is_tried(chosen: target.Target) -> None:
    tried = {example.operation.kernel for calls, _ in CALLS.values() for example in calls(chosen)}
    for kept in TYPES:
        functions = kernel_functions(chosen, kept, codes=True)
        called = {function.name for function in functions if "worker" not in function.name}
        assert called <= tried
        assert all(function.extents for function in functions if function.name in called)


def copying(code: Code, goal: np.ndarray, vectors: int) -> Program:
    source = np.zeros(1024, np.float32)
    operation = tiles.COPY.operation(
        "copy", x=source.ctypes.data, y=goal.ctypes.data, vectors=vectors
    )
    return Program(code, [[[operation]]], [source, goal])


def test_programs_are_checked_if_asked(
    chosen: target.Target,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    code = code_for(chosen, FLOAT32)
    room = np.zeros(64, np.float32)
    goal = room[: 2 * chosen.lanes]
    monkeypatch.setenv("HF_SPARSE_CHECK", "1")
    assert checking.is_asked_for()
    copying(code, goal, 2).run()
    message = rf"copy would write {12 * chosen.lanes} bytes by y at .*; {8 * chosen.lanes} bytes"
    with pytest.raises(OutOfBoundsError, match=message):
        copying(code, goal, 3).run()
    monkeypatch.setenv("HF_SPARSE_CHECK", "0")
    copying(code, goal, 3).run()  # there is memory behind it, which is not the program's


def test_what_is_lent_is_checked(
    chosen: target.Target,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from hf_sparse.runtime.kernels.call import Slot

    code = code_for(chosen, FLOAT32)
    goal, source = (np.zeros(64, np.float32) for _ in range(2))
    operation = tiles.COPY.operation("copy", x=Slot("x", 4), y=goal.ctypes.data, vectors=1)
    program = Program(code, [[[operation]]], [goal])
    monkeypatch.setenv("HF_SPARSE_CHECK", "1")
    program.run(lambda: [source], x=source.ctypes.data)
    last = source[-chosen.lanes :]
    with pytest.raises(OutOfBoundsError, match="copy would read"):
        program.run(lambda: [last], x=last.ctypes.data)
    with pytest.raises(OutOfBoundsError, match="its memory is not there"):
        program.run(x=source.ctypes.data)
