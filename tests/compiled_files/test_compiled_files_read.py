"""What load_compiled makes of the two files themselves, and what save_compiled leaves."""

from __future__ import annotations

import copy
import json
import os
import resource
import shutil
import signal
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GPT2Config

import hf_sparse
from hf_sparse.compiled_files import files as compiled_files
from hf_sparse.compiled_files import skeleton
from hf_sparse.files import atomic
from hf_sparse.formats import FormatError
from tests.support.compiled_folders import DECODER, MODELS, in_a_child, logits, saved, write
from tests.support.sparse_models import random_model


@pytest.mark.parametrize("end", [".down.bias", ".words", ".norms.0.bias", "wte.weight", "id"])
def test_tensors_that_are_missing_are_found(tmp_path: Path, end: str) -> None:
    described, tensors = saved("gpt2")
    kept = {name: tensor for name, tensor in tensors.items() if not name.endswith(end)}
    assert len(kept) < len(tensors)
    folder = write(tmp_path / "missing", described, kept, described_too=False)
    with pytest.raises(FormatError, match=r"is missing|not saved together"):
        hf_sparse.load_compiled(folder)


def test_a_description_beside_the_weights_of_another_save_is_found(tmp_path: Path) -> None:
    """What a kill between two renames leaves: even two saves of one model are not mixed."""
    model = hf_sparse.compile(MODELS["gpt2"]())
    old, new = (hf_sparse.save_compiled(model, tmp_path / name) for name in ("old", "new"))
    shutil.copy(new / "compiled.json", old / "compiled.json")
    with pytest.raises(FormatError, match="not saved together"):
        hf_sparse.load_compiled(old)


@pytest.mark.parametrize("step", [1, 2])
def test_a_kill_while_saving_leaves_the_old_model_or_the_new_one(tmp_path: Path, step: int) -> None:
    old, new = (hf_sparse.compile(MODELS[name]()) for name in ("gpt2", "llama"))
    hf_sparse.save_compiled(old, tmp_path)
    steps = []

    def killed(real: Callable) -> Callable:
        def call(*given: object) -> None:
            steps.append(given)
            if len(steps) == step:
                os.kill(os.getpid(), signal.SIGKILL)
            real(*given)

        return call

    def run() -> None:
        os.replace, atomic._rename_exchange = killed(os.replace), killed(atomic._rename_exchange)
        hf_sparse.save_compiled(new, tmp_path)

    in_a_child(run)
    with suppress(FormatError):  # "not saved together", where the system exchanges no folders
        loaded = hf_sparse.load_compiled(tmp_path)
        whole = {type(model): logits(model) for model in (old, new)}
        torch.testing.assert_close(logits(loaded), whole[type(loaded)])


@pytest.mark.parametrize("how", ["cut", "overwritten", "removed"])
def test_what_happens_to_the_file_afterwards_changes_nothing(tmp_path: Path, how: str) -> None:
    folder = write(tmp_path / "served", *saved("gpt2"))
    file = folder / "compiled.safetensors"
    wanted, model = logits(hf_sparse.load_compiled(folder)), hf_sparse.load_compiled(folder)

    def run() -> None:
        if how == "cut":
            os.truncate(file, 1000)
        elif how == "overwritten":
            with file.open("r+b") as opened:  # the same file, not a new one of its name
                opened.write(b"\x7f" * file.stat().st_size)
        else:
            file.unlink()
        torch.testing.assert_close(logits(model), wanted)

    assert in_a_child(run) == 0


def test_a_file_that_is_cut_off_while_it_is_read_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write(tmp_path / "cut", *saved("gpt2"))
    real = compiled_files.read_header

    def read_and_cut(file: Any) -> Any:
        found = real(file)
        os.truncate(folder / "compiled.safetensors", file.tell() + 100)
        return found

    monkeypatch.setattr(compiled_files, "read_header", read_and_cut)
    with pytest.raises(FormatError, match="cut off while it was read"):
        hf_sparse.load_compiled(folder)


HEADERS: dict[str, Any] = {
    "no table": [],
    "no offsets": {"a": {"dtype": "F32", "shape": [1]}},
    "overlapping": {
        "a": {"dtype": "U8", "shape": [4], "data_offsets": [0, 4]},
        "b": {"dtype": "U8", "shape": [4], "data_offsets": [0, 4]},
    },
    "a gap": {"a": {"dtype": "U8", "shape": [3], "data_offsets": [1, 4]}},
    "too short": {"a": {"dtype": "U8", "shape": [3], "data_offsets": [0, 3]}},
    "too long": {"a": {"dtype": "U8", "shape": [2**40], "data_offsets": [0, 2**40]}},
    "negative": {"a": {"dtype": "U8", "shape": [-4], "data_offsets": [0, -4]}},
    "two negatives": {"a": {"dtype": "U8", "shape": [-2, -2], "data_offsets": [0, 4]}},
    "wrapping": {"a": {"dtype": "U8", "shape": [2**33, 2**33, 4], "data_offsets": [0, 4]}},
    "texts": {"a": {"dtype": "U8", "shape": ["4"], "data_offsets": ["0", "4"]}},
    "floats": {"a": {"dtype": "U8", "shape": [4.0], "data_offsets": [0.0, 4.0]}},
    "a type of none": {"a": {"dtype": "F8_E4M3", "shape": [4], "data_offsets": [0, 4]}},
    "a type that is a list": {"a": {"dtype": ["U8"], "shape": [4], "data_offsets": [0, 4]}},
}


@pytest.mark.parametrize("name", HEADERS)
def test_headers_that_lie_are_found(tmp_path: Path, name: str) -> None:
    folder = write(tmp_path / "lies", *saved("gpt2"))
    header = json.dumps(HEADERS[name]).encode()
    content = len(header).to_bytes(8, "little") + header + bytes(4)
    (folder / "compiled.safetensors").write_bytes(content)
    with pytest.raises(FormatError):
        hf_sparse.load_compiled(folder)


@pytest.mark.parametrize("length", [2**64 - 1, 2**63, 10**6, 0])
def test_headers_of_any_length_are_found(tmp_path: Path, length: int) -> None:
    folder = write(tmp_path / "long", *saved("gpt2"))
    (folder / "compiled.safetensors").write_bytes(length.to_bytes(8, "little") + bytes(100))
    with pytest.raises(FormatError):
        hf_sparse.load_compiled(folder)


TEXTS = {
    "nested": "[" * 100_000,
    "a nested config": '{"layout": LAYOUT, "id": "", "config": ' + "[" * 100_000,
    "a long number": '{"layout": ' + "9" * 10_000 + "}",
    "no text": "\udc80",
    "a list": "[1]",
    "another layout": '{"layout": [3]}',
    "nothing else": '{"layout": LAYOUT}',
    "an id that is none": '{"layout": LAYOUT, "id": [1], "types": {}}',
}


@pytest.mark.parametrize("name", TEXTS)
def test_descriptions_of_any_kind_are_found(tmp_path: Path, name: str) -> None:
    folder = write(tmp_path / "texts", *saved("gpt2"))
    text = TEXTS[name].replace("LAYOUT", json.dumps(compiled_files.LAYOUT))
    (folder / "compiled.json").write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(FormatError):
        hf_sparse.load_compiled(folder)


def test_a_config_does_not_choose_code_to_download(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    described, tensors = saved("llama")
    described["config"].update(attn_implementation="someone/kernel", _attn_implementation="x/y")
    built = []
    real = skeleton._with_one_block

    def watched(config: Any) -> Any:
        built.append(config._attn_implementation)
        return real(config)

    monkeypatch.setattr(skeleton, "_with_one_block", watched)
    hf_sparse.load_compiled(write(tmp_path / "code", described, tensors))
    assert built == ["eager"]


def test_a_folder_without_a_compiled_model_says_what_it_holds(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="no such folder"):
        hf_sparse.load_compiled(tmp_path / "none")
    with pytest.raises(FormatError, match="it holds nothing"):
        hf_sparse.load_compiled(tmp_path)
    (tmp_path / "graph.onnx").touch()
    with pytest.raises(FormatError, match=r"it holds graph.onnx.*save_compiled"):
        hf_sparse.load_compiled(tmp_path)
    (tmp_path / "config.json").touch()
    with pytest.raises(FormatError, match=r"checkpoint, for from_pretrained"):
        hf_sparse.load_compiled(tmp_path)
    os.mkfifo(tmp_path / "compiled.json")  # not waited for
    with pytest.raises(FormatError, match="missing"):
        hf_sparse.load_compiled(tmp_path)


def test_a_full_disk_is_an_os_error_and_the_old_model_stays(tmp_path: Path) -> None:
    """A limit on the size of files fails as a full disk does."""
    model = hf_sparse.compile(MODELS["gpt2"]())
    hf_sparse.save_compiled(model, tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def run() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        for most in (30_000, 60_000):
            resource.setrlimit(resource.RLIMIT_FSIZE, (most, resource.RLIM_INFINITY))
            with pytest.raises(OSError, match="cannot be written"):
                hf_sparse.save_compiled(model, tmp_path)

    assert in_a_child(run) == 0
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_model_that_was_loaded_in_inference_mode_is_usable_outside(tmp_path: Path) -> None:
    folder = write(tmp_path / "inference", *saved("gpt2"))
    with torch.inference_mode(), torch.device("meta"):
        model = hf_sparse.load_compiled(folder)
    wanted = logits(hf_sparse.load_compiled(folder))
    torch.testing.assert_close(logits(copy.deepcopy(model)), wanted)
    model.transformer.wte.weight.mul_(2)  # an inference tensor would refuse


def test_tensors_that_share_memory_are_saved(tmp_path: Path) -> None:
    """Two blocks have one dense weight; a norm's weight and bias lie in one piece."""
    model = random_model(GPT2Config(n_embd=32, n_layer=2, n_head=4, n_positions=64, **DECODER), 0.0)
    first, second = model.transformer.h
    second.attn.c_proj.weight = first.attn.c_proj.weight
    both = torch.randn(64)
    model.transformer.ln_f.weight.data, model.transformer.ln_f.bias.data = both[:32], both[32:]
    compiled = hf_sparse.compile(model)
    loaded = hf_sparse.load_compiled(hf_sparse.save_compiled(compiled, tmp_path))
    torch.testing.assert_close(logits(loaded), logits(compiled))
    again = hf_sparse.load_compiled(hf_sparse.save_compiled(loaded, tmp_path / "again"))
    torch.testing.assert_close(logits(again), logits(compiled))
