"""Damaged checkpoints and full disks: a clear error, never a wrong model, nothing lost."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import tempfile
import time
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import hf_sparse
from hf_sparse import FormatError, SparsityConfig
from hf_sparse.checkpoint import writing
from hf_sparse.files import atomic
from tests.support.processes import command, environment, run
from tests.support.tiny_models import tiny_model

TENSOR = "model.layers.1.mlp.up_proj.weight"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A compressed checkpoint, unstructured so that its tensors have bitmasks."""
    model = tiny_model("llama")
    hf_sparse.prune_(model, SparsityConfig("unstructured", 0.5), "magnitude")
    return hf_sparse.save_pretrained(model, tmp_path / "model", SparsityConfig("unstructured", 0.5))


def load(folder: Path) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(folder)


def rewrite(folder: Path, change: object) -> None:
    file = folder / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


def drop(name: str) -> object:
    return lambda tensors: tensors.pop(name)


def put(name: str, change: object) -> object:
    def apply(tensors: dict) -> None:
        tensors[name] = change(tensors[name])

    return apply


def flipped(bits: torch.Tensor) -> torch.Tensor:
    bits = bits.clone()
    bits[0] ^= 1
    return bits


DAMAGE = {
    "values missing": (drop(TENSOR), "incomplete"),
    "mask missing": (drop(f"{TENSOR}.bitmask"), "incomplete"),
    "layout missing": (drop(f"{TENSOR}.layout"), "incomplete"),
    "a value too few": (put(TENSOR, lambda t: t[:-1]), "marks 1024 nonzeros, but 1023"),
    "a value too many": (
        put(TENSOR, lambda t: torch.cat([t, t[:1]])),
        "marks 1024 nonzeros, but 1025",
    ),
    "one bit flipped": (put(f"{TENSOR}.bitmask", flipped), "marks 102[35] nonzeros, but 1024"),
    "mask cut": (put(f"{TENSOR}.bitmask", lambda t: t[:-1]), "bitmask has 255 bytes, wanted 256"),
    "mask of another type": (
        put(f"{TENSOR}.bitmask", lambda t: t.to(torch.int32)),
        "wanted 1-D bytes",
    ),
    "rows wrong": (
        put(f"{TENSOR}.layout", lambda t: t * torch.tensor([2, 1, 1])),
        "shape mismatch|wanted 512",
    ),
    "rows negative": (put(f"{TENSOR}.layout", lambda t: -t), "no layout of 'bitmask'"),
    "layout cut": (put(f"{TENSOR}.layout", lambda t: t[:2]), "wanted 3 int64"),
    "values 2-D": (put(TENSOR, lambda t: t.reshape(2, -1)), "wanted 1-D"),
}


@pytest.mark.few(3)
@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_named_by_tensor_and_file(folder: Path, damage: str) -> None:
    change, message = DAMAGE[damage]
    rewrite(folder, change)
    for read in (load, hf_sparse.inspect_checkpoint):
        with pytest.raises(FormatError, match=message) as caught:
            read(folder)
        assert TENSOR in str(caught.value)
        assert str(folder / "model.safetensors") in str(caught.value)


def test_a_weight_that_breaks_the_promised_pattern_is_refused(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] |= {"pattern": "2:4", "sparsity": 0.5}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(
        FormatError, match=r"tensor model.layers.*config.json promises pattern '2:4'"
    ):
        load(folder)


def test_another_shape_than_the_model_wants_is_refused(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["intermediate_size"] = 32
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises((FormatError, RuntimeError), match=r"(?i)mismatch"):
        load(folder)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"version": 2}, FormatError, "version 2, this hf_sparse reads up to 1"),
        ({"version": "x"}, FormatError, "version 'x'"),
        ({"colour": 1}, ValueError, r"unknown keys \['colour'\].*Known keys: pattern, sparsity"),
        ({"pattern": "2-4"}, ValueError, "unknown pattern '2-4'"),
        ({"sparsity": 2}, ValueError, "sparsity is 2"),
    ],
)
def test_bad_configs_are_refused(
    folder: Path, change: dict, error: type[Exception], message: str
) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] |= change
    (folder / "config.json").write_text(json.dumps(config))
    for read in (load, hf_sparse.inspect_checkpoint):
        with pytest.raises(error, match=message):
            read(folder)


@pytest.mark.parametrize("length", [0, 4, 100, 5000, -1])
def test_truncated_files_are_refused(folder: Path, length: int) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:length])
    for read in (load, hf_sparse.inspect_checkpoint):
        with pytest.raises(FormatError, match=r"model.safetensors cannot be read as safetensors"):
            read(folder)


def test_missing_and_mixed_shards_are_refused(folder: Path) -> None:
    load(folder).save_pretrained(folder, max_shard_size="20KB")
    shard = sorted(folder.glob("model-*"))[1]
    whole = shard.read_bytes()
    tensors = load_file(shard)
    save_file({name: tensors[name] for name in list(tensors)[3:]}, shard, metadata={"format": "pt"})
    for read in (load, hf_sparse.inspect_checkpoint):
        with pytest.raises(FormatError, match="lacks 3 tensors"):
            read(folder)
    shard.unlink()
    with pytest.raises(OSError, match=shard.name):
        load(folder)
    with pytest.raises(FormatError, match=shard.name):
        hf_sparse.inspect_checkpoint(folder)
    shard.write_bytes(whole)
    load(folder)


def test_pickled_weights_are_refused(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    torch.save({}, folder / "pytorch_model.bin")
    with pytest.raises(FormatError, match="stored as safetensors alone"):
        load(folder)


@pytest.mark.slow
def test_without_the_package_loading_fails(folder: Path) -> None:
    done = run("load_without_the_package", folder)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == 4, done.stdout + done.stderr
    assert "LOADED" not in done.stdout
    assert "trust_remote_code=True" in lines[0]
    assert "hf_sparse" in lines[1]


@pytest.mark.slow
def test_trust_remote_code_imports_the_package(folder: Path) -> None:
    done = run("load_by_remote_code", folder)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["SparseLlamaForCausalLM", "0.5"]


def snapshot(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def test_a_full_disk_changes_nothing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before, model = snapshot(folder), load(folder)

    def full(*args: object, **kwargs: object) -> None:
        raise SafetensorError("Error while serializing: I/O error: No space left on device")

    monkeypatch.setattr(writing, "save_file", full)
    with pytest.raises(OSError, match="No space left"):
        model.save_pretrained(folder)
    assert snapshot(folder) == before
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]


def test_a_read_only_folder_is_an_error(folder: Path) -> None:
    model = load(folder)
    with tempfile.TemporaryDirectory() as temporary:
        copy = Path(shutil.copytree(folder, Path(temporary) / "model"))
        before = snapshot(copy)
        for place in (copy, copy.parent):
            place.chmod(0o555)
        child = os.fork()
        if child == 0:  # root may write anywhere, so the child becomes somebody else
            try:
                if os.geteuid() == 0:
                    os.setuid(65534)
                model.save_pretrained(copy)
            except PermissionError as error:
                os._exit(0 if str(copy) in str(error) else 2)
            finally:
                os._exit(1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        copy.parent.chmod(0o700)
        assert snapshot(copy) == before
        assert [path.name for path in copy.parent.iterdir()] == ["model"]
        copy.chmod(0o700)


def test_a_file_in_the_way_is_an_error(folder: Path) -> None:
    model = load(folder)
    (folder.parent / "file").write_text("mine")
    with pytest.raises(NotADirectoryError, match="wanted a folder"):
        model.save_pretrained(folder.parent / "file")
    assert (folder.parent / "file").read_text() == "mine"


def test_a_folder_in_place_of_the_card_is_an_error(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "other" / "README.md").mkdir(parents=True)
    with pytest.raises(IsADirectoryError, match="wanted a file, the model card"):
        load(folder).save_pretrained(tmp_path / "other")
    assert [path.name for path in (tmp_path / "other").rglob("*")] == ["README.md"]


def test_an_onnx_export_is_not_overwritten(folder: Path, tmp_path: Path) -> None:
    model = load(folder)
    for name in ("export.json", "model.onnx", "config.json"):
        (tmp_path / name).write_text("{}")
    before = snapshot(tmp_path)
    with pytest.raises(ValueError, match="an ONNX export"):
        model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="an ONNX export"):
        hf_sparse.prune_checkpoint(folder, tmp_path, hf_sparse.SparsityConfig("2:4"))
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize("exchange", [True, False])
def test_files_are_replaced_whole(
    tmp_path: Path, exchange: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not exchange:
        monkeypatch.setattr(atomic, "_can_exchange", lambda folder: False)
    target = tmp_path / "model"
    for content in ("old", "new"):
        with atomic.replacing(target, lambda name: name.startswith("w-")) as fresh:
            (fresh / "config.json").write_text(content)
            (fresh / f"w-{content}").write_text(content)
        (target / "mine").write_text("mine")
    assert {path.name: path.read_text() for path in target.iterdir()} == {
        "config.json": "new",
        "w-new": "new",
        "mine": "mine",
    }
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_an_error_while_writing_leaves_the_old_files(tmp_path: Path) -> None:
    def write(content: str, fail: bool) -> None:
        with atomic.replacing(tmp_path / "model") as fresh:
            (fresh / "config.json").write_text(content)
            if fail:
                raise KeyError

    write("old", fail=False)
    with pytest.raises(KeyError):
        write("new", fail=True)
    assert (tmp_path / "model" / "config.json").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_subfolders_links_and_the_working_directory_survive(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load(folder)
    (folder / "checkpoint-1").mkdir()
    (folder / "checkpoint-1" / "optimizer.pt").write_text("mine")
    (folder / "model_ema.safetensors").write_text("mine")
    link = folder.parent / "link"
    link.symlink_to(folder)
    model.save_pretrained(link)
    assert link.is_symlink()
    monkeypatch.chdir(folder)
    model.save_pretrained(".")
    assert Path.cwd() == folder
    assert (folder / "checkpoint-1" / "optimizer.pt").read_text() == "mine"
    assert (folder / "model_ema.safetensors").read_text() == "mine"
    assert sorted(path.name for path in folder.parent.iterdir()) == ["link", folder.name]
    load(folder)


@pytest.mark.parametrize("there", ["a model", "a file"])
def test_a_folder_that_another_process_makes_meanwhile(
    tmp_path: Path, there: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    rename = Path.rename

    def late(path: Path, target: Path) -> Path:
        target.mkdir()
        (target / ("config.json" if there == "a model" else "file")).write_text("other")
        (target / "mine").write_text("mine")
        return rename(path, target)

    with atomic.replacing(tmp_path / "model") as fresh:
        (fresh / "config.json").write_text("new")
        monkeypatch.setattr(Path, "rename", late)
    files = {path.name: path.read_text() for path in (tmp_path / "model").iterdir()}
    assert files == {"config.json": "new", "mine": "mine"} | (
        {} if there == "a model" else {"file": "other"}
    )
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_files_in_subfolders_are_replaced(tmp_path: Path) -> None:
    for content in ("old", "new"):
        with atomic.replacing(tmp_path / "model") as fresh:
            (fresh / "config.json").write_text(content)
            (fresh / "chat_templates").mkdir()
            (fresh / "chat_templates" / "tool.jinja").write_text(content)
        (tmp_path / "model" / "chat_templates" / "mine").write_text("mine")
    files = {path.name: path.read_text() for path in (tmp_path / "model").rglob("*.j*")}
    assert files == {"config.json": "new", "tool.jinja": "new"}
    assert (tmp_path / "model" / "chat_templates" / "mine").exists()


def test_variants_stand_side_by_side(folder: Path) -> None:
    model = load(folder)
    whole = {name: value.clone() for name, value in model.state_dict().items()}
    model.half().save_pretrained(folder, variant="fp16", max_shard_size="20KB")
    again = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    half = AutoModelForCausalLM.from_pretrained(folder, variant="fp16")
    for name, value in whole.items():
        assert torch.equal(again.state_dict()[name], value), name
        assert torch.equal(half.state_dict()[name], value.half()), name


def start(program: str, target: Path) -> subprocess.Popen[str]:
    """A program that runs until it is killed."""
    return subprocess.Popen(
        command(program, target), stdout=subprocess.PIPE, text=True, env=environment()
    )


@pytest.mark.slow
@pytest.mark.parametrize("attempts", [2, pytest.param(12, marks=pytest.mark.slow)])
def test_a_kill_leaves_the_old_or_the_new(attempts: int, tmp_path: Path) -> None:
    """Two versions are saved in turn by a process that is killed at many moments."""
    target = tmp_path / "model"
    for attempt in range(attempts):
        process = start("save_until_killed", target)
        assert process.stdout.readline()
        time.sleep(0.003 * attempt)
        process.send_signal(signal.SIGKILL)
        process.wait()
        contents = {path.name: path.read_text() for path in target.iterdir()}
        version = contents["config.json"]
        assert contents == {
            "config.json": version,
            "a": version,
            "b": version,
            f"w-{version}": version,
        }
        with atomic.replacing(target) as fresh:
            (fresh / "config.json").write_text("0")
        assert [path.name for path in tmp_path.iterdir()] == ["model"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "there",
    ["a model", *(pytest.param(x, marks=pytest.mark.slow) for x in ("nothing", "a folder"))],
)
def test_leftovers_of_the_dead_are_removed_and_of_the_living_kept(
    tmp_path: Path, there: str
) -> None:
    target = tmp_path / "model[1]"
    if there != "nothing":
        target.mkdir()
    if there == "a model":
        (target / "config.json").write_text("old")
    other = tmp_path / ".model.saving-of-another"
    other.mkdir()
    savers = [start("save_and_sleep", target) for _ in range(2)]
    dead, living = (Path(saver.stdout.readline().strip()) for saver in savers)
    savers[0].send_signal(signal.SIGKILL)
    savers[0].wait()
    assert dead.exists()

    def save(fail: bool = False) -> None:
        with atomic.replacing(target) as fresh:
            (fresh / "config.json").write_text("new")
            assert not fail

    with pytest.raises(AssertionError):
        save(fail=True)
    assert dead.exists()  # what may be the last whole copy goes when there is another
    save()
    assert (living / "config.json").read_text() == "killed"
    savers[1].send_signal(signal.SIGKILL)
    savers[1].wait()
    assert not dead.exists()
    save()
    assert sorted(path.name for path in tmp_path.iterdir()) == [other.name, target.name]
    assert [path.name for path in target.iterdir()] == ["config.json"]


@pytest.mark.parametrize("marked", [False, True])
def test_folders_that_look_like_leftovers_stay(tmp_path: Path, marked: bool) -> None:
    mine = [tmp_path / ".model.saving-notes", tmp_path / "model" / ".model.saving-12345678"]
    for path in mine:
        path.mkdir(parents=True)
        (path / "thesis.txt").write_text("mine")
        if marked:
            (path / atomic._MARKER).touch()
    for _ in range(2):
        with atomic.replacing(tmp_path / "model") as fresh:
            (fresh / "config.json").write_text("new")
    assert all((path / "thesis.txt").read_text() == "mine" for path in mine)


def test_what_is_left_of_a_hidden_folder_is_removed(tmp_path: Path) -> None:
    for number, entries in enumerate(((), (atomic._MARKER,), (atomic._MARKER, atomic._FILES))):
        hidden = tmp_path / f".model.saving-1234567{number}"
        hidden.mkdir()
        if atomic._MARKER in entries:
            (hidden / atomic._MARKER).touch()
        if atomic._FILES in entries:
            (hidden / atomic._FILES).mkdir()
    with atomic.replacing(tmp_path / "model") as fresh:
        (fresh / "config.json").write_text("new")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_without_locks_leftovers_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(atomic, "fcntl", None)
    leftover = tmp_path / ".model.saving-12345678"
    leftover.mkdir()
    with atomic.replacing(tmp_path / "model") as fresh:
        (fresh / "config.json").write_text("new")
    assert sorted(path.name for path in tmp_path.iterdir()) == [leftover.name, "model"]
