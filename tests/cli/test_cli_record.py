"""`hf-sparse eval --record`: perplexity and accuracy in the card of the folder that was measured."""

from __future__ import annotations

from pathlib import Path

import pytest

from hf_sparse_cli import main
from tests.support.dense_folders import sparse_folders
from tests.support.tiny_models import prose


@pytest.fixture
def folders(tmp_path: Path) -> Path:
    sparse_folders(tmp_path)
    (tmp_path / "held_out.txt").write_text(prose()[:4000])
    return tmp_path


def test_perplexity_is_told_by_the_card(folders: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sparse, text = folders / "sparse", folders / "held_out.txt"
    before = (sparse / "model.safetensors").read_bytes()
    command = ["eval", str(sparse), "--text", str(text), "--window", "32", "--max-windows", "2"]
    assert main([*command, "--dense", str(folders / "dense"), "--record"]) == 0
    printed = dict(line.split()[:2] for line in capsys.readouterr().out.splitlines()[2:4])
    card = (sparse / "README.md").read_text()
    (row,) = [line for line in card.splitlines() if "perplexity, held" in line]
    name, dense, found = (cell.strip() for cell in row.strip("|").split("|"))
    assert name == "perplexity, held_out.txt, 2 x 32 tokens"
    assert float(found) == pytest.approx(float(printed["sparse"]), rel=1e-3)
    assert float(dense) == pytest.approx(float(printed["dense"]), rel=1e-3)
    assert (sparse / "model.safetensors").read_bytes() == before
    # The same weights are still known by their figures when they are saved again.
    assert main(["eval", str(sparse), "--text", str(text), "--window", "32", "--record"]) == 0
    card = (sparse / "README.md").read_text()
    assert "2 x 32 tokens" in card
    assert "all x 32 tokens | not measured" in card


def test_a_file_whose_name_no_card_takes_is_told_first(
    folders: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = folders / "a|b.txt"
    text.write_text("a")
    assert main(["eval", str(folders / "sparse"), "--text", str(text), "--record"]) == 1
    assert "wanted one line without" in capsys.readouterr().err
