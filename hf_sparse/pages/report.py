"""`report`: models as one HTML page that can be sent around, with the pictures for cards."""

from __future__ import annotations

import base64
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from hf_sparse.arguments import check_kinds
from hf_sparse.checkpoint.card import CARD_NAME
from hf_sparse.checkpoint.card_file import add_pictures
from hf_sparse.files.single import write_file
from hf_sparse.pages.comparison import comparison
from hf_sparse.pages.contents import model_page
from hf_sparse.pages.drawing import Picture, need_matplotlib
from hf_sparse.pages.facts import ModelFacts
from hf_sparse.pages.latency import time_ways
from hf_sparse.pages.sections import ModelPage, Section, all_pictures
from hf_sparse.pages.sources import Source, find_sources, read_facts
from hf_sparse.version import __version__

# By this a page is known to be one of ours, which a new one may replace.
_GENERATOR = '<meta name="generator" content="hf_sparse'
_TEMPLATES = Path(__file__).parent / "templates"


@dataclass(frozen=True)
class Report:
    """A page about one model or several; `save` writes it, a notebook shows it.

    Attributes:
        html: the page, with all that it needs.
        pictures: those on it, for `save_figures`.
        titles: what it calls the models.
    """

    html: str
    pictures: tuple[Picture, ...]
    titles: tuple[str, ...]

    def save(self, file: str | os.PathLike[str]) -> Path:
        """Write the page.

        Raises:
            ValueError: the file is there, and is no page of hf_sparse.
        """
        path = Path(file)
        check_page_file(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_file(path, self.html.encode())
        return path

    def save_figures(self, folder: str | os.PathLike[str]) -> list[Path]:
        """Write each picture as SVG and as PNG, on white; files of these names are replaced."""
        place, written = Path(folder), []
        place.mkdir(parents=True, exist_ok=True)
        for picture in self.pictures:
            for ending, content in (("svg", picture.svg.encode()), ("png", picture.png())):
                path = place / f"{picture.name}.{ending}"
                write_file(path, content)
                written.append(path)
        return written

    def _repr_html_(self) -> str:
        """The page in a frame, for notebooks."""
        template = _environment().from_string(
            '<iframe title="hf_sparse report" srcdoc="{{ html }}" width="100%" height="720" '
            'style="border:1px solid #8884"></iframe>'
        )
        return str(template.render(html=self.html))

    def __repr__(self) -> str:
        return (
            f"<Report: {', '.join(self.titles)}; {len(self.html) / 1e6:.2f} MB of HTML, "
            f"{len(self.pictures)} pictures; .save(file), .save_figures(folder)>"
        )


def report(
    models: Any,
    html: str | os.PathLike[str] | None = None,
    *,
    figures: str | os.PathLike[str] | None = None,
    base: Any = None,
    matrix: str | None = None,
    latency: bool = False,
    tokens: int = 128,
    repeats: int = 10,
) -> Report:
    """Show what is known of sparse models on one HTML page that fetches nothing.

    The page tells what was done to each model, where its zeros are, by block and by expert, how one
    matrix looks, how its nonzero weights are spread, what its files weigh, and the figures that were
    measured; of several models also quality against size and time. Each picture has a table that
    says the same.

    Args:
        models: the folder of a checkpoint, a name on the Hub, or a model in memory; several of them, or
            a mapping from titles to them. They may be dense, and of different families.
        html: file to write the page to; an earlier page of hf_sparse is replaced.
        figures: folder to write the pictures to, as SVG and PNG. In the folder of a checkpoint, its
            model card shows them.
        base: the dense model that all of these were made from, as one of `models`: its weights are
            shown beside, and how far each matrix is from it.
        matrix: name or glob of the matrix whose zeros are shown; the first of those that match. None:
            the first of the model.
        latency: also time a call of each model on this machine, with torch, compiled, and in ONNX
            Runtime where the extra `onnx` is installed. Models are loaded for that.
        tokens, repeats: of a timed call, and how many of each way.

    Memory: one matrix, and with `base` that of the dense model beside it; with `latency` the model.

    Returns:
        The page.

    Raises:
        ImportError: matplotlib is not installed, or with `latency` llvmlite.
        FileNotFoundError: no such folder.
        ValueError: a folder holds no checkpoint, or a damaged one; no matrix has that name; `html` is a
            file that hf_sparse did not write.
    """
    check_kinds(report, locals())
    need_matplotlib()
    if html is not None:
        check_page_file(Path(html))
    sources = find_sources(models)
    dense = None if base is None else next(iter(find_sources(base).values()))
    facts = [read_facts(title, source, dense, matrix) for title, source in sources.items()]
    if all(one.no_such_matrix for one in facts):
        raise ValueError(facts[0].no_such_matrix)
    if latency:
        alone = len(facts) == 1
        facts = [
            _timed(one, source, tokens, repeats, alone=alone)
            for one, source in zip(facts, sources.values(), strict=True)
        ]
    overview = comparison(facts)
    pages = [model_page(f"model-{number}", one) for number, one in enumerate(facts, 1)]
    sections = [overview, *(section for page in pages for section in page.sections)]
    made = Report(_render(overview, pages), tuple(all_pictures(sections)), tuple(sources))
    if html is not None:
        made.save(html)
    if figures is not None:
        made.save_figures(figures)
        folder = Path(figures)
        shown = {f"{folder.name}/{p.name}.png": f"{p.title}: {p.alt}" for p in made.pictures}
        add_pictures(folder.resolve().parent / CARD_NAME, shown)
    return made


def _timed(
    facts: ModelFacts, source: Source, tokens: int, repeats: int, *, alone: bool
) -> ModelFacts:
    """With times; on a page of several models, those that cannot be timed say why."""
    try:
        found, notes = time_ways(source, tokens, repeats)
    except ValueError as error:
        if alone:
            raise
        return facts.with_notes(f"It was not timed: {error}")
    return replace(facts, latency=found).with_notes(*notes)


def check_page_file(path: Path) -> None:
    """Refuse a file that is no page of ours: it would be lost.

    Raises:
        IsADirectoryError: it is a folder.
        ValueError: it is there, and something else.
    """
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder; wanted a file for the page.")
    if path.exists():
        with path.open(encoding="utf-8", errors="replace") as file:
            if _GENERATOR not in file.read(2000):
                raise ValueError(
                    f"{path} is there, and no page of hf_sparse: it would be lost. Give another name, "
                    "or move it away."
                )


def _environment() -> Any:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    loader = FileSystemLoader(_TEMPLATES)
    return Environment(
        loader=loader,
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def _render(overview: Section, pages: Sequence[ModelPage]) -> str:
    def source_of(picture: Picture) -> str:
        data = base64.b64encode(picture.page_svg.encode()).decode()
        return f"data:image/svg+xml;base64,{data}"

    known: Mapping[str, Any] = {
        "overview": overview,
        "pages": pages,
        "version": __version__,
        "date": datetime.now(UTC).date().isoformat(),
        "style": (_TEMPLATES / "style.css").read_text(encoding="utf-8"),
        "source_of": source_of,
        "title": ", ".join(page.title for page in pages),
    }
    return str(_environment().get_template("report.html").render(known))
