"""Shards of weights that are stored transposed cut columns: groups across them are refused."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard

from hf_sparse.optim.sharding import check_shardable, rows_of_shard
from hf_sparse.patterns import Pattern


class TwoProcesses:
    """A mesh of two processes, of which this one is alone."""

    shape = (2,)
    ndim = 1


@pytest.fixture
def one_process(tmp_path: Path) -> Iterator[None]:
    dist.init_process_group(
        "gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1
    )
    yield
    dist.destroy_process_group()


@pytest.fixture
def cut(one_process: None, monkeypatch: pytest.MonkeyPatch) -> DTensor:
    """A parameter of 12 x 8, cut into two shards of six rows."""
    mesh = init_device_mesh("cpu", (1,))
    found = DTensor.from_local(nn.Parameter(torch.randn(12, 8)), mesh, [Shard(0)])
    monkeypatch.setattr(DTensor, "device_mesh", TwoProcesses())
    assert rows_of_shard(found) == 6
    return found


@pytest.mark.parametrize("notation", ["unstructured", "2:4", "row", "block:1x4", "block:2x4"])
def test_groups_inside_of_shards_are_taken(cut: DTensor, notation: str) -> None:
    check_shardable("w", cut, Pattern.parse(notation))


@pytest.mark.parametrize("notation", ["column", "block:4x1"])
def test_groups_that_shards_cut_are_refused(cut: DTensor, notation: str) -> None:
    with pytest.raises(ValueError, match=f"w is sharded into 6 rows each.*'{notation}' span"):
        check_shardable("w", cut, Pattern.parse(notation))


@pytest.mark.parametrize("notation", ["unstructured", "column", "1:2", "2:6", "block:4x1"])
def test_groups_inside_of_transposed_shards_are_taken(cut: DTensor, notation: str) -> None:
    check_shardable("w", cut, Pattern.parse(notation), transposed=True)


@pytest.mark.parametrize("notation", ["row", "2:4", "block:1x4", "head_in:4"])
def test_groups_that_transposed_shards_cut_are_refused(cut: DTensor, notation: str) -> None:
    with pytest.raises(ValueError, match=f"w is sharded into 6 columns each.*'{notation}' span"):
        check_shardable("w", cut, Pattern.parse(notation), transposed=True)
