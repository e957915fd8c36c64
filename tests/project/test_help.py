"""`help` of the public calls names what may be given: it follows the tables of the code."""

from __future__ import annotations

import inspect
from typing import Any

import pytest

import hf_sparse
from hf_sparse.dropping.blocks import METHODS as WAYS_TO_CHOOSE
from hf_sparse.dropping.experts import METHODS as EXPERT_METHODS
from hf_sparse.formats import FORMATS
from hf_sparse.optim.methods import TRAINING_METHODS
from hf_sparse.optim.penalties import PENALTIES, SCALES
from hf_sparse.optim.schedules import SHAPES
from hf_sparse.patterns import Pattern
from hf_sparse.pruning.allocation import ALLOCATIONS
from hf_sparse.pruning.composition import REFINEMENTS, Composition
from hf_sparse.pruning.methods import METHODS
from hf_sparse.recovery.methods import RECOVERIES


def told(value: Any) -> str:
    return (inspect.getdoc(value) or "").replace("'", '"')


def written(value: Any) -> str:
    return repr(value).replace("'", '"')


@pytest.mark.parametrize("name", METHODS)
def test_prune_tells_each_method_with_its_options(name: str) -> None:
    table = [line.split("|") for line in told(hf_sparse.prune_).splitlines() if line[:1] == "|"]
    [row] = [cells[3] for cells in table if cells[1].strip(" `") == name]
    own = METHODS[name].options()
    row = row.replace("those", "`damping=0.01`, `block_size=128`")
    assert {option for option in row.split("`") if "=" in option} == {
        f"{option}={written(default)}" for option, default in own.items()
    }


def test_prune_tells_what_is_composed() -> None:
    text = told(hf_sparse.prune_)
    for name, value in vars(Composition()).items():
        assert f"`{name}={written(value)}`" in text
    for name in (*ALLOCATIONS, *REFINEMENTS):
        assert f'"{name}"' in text


@pytest.mark.parametrize(
    ("call", "names"),
    [
        (hf_sparse.SparsityConfig, FORMATS),
        (hf_sparse.recover_, RECOVERIES),
        (hf_sparse.drop_blocks_, WAYS_TO_CHOOSE),
        (hf_sparse.drop_experts_, EXPERT_METHODS),
        (hf_sparse.SparseAdamW, (*PENALTIES, *SCALES)),
        (hf_sparse.Schedule, SHAPES),
        (hf_sparse.SparsityCallback, TRAINING_METHODS),
        (hf_sparse.Sparsifier, TRAINING_METHODS),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_the_names_are_told(call: Any, names: Any) -> None:
    assert [name for name in names if f'"{name}"' not in told(call)] == []


@pytest.mark.parametrize("call", [hf_sparse.SparsityCallback, hf_sparse.Sparsifier])
def test_the_options_of_training_methods_are_told(call: Any) -> None:
    for method in TRAINING_METHODS.values():
        for name, parameter in inspect.signature(method).parameters.items():
            if parameter.kind is parameter.KEYWORD_ONLY:
                assert f"`{name}={parameter.default!r}`" in told(call)


def test_the_patterns_are_told() -> None:
    text = told(hf_sparse.SparsityConfig)
    for notation in (notation for kind in Pattern.kinds() for notation in kind.notations):
        assert notation.split(" ")[0].removesuffix(":D").removesuffix("_in") in text
