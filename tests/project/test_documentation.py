"""The documentation agrees with the package: names, arguments, pages, and what the site shows."""

from __future__ import annotations

import ast
import importlib
import inspect
import re
import subprocess
import sys
from pathlib import Path
from typing import TypeGuard

import pytest

import hf_sparse
from hf_sparse.cli import commands
from hf_sparse_cli.messages import EXIT_CODES
from tests.support.documents import Block, blocks

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
SITE = (ROOT / "mkdocs.yml").read_text()


@pytest.mark.parametrize("block", list(blocks("python")), ids=str)
def test_a_block_calls_what_there_is_by_the_arguments_that_it_has(block: Block) -> None:
    for node in ast.walk(ast.parse(block.code)):
        if is_ours(node):
            assert hasattr(hf_sparse, node.attr), node.attr
        if isinstance(node, ast.Call) and is_ours(node.func):
            named = {keyword.arg: None for keyword in node.keywords if keyword.arg}
            call = getattr(hf_sparse, node.func.attr)
            inspect.signature(call).bind_partial(*node.args, **named)


def is_ours(node: ast.AST) -> TypeGuard[ast.Attribute]:
    """Whether it is `hf_sparse.NAME`."""
    return isinstance(node, ast.Attribute) and ast.unparse(node.value) == "hf_sparse"


def test_every_public_name_is_on_the_page_of_calls_once() -> None:
    told = re.findall(r"^::: (hf_sparse\S*)\.(\w+)$", (DOCS / "api.md").read_text(), re.MULTILINE)
    names = [name for _, name in told]
    deprecated = {name for name in hf_sparse.__all__ if f"{name}_" in hf_sparse.__all__}
    assert sorted(names) == sorted(set(hf_sparse.__all__) - {"__version__"} - deprecated)
    for module, name in told:
        assert getattr(importlib.import_module(module), name) is getattr(hf_sparse, name)


def test_every_page_is_on_the_site() -> None:
    listed = re.findall(r"^ +- (\S+\.md)$", SITE, re.MULTILINE)
    pages = {page.relative_to(DOCS).as_posix() for page in DOCS.rglob("*.md")}
    assert len(listed) == len(set(listed))
    assert pages <= set(listed)
    assert {name for name in listed if not (ROOT / name).exists()} <= pages


def test_there_is_a_way_to_do_everything_that_the_readme_offers() -> None:
    chooser = (ROOT / "README.md").read_text().partition("\n## Which part is for me?\n")[2]
    rows = chooser.partition("\n\nEvery")[0]
    calls = {name for name in re.findall(r"`(\w+)[(`]", rows) if name in hf_sparse.__all__}
    assert len(calls) >= 10
    told = (DOCS / "how-to.md").read_text()
    assert {name for name in calls if name not in told} == set()


def test_the_page_of_the_command_line_tells_commands_and_exit_codes() -> None:
    page = (DOCS / "command-line.md").read_text()
    rows = re.findall(r"^\| `?(\w+)`? \|", page, re.MULTILINE)
    assert [row for row in rows if row.isdigit()] == [str(code) for code in EXIT_CODES]
    assert set(commands.COMMANDS) <= set(rows)


def test_what_pages_link_to_outside_of_docs_is_brought_to_the_site() -> None:
    hooks = ast.parse((ROOT / "mkdocs_hooks.py").read_text())
    [brought] = [
        ast.literal_eval(node.value)
        for node in hooks.body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "BROUGHT"
    ]
    there = {file for pattern in brought for file in ROOT.glob(pattern)}
    pages = [*DOCS.rglob("*.md"), *(file for file in there if file.suffix == ".md")]
    missing = []
    for page in pages:
        for link in re.findall(r"\]\(([^)\s#:]+)[)#]", page.read_text()):
            target = (page.parent / link).resolve()
            if DOCS in target.parents or target == ROOT / "README.md":
                continue
            if target not in there and not (target.is_dir() and there & {*target.glob("*.md")}):
                missing.append(f"{page.relative_to(ROOT)}: {link}")
    assert missing == []


@pytest.mark.slow
def test_the_site_builds_without_a_broken_link(tmp_path: Path) -> None:
    pytest.importorskip("mkdocs")
    pytest.importorskip("mkdocstrings")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "benchmarks/results/peers.png").exists()
    pages = re.findall(r"\]\((\S+\.html)\)", (tmp_path / "llms.txt").read_text())
    assert len(pages) > 15
    for page in pages:
        assert (tmp_path / page).exists(), page
    assert "doc-signature" in (tmp_path / "api.html").read_text()
