"""Names of other packages that are no public API of theirs stand in the rooms `upstream` alone.

When a new release moves one, a test that fails here, or in the files beside this one, names the
function of the rooms to adapt.
"""

from __future__ import annotations

import ast
import importlib
import importlib.util
import inspect
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import Optimizer
from transformers import PreTrainedConfig, PreTrainedModel

# Found, and not imported: what is gone is told one by one, also where the package cannot be imported.
PACKAGES = {
    name: Path(str(spec.origin)).parent
    for name in ("hf_sparse", "hf_sparse_cli")
    if (spec := importlib.util.find_spec(name))
}
FOREIGN = ("transformers", "accelerate", "peft", "torch")
# Modules below those packages that their manuals describe; what is imported from any other is unstable.
DOCUMENTED = (
    "accelerate.hooks",
    "accelerate.utils",
    "torch.distributed",
    "torch.distributed.fsdp",
    "torch.distributed.tensor",
    "torch.nn",
    "torch.nn.parallel",
    "torch.optim",
    "torch.overrides",
    "transformers.pytorch_utils",  # Conv1D
    "transformers.utils.logging",
)
# What some builds of torch lack, or is called by other names in another release.
BUILT_IN_SOME = ("torch.backends", "torch.ops.aten", "torch.ops.mkldnn")
LAST_PARTS = {name.rpartition(".")[2] for name in BUILT_IN_SOME}
# What may not be installed: where its modules are, and what those need.
OPTIONAL = {"peft": ["peft"], "transformers.exporters": ["transformers.exporters", "onnxruntime"]}
# Private names that may stand everywhere, and why.
ALLOWED = {"_asdict": "a documented method of named tuples"}
# Where attributes of all kinds are looked up by name.
BY_NAME = ("getattr", "hasattr", "setattr", "delattr", "get", "pop", "setdefault")


def is_private(name: str) -> bool:
    return name.isidentifier() and re.match(r"_[^_]", name) is not None and name not in ALLOWED


def is_unstable(module: str) -> bool:
    package, _, rest = module.partition(".")
    if any(map(is_private, module.split("."))):
        return True
    return package in FOREIGN and bool(rest) and module not in DOCUMENTED


@cache
def modules() -> dict[str, Path]:
    """The modules of both packages by name, with their files."""
    return {
        ".".join((package, *file.relative_to(folder).with_suffix("").parts)).removesuffix(
            ".__init__"
        ): file
        for package, folder in PACKAGES.items()
        for file in sorted(folder.rglob("*.py"))
    }


def is_room(module: str) -> bool:
    return module.split(".")[1:2] == ["upstream"]


@cache
def tree_of(file: Path) -> ast.Module:
    return ast.parse(file.read_text())


def defined_in(tree: ast.AST) -> set[str]:
    """The names that a module gives to something: functions, classes, variables, attributes."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            names |= {node.attr} if ast.unparse(node.value) in ("self", "cls") else set()
    return names


def names_in(tree: ast.AST) -> set[str]:
    """The private names that stand in a module as attributes, or as texts."""
    found = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    texts = {node.value for node in ast.walk(tree) if isinstance(node, ast.Constant)}
    return {name for name in (*found, *texts) if isinstance(name, str) and is_private(name)}


@cache
def known_private() -> frozenset[str]:
    """Private names that others are known to have, so that a text which is one is no accident."""
    owners = (torch, torch.Tensor, nn.Module(), Optimizer, PreTrainedModel, PreTrainedConfig())
    names = {name for owner in owners for name in dir(owner)}
    for module, file in modules().items():
        if is_room(module):
            names |= names_in(tree_of(file)) - defined_in(tree_of(file))
    return frozenset(filter(is_private, names))


@cache
def own_names() -> frozenset[str]:
    trees = [tree_of(file) for module, file in modules().items() if not is_room(module)]
    return frozenset[str]().union(*map(defined_in, trees)) - known_private()


@cache
def names_a_module(text: str) -> bool:
    """Whether a text is the name of a module of others, or asks whether something is from them."""
    match = re.fullmatch(rf"({'|'.join(FOREIGN)})\.(\w*)[\w.]*", text)
    if match is None or text in DOCUMENTED:
        return False
    if not match[2]:
        return True
    found = importlib.util.find_spec(match[1])
    return found is None or importlib.util.find_spec(f"{match[1]}.{match[2]}") is not None


def lookups(tree: ast.AST) -> Iterator[str]:
    """The texts by which attributes are looked up."""
    for node in ast.walk(tree):
        places: list[ast.expr] = []
        if isinstance(node, ast.Call):
            function = node.func
            name = function.attr if isinstance(function, ast.Attribute) else ""
            name = function.id if isinstance(function, ast.Name) else name
            places = node.args if name in BY_NAME else []
        elif isinstance(node, ast.Subscript):
            places = [node.slice]
        elif isinstance(node, ast.Compare):
            places = [node.left]
        yield from (
            place.value
            for place in places
            if isinstance(place, ast.Constant) and isinstance(place.value, str)
        )


def misplaced(tree: ast.Module, own: frozenset[str]) -> Iterator[str]:
    """What a module outside of the rooms names, and should not."""
    known, here = known_private(), defined_in(tree)
    yield from (name for name in lookups(tree) if is_private(name) and name not in own)
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if is_unstable(alias.name))
        elif isinstance(node, ast.ImportFrom) and str(node.module).split(".")[0] not in PACKAGES:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            private = (any(map(is_private, name.split("."))) for name in names)
            yield from (
                name
                for name, bad in zip(names, private, strict=True)
                if bad or is_unstable(str(node.module))
            )
        elif isinstance(node, ast.Attribute) and is_private(node.attr):
            owner = ast.unparse(node.value)
            if node.attr not in own and not (owner in ("self", "cls") and node.attr in here):
                yield f"{owner}.{node.attr}"
        elif isinstance(node, ast.Attribute) and node.attr in LAST_PARTS:
            yield from {ast.unparse(node)} & set(BUILT_IN_SOME)
        elif isinstance(node, ast.Constant) and isinstance(text := node.value, str):
            yield from [text] if text in known or names_a_module(text) else []


OUTSIDE = [module for module in modules() if not is_room(module)]
ROOMS = [module for module in modules() if is_room(module)]


def test_private_and_unstable_names_of_others_stand_in_the_rooms_alone() -> None:
    found = {
        module: names
        for module in OUTSIDE
        if (names := sorted(set(misplaced(tree_of(modules()[module]), own_names()))))
    }
    assert not found, "put functions into upstream for these"


@pytest.mark.parametrize(
    "line",
    [
        "model._hf_hook",
        "self._modules",
        "torch.nn.Module._call_impl",
        "getattr(model, '_weight_conversions', None)",
        "vars(module)['_some_private_name']",
        "'_some_private_name' in vars(module)",
        "HOOKS = ('_forward_hooks', '_forward_pre_hooks')",
        "from re import _parser",
        "from torch.utils._pytree import tree_flatten",
        "from transformers.core_model_loading import ConversionOps",
        "import peft.tuners",
        "import_module(f'transformers.models.{family}.modeling_{family}')",
        "torch.ops.aten.softshrink.out(w, t, out=w)",
        "torch.backends.mkldnn.is_available()",
        "type(module).__module__.startswith('peft.')",
    ],
)
def test_the_scan_finds(line: str) -> None:
    assert list(misplaced(ast.parse(line), own_names()))


@pytest.mark.parametrize(
    "line",
    [
        "self._pattern",
        "from transformers import PreTrainedModel",
        "from torch.nn import functional",
        "values['torch.dtype']",
        "torch.ops.hf_sparse.linear",
        "placed._asdict()",
        "raise ValueError('torch.nn.utils.prune.remove makes it permanent')",
        "from hf_sparse.upstream.torch import children_of",
    ],
)
def test_the_scan_passes(line: str) -> None:
    assert not list(misplaced(ast.parse(line), own_names()))


def classes_with_private_methods() -> list[tuple[str, str, list[str]]]:
    """The classes outside of the rooms that are made from others, with their private methods."""
    return [
        (module, node.name, names)
        for module in OUTSIDE
        for node in tree_of(modules()[module]).body
        if isinstance(node, ast.ClassDef) and node.bases
        if (
            names := [
                item.name
                for item in node.body
                if isinstance(item, ast.FunctionDef) and is_private(item.name)
            ]
        )
    ]


def test_no_private_method_of_others_is_overridden_outside_of_the_rooms() -> None:
    for module, name, methods in classes_with_private_methods():
        kind = getattr(importlib.import_module(module), name)
        for base in kind.__mro__[1:]:
            if base.__module__.split(".")[0] not in PACKAGES:
                found = vars(base).keys() & set(methods)
                assert not found, f"{module}.{name} overrides {found} of {base.__qualname__}"


def imported_in_rooms() -> list[tuple[str, str, str]]:
    """Module, name in it, room, of all that the rooms import from unstable modules."""
    return sorted(
        {
            (str(node.module), alias.name, module)
            for module in ROOMS
            for node in ast.walk(tree_of(modules()[module]))
            if isinstance(node, ast.ImportFrom)
            for alias in node.names
            if is_unstable(str(node.module)) or is_private(alias.name)
        }
    )


def module_of(name: str) -> ModuleType:
    """A module of another package; the test is skipped where the package is optional and missing."""
    for start, needed in OPTIONAL.items():
        if f"{name}.".startswith(f"{start}."):
            for package in needed:
                pytest.importorskip(package)
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        pytest.fail(f"{name} is gone, or lacks something: {error}")


@pytest.mark.parametrize(("module", "name", "room"), imported_in_rooms())
def test_a_name_that_a_room_imports_is_there(module: str, name: str, room: str) -> None:
    assert hasattr(module_of(module), name), f"{module}.{name} is gone: {room} needs another way"


# Methods that others call on ours, or that ours call on what they are made from.
@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("argparse", "ArgumentParser._check_value"),
        ("peft.tuners.lora.layer", "LoraLayer.resolve_lora_variant"),
        ("peft.tuners.lora.layer", "LoraVariant.supports_lora_conversion"),
        *[
            ("peft.tuners.lora.layer", f"LoraVariant.{method}")
            for method in ("init", "forward", "merge_safe", "merge_unsafe", "unmerge")
        ],
        ("peft.tuners.lora.layer", "Linear.get_delta_weight"),
        ("transformers.core_model_loading", "ConversionOps.convert"),
        ("transformers.core_model_loading", "WeightConverter.add_tensor"),
        *[
            ("transformers.quantizers.base", f"HfQuantizer.{method}")
            for method in (
                "_process_model_before_weight_loading",
                "get_weight_conversions",
                "is_serializable",
                "is_trainable",
                "postprocess_model",
                "remove_quantization_config",
                "requires_calibration",
            )
        ],
        *[
            ("transformers.cache_utils", f"CacheLayerMixin.{method}")
            for method in ("update", "get_mask_sizes", "get_seq_length", "offload", "reset")
        ],
    ],
)
def test_a_method_that_we_override_is_there(module: str, name: str) -> None:
    value: Any = module_of(module)
    for part in name.split("."):
        assert hasattr(value, part), f"{module}.{name} is gone"
        value = getattr(value, part)


def test_conversions_are_called_with_the_names_that_ours_reads() -> None:
    convert = importlib.import_module("transformers.core_model_loading").WeightConverter.convert
    source = inspect.getsource(convert)
    assert "full_layer_name=" in source
    assert "model=" in source


@pytest.mark.parametrize("room", ROOMS)
def test_every_function_of_a_room_is_tried(room: str) -> None:
    if room.endswith(".peft"):
        pytest.importorskip("peft")
    tried = {"export"}  # it takes long: tests of the exporter do that
    for file in Path(__file__).parent.glob("test_upstream_*.py"):
        tried |= {node.attr for node in ast.walk(tree_of(file)) if isinstance(node, ast.Attribute)}
    missing = set(getattr(importlib.import_module(room), "__all__", ())) - tried
    assert not missing, f"no test calls {', '.join(missing)} of {room}"
