"""Publishing and pulling with the real client, against a stand-in for the Hub."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.exporting import needs_export
from tests.support.hub_stand_in import HubStandIn
from tests.support.processes import run

WEIGHTS = {
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "modeling_hf_sparse.py",
}
TOKENIZER = {"tokenizer.json", "tokenizer_config.json"}
GIVEN = {".gitattributes", "README.md"}


@pytest.mark.slow
def test_push_and_pull(tmp_path: Path) -> None:
    pytest.importorskip("peft")
    with HubStandIn() as hub:
        home = hub.environment(tmp_path / "home")
        done = run("push_sparse_models", tmp_path / "saved", variables=home)
        assert done.stdout.endswith("PULLED\n"), done.stdout + done.stderr
        for message in ("at other places", "--base is for adapters", "cannot be loaded from"):
            assert message in done.stderr, done.stderr
        assert "user/never" not in hub.repos
        assert "adapter_config.json" not in hub.files("user/moved")
        files = hub.files("user/tiny-sparse")
        assert "One file" in hub.commits("user/tiny-sparse")
        others = [set(hub.files(name)) for name in ("user/other", "user/third")]
        foreign = hub.files("user/moved")
        names = ("user/other", "user/third", "user/recovered")
        *cards, recovered = [hub.files(name)["README.md"] for name in names]
    assert set(files) == WEIGHTS | TOKENIZER | GIVEN
    assert all(other == WEIGHTS | GIVEN for other in others)
    assert {"onnx/export.json", "onnx/model.onnx", "onnx/README.md"} <= set(foreign)
    assert not (tmp_path / "saved" / "onnx").exists()
    # What was pulled knows where it comes from, and tells it wherever it is pushed.
    for text in (b"base_model: someone/tiny-llama", b"| method | magnitude |", b"| 11.25 | 12.5 |"):
        assert all(text in card for card in (files["README.md"], *cards))
    assert b"- tiny\n" in cards[0]
    assert b"| method | magnitude |" in recovered
    assert b"| method | merged adapter |" in recovered
    assert b"None were measured." in recovered  # the figures are those of the model before
    assert b"| perplexity, prose, after this step | 12.5 (dense 11.25) |" in recovered


@needs_export
@pytest.mark.slow
def test_graphs_are_pushed_beside_the_weights(tmp_path: Path) -> None:
    with HubStandIn() as hub:
        home = hub.environment(tmp_path / "home")
        done = run("push_graphs", tmp_path / "saved", variables=home)
        assert done.stdout.endswith("PULLED\n"), done.stdout + done.stderr
        first = hub.repos["user/tiny-sparse"][1].files
        files = hub.files("user/tiny-sparse")
        with_graph = hub.repos["user/graph"][1].files
        without_graph = hub.files("user/graph")
    graph = {"config.json", "export.json", "generation_config.json", "README.md"}
    graph |= {"model.onnx", "model.onnx.data"}
    assert {name for name in first if "/" in name} == {f"onnx/{name}" for name in graph | TOKENIZER}
    # A graph that is not uploaded anew goes; files that are not of hf_sparse stay.
    assert set(files) == WEIGHTS | TOKENIZER | GIVEN
    assert set(with_graph) == WEIGHTS | GIVEN | {f"onnx/{name}" for name in graph}
    assert b"base_model: someone/tiny-llama" in with_graph["onnx/README.md"].content
    assert {name for name in without_graph if "onnx" in name} == {"onnx/mine.txt"}
