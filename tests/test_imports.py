"""The layers of the package, and what importing it pulls in."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import hf_sparse

PACKAGE = Path(hf_sparse.__file__).parent
# A module imports only from layers above its own, and from its own package.
LAYERS = [
    ["suggestions", "upstream"],
    ["arguments"],
    ["patterns", "models.families"],
    ["models.parts"],
    ["version"],
    ["selection"],
    ["formats"],
    ["configuration_sparse"],
    ["structure", "provenance"],
    ["units"],
    ["report", "promise"],
    ["runtime", "runtime.llvm"],
    ["runtime.kernels"],
    ["runtime.weights"],
    ["runtime.programs"],
    ["optim.prox", "optim.sharding"],
    ["pruning", "optim", "distillation", "models.configuration"],
    ["budget", "recovery", "shrinking"],
    ["checkpoint"],
    ["runtime.model"],
    ["benchmark"],
    ["exporters"],
    ["hub"],
    ["models"],
    ["evaluation", "documents"],
    ["registration"],
    ["cli"],
]
OPTIONAL = ("datasets", "evaluate", "peft", "onnx", "onnxruntime", "llvmlite", "matplotlib")
HEAVY = ("transformers.modeling_utils", "transformers.trainer")


def layer_of(module: str) -> int:
    """The layer of the longest name that is the module's, or that of a package around it."""
    own = module.removeprefix("hf_sparse.")
    found = {
        name: index
        for index, layer in enumerate(LAYERS)
        for name in layer
        if own == name or own.startswith(f"{name}.")
    }
    assert found, f"{module} has no layer: add it to LAYERS"
    return found[max(found, key=len)]


def is_module(name: str) -> bool:
    place = PACKAGE.parent.joinpath(*name.split("."))
    return place.is_dir() or place.with_suffix(".py").is_file()


def imports_of(file: Path) -> set[str]:
    tree = ast.parse(file.read_text())
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module == "hf_sparse":
            names.update(f"hf_sparse.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("hf_sparse."):
            inside = {f"{node.module}.{alias.name}" for alias in node.names}
            modules = set(filter(is_module, inside))
            names.update(modules if modules == inside else {node.module, *modules})
    return names


FILES = sorted(file for file in PACKAGE.rglob("*.py") if file != PACKAGE / "__init__.py")


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(PACKAGE)))
def test_a_module_imports_only_from_layers_above(file: Path) -> None:
    module = "hf_sparse." + ".".join(file.relative_to(PACKAGE).with_suffix("").parts)
    module = module.removesuffix(".__init__")
    own = layer_of(module)
    for imported in imports_of(file):
        if not is_module(imported):
            continue  # a name of the public page, used by the command line
        assert layer_of(imported) <= own, f"{module} imports {imported}"


def test_the_rooms_of_the_runtime_look_down() -> None:
    rooms = ["llvm", "kernels", "weights", "programs", "model"]
    folder = PACKAGE / "runtime"
    assert {path.parent.name for path in folder.glob("*/*.py")} == set(rooms)
    layers = [layer_of(f"hf_sparse.runtime.{room}") for room in rooms]
    assert sorted(set(layers)) == layers
    assert [path.name for path in folder.glob("*.py")] == ["__init__.py"]


def loaded_modules(code: str) -> set[str]:
    script = f"import sys\n{code}\nprint(' '.join(sys.modules))"
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    return set(done.stdout.split())


def test_the_import_pulls_in_nothing_optional_or_slow() -> None:
    loaded = loaded_modules("import hf_sparse")
    assert not loaded.intersection(OPTIONAL)
    assert not loaded.intersection(HEAVY)
    assert "hf_sparse.models.registration" in loaded


def test_using_the_package_pulls_in_nothing_optional() -> None:
    code = (
        "import torch, hf_sparse\n"
        "config = hf_sparse.SparseBertConfig(hidden_size=8, num_attention_heads=2, vocab_size=9,\n"
        "    intermediate_size=16, num_hidden_layers=1)\n"
        "model = hf_sparse.SparseBertModel(config)\n"
        "batches = [torch.ones(1, 4, dtype=int)]\n"
        "hf_sparse.prune_(model, hf_sparse.SparsityConfig('2:4'), 'wanda', batches)\n"
        "import hf_sparse.checkpoint.save"
    )
    loaded = loaded_modules(code)
    assert not loaded.intersection(OPTIONAL)


def test_the_public_page_is_complete() -> None:
    for name in hf_sparse.__all__:
        assert getattr(hf_sparse, name) is not None
    assert set(hf_sparse.__all__) <= set(dir(hf_sparse))
