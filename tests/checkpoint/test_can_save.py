"""What cannot be saved is refused before any work: no text is read, and no weight."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    GemmaConfig,
    GemmaForCausalLM,
    PreTrainedModel,
)

import hf_sparse
from hf_sparse import SparsityConfig
from hf_sparse.checkpoint.can_save import check_can_save, check_can_write
from hf_sparse.cli import commands, loading, main
from hf_sparse.pruning import streaming
from hf_sparse.structure.units import find_units
from tests.support.tiny_models import (
    CONFIGS,
    UNKNOWN,
    prose,
    tiny_batches,
    tiny_model,
    tiny_tokenizer,
)

torch.set_num_threads(1)
UNSAVABLE = "own_gemma"


class OwnConfig(GemmaConfig):
    """A config of code that is not in transformers, which no Auto class has a model for."""

    model_type = UNSAVABLE


@pytest.fixture(autouse=True)
def _known() -> Iterator[None]:
    """AutoConfig knows the type for the time of a test."""
    AutoConfig.register(UNSAVABLE, OwnConfig)
    yield
    CONFIG_MAPPING._extra_content.pop(UNSAVABLE)


def made(family: str) -> PreTrainedModel:
    """A dense model of a family."""
    if family != UNSAVABLE:
        return tiny_model(family)
    torch.manual_seed(0)
    values = UNKNOWN["gemma"].to_dict()
    values.pop("model_type")
    return GemmaForCausalLM(OwnConfig(**values)).eval()


def saved(family: str, folder: Path, sparse: bool = False) -> Path:
    """A dense model of a family in a folder, or a sparse one in the format dense."""
    model = made(family)
    if sparse:
        config = SparsityConfig("2:4", format="dense")
        hf_sparse.prune_(model, config, "magnitude")
        hf_sparse.save_pretrained(model, folder, config)
    else:
        model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def text(tmp_path: Path) -> str:
    (tmp_path / "text.txt").write_text(prose()[:3000])
    return str(tmp_path / "text.txt")


@pytest.fixture
def no_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reading texts or weights fails the test."""

    def never(*arguments: Any, **options: Any) -> None:
        raise AssertionError("work began")

    monkeypatch.setattr(commands, "read_documents", never)
    monkeypatch.setattr(PreTrainedModel, "from_pretrained", never)


SMALL = ["--num-samples", "2", "--window", "16"]


@pytest.mark.usefixtures("no_work")
@pytest.mark.parametrize("stream", [[], ["--stream"]])
def test_pruning_a_family_that_is_not_savable(
    stream: list[str], tmp_path: Path, text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    dense, out = str(saved(UNSAVABLE, tmp_path / "dense")), tmp_path / "out"
    command = ["prune", dense, str(out), "--sparsity", "0.5", "--calibration", text, *stream]
    assert main(command) == 1
    told = capsys.readouterr().err
    for part in (f"type '{UNSAVABLE}' cannot be stored compressed", "no Auto class has a model"):
        assert part in told
    assert "--format dense" in told or "format='dense'" in told
    assert not out.exists()


def test_pruning_it_in_the_format_dense(tmp_path: Path, text: str) -> None:
    dense, out = str(saved(UNSAVABLE, tmp_path / "dense")), str(tmp_path / "out")
    command = ["prune", dense, out, "--sparsity", "0.5", "--calibration", text, *SMALL]
    assert main([*command, "--format", "dense"]) == 0
    model = GemmaForCausalLM.from_pretrained(out)
    assert hf_sparse.measure_sparsity(model).sparsity == pytest.approx(0.5, abs=1e-3)


def test_recovering_it(
    tmp_path: Path,
    text: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    sparse, out = str(saved(UNSAVABLE, tmp_path / "sparse", sparse=True)), str(tmp_path / "out")
    command = ["recover", sparse, out, "--data", text, *SMALL, "--epochs", "1"]
    with monkeypatch.context() as patch:
        patch.setattr(commands, "read_documents", None)
        patch.setattr(commands, "load", None)
        assert main(command) == 1
    assert "--format dense" in capsys.readouterr().err
    assert main([*command, "--format", "dense"]) == 0
    assert hf_sparse.measure_sparsity(GemmaForCausalLM.from_pretrained(out)).sparsity >= 0.5


@pytest.mark.usefixtures("no_work")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--pattern", "5:7"], "in_features is 32, which is not divisible by M = 7"),
        (["--pattern", "block:5x5", "--sparsity", "0.5"], "cannot be divided into groups of 5 x 5"),
        (["--sparsity", "0.5", "--format", "nm"], "format 'nm' stores N:M patterns"),
        (["--pattern", "2:4", "--format", "block"], "format 'block' stores block, row, column"),
        (["--sparsity", "0.5", "--targets", "q_prj"], "'q_prj' matches no layer"),
        (["--pattern", "head:8", "--sparsity", "0.5"], "needs targets"),
        (["--pattern", "2:4", "--refine", "refit"], "fits whole columns"),
    ],
)
def test_patterns_formats_and_targets_that_do_not_fit(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    text: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    dense, out = str(saved("llama", tmp_path / "dense")), tmp_path / "out"
    assert main(["prune", dense, str(out), "--calibration", text, *arguments]) == 1
    assert message in capsys.readouterr().err
    assert not out.exists()


def test_an_earlier_output_is_replaced_only_if_that_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    dense, out = str(saved("llama", tmp_path / "dense")), tmp_path / "out"
    command = ["prune", dense, str(out), "--method", "magnitude", "--pattern"]
    assert main([*command, "2:4", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["file_bytes"] == {
        "before": loading.weight_bytes(dense),
        "after": (out / "model.safetensors").stat().st_size,
    }
    (out / "notes.txt").write_text("mine")
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    assert main([*command, "1:4"]) == 1
    assert "--overwrite: the model in it is replaced" in capsys.readouterr().err
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    assert main([*command, "1:4", "--overwrite"]) == 0
    assert "MB before" in capsys.readouterr().out
    assert hf_sparse.inspect_checkpoint(out).report.sparsity == 0.75
    assert (out / "notes.txt").read_text() == "mine"


@pytest.mark.usefixtures("no_work")
def test_a_checkpoint_is_not_pruned_over_an_export(
    tmp_path: Path, text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    dense, out = str(saved("llama", tmp_path / "dense")), tmp_path / "out"
    out.mkdir()
    for name in ("export.json", "model.onnx"):
        (out / name).write_text("{}")
    for more in ([], ["--overwrite"]):
        command = ["prune", dense, str(out), "--pattern", "2:4", "--calibration", text]
        assert main([*command, *more]) == 1
        assert "an ONNX export, whose config.json" in capsys.readouterr().err


def test_a_folder_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    for place in ("file", "file/out"):
        with pytest.raises(NotADirectoryError, match="wanted a folder to save in"):
            check_can_write(tmp_path / place)
    check_can_write(tmp_path / "new" / "folder")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]

    def read_only(**options: Any) -> str:
        raise OSError(30, "Read-only file system", "a hidden folder")

    monkeypatch.setattr("tempfile.mkdtemp", read_only)
    with pytest.raises(OSError, match="out cannot be written: Read-only file system in"):
        check_can_write(tmp_path / "out")


def test_the_config_alone_tells_the_family(tmp_path: Path) -> None:
    for family, config in CONFIGS.items():
        check_can_save(config, tmp_path / family, SparsityConfig("2:4"))
    with pytest.raises(ValueError, match="cannot be stored compressed"):
        check_can_save(made(UNSAVABLE).config, tmp_path, SparsityConfig("2:4"))
    check_can_save(made(UNSAVABLE).config, tmp_path, SparsityConfig("2:4", format="dense"))


def test_a_shrunk_model_is_not_recovered_into_the_format_dense(
    tmp_path: Path, text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tiny_model("llama")
    with torch.no_grad():  # blocks of different sizes, which no config of the family tells
        find_units(model)[0].down.weight[:, :8] = 0
    hf_sparse.shrink_(model)
    hf_sparse.save_pretrained(model, tmp_path / "small", tokenizer=tiny_tokenizer())
    small, out = str(tmp_path / "small"), str(tmp_path / "out")
    assert main(["recover", small, out, "--data", text, "--format", "dense"]) == 1
    assert "were made smaller by hf-sparse shrink" in capsys.readouterr().err


def test_prune_checkpoint_refuses_before_it_reads_the_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dense = saved(UNSAVABLE, tmp_path / "dense")
    monkeypatch.setattr(streaming, "dense_model_class", None)
    with pytest.raises(ValueError, match=r"cannot be stored compressed.* format='dense'"):
        hf_sparse.prune_checkpoint(dense, tmp_path / "out", SparsityConfig("2:4"), "wanda")
    (tmp_path / "file").write_text("")
    for place, error in (("file", NotADirectoryError), ("file/out", NotADirectoryError)):
        with pytest.raises(error):
            hf_sparse.prune_checkpoint(dense, tmp_path / place, SparsityConfig("2:4"), "wanda")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dense", "file"]


def test_an_old_checkpoint_is_refused_before_its_weights_are_read(tmp_path: Path) -> None:
    values = made(UNSAVABLE).config.to_dict() | {"architectures": ["GemmaForCausalLM"]}
    entry = {"format": "sparse-bitmask", "sparsity_structure": "2:4", "global_sparsity": 0.5}
    values["quantization_config"] = {
        "quant_method": "compressed-tensors",
        "sparsity_config": entry,
    }
    old = tmp_path / "old"
    old.mkdir()
    (old / "config.json").write_text(json.dumps(values))
    save_file({"foreign": torch.ones(1)}, old / "model.safetensors")
    # And not: its weights are of another model.
    with pytest.raises(ValueError, match="cannot be stored compressed"):
        hf_sparse.convert_legacy(old, tmp_path / "new")
    with pytest.raises(ValueError, match="describes no such tensor"):
        hf_sparse.convert_legacy(old, tmp_path / "new", format="dense")


def test_compiling_and_exporting_refuse_a_place_that_is_no_folder(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(NotADirectoryError, match="wanted a folder to save in"):
        hf_sparse.save_compiled(tiny_model("bert"), tmp_path / "file" / "out")
    with pytest.raises(NotADirectoryError, match="wanted a folder to save in"):
        hf_sparse.export_onnx(tiny_model("llama"), tmp_path / "file" / "out")


@pytest.mark.usefixtures("no_work")
def test_a_model_that_is_not_exported_is_told_before_its_weights_are_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny_model("t5").save_pretrained(tmp_path / "t5")
    tiny_tokenizer().save_pretrained(tmp_path / "t5")
    assert main(["export", str(tmp_path / "t5"), str(tmp_path / "graph")]) == 1
    assert "T5Model is an encoder and a decoder" in capsys.readouterr().err


def test_an_upload_is_refused_without_a_token_or_with_a_bad_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    sparse = saved("llama", tmp_path / "sparse")
    monkeypatch.setattr("hf_sparse.hub.get_token", lambda: None)
    monkeypatch.setattr(hf_sparse, "inspect_checkpoint", None)
    for name, message in (("a/b/c", "Repo id must be"), ("user/name", "needs a token of the Hub")):
        assert main(["push", str(sparse), name]) == 1
        assert message in capsys.readouterr().err
        with pytest.raises(ValueError, match=message):
            hf_sparse.push_to_hub(tiny_model("llama"), name)


def test_labels_of_a_stream_are_texts_to_calibrate_on(tmp_path: Path) -> None:
    """A stream takes --labels as the same method does without --stream."""
    from tests.support.tiny_models import tiny_classifier

    tiny_classifier().save_pretrained(tmp_path / "dense")
    tiny_tokenizer().save_pretrained(tmp_path / "dense")
    rows = [{"sentence": line, "label": number % 3} for number, line in enumerate("abcd")]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    command = ["--pattern", "2:4", "--labels", str(tmp_path / "rows.jsonl"), *SMALL]
    weights = []
    for out, stream in (("whole", []), ("streamed", ["--stream"])):
        folders = [str(tmp_path / "dense"), str(tmp_path / out)]
        assert main(["prune", *folders, *command, *stream]) == 0
        model = hf_sparse.SparseBertForSequenceClassification.from_pretrained(folders[1])
        weights.append(model.state_dict())
    for name, value in weights[0].items():
        assert torch.equal(value, weights[1][name]), name


def test_pruning_from_python_with_nothing_to_write_is_not_refused(tmp_path: Path) -> None:
    model = made(UNSAVABLE)
    hf_sparse.prune_(model, SparsityConfig("2:4"), "wanda", tiny_batches(UNSAVABLE))
    with pytest.raises(ValueError, match="cannot be stored compressed"):
        hf_sparse.save_pretrained(model, tmp_path / "out")
    assert hf_sparse.measure_sparsity(model).sparsity >= 0.5
