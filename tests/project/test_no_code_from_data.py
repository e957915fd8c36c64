"""No file that is read can bring code: no pickle, no eval, no torch.load, no paths elsewhere."""

from __future__ import annotations

import ast
import builtins
import json
import pickle
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import hf_sparse
from hf_sparse import FormatError, SparsityConfig
from tests.support.few_bits import INT4, quantised
from tests.support.tiny_models import tiny_model

ROOT = Path(__file__).parents[2]
FILES = sorted([*(ROOT / "hf_sparse").rglob("*.py"), *(ROOT / "hf_sparse_cli").rglob("*.py")])
MODULES = {
    "pickle",
    "cPickle",
    "dill",
    "cloudpickle",
    "joblib",
    "marshal",
    "shelve",
    "runpy",
}
CALLS = {"eval", "exec", "compile", "__import__", "torch.load", "torch.jit.load", "os.system"}
CALLS |= {
    "yaml.load",
    "yaml.load_all",
    "yaml.unsafe_load",
    "yaml.full_load",
    "os.popen",
    "torch.hub.load",
    "numpy.load",
    "np.load",
}
# What imports a module by a name that is ours or transformers', never from a file.
IMPORTS = {"hf_sparse/__init__.py", "hf_sparse/upstream/transformers/models.py"}


def dotted(node: ast.expr) -> str:
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


def found_in(tree: ast.AST, name: str) -> Iterator[str]:
    """What could run code that a file brings."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [alias.name for alias in node.names]
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            yield from (f"imports {one}" for one in names if one.split(".")[0] in MODULES)
        elif isinstance(node, ast.Call):
            called = dotted(node.func)
            if called in CALLS:
                yield f"calls {called}"
            if called.endswith("import_module") and name not in IMPORTS:
                yield f"calls {called}"
            for keyword in node.keywords:
                if keyword.arg in ("trust_remote_code", "allow_pickle"):
                    yield f"gives {keyword.arg}"


def test_no_file_calls_what_runs_code() -> None:
    found = []
    for file in FILES:
        name = file.relative_to(ROOT).as_posix()
        # UnpicklingError is what PEFT's reader of old adapters may raise.
        found += [
            f"{name} {told}"
            for told in found_in(ast.parse(file.read_text()), name)
            if told != "imports pickle" or "UnpicklingError" not in file.read_text()
        ]
    assert found == []


@pytest.mark.parametrize(
    "line",
    [
        "import pickle",
        "from pickle import loads",
        "torch.load(file)",
        "eval(text)",
        "importlib.import_module(name)",
        "AutoModel.from_pretrained(x, trust_remote_code=True)",
    ],
)
def test_such_calls_are_seen(line: str) -> None:
    assert list(found_in(ast.parse(line), "hf_sparse/x.py"))


@pytest.fixture
def without_code(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing that runs code from data can be called."""

    def refuse(*arguments: Any, **options: Any) -> Any:
        raise AssertionError("code from data")

    for owner, name in (
        *((pickle, name) for name in ("load", "loads", "Unpickler")),
        (torch, "load"),
        (torch.jit, "load"),
        (builtins, "eval"),
    ):
        monkeypatch.setattr(owner, name, refuse)


@pytest.mark.parametrize("kind", ["sparse", "codes"])
def test_checkpoints_load_without_it(tmp_path: Path, kind: str, request: Any) -> None:
    config = SparsityConfig("2:4") if kind == "sparse" else INT4
    model = quantised() if kind == "codes" else tiny_model("llama")
    if kind == "sparse":
        hf_sparse.prune_(model, config, "magnitude")
    hf_sparse.save_pretrained(model, tmp_path, config)
    request.getfixturevalue("without_code")
    hf_sparse.inspect_checkpoint(tmp_path)
    AutoModelForCausalLM.from_pretrained(tmp_path)


def test_compiled_models_load_without_it(tmp_path: Path, request: Any) -> None:
    hf_sparse.save_compiled(hf_sparse.compile(tiny_model("llama", num_hidden_layers=1)), tmp_path)
    request.getfixturevalue("without_code")
    hf_sparse.load_compiled(tmp_path)


def test_adapters_load_without_it(tmp_path: Path, request: Any) -> None:
    peft = pytest.importorskip("peft")
    model = tiny_model("llama", num_hidden_layers=1)
    hf_sparse.prune_(model, SparsityConfig("2:4"), "magnitude")
    adapted = hf_sparse.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj"]))
    adapted.save_pretrained(tmp_path)
    base = adapted.unload()
    request.getfixturevalue("without_code")
    hf_sparse.load_adapter(base, tmp_path)


PATHS = [
    "../other.safetensors",
    "/etc/passwd",
    "a/b.safetensors",
    "..",
    "x\x00.safetensors",
    "C:x.safetensors",
]


@pytest.mark.parametrize("name", PATHS)
def test_shards_elsewhere_are_refused(tmp_path: Path, name: str) -> None:
    model = tiny_model("llama", num_hidden_layers=1)
    hf_sparse.prune_(model, SparsityConfig("2:4"), "magnitude")
    folder = tmp_path / "model"
    hf_sparse.save_pretrained(model, folder, SparsityConfig("2:4"), max_shard_size="20KB")
    index = folder / "model.safetensors.index.json"
    values = json.loads(index.read_text())
    first = next(iter(values["weight_map"]))
    shutil.copy(folder / values["weight_map"][first], tmp_path / "other.safetensors")
    values["weight_map"][first] = name
    index.write_text(json.dumps(values))
    for read in (AutoModelForCausalLM.from_pretrained, hf_sparse.inspect_checkpoint):
        with pytest.raises(FormatError, match="does not map tensors to files of its folder"):
            read(folder)
