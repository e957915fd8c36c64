"""prune_checkpoint: the result of prune_, from disk to disk, through kills and bad input."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from hf_sparse import SparsityConfig, prune_, prune_checkpoint
from hf_sparse.cli import main
from hf_sparse.files import work_folder
from hf_sparse.pruning import on_disk
from tests.support.closeness import nearly_same, nearly_the_same_zeros
from tests.support.processes import run
from tests.support.tiny_models import prose, tiny_batches, tiny_model, tiny_tokenizer

CONFIG = SparsityConfig("unstructured", 0.6)
RECIPES = [
    {"method": "wanda", "allocation": "owl", "reconstruct": 1},
    {"method": "sparsegpt"},
    {"method": "sparsellm", "refine": "swaps"},
]


@pytest.fixture
def dense(tmp_path: Path) -> Path:
    tiny_model("llama").save_pretrained(tmp_path / "dense")
    return tmp_path / "dense"


def state(folder: Path) -> dict[str, torch.Tensor]:
    return AutoModelForCausalLM.from_pretrained(folder).state_dict()


def agree(one: torch.Tensor, other: torch.Tensor, recipe: dict[str, object]) -> bool:
    if recipe["method"] == "sparsellm":  # whose alternating solutions make a last bit grow
        return nearly_the_same_zeros(one, other)
    return nearly_same(one, other, share=0.9)


@pytest.mark.few(1)
@pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])
@pytest.mark.parametrize("recipe", RECIPES)
def test_the_result_is_that_of_prune(
    tmp_path: Path, family: str, recipe: dict[str, object]
) -> None:
    model = tiny_model(family)
    model.save_pretrained(tmp_path / "dense")
    batches = tiny_batches(family)
    report = prune_checkpoint(
        tmp_path / "dense", tmp_path / "out", CONFIG, batches=batches, **recipe
    )
    expected = prune_(model, CONFIG, batches=batches, **recipe)
    found = state(tmp_path / "out")
    assert found.keys() == model.state_dict().keys()
    for name, value in model.state_dict().items():
        assert agree(found[name], value, recipe), name
    assert report.tensors == expected.tensors
    assert report.notes == expected.notes
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dense", "out"]


@pytest.mark.few(1)
@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("blocks", [1, 2])
def test_a_killed_run_goes_on_and_gives_the_same(
    dense: Path, tmp_path: Path, recipe: dict[str, object], blocks: int, monkeypatch
) -> None:
    batches = tiny_batches("llama")
    prune_checkpoint(dense, tmp_path / "whole", CONFIG, batches=batches, **recipe)
    finish = on_disk.OnDisk.finish
    done: list[str] = []

    def breaking(self, step) -> None:
        if len(done) == blocks:
            raise KeyboardInterrupt
        finish(self, step)
        done.append(step.name)

    monkeypatch.setattr(on_disk.OnDisk, "finish", breaking)
    with pytest.raises(KeyboardInterrupt):
        prune_checkpoint(dense, tmp_path / "out", CONFIG, batches=batches, **recipe)
    assert not (tmp_path / "out").exists()
    again: list[str] = []

    def counting(self, step) -> None:
        again.append(step.name)
        finish(self, step)

    monkeypatch.setattr(on_disk.OnDisk, "finish", counting)
    with pytest.raises(ValueError, match="a run was stopped"):
        prune_checkpoint(dense, tmp_path / "out", CONFIG, batches=batches, **recipe)
    other = SparsityConfig("unstructured", 0.5)
    with pytest.raises(ValueError, match="another config"):
        prune_checkpoint(dense, tmp_path / "out", other, batches=batches, **recipe, resume=True)
    with pytest.raises(ValueError, match="another calibration"):
        prune_checkpoint(
            dense, tmp_path / "out", CONFIG, batches=batches[:1], **recipe, resume=True
        )
    report = prune_checkpoint(
        dense, tmp_path / "out", CONFIG, batches=batches, **recipe, resume=True
    )
    assert len(again) == 3 - blocks
    assert report.sparsity == pytest.approx(0.6, abs=1e-3)
    whole, out = state(tmp_path / "whole"), state(tmp_path / "out")
    for name, value in whole.items():
        assert agree(out[name], value, recipe), name


def test_what_cannot_stream_is_refused_before_work_begins(dense: Path, tmp_path: Path) -> None:
    batches = tiny_batches("llama")
    for config, method, message in (
        (CONFIG, "magnitude", "looks at all layers at once"),
        (SparsityConfig("2:4"), "proxsparse", "looks at all layers at once"),
        (SparsityConfig("unstructured", 0.5, targets=["lm_head"]), "wanda", "outside the blocks"),
        (SparsityConfig("5:7"), "wanda", "not divisible by M = 7"),
        (CONFIG, "wonda", "unknown method"),
    ):
        with pytest.raises(ValueError, match=message):
            prune_checkpoint(dense, tmp_path / "out", config, method, batches)
    with pytest.raises(ValueError, match="the output is the source"):
        prune_checkpoint(dense, dense, CONFIG, "wanda", batches)
    with pytest.raises(ValueError, match="needs calibration data"):
        prune_checkpoint(dense, tmp_path / "out", CONFIG, "wanda")
    assert [path.name for path in tmp_path.iterdir()] == ["dense"]


def test_a_full_disk_keeps_the_finished_blocks(dense: Path, tmp_path: Path, monkeypatch) -> None:
    batches, real = tiny_batches("llama"), work_folder.save_file
    written: list[Path] = []

    def full(tensors, path, metadata) -> None:
        if len(written) == 1:
            raise work_folder.SafetensorError("No space left on device")
        written.append(path)
        real(tensors, path, metadata)

    monkeypatch.setattr(work_folder, "save_file", full)
    with pytest.raises(OSError, match="free space, and resume"):
        prune_checkpoint(dense, tmp_path / "out", CONFIG, "wanda", batches)
    monkeypatch.setattr(work_folder, "save_file", real)
    assert (tmp_path / "out.unfinished" / "model.layers.0.safetensors").exists()
    report = prune_checkpoint(dense, tmp_path / "out", CONFIG, "wanda", batches, resume=True)
    assert report.sparsity == pytest.approx(0.6, abs=1e-3)


def test_a_damaged_work_folder_is_an_error(dense: Path, tmp_path: Path) -> None:
    work = tmp_path / "out.unfinished"
    work.mkdir()
    batches = tiny_batches("llama")
    for text in ("{", "[]"):
        (work / "run.json").write_text(text)
        with pytest.raises(ValueError, match=r"run\.json .*Remove"):
            prune_checkpoint(dense, tmp_path / "out", CONFIG, "wanda", batches, resume=True)


@pytest.fixture
def stopped(dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The work folder of a run that was killed after two blocks."""
    finish = on_disk.OnDisk.finish

    def breaking(self, step) -> None:
        finish(self, step)
        if step.name.endswith("1"):
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(on_disk.OnDisk, "finish", breaking)
        with pytest.raises(KeyboardInterrupt):
            prune_checkpoint(dense, tmp_path / "out", CONFIG, "sparsegpt", tiny_batches("llama"))
    return tmp_path / "out.unfinished"


def resume(dense: Path, stopped: Path) -> None:
    batches = tiny_batches("llama")
    prune_checkpoint(dense, stopped.with_suffix(""), CONFIG, "sparsegpt", batches, resume=True)


def test_a_source_with_other_weights_is_not_resumed(dense: Path, stopped: Path) -> None:
    tiny_model("llama", seed=5).save_pretrained(dense)
    with pytest.raises(ValueError, match="of a run with another source"):
        resume(dense, stopped)


@pytest.mark.few(1)
@pytest.mark.parametrize("damage", ["value", "tensor", "metadata", "truncated"])
def test_damaged_blocks_are_not_resumed(dense: Path, stopped: Path, damage: str) -> None:
    file = stopped / "model.layers.0.safetensors"
    with safe_open(file, "pt") as opened:
        tensors, metadata = {k: opened.get_tensor(k) for k in opened.keys()}, opened.metadata()  # noqa: SIM118
    name = "model.layers.0.self_attn.q_proj.weight"
    if damage == "value":
        tensors[name][3] += 1
    elif damage == "tensor":
        tensors = {k: v for k, v in tensors.items() if not k.startswith(name)}
    elif damage == "metadata":
        metadata = None
    if damage == "truncated":
        file.write_bytes(file.read_bytes()[:-50])
    else:
        save_file(tensors, file, metadata)
    with pytest.raises(ValueError, match=r"layers\.0\.safetensors"):
        resume(dense, stopped)
    file.unlink()
    resume(dense, stopped)  # the other block is still good


def test_an_error_before_the_first_block_leaves_nothing(dense: Path, tmp_path: Path) -> None:
    batches = tiny_batches("llama")
    with pytest.raises(ValueError, match="damping is -1"):
        prune_checkpoint(dense, tmp_path / "out", CONFIG, "sparsegpt", batches, damping=-1.0)
    assert [path.name for path in tmp_path.iterdir()] == ["dense"]
    (tmp_path / "out").write_text("a file")
    with pytest.raises(NotADirectoryError):
        prune_checkpoint(dense, tmp_path / "out", CONFIG, "sparsegpt", batches)


def test_the_command_streams_and_resumes(dense: Path, tmp_path: Path, capsys) -> None:
    tiny_tokenizer().save_pretrained(dense)
    text = tmp_path / "text.txt"
    text.write_text(prose()[:20_000])
    arguments = ["prune", str(dense), str(tmp_path / "out"), "--sparsity", "0.5"]
    arguments += ["--method", "sparsegpt", "--option", "block_size=16", "--calibration", str(text)]
    arguments += ["--num-samples", "2", "--window", "32"]
    assert main([*arguments, "--resume"]) == 1
    assert "give --stream too" in capsys.readouterr().err
    assert main([*arguments, "--stream"]) == 0
    assert "sparsegpt, damping=0.01, block_size=16" in capsys.readouterr().out
    assert main([*arguments, "--option", "size=3"]) == 1
    assert "has the options damping=0.01, block_size=128" in capsys.readouterr().err
    assert main([*arguments, "--option", "block_size=many"]) == 1
    assert "wanted a value like block_size=128" in capsys.readouterr().err
    assert state(tmp_path / "out").keys() == state(dense).keys()


def test_two_runs_do_not_share_a_work_folder(dense: Path, tmp_path: Path, monkeypatch) -> None:
    batches, finish = tiny_batches("llama"), on_disk.OnDisk.finish
    refused: list[str] = []

    def second_run(self, step) -> None:
        with pytest.raises(ValueError, match="in use by a run that still goes on") as error:
            prune_checkpoint(dense, tmp_path / "out", CONFIG, "wanda", batches, resume=True)
        refused.append(str(error.value))
        finish(self, step)

    monkeypatch.setattr(on_disk.OnDisk, "finish", second_run)
    prune_checkpoint(dense, tmp_path / "out", CONFIG, "wanda", batches)
    assert len(refused) == 3


@pytest.mark.slow
def test_a_model_larger_than_the_memory_that_is_used(tmp_path: Path) -> None:
    """Two blocks, their Gram matrices, one batch and 1 GB, Python and torch included."""
    sizes = {"num_attention_heads": 16, "num_key_value_heads": 16, "vocab_size": 1024}
    sizes |= {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 48}
    model = tiny_model("llama", **sizes)
    block = sum(p.numel() for p in model.model.layers[0].parameters())
    grams = 3 * 1024**2 + 2816**2
    bound = 4 * (2 * (block + grams) + 64 * (10 * 1024 + 4 * 2816)) + 1e9
    assert model.get_memory_footprint() > 2 * bound
    model.save_pretrained(tmp_path / "dense", max_shard_size="300MB")
    del model
    done = run("prune_a_checkpoint", tmp_path / "dense", tmp_path / "out")
    assert done.returncode == 0, done.stderr[-2000:]
    assert int(done.stdout.split()[-1]) < bound


def test_tied_weights_on_the_disk_count_once(tmp_path: Path) -> None:
    model = tiny_model("llama", tie_word_embeddings=True)
    model.save_pretrained(tmp_path / "dense")
    config = SparsityConfig("2:4")
    streamed = prune_checkpoint(
        tmp_path / "dense", tmp_path / "out", config, "wanda", tiny_batches("llama")
    )
    wanted = prune_(model, config, "wanda", tiny_batches("llama"))
    assert streamed.parameters == wanted.parameters == model.num_parameters()
