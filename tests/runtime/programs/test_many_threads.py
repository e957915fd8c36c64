"""More threads than cores, and work shared among any number of them."""

from __future__ import annotations

import os
from itertools import pairwise

import pytest
import torch

import hf_sparse
from hf_sparse.runtime.kernels import tiles
from hf_sparse.runtime.kernels.all import kernels
from hf_sparse.runtime.llvm import target
from hf_sparse.runtime.llvm.jit import DEFAULT_CACHE
from hf_sparse.runtime.programs import threads
from hf_sparse.runtime.programs.program import Program
from hf_sparse.runtime.weights.memory import aligned
from hf_sparse.runtime.weights.rows import SHARED_ROWS, share_rows
from tests.support.compiled_folders import logits
from tests.support.tiny_models import tiny_model


def test_there_are_no_more_threads_than_cores() -> None:
    cores = len(os.sched_getaffinity(0))
    assert [threads.team(lists) for lists in (1, cores, 8 * cores)] == [1, cores, cores]


def test_eight_lists_finish_on_fewer_cores() -> None:
    """150 phases, in each of which every list copies what another one wrote before."""
    lists, phases = 4 * len(os.sched_getaffinity(0)), 150
    code = kernels(target.host(), DEFAULT_CACHE)
    rows = aligned(2, lists, 64)
    rows[0] = torch.arange(lists)[:, None]
    operations = [
        [
            [
                tiles.COPY.operation(
                    "copy",
                    x=rows[phase % 2][(number + 1) % lists].data_ptr(),
                    y=rows[1 - phase % 2][number].data_ptr(),
                    vectors=64 // target.host().lanes,
                )
            ]
            for number in range(lists)
        ]
        for phase in range(phases)
    ]
    Program(code, operations, [rows]).run()
    wanted = torch.arange(lists).roll(-phases).float()
    assert torch.equal(rows[phases % 2], wanted[:, None].expand(lists, 64))


@pytest.mark.parametrize("pattern", ["2:4", "unstructured"])
def test_results_do_not_depend_on_the_number_of_threads(pattern: str) -> None:
    model = tiny_model("llama")
    config = hf_sparse.SparsityConfig(pattern, 0.5)
    hf_sparse.prune_(model, config, "magnitude")
    compiled = hf_sparse.compile(model)
    wanted = logits(model)
    for count in (1, 3, 8):
        torch.set_num_threads(count)
        torch.testing.assert_close(logits(compiled), wanted, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("rows", [1, 16, 70, 576, 960, 1536, 49152])
def test_rows_are_shared_whole_and_evenly(rows: int) -> None:
    units = -(-rows // SHARED_ROWS)
    for count in (1, 2, 3, 7, 16, 64):
        parts = share_rows(rows, count)
        assert (parts[0][0], parts[-1][1], len(parts)) == (0, rows, count)
        assert all(one[1] == other[0] for one, other in pairwise(parts))
        assert all(first % SHARED_ROWS == 0 for first, last in parts if first < last)
        most = max(last - first for first, last in parts)
        assert most <= -(-units // count) * SHARED_ROWS
