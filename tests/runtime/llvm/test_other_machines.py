"""Code for machines that this is not: every row of the table makes it, and it says for what it is."""

from __future__ import annotations

import functools
from typing import Any

import pytest

from hf_sparse.runtime.kernels import activation, code_rows, single_token, tiles, worker
from hf_sparse.runtime.kernels.all import kernel_functions
from hf_sparse.runtime.kernels.shuffled_rows import WINDOWS, shuffled_rows
from hf_sparse.runtime.kernels.weight_types import (
    BFLOAT16,
    FLOAT16,
    FLOAT32,
    WEIGHT_TYPES,
    WeightType,
)
from hf_sparse.runtime.llvm import target
from hf_sparse.runtime.llvm.ir import Function
from hf_sparse.runtime.llvm.jit import module_text, object_code
from hf_sparse.runtime.llvm.target import llvm

ROWS = [pytest.param(row, id=row.name) for row in target.INSTRUCTION_SETS]
# What files for Linux call the machines.
MACHINES = {"x86_64": 62, "aarch64": 183}


def check(row: target.InstructionSet, functions: list[Function]) -> None:
    code = object_code(functions, target.elsewhere(row))
    assert code[:5] == b"\x7fELF\x02"
    assert int.from_bytes(code[18:20], "little") == MACHINES[row.machines[0]]
    for function in functions:
        assert f"\0{function.name}\0".encode() in code


@pytest.mark.few(1)
@pytest.mark.parametrize("row", ROWS)
def test_every_instruction_of_the_table_compiles(
    row: target.InstructionSet, capfd: pytest.CaptureFixture[str]
) -> None:
    chosen = target.elsewhere(row)
    check(
        row,
        [
            worker.worker(chosen, parallel=True, timed=True),
            activation.activation(chosen, "silu", gated=False),
            single_token.sparse_rows(chosen, BFLOAT16),
            *(shuffled_rows(chosen, window, FLOAT16) for window in WINDOWS),
            *code_rows.code_functions(chosen),
        ],
    )
    assert (
        not capfd.readouterr().err
    )  # LLVM complains about features and CPUs that it does not know


@functools.cache
def parameters_here() -> dict[str, Any]:
    functions = kernel_functions(target.host(), FLOAT32, codes=True)
    return {function.name: function.signature for function in functions}


@pytest.mark.parametrize("row", ROWS)
def test_every_target_has_the_same_kernels(row: target.InstructionSet) -> None:
    """Written as valid code, with the same parameters as those of this CPU, whatever the target."""
    chosen = target.elsewhere(row, extras=bool(row.extras))
    functions = kernel_functions(chosen, FLOAT32, codes=True)
    assert {function.name: function.signature for function in functions} == parameters_here()
    llvm().parse_assembly(module_text(functions)).verify()


@pytest.mark.slow
@pytest.mark.parametrize("kept", WEIGHT_TYPES.values(), ids=lambda kept: str(kept.dtype)[6:])
@pytest.mark.parametrize("row", ROWS)
def test_every_kernel_compiles(row: target.InstructionSet, kept: WeightType) -> None:
    check(row, kernel_functions(target.elsewhere(row), kept, codes=True))


@pytest.mark.slow
@pytest.mark.parametrize(
    "row", [row for row in target.INSTRUCTION_SETS if row.extras], ids=lambda row: row.name
)
def test_extras_are_used(row: target.InstructionSet) -> None:
    plain, later = target.elsewhere(row), target.elsewhere(row, extras=True)
    code = [object_code(code_rows.code_functions(one), one) for one in (plain, later)]
    assert code[0] != code[1]
    for flag, field, name in row.extras:
        assert f"+{flag}" in later.features.split(",")
        assert f"+{flag}" not in plain.features.split(",")
        assert (getattr(plain.has, field), getattr(later.has, field)) == ("", name)


def test_features_of_capabilities_are_known_to_llvm(capfd: pytest.CaptureFixture[str]) -> None:
    for row in target.CAPABILITIES:
        made = target.InstructionSet(
            row.name, row.machines, 4, 16, row.needs, target.Instructions("", "")
        )
        chosen = target.elsewhere(made)
        object_code([tiles.copy(chosen)], chosen)
    assert not capfd.readouterr().err
    unknown = target.InstructionSet(
        "", ("aarch64",), 4, 16, ("dotprods",), target.Instructions("", "")
    )
    object_code([tiles.copy(target.elsewhere(unknown))], target.elsewhere(unknown))
    assert "dotprods" in capfd.readouterr().err


def test_a_name_stands_for_one_row_of_a_machine() -> None:
    for machine in MACHINES:
        names = [row.name for row in target.INSTRUCTION_SETS if machine in row.machines]
        assert names
        assert len(set(names)) == len(names)
