"""The floors of the package, and what importing it pulls in."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

import hf_sparse
from tests.support.processes import run

PACKAGE = Path(hf_sparse.__file__).parent
# A module imports from lower floors, which stand first, and from its own room. A room is a folder of
# the package, or a file that lies in no folder. docs/architecture.md tells what each is for.
FLOORS = [
    ["suggestions", "version", "upstream", "tables"],
    ["arguments"],
    ["patterns", "quantization"],
    ["selection"],
    ["formats"],
    ["configuration_sparse"],
    ["structure"],
    ["counts", "provenance"],
    ["calibration"],
    ["files"],
    ["optim"],
    ["checkpoint"],
    ["pruning"],
    ["adapters"],
    ["runtime"],
    ["exporters"],
    [
        "distillation",
        "evaluation",
        "recovery",
        "dropping",
        "budget",
        "timing",
    ],
    ["recover", "slimming", "shrinking", "zeroshot", "byte_budget"],
    ["effort"],
    ["saving", "uploads"],
    ["hub"],
    ["models"],
    ["compiled_files", "pages"],
    ["cli"],
]
# The rooms of the runtime stand on each other in the same way.
RUNTIME = ["llvm", "kernels", "weights", "programs", "model"]
# The public page, whose names everything above the floors may use, and the files that it is made of.
PUBLIC_PAGE = "hf_sparse"
USES_THE_PUBLIC_PAGE = ["cli"]
OPTIONAL = (
    *("datasets", "evaluate", "peft", "onnx", "onnxruntime", "llvmlite", "matplotlib"),
    "gguf",
)
HEAVY = ("transformers.modeling_utils", "transformers.trainer")
FILES = {
    ".".join(("hf_sparse", *file.relative_to(PACKAGE).with_suffix("").parts)).removesuffix(
        ".__init__"
    ): file
    for file in sorted(PACKAGE.rglob("*.py"))
    if file != PACKAGE / "__init__.py"
}


def room_of(module: str) -> str:
    return module.removeprefix("hf_sparse.").split(".")[0]


def floor_of(room: str) -> int:
    found = [number for number, rooms in enumerate(FLOORS) if room in rooms]
    assert found, f"{room} stands on no floor: add it to FLOORS"
    return found[0]


@cache
def imports_of(module: str) -> frozenset[str]:
    """The modules of the package that a module imports, in whatever form and place."""
    file = FILES[module]
    package = module if file.name == "__init__.py" else module.rpartition(".")[0]
    names: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{package} has a relative import"
            names |= {
                full if (full := f"{node.module}.{alias.name}") in FILES else str(node.module)
                for alias in node.names
            }
    return frozenset(name for name in names if name.split(".")[0] == "hf_sparse")


def is_allowed(module: str, imported: str) -> bool:
    own = room_of(module)
    if imported == PUBLIC_PAGE:
        return own in USES_THE_PUBLIC_PAGE
    other = room_of(imported)
    return other == own or floor_of(other) < floor_of(own)


def test_modules_import_only_from_lower_floors_and_their_own_room() -> None:
    climbing = [
        f"{module} imports {imported}"
        for module in FILES
        for imported in imports_of(module)
        if not is_allowed(module, imported)
    ]
    assert not climbing


def test_the_rooms_of_the_runtime_stand_on_each_other() -> None:
    for module in FILES:
        if not module.startswith("hf_sparse.runtime."):
            continue
        own = RUNTIME.index(module.split(".")[2])
        for imported in imports_of(module):
            if imported.startswith("hf_sparse.runtime."):
                assert RUNTIME.index(imported.split(".")[2]) <= own, f"{module} imports {imported}"


def circles(graph: dict[str, frozenset[str]]) -> Iterator[list[str]]:
    """The first circle that is met from each module, by a walk in depth."""
    done: set[str] = set()

    def walk(module: str, path: list[str]) -> list[str] | None:
        if module in path:
            return path[path.index(module) :]
        if module in done or module not in graph:
            return None
        done.add(module)
        found = (walk(other, [*path, module]) for other in sorted(graph[module]))
        return next((circle for circle in found if circle), None)

    for module in graph:
        if circle := walk(module, []):
            yield circle


def test_no_module_imports_itself_through_others() -> None:
    graph = {module: imports_of(module) - {module} for module in FILES}
    assert list(circles(graph)) == []
    assert list(circles({"a": frozenset("b"), "b": frozenset("a")})) == [["a", "b"]]


def test_the_page_of_the_architecture_shows_every_room() -> None:
    page = PACKAGE.parent / "docs" / "architecture.md"
    picture = page.read_text().split("```")[1].replace(",", " ").replace("<", " ").split()
    assert {room for rooms in FLOORS for room in rooms} | set(RUNTIME) <= set(picture)


def loaded_modules(program: str, *arguments: Path) -> set[str]:
    done = run(program, *arguments)
    assert done.returncode == 0, done.stderr
    return set(done.stdout.split())


@pytest.mark.slow
def test_the_import_pulls_in_nothing_optional_or_slow() -> None:
    loaded = loaded_modules("modules_of_the_import")
    assert not loaded.intersection(OPTIONAL)
    assert not loaded.intersection(HEAVY)
    assert "hf_sparse.models.configuration" in loaded


@pytest.mark.slow
def test_using_the_package_pulls_in_nothing_optional(tmp_path: Path) -> None:
    loaded = loaded_modules("modules_of_a_pruning", tmp_path / "model")
    assert "hf_sparse.checkpoint.save" in loaded
    assert not loaded.intersection(OPTIONAL)


def test_the_public_page_is_complete() -> None:
    for name in hf_sparse.__all__:
        assert getattr(hf_sparse, name) is not None
    assert set(hf_sparse.__all__) <= set(dir(hf_sparse))


def test_no_module_has_the_name_of_a_public_function() -> None:
    """Importing a module sets the package's attribute of its name, which would hide the function."""
    modules = {path.stem for path in Path(hf_sparse.__file__).parent.iterdir()}
    assert not modules & hf_sparse._PUBLIC.keys()
