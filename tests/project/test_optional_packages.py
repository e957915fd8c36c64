"""Without an optional package each call that needs it says how to install it, before it works."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import hf_sparse
from hf_sparse.runtime.llvm import target
from tests.support.exporting import WHY_NOT
from tests.support.tiny_models import tiny_batches, tiny_model

CONFIG = hf_sparse.SparsityConfig("2:4")

# The package, its extra, the call, and what runs it with a sparse model and a folder that is not there.
CALLS: list[tuple[str, str, str, Callable[[Any, Path], Any]]] = [
    ("peft", "peft", "get_peft_model", lambda model, _: hf_sparse.get_peft_model(model, None)),
    ("peft", "peft", "load_adapter", lambda model, f: hf_sparse.load_adapter(model, f)),
    (
        "peft",
        "peft",
        "recover_, lora",
        lambda model, _: hf_sparse.recover_(model, tiny_batches("llama"), "lora"),
    ),
    (
        "peft",
        "peft",
        "recover_, shira",
        lambda model, _: hf_sparse.recover_(model, tiny_batches("llama"), "shira"),
    ),
    *[
        (package, "onnx", call, run)
        for package in ("onnx", "onnxruntime", "onnxscript")
        for call, run in {
            "export_onnx": lambda model, folder: hf_sparse.export_onnx(model, folder),
            "push_to_hub": lambda model, _: hf_sparse.push_to_hub(model, "user/name", onnx=True),
        }.items()
    ],
    ("gguf", "gguf", "export_gguf", lambda model, f: hf_sparse.export_gguf(model, f / "m.gguf")),
    ("llvmlite", "runtime", "compile", lambda model, _: hf_sparse.compile(model)),
    ("llvmlite", "runtime", "load_compiled", lambda _, folder: hf_sparse.load_compiled(folder)),
    ("llvmlite", "runtime", "benchmark", lambda model, _: hf_sparse.benchmark(model, repeats=1)),
    ("matplotlib", "plots", "report", lambda model, _: hf_sparse.report(model)),
    ("llvmlite", "runtime", "allocate", lambda model, _: hf_sparse.allocate(model, 0.5)),
    ("llvmlite", "runtime", "sparsity_for", lambda *_: hf_sparse.sparsity_for(0.5, "row")),
]


@pytest.mark.parametrize(
    ("package", "extra", "call", "run"), CALLS, ids=[f"{p}: {call}" for p, _, call, _ in CALLS]
)
def test_the_install_line_is_told(
    package: str,
    extra: str,
    call: str,
    run: Callable[[Any, Path], Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if extra == "onnx" and WHY_NOT:
        pytest.skip(WHY_NOT)
    model = tiny_model("llama")
    hf_sparse.prune_(model, CONFIG, "magnitude")
    before = copy.deepcopy(model.state_dict())
    for name in [name for name in sys.modules if name.partition(".")[0] == package]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    for remembers in (target.host, target.targets):  # what an earlier test asked llvmlite
        getattr(remembers, "cache_clear", lambda: None)()
    with pytest.raises(ImportError, match=rf"pip install .hf_sparse\[{extra}\]"):
        run(model, tmp_path / "new")
    assert not (tmp_path / "new").exists()
    assert all((model.state_dict()[name] == value).all() for name, value in before.items())


def test_what_needs_no_package_runs_without(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for package in (
        "peft",
        "onnx",
        "onnxruntime",
        "onnxscript",
        "llvmlite",
        "datasets",
        "matplotlib",
    ):
        monkeypatch.setitem(sys.modules, package, None)
    model = tiny_model("llama")
    batches = tiny_batches("llama")
    hf_sparse.prune_(model, CONFIG, "wanda", batches)
    hf_sparse.recover_(model, batches, "finetune")
    hf_sparse.save_pretrained(model, tmp_path)
    assert hf_sparse.inspect_checkpoint(tmp_path).report.sparsity == 0.5
