"""The names that functions had before they told that they work in place: they warn, and still work."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch

import hf_sparse
from hf_sparse import SparsityConfig
from hf_sparse.suggestions import deprecated_name
from tests.support.tiny_models import tiny_model

OLD_NAMES = sorted(hf_sparse._DEPRECATED)


def test_these_names_are_deprecated() -> None:
    assert OLD_NAMES == ["add_shrinkage", "freeze_zeros", "keep_zeros", "merge_adapters", "shrink"]


@pytest.mark.parametrize("name", OLD_NAMES)
def test_an_old_name_is_public_and_has_the_parameters_of_the_new_one(name: str) -> None:
    old, new = getattr(hf_sparse, name), getattr(hf_sparse, f"{name}_")
    assert {name, f"{name}_"} <= set(hf_sparse.__all__)
    assert inspect.signature(old) == inspect.signature(new)
    assert old.__name__ == name
    assert old.__doc__.startswith(f"Deprecated: call `{name}_`")


@pytest.mark.parametrize("name", OLD_NAMES)
def test_an_old_name_warns_where_it_is_called_and_calls_the_new_one(name: str) -> None:
    advice = rf"hf_sparse\.{name} is deprecated: it is called hf_sparse\.{name}_ now\."
    with (
        pytest.warns(FutureWarning, match=advice) as warned,
        pytest.raises(
            ValueError, match=f"{name}_ takes|wanted one of torch"
        ),  # the new one refuses what it is given
    ):
        getattr(hf_sparse, name)(*[None] * (2 if name == "keep_zeros" else 1))
    assert [warning.filename for warning in warned] == [__file__]


def test_arguments_and_results_pass_through() -> None:
    def double_(value: int, *, by: int = 2) -> int:
        return by * value

    double: Any = deprecated_name("double", double_)
    with pytest.warns(FutureWarning, match="double_ now"):
        assert double(4, by=3) == 12


def test_an_old_name_does_its_work() -> None:
    model = tiny_model("llama")
    hf_sparse.prune_(model, SparsityConfig("2:4"), "magnitude")
    with pytest.warns(FutureWarning):
        mask = hf_sparse.keep_zeros(torch.optim.SGD(model.parameters(), lr=1.0), model)
    mask.check()
