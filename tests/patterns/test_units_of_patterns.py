"""What patterns answer about their units, against loops; a new kind of groups is one class."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

import hf_sparse
from hf_sparse.formats import compress, decompress
from hf_sparse.optim.penalties import default_penalty
from hf_sparse.patterns import NM, GroupPattern, Pattern
from tests.support.closeness import same
from tests.support.tiny_models import tiny_batches, tiny_model

ROWS, COLUMNS = 8, 16
# Rows and columns of one unit.
GROUPS = {
    "unstructured": (1, 1),
    "block:2x4": (2, 4),
    "block:1x1": (1, 1),
    "row": (1, COLUMNS),
    "column": (ROWS, 1),
    "head:4": (4, COLUMNS),
    "head_in:4": (ROWS, 4),
}


def scores() -> Tensor:
    return torch.rand(ROWS, COLUMNS, generator=torch.Generator().manual_seed(0))


def tiles(height: int, width: int) -> list[tuple[slice, slice]]:
    return [
        (slice(top, top + height), slice(left, left + width))
        for top in range(0, ROWS, height)
        for left in range(0, COLUMNS, width)
    ]


@pytest.mark.parametrize(("notation", "shape"), GROUPS.items())
def test_units_and_weights_map_to_each_other(notation: str, shape: tuple[int, int]) -> None:
    pattern, values = Pattern.parse(notation), scores()
    assert pattern.group_shape(ROWS, COLUMNS) == shape
    places = tiles(*shape)
    assert pattern.num_units(ROWS, COLUMNS) == len(places)
    assert same(pattern.sums(values).flatten(), torch.stack([values[p].sum() for p in places]))
    assert same(pattern.means(values).flatten(), torch.stack([values[p].mean() for p in places]))
    numbers = torch.arange(len(places)).view(pattern.sums(values).shape)
    spread = pattern.spread(numbers, values.shape)
    for number, place in enumerate(places):
        assert (spread[place] == number).all()
    pruned = numbers % 3 == 0
    assert torch.equal(pattern.expand(pruned, values), spread % 3 == 0)


@pytest.mark.parametrize(("notation", "shape"), GROUPS.items())
def test_units_compare_by_their_mean_square(notation: str, shape: tuple[int, int]) -> None:
    units = Pattern.parse(notation).units(scores()).flatten()
    wanted = [scores()[place] for place in tiles(*shape)]
    single = notation == "unstructured"
    expected = [part.sum() if single else part.square().mean() for part in wanted]
    assert same(units, torch.stack(expected))


@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 8), (3, 16)])
def test_a_group_of_n_of_m_loses_its_lowest_weights(n: int, m: int) -> None:
    pattern, values = NM(n, m), scores()
    groups = values.view(-1, m)
    lost = groups.sort(dim=1).values[:, : m - n]
    assert same(pattern.units(values), lost.square().sum(dim=1))
    pruned = torch.arange(len(groups)) % 2 == 0
    expected = (groups <= lost[:, -1:]) & pruned[:, None]
    assert torch.equal(pattern.expand(pruned, values), expected.view(values.shape))
    assert pattern.num_units(ROWS, COLUMNS) == len(groups)


@pytest.mark.parametrize(
    ("notation", "span"),
    [("unstructured", 1), ("2:4", 1), ("row", 1), ("block:1x4", 1), ("head_in:4", ROWS)]
    + [("block:2x4", 2), ("head:4", 4), ("column", ROWS)],
)
def test_rows_that_belong_together_are_told(notation: str, span: int) -> None:
    assert Pattern.parse(notation).least_span(torch.Size((ROWS, COLUMNS))) == span


@pytest.mark.parametrize(
    ("notation", "span"),
    [("unstructured", 1), ("2:4", 4), ("row", COLUMNS), ("block:1x4", 4), ("head_in:4", 4)]
    + [("block:2x4", 4), ("head:4", COLUMNS), ("column", 1)],
)
def test_columns_that_belong_together_are_told(notation: str, span: int) -> None:
    assert Pattern.parse(notation).least_span(torch.Size((ROWS, COLUMNS)), 1) == span


@dataclass(frozen=True)
class Pair(GroupPattern):
    """Two rows at a time, which no notation knows."""

    def __str__(self) -> str:
        return "pair"

    def group_shape(self, rows: int, columns: int) -> tuple[int, int]:
        return 2, columns


@pytest.mark.parametrize("method", ["magnitude", "wanda", "taylor", "sparsegpt", "alps"])
def test_a_new_kind_of_groups_is_pruned_by_every_method(method: str) -> None:
    model = tiny_model("llama")
    config = hf_sparse.SparsityConfig(Pair(), 0.5, targets=["up_proj"])
    batches = None if method == "magnitude" else tiny_batches("llama")
    hf_sparse.prune_(model, config, method, batches)
    for layer in model.model.layers:
        weight = layer.mlp.up_proj.weight.detach()
        assert int((weight == 0).sum()) == weight.numel() // 2
        assert Pair().follows(weight)


def test_a_new_kind_of_groups_is_stored_and_has_a_penalty() -> None:
    weight = scores()
    weight[2:6] = 0
    parts = compress(weight, "block", Pair())
    assert parts["layout"].tolist() == [ROWS, COLUMNS, 0, 2, COLUMNS]
    assert torch.equal(decompress(parts), weight)
    larger = weight.repeat(8, 1)
    assert compress(larger, "auto", Pair()).keys() == parts.keys()
    assert default_penalty(Pair()) == "group_l2"


def test_a_config_of_heads_of_another_size_than_the_optimizer_has_is_refused() -> None:
    model = tiny_model("llama")
    made = hf_sparse.SparsityConfig("head:8", 0.5, targets=["q_proj"])
    other = hf_sparse.SparsityConfig("head:4", 0.5, targets=["q_proj"])
    optimizer = hf_sparse.SparseAdamW(hf_sparse.sparse_param_groups(model, made))
    with pytest.raises(ValueError, match=r"pattern 'head:8', the config has 'head:4'"):
        hf_sparse.Sparsifier(optimizer, other, total_steps=100)
    unsized = hf_sparse.SparsityConfig("head", 0.5, targets=["q_proj"])
    hf_sparse.Sparsifier(optimizer, unsized, total_steps=100)


@pytest.mark.parametrize(("notation", "shape"), GROUPS.items())
def test_whole_columns_are_units_that_span_all_rows(notation: str, shape: tuple[int, int]) -> None:
    assert Pattern.parse(notation).whole_columns == (shape[0] == ROWS)


@pytest.mark.parametrize(
    ("notation", "rows", "columns", "shape"),
    [
        ("row", 3, 1, (1, 1)),
        ("column", 1, 3, (1, 1)),
        ("head:4", 8, 1, (4, 1)),
        ("head_in:4", 1, 8, (1, 4)),
        # A matrix without rows or columns has no units, and the size of one is no zero.
        ("row", 3, 0, (1, 1)),
        ("column", 0, 3, (1, 1)),
        ("head:4", 8, 0, (4, 1)),
        ("head_in:4", 0, 8, (1, 4)),
    ],
)
def test_units_of_the_thinnest_matrices(
    notation: str, rows: int, columns: int, shape: tuple[int, int]
) -> None:
    assert Pattern.parse(notation).group_shape(rows, columns) == shape
