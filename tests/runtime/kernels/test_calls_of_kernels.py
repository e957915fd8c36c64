"""Operations are checked by the kernel's own parameters before machine code runs."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest

from hf_sparse.runtime.kernels import tiles
from hf_sparse.runtime.kernels.all import kernel_functions
from hf_sparse.runtime.kernels.call import Operation, Signature, Slot, run
from hf_sparse.runtime.kernels.normalisation import SIGNATURE as NORM
from hf_sparse.runtime.kernels.worker import OPERATION_WORDS
from hf_sparse.runtime.llvm import jit, target
from hf_sparse.runtime.programs.program import Program

NUMBERS = np.arange(64, dtype=np.float32)
RIGHT: dict[str, Any] = {
    "x": NUMBERS.ctypes.data,
    "y": 64,
    "features": 4,
    "groups": 1,
    "weight": 0,
    "bias": 0,
    "epsilon": 1e-5,
}


@pytest.fixture(scope="module")
def code() -> jit.Code:
    chosen = target.host()
    return jit.compile_kernels([tiles.copy(chosen)], chosen, None)


def copied(**changes: Any) -> Operation:
    goal = np.zeros_like(NUMBERS)
    given = {"x": NUMBERS.ctypes.data, "y": goal.ctypes.data, "vectors": 1, **changes}
    return tiles.COPY.operation("copy", **given)


@pytest.mark.parametrize("missing", RIGHT)
def test_a_missing_argument_is_named(missing: str) -> None:
    given = {name: value for name, value in RIGHT.items() if name != missing}
    with pytest.raises(TypeError, match=f"layer_norm4 lacks {missing}; wanted ptr x, ptr y, i64"):
        NORM.operation("layer_norm4", **given)


def test_an_argument_too_many_is_named() -> None:
    with pytest.raises(TypeError, match="layer_norm4 has no window; wanted ptr x"):
        NORM.operation("layer_norm4", **RIGHT, window=3)


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("epsilon", 1),
        ("epsilon", Slot("epsilon")),
        ("features", 4.0),
        ("features", True),
        ("features", None),
        ("features", 1 << 63),
        ("x", 1.5),
        ("x", -8),
        ("x", np.int64(8)),
        ("x", NUMBERS),
    ],
)
def test_an_argument_of_another_kind_is_refused(name: str, wrong: Any) -> None:
    with pytest.raises(TypeError, match=f"(?s)layer_norm4 has {name}=.*wanted a"):
        NORM.operation("layer_norm4", **{**RIGHT, name: wrong})


@pytest.mark.parametrize("count", [0, 2, 4])
def test_a_wrong_count_is_refused(count: int) -> None:
    with pytest.raises(TypeError, match=f"copy has {count} arguments; wanted 3: ptr x, ptr y, i64"):
        Operation("copy", tiles.COPY.parameters, (0,) * count)


def test_arguments_come_in_the_order_of_the_parameters() -> None:
    operation = NORM.operation("layer_norm4", **dict(reversed(RIGHT.items())))
    assert operation.arguments == tuple(RIGHT.values())


def test_an_operation_for_another_kernel_does_not_run(code: jit.Code) -> None:
    foreign = Signature(("ptr x", "i64 vectors", "ptr y")).operation("copy", x=0, vectors=0, y=0)
    unknown = tiles.COPY.operation("move", x=0, y=0, vectors=0)
    for operation, message in (
        (foreign, "for the kernel copy, whose are ('ptr x', 'ptr y', 'i64 vectors')"),
        (unknown, "for the kernel move, which there is not"),
    ):
        with pytest.raises(TypeError, match=re.escape(message)):
            run(code, operation)
        with pytest.raises(TypeError, match=re.escape(message)):
            Program(code, [[[operation]]], [])


def test_an_operation_with_slots_runs_in_a_program_only(code: jit.Code) -> None:
    with pytest.raises(TypeError, match="copy has slots"):
        run(code, copied(x=Slot("x")))


def test_every_slot_must_be_filled() -> None:
    chosen = target.host()
    functions = [function for function in kernel_functions(chosen) if "worker" in function.name]
    code = jit.compile_kernels([*functions, tiles.copy(chosen)], chosen, None)
    goal = np.zeros(chosen.lanes, np.float32)
    operation = copied(x=Slot("x"), y=goal.ctypes.data)
    program = Program(code, [[[operation]]], [goal])
    with pytest.raises(TypeError, match="nothing fills the slot x; given z"):
        program.run(z=0)
    program.run(x=NUMBERS.ctypes.data, z=0)
    assert np.array_equal(goal, NUMBERS[: chosen.lanes])


def test_every_kernel_has_names_of_its_own_and_fits_an_operation() -> None:
    for function in kernel_functions(target.host()):
        names = [parameter.split()[1] for parameter in function.signature]
        assert len(set(names)) == len(names) < OPERATION_WORDS
