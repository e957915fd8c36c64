"""Options of pruning methods are checked before any work: before data are read, and weights change."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import hf_sparse
from hf_sparse import SparsityConfig
from hf_sparse.cli import main
from hf_sparse.pruning.methods import METHODS
from hf_sparse.pruning.options import BOUNDS
from tests.support.tiny_models import tiny_model

# Values that no option of the name may have.
BAD: dict[str, tuple[Any, ...]] = {
    "scope": ("all", "", None, 1),
    "damping": (0, -1, -0.5, math.nan, math.inf, 10**400, "0.1", True),
    "block_size": (0, -1, 1.5, True),
    "rounds": (-1, 0.5),
    "penalty": (0, -1.0, math.nan),
    "solver": ("wanda", None),
    "iterations": (0, -1, 2.0),
    "refit_steps": (-1,),
    "lam": (0, -1, math.nan, -math.inf),
    "growth": (0.99, -1, math.inf),
    "relative_lr": (0, -1e-9),
    "preserve": (-1, math.nan),
    "epochs": (0, -1),
    "accumulate": (0, -2),
    "gradient_checkpointing": (1, "yes", None),
    "state": (1, b"folder", __file__),
}
CASES = [
    (method, name, value)
    for method, row in METHODS.items()
    for name in row.options()
    for value in BAD[name]
]


def no_batches() -> Iterator[Any]:
    raise AssertionError("calibration data were read")
    yield


def config_for(method: str) -> SparsityConfig:
    return SparsityConfig("2:4") if METHODS[method].nm_only else SparsityConfig("unstructured", 0.5)


def test_every_option_of_every_method_has_bounds() -> None:
    assert {name for row in METHODS.values() for name in row.options()} == set(BOUNDS) == set(BAD)


@pytest.mark.few(23)
@pytest.mark.parametrize(("method", "name", "value"), CASES)
def test_a_bad_value_is_refused_before_data_are_read(method: str, name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"{name} is .*wanted"):
        hf_sparse.prune_(
            tiny_model("llama"), config_for(method), method, no_batches(), **{name: value}
        )


@pytest.mark.parametrize("method", [name for name, row in METHODS.items() if row.options()])
def test_the_defaults_are_inside_their_bounds(method: str) -> None:
    for name, value in METHODS[method].options().items():
        is_inside, _ = BOUNDS[name]
        assert is_inside(value)


@pytest.mark.parametrize("method", ["magnitude", "taylor"])
@pytest.mark.parametrize(
    ("config", "options", "wanted"),
    [
        (SparsityConfig("2:4"), {}, "which fixes the sparsity"),
        (SparsityConfig("unstructured", 0.5), {"allocation": "alpha"}, "Use one of them"),
    ],
)
def test_a_global_scope_that_contradicts_the_rest_is_refused_before_data_are_read(
    method: str, config: SparsityConfig, options: dict[str, Any], wanted: str
) -> None:
    with pytest.raises(ValueError, match=wanted):
        hf_sparse.prune_(
            tiny_model("llama"), config, method, no_batches(), scope="global", **options
        )


@pytest.mark.parametrize("stream", [[], ["--stream"]])
def test_the_command_line_refuses_a_bad_value_before_the_model_is_read(
    stream: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = tmp_path / "text.txt"
    text.write_text("words " * 50)
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text("{}")  # of no model: reading it would be another error
    words = ["prune", str(model), str(tmp_path / "out"), "--sparsity", "0.5", "--method", "alps"]
    given = ["--calibration", str(text), "--option", "refit_steps=-1", *stream]
    assert main([*words, *given]) == 1
    assert "refit_steps is -1; wanted >= 0." in capsys.readouterr().err
