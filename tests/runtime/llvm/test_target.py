"""What CPUs can do stands in one table, which chooses the target."""

from __future__ import annotations

import ast
import types
from pathlib import Path

import pytest

import hf_sparse
from hf_sparse.runtime.llvm import target

RUNTIME = Path(hf_sparse.__file__).parent / "runtime"
V3 = ("ssse3", "sse4.1", "sse4.2", "avx2", "fma", "f16c", "bmi2")
V4 = (*V3, "avx512f", "avx512bw", "avx512dq", "avx512vl")
CPUS = [
    # Features, the target, capabilities.
    (V3, "avx2", ()),
    ((*V3, "avxvnni"), "avx2", ("AVX-VNNI",)),
    (V4, "avx2", ("AVX-512",)),  # without VBMI2
    ((*V4, "avx512vbmi2"), "avx2", ("AVX-512", "AVX-512 VBMI2")),  # without VNNI
    (
        (*V4, "avx512vbmi2", "avx512vnni", "amx-tile", "amx-int8"),
        "avx512",
        ("AVX-512", "AVX-512 VBMI2", "AVX-512 VNNI", "AMX int8"),
    ),
    ((*V3[:3], "amx-int8"), "portable", ()),
]


@pytest.mark.parametrize(("features", "name", "capabilities"), CPUS)
def test_a_cpu_is_recognised(
    features: tuple[str, ...],
    name: str,
    capabilities: tuple[str, ...],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    flags = types.SimpleNamespace(get=lambda feature: feature in features)
    binding = types.SimpleNamespace(get_host_cpu_features=lambda: flags)
    monkeypatch.setattr(target, "llvm", lambda: binding)
    monkeypatch.setattr(target.platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(
        target, "targets", lambda: {row.name: row.name for row in target.INSTRUCTION_SETS}
    )
    assert target.capabilities() == capabilities
    assert _host() == name


def _host() -> object:
    uncached = getattr(target.host, "__wrapped__", None)
    if uncached is None:
        pytest.skip("the target is given")
    return uncached()


def test_no_other_file_names_instructions_or_features() -> None:
    names = {row.name for row in target.INSTRUCTION_SETS}
    features = {f for row in (*target.INSTRUCTION_SETS, *target.CAPABILITIES) for f in row.needs}
    seen = 0
    for file in RUNTIME.rglob("*.py"):
        if file == RUNTIME / "llvm/target.py":
            continue
        tree = ast.parse(file.read_text())
        spoken = {
            id(node.body[0].value)
            for node in ast.walk(tree)
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef)
            and node.body
            and isinstance(node.body[0], ast.Expr)
        }
        for node in ast.walk(tree):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                if id(node) in spoken:
                    continue
                seen += 1
                assert node.value not in features - names, (file, node.value)
                assert "llvm.x86" not in node.value, file
                assert "llvm.aarch64" not in node.value, file
                assert "{lane}" not in node.value, file
    assert seen > 1000
