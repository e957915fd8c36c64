"""The page in headless Chromium: no errors, nothing fetched, and it fits a phone and a desk."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import hf_sparse
from hf_sparse import Metric, SparsityConfig
from tests.support.mixtures import tiny_mixture
from tests.support.tiny_models import tiny_batches, tiny_model

pytestmark = pytest.mark.slow
pytest.importorskip("matplotlib", reason="the extra plots is not installed")
playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
WIDTHS = (390, 1440)


@pytest.fixture(scope="module")
def page_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("page")
    model = tiny_model("llama")
    hf_sparse.prune_(model, SparsityConfig("2:4"), "wanda", tiny_batches("llama"))
    metrics = [Metric("perplexity, a text with a long name, window of 512 tokens", 12.5, 11.25)]
    hf_sparse.save_pretrained(model, root / "a-model-with-a-rather-long-name", metrics=metrics)
    mixture = tiny_mixture("mixtral")
    hf_sparse.prune_(mixture, SparsityConfig("unstructured", 0.5), "magnitude", scope="global")
    hf_sparse.save_pretrained(mixture, root / "mixture", metrics=metrics)
    folders = [path for path in sorted(root.iterdir()) if path.is_dir()]
    hf_sparse.report(folders, root / "page.html", base=tiny_model("llama"))
    return root / "page.html"


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    if CHROMIUM is None:
        pytest.skip("Chromium is not installed: apt-get install chromium")
    with playwright.sync_playwright() as started:
        found = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield found
        found.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", WIDTHS)
def test_the_page_is_shown_without_errors(
    browser: Any, page_file: Path, tmp_path: Path, width: int, scheme: str
) -> None:
    context = browser.new_context(
        viewport={"width": width, "height": 900}, color_scheme=scheme, offline=True
    )
    page, wrong, asked = context.new_page(), list[str](), list[str]()
    page.on("console", lambda message: wrong.append(message.text))
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("request", lambda request: asked.append(request.url))
    page.goto(page_file.as_uri())
    assert wrong == []
    assert [url for url in asked if not url.startswith("data:")] == [page_file.as_uri()]
    images = page.evaluate(
        "[...document.images].map(i => [i.complete && i.naturalWidth > 0, i.alt.length > 0])"
    )
    assert len(images) > 10
    assert all(all(one) for one in images)
    # Nothing but tables in their own frames is wider than the window.
    assert page.evaluate("document.documentElement.scrollWidth") == width
    texts = "[...document.querySelectorAll('p, td, th, dt, a')]"
    fonts = f"{texts}.map(e => parseFloat(getComputedStyle(e).fontSize))"
    assert min(page.evaluate(fonts)) >= 14
    ink, paper = page.evaluate(
        "(s => [s.color, s.backgroundColor])(getComputedStyle(document.body))"
    )
    assert contrast(ink, paper) > 7
    shot = tmp_path / "shot.png"
    page.screenshot(path=shot, full_page=True)
    assert shot.stat().st_size > 50_000
    context.close()


def test_the_keyboard_reaches_the_content_and_opens_tables(browser: Any, page_file: Path) -> None:
    page = browser.new_context(viewport={"width": 390, "height": 800}).new_page()
    page.goto(page_file.as_uri())
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.className") == "skip"
    page.keyboard.press("Enter")
    assert page.url.endswith("#content")
    page.locator("summary").first.focus()
    page.keyboard.press("Enter")
    assert page.evaluate("document.querySelector('details').open")
    assert page.locator("details table").first.is_visible()


def contrast(one: str, other: str) -> float:
    """The ratio of WCAG 2.2 of two colours as CSS tells them."""

    def luminance(colour: str) -> float:
        parts = [int(part) / 255 for part in colour[4:-1].split(",")[:3]]
        linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    light, dark = sorted((luminance(one), luminance(other)), reverse=True)
    return (light + 0.05) / (dark + 0.05)
