"""The page of `report`: its structure, what it tells, and what hostile names become on it."""

from __future__ import annotations

import itertools
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch

import hf_sparse
from hf_sparse import FormatError, Metric, SparsityConfig
from hf_sparse.cli import main
from tests.support.mixtures import tiny_mixture
from tests.support.tiny_models import tiny_batches, tiny_classifier, tiny_model, tiny_tokenizer

pytest.importorskip("matplotlib", reason="the extra plots is not installed")

PERPLEXITY = "perplexity, prose"
HOSTILE = "</title><script>alert(1)</script>\"'&"
VOID = {"meta", "link", "img", "br", "hr", "input"}


class Page(HTMLParser):
    """What is in a page; tags that do not fit are collected."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.wrong: list[str] = []
        self.text = ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if not self.open or self.open.pop() != tag:
            self.wrong.append(tag)

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] != "style":
            self.text += f"{data} "

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    model = tiny_model("llama")
    model.save_pretrained(root / "dense")
    hf_sparse.prune_(model, SparsityConfig("2:4"), "wanda", tiny_batches("llama"))
    hf_sparse.save_pretrained(
        model,
        root / "llama",
        metrics=[Metric(PERPLEXITY, 12.5, 11.25), Metric(HOSTILE, 1.0)],
        base_model="someone/<b>tiny</b>",
        tokenizer=tiny_tokenizer(),
    )
    mixture = tiny_mixture("mixtral")
    hf_sparse.prune_(mixture, SparsityConfig("unstructured", 0.5), "magnitude", scope="global")
    hf_sparse.save_pretrained(mixture, root / "mixture", metrics=[Metric(PERPLEXITY, 20.0)])
    classifier = tiny_classifier()
    hf_sparse.prune_(classifier, SparsityConfig("column", 0.5), "magnitude")
    hf_sparse.save_pretrained(classifier, root / "bert")
    return {path.name: path for path in root.iterdir()}


@pytest.fixture(scope="module")
def made(folders: dict[str, Path]) -> Any:
    models = {HOSTILE: folders["llama"], "mixture": folders["mixture"], "bert": folders["bert"]}
    return hf_sparse.report(models, base=folders["dense"], matrix="*1.mlp.up_proj")


@pytest.fixture(scope="module")
def page(made: Any) -> Page:
    return Page(made.html)


@pytest.mark.slow
def test_the_page_is_well_formed_and_holds_all_that_it_shows(made: Any, page: Page) -> None:
    assert (page.wrong, page.open) == ([], [])
    assert len(made.html) < 3_000_000
    for tag in ("script", "iframe", "object", "base"):
        assert not page.all(tag), tag
    places = [a[key] or "" for _, a in page.tags for key in ("src", "href") if key in a]
    assert all(place.startswith(("data:", "#")) for place in places)
    assert "url(" not in made.html
    assert "@import" not in made.html


@pytest.mark.slow
def test_who_does_not_see_the_pictures_finds_what_they_show(page: Page) -> None:
    images, figures = page.all("img"), page.all("figure")
    assert len(images) == len(figures) > 10
    assert all(len(image["alt"] or "") > 40 for image in images)
    assert len(page.all("table")) >= len(figures)  # each picture has its own
    assert all(cell.get("scope") in ("row", "col") for cell in page.all("th"))
    names = [attributes["id"] for _, attributes in page.tags if attributes.get("id")]
    assert len(names) == len(set(names))
    assert {"header", "nav", "main", "footer", "h1"} <= {tag for tag, _ in page.tags}
    assert page.all("html")[0]["lang"] == "en"
    for _, attributes in page.tags:
        label = attributes.get("aria-labelledby")
        assert label is None or label in names
        target = attributes.get("href") or ""
        assert not target.startswith("#") or target[1:] in names
    levels = [int(tag[1]) for tag, _ in page.tags if re.fullmatch(r"h\d", tag)]
    assert levels[0] == 1
    assert all(after - before <= 1 for before, after in itertools.pairwise(levels))


def test_hostile_names_are_text(made: Any, page: Page) -> None:
    assert "<script" not in made.html
    assert "<b>" not in made.html
    assert HOSTILE in page.text
    assert "someone/<b>tiny</b>" in page.text
    assert any(HOSTILE in (image["alt"] or "") for image in page.all("img"))


def test_the_figures_are_those_of_the_models(folders: dict[str, Path], page: Page) -> None:
    for name in ("llama", "mixture", "bert"):
        report = hf_sparse.inspect_checkpoint(folders[name]).report
        assert f"{report.zeros:,} of {report.numel:,} target weights are zero" in page.text
        assert f"{report.model_sparsity:.1%}" in page.text
    for text in ("wanda", "12.5", "11.25", "+11.1%", "Zeros by block and expert", "up_proj.weight"):
        assert text in page.text, text
    # In each group of four of a 2:4 matrix two weights are left.
    groups = page.text.partition("2 of 4")[2][:40]
    assert "100.00%" in groups


@pytest.mark.slow
def test_no_step_and_no_metric_are_told(folders: dict[str, Path]) -> None:
    found = hf_sparse.report(folders["dense"], html=folders["dense"].parent / "dense.html")
    text = Page(found.html).text
    assert "No step was recorded" in text
    assert "No quality was measured" in text
    assert "front" not in text
    assert (folders["dense"].parent / "dense.html").read_text() == found.html


@pytest.mark.slow
def test_a_model_in_memory_is_shown_without_files(folders: dict[str, Path]) -> None:
    dense, model = tiny_model("llama"), tiny_model("llama")
    with torch.no_grad():
        for parameter in model.model.layers[0].mlp.parameters():
            parameter.mul_(0.5)
    found = hf_sparse.report(model, base=dense)
    text = Page(found.html).text
    assert "Sizes of files" not in text
    rows = re.findall(r"(?:\b0\.00%\s*){4}(?:50\.00%\s*){3}", text)
    assert rows, "the distance of a halved matrix is half of its norm"


@pytest.mark.slow
def test_times_are_measured_where_they_can_be(folders: dict[str, Path]) -> None:
    pytest.importorskip("llvmlite", reason="the extra runtime is not installed")
    models = {"llama": folders["llama"], "two parts": tiny_model("t5")}
    text = Page(hf_sparse.report(models, latency=True, tokens=16, repeats=2).html).text
    assert "It was not timed: a T5" in text
    table = text.partition("Time of a call: table")[2]
    assert re.search(r"torch\s+\d+\.\d\d.*compiled\s+\d+\.\d\d", table, re.DOTALL)
    with pytest.raises(ValueError, match="wanted a model of token ids alone"):
        hf_sparse.report(models["two parts"], latency=True)
    with pytest.raises(ValueError, match="tokens is 500"):
        hf_sparse.report(folders["llama"], latency=True, tokens=500)


def test_pictures_are_written_for_cards(made: Any, tmp_path: Path) -> None:
    short = type(made)(made.html, made.pictures[:2], made.titles)
    written = short.save_figures(tmp_path / "figures")
    assert [path.suffix for path in written] == [".svg", ".png"] * 2
    assert written[0].read_text().startswith("<svg")
    assert "var(--" not in written[0].read_text()
    assert "var(--ink)" in made.pictures[0].page_svg
    assert written[1].read_bytes()[:4] == b"\x89PNG"
    assert "srcdoc" in made._repr_html_()


def test_the_command_writes_a_page_and_no_other_file_is_lost(
    folders: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "mine.html"
    command = ["report", str(folders["bert"]), "--html", str(file), "--json"]
    assert main(command) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["models"], told["bytes"]) == (["bert"], file.stat().st_size)
    before = file.read_bytes()
    file.write_text("<html>my own</html>")
    assert main(command) == 1
    assert "no page of hf_sparse: it would be lost" in capsys.readouterr().err
    assert file.read_text() == "<html>my own</html>"
    assert before.startswith(b"<!doctype html>")


def test_what_is_no_checkpoint_is_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "graph").mkdir()
    (tmp_path / "graph" / "model.onnx").touch()
    (tmp_path / "compiled").mkdir()
    (tmp_path / "compiled" / "compiled.json").touch()
    file = tmp_path / "file"
    file.touch()
    wrong: list[tuple[Any, type[Exception], str]] = [
        (tmp_path / "graph", FormatError, "holds an ONNX graph"),
        (tmp_path / "compiled", FormatError, "holds a compiled model"),
        (tmp_path / "a" / "b" / "none", FileNotFoundError, "no such folder"),
        (file, NotADirectoryError, "is a file"),
        ([], ValueError, "no model"),
        (5, ValueError, "report takes a model"),
        ([folders["bert"], None], ValueError, "report takes a model"),
    ]
    for given, kind, message in wrong:
        with pytest.raises(kind, match=message):
            hf_sparse.report(given, tmp_path / "page.html")
    with pytest.raises(
        ValueError, match=r"no matrix of bert is called 'up_proj_'; wanted one of its"
    ):
        hf_sparse.report(folders["bert"], matrix="up_proj_")
    assert not (tmp_path / "page.html").exists()
