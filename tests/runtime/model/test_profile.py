"""The time of each kernel in a real call: that sums are plausible, not what they are."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import hf_sparse
from hf_sparse.cli import main
from hf_sparse.runtime.kernels.all import kernels
from hf_sparse.runtime.llvm.jit import DEFAULT_CACHE
from hf_sparse.runtime.llvm.target import host
from hf_sparse.runtime.model import profile as profiles
from hf_sparse.runtime.model.profile import Peaks, measure_peaks, profile_call
from hf_sparse.timing import profile
from tests.support.tiny_models import tiny_model


@pytest.fixture(autouse=True)
def quick_peaks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(profiles, "measure_peaks", lambda *_: Peaks(100.0, 10.0))


def pruned(family: str) -> torch.nn.Module:
    model = tiny_model(family)
    hf_sparse.prune_(model, hf_sparse.SparsityConfig("2:4"), "magnitude")
    return model


@pytest.mark.parametrize(("family", "threads"), [("bert", 1), ("llama", 2), ("gpt_neox", 2)])
def test_kernels_and_waits_add_up_to_what_programs_take(family: str, threads: int) -> None:
    torch.set_num_threads(threads)
    found = profile(pruned(family), batch=2, tokens=9, repeats=2)
    assert list(found) == (["forward"] if family == "bert" else ["forward", "new token"])
    for one in found.values():
        assert 1 <= one.threads <= threads
        assert one.programs <= one.call
        sums = [sum(each) for each in zip(one.waits, *one.kernels.values(), strict=True)]
        assert all(0 < spent <= 1.01 * one.programs for spent in sums)
        assert sum(sums) >= 0.99 * one.programs  # in every run one thread is busy all along
        assert 0 < one.products <= one.programs
        assert one.gflop > 0 < one.gbytes
        text = str(one)
        assert all(name in text for name in (*one.kernels, "waits", "GB/s", host().name))


def test_results_are_the_same_while_clocks_run() -> None:
    compiled = hf_sparse.compile(pruned("llama"))
    ids = torch.arange(12).view(2, 6)
    results = []
    with torch.inference_mode():
        plain = compiled(ids).logits
        profile_call(compiled, lambda: results.append(compiled(ids).logits), 12, False, 1)
    torch.testing.assert_close(results[-1], plain)


def test_a_model_that_is_not_compiled_has_no_kernels() -> None:
    model = tiny_model("bert")
    with pytest.raises(ValueError, match="is it compiled"):
        profile_call(model, lambda: None, 1, False, 1)


def test_peaks_are_positive() -> None:
    code = kernels(host(), DEFAULT_CACHE)
    for threads in (1, 2):
        found = measure_peaks(code, host(), threads, nbytes=1 << 16)
        assert found.gflops > 0 < found.bandwidth


def test_the_command_prints_profiles(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = hf_sparse.save_pretrained(pruned("llama"), tmp_path / "sparse")
    arguments = ["bench", str(folder), "--tokens", "5", "--repeats", "1", "--profile"]
    assert main([*arguments, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["new token"]["kernels"]
    assert main(arguments) == 0
    assert "Products with weights" in capsys.readouterr().out
