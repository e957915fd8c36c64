"""The Gradio app: what the Hub reads of it, and the app itself in headless Chromium."""

from __future__ import annotations

import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import SpaceCard
from transformers import AutoModelForCausalLM

import hf_sparse
from tests.support.processes import environment
from tests.support.tiny_models import prose, tiny_model, tiny_tokenizer

SPACE = Path(__file__).parents[2] / "examples/space"
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")


def test_the_hub_is_told_what_the_app_needs() -> None:
    data = SpaceCard.load(SPACE / "README.md").data
    assert (data.sdk, data.app_file, data.license) == ("gradio", "app.py", "apache-2.0")
    assert (SPACE / data.app_file).exists()
    assert len(data.short_description) <= 60  # the Hub takes no more
    code = (SPACE / "app.py").read_text()
    for model in data.models:
        assert f'"{model}"' in code
    wanted = (SPACE / "requirements.txt").read_text().splitlines()
    major = data.sdk_version.partition(".")[0]
    assert wanted == [f"gradio>={major}.0,<{int(major) + 1}", "hf_sparse[runtime]"]


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Where the app runs, with a tiny model."""
    pytest.importorskip("gradio", reason="gradio is not installed")
    pytest.importorskip("llvmlite", reason="the extra runtime is not installed")
    folder = tmp_path_factory.mktemp("space") / "tiny"
    tiny_model("llama", eos_token_id=None).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [sys.executable, SPACE / "app.py", "--models", folder, "--port", port]
    process = subprocess.Popen(
        [*map(str, command)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment(HF_HUB_OFFLINE="1", GRADIO_ANALYTICS_ENABLED="False"),
    )
    found = f"http://127.0.0.1:{port}"
    for _ in range(240):
        assert process.poll() is None, process.stdout and process.stdout.read()
        try:
            urllib.request.urlopen(found, timeout=5).close()
            break
        except OSError:
            time.sleep(0.5)
    yield found
    process.terminate()
    process.wait(timeout=30)


@pytest.mark.slow
@pytest.mark.parametrize("width", [390, 1440])
def test_a_visitor_prunes_asks_and_downloads(address: str, width: int, tmp_path: Path) -> None:
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    if CHROMIUM is None:
        pytest.skip("Chromium is not installed: apt-get install chromium")
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": width, "height": 900}, accept_downloads=True)
        page.set_default_timeout(120_000)
        wrong, elsewhere = list[str](), list[str]()
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on(
            "request",
            lambda r: elsewhere.append(r.url) if not r.url.startswith((address, "data:")) else None,
        )
        page.goto(address)
        drive(page, playwright.expect)
        page.screenshot(path=tmp_path / f"space-{width}.png", full_page=True)
        with page.expect_download() as download:
            page.get_by_text("Download the sparse model").click()
        download.value.save_as(tmp_path / "sparse.zip")
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        assert wrong == []
        assert [url for url in elsewhere if not url.startswith("blob:")] == []
        browser.close()
    zipfile.ZipFile(tmp_path / "sparse.zip").extractall(tmp_path / "model")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert hf_sparse.measure_sparsity(model).sparsity == pytest.approx(0.5, abs=1e-3)


def drive(page: Any, expect: Any) -> None:
    """Prune the first model by its first pattern, then ask."""
    assert page.get_by_role("button", name="Answer").is_disabled()
    page.get_by_role("button", name="Prune").click()
    told = page.locator("#told")
    expect(told).to_contain_text("weights in the blocks are zero", timeout=120_000)
    assert "50.0%, 2:4" in told.inner_text()
    page.get_by_label("Text", exact=True).fill(prose()[:60])
    page.get_by_role("button", name="Answer").click()
    table = page.locator("#table")
    expect(table).to_contain_text("ms a token", timeout=120_000)
    rows = re.findall(r"(dense|sparse)\s+(\S+%)\s+([\d.]+)\s+([\d.]+)", table.inner_text())
    assert [(row[0], row[1]) for row in rows] == [("dense", "0.0%"), ("sparse", "50.0%")]
    assert all(float(value) > 0 for row in rows for value in row[2:])
    for answer in ("#dense", "#sparse"):
        assert page.locator(f"{answer} textarea").input_value()
