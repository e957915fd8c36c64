"""The files around the package (forms, workflows, citation, hooks, pages): they parse, and agree."""

from __future__ import annotations

import configparser
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

import hf_sparse

ROOT = Path(__file__).parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("model_cards/**/*.md")])
FORMS = sorted((ROOT / ".github/ISSUE_TEMPLATE").glob("*.yml"))
RELEASE = ROOT / ".github/workflows/release.yml"
PINNED = dict(
    line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line
)


def load(file: Path) -> Any:
    return yaml.safe_load(file.read_text())


def test_the_citation_names_this_version_and_license() -> None:
    citation = load(ROOT / "CITATION.cff")
    assert citation["cff-version"] == "1.2.0"
    assert {"message", "title", "authors"} <= citation.keys()
    assert citation["authors"] == [{"name": "The hf_sparse authors"}]
    assert citation["version"] == hf_sparse.__version__
    setup = configparser.ConfigParser(interpolation=None)
    setup.read(ROOT / "setup.cfg")
    assert citation["license"] == setup["metadata"]["license"]


def test_the_changelog_knows_this_version() -> None:
    assert f"\n## {hf_sparse.__version__} " in (ROOT / "CHANGELOG.md").read_text()


@pytest.mark.parametrize("file", FORMS, ids=lambda file: file.stem)
def test_an_issue_form_is_one(file: Path) -> None:
    form = load(file)
    assert form.keys() <= {"name", "description", "labels", "body"}
    assert form["name"]
    assert form["description"]
    ids = [field["id"] for field in form["body"] if field["type"] != "markdown"]
    assert len(ids) == len(set(ids)) >= 3
    for field in form["body"]:
        assert field["type"] in {"markdown", "textarea", "input", "dropdown", "checkboxes"}
        assert field["attributes"]["value" if field["type"] == "markdown" else "label"]
        for choice in field["attributes"].get("options", []):
            assert isinstance(choice, str), f"{choice!r} is no text to GitHub: quote it"
    assert any(field.get("validations", {}).get("required") for field in form["body"])


def test_there_are_forms_for_bugs_and_for_features() -> None:
    assert [file.stem for file in FORMS] == ["bug_report", "feature_request"]


def test_a_tag_is_tested_and_checked_before_it_is_published_without_a_secret() -> None:
    text = RELEASE.read_text()
    workflow = load(RELEASE)
    # YAML 1.1 reads the key `on` as true.
    assert list(workflow[True]) == ["push"]
    assert list(workflow[True]["push"]) == ["tags"]
    jobs = workflow["jobs"]
    assert set(jobs["publish"]["needs"]) == {"test", "build"}
    assert jobs["publish"]["permissions"] == {"id-token": "write"}
    assert workflow["permissions"] == {"contents": "read"}
    assert "secrets." not in text
    assert "password" not in yaml.dump(jobs)
    commands = [step["run"] for job in jobs.values() for step in job["steps"] if "run" in step]
    assert "make quality test" in commands
    build, check = commands.index("python -m build"), "python -m twine check --strict dist/*"
    assert commands.index(check) > build


@pytest.mark.parametrize(("tag", "same"), [("v" + hf_sparse.__version__, True), ("v9.9.9", False)])
def test_a_tag_of_another_version_is_not_built(tag: str, same: bool) -> None:
    steps = load(RELEASE)["jobs"]["build"]["steps"]
    (command,) = [step["run"] for step in steps if "GITHUB_REF_NAME" in step.get("run", "")]
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "GITHUB_REF_NAME": tag}
    done = subprocess.run(["sh", "-c", command], cwd=ROOT, env=environment, check=False)
    assert (done.returncode == 0) is same


def test_hooks_run_the_tools_that_are_pinned() -> None:
    hooks = [
        hook for repo in load(ROOT / ".pre-commit-config.yaml")["repos"] for hook in repo["hooks"]
    ]
    commands = [hook["entry"].removeprefix(".venv/bin/") for hook in hooks]
    assert [command.split()[0] for command in commands] == ["ruff", "ruff", "mypy"]
    assert {"ruff", "mypy"} <= PINNED.keys()
    quality = (ROOT / "Makefile").read_text().partition("\nquality:")[2].partition("\n\n")[0]
    for hook, command in zip(hooks, commands, strict=True):
        assert hook["language"] == "system"
        assert hook["entry"].startswith(".venv/bin/")
        assert f"$(BIN)/{command.removesuffix(' --force-exclude')}" in quality


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_the_links_of_a_page_lead_to_files_and_to_headings(page: Path) -> None:
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if link.startswith(("https://", "http://")):
            continue
        name, _, anchor = link.partition("#")
        target = page.parent / name if name else page
        assert target.exists(), f"{page.name} links to {link}"
        if anchor:
            assert anchor in headings(target), f"{page.name} links to {link}"


def headings(page: Path) -> set[str]:
    """The anchors that GitHub gives to the headings of a page."""
    titles = re.findall(r"^#+ (.*)$", page.read_text(), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def test_the_files_that_agents_and_reporters_read_are_there() -> None:
    for name in ("AGENTS.md", "CONTRIBUTING.md", "SECURITY.md", "LICENSE"):
        assert (ROOT / name).stat().st_size > 500
    assert "CONTRIBUTING.md" in (ROOT / "AGENTS.md").read_text()
    assert "make quality test" in (ROOT / ".github/pull_request_template.md").read_text()


def test_data_of_results_lie_beside_the_benchmarks() -> None:
    pages = [path for path in (ROOT / "docs").rglob("*") if path.is_file()]
    assert not [file for file in pages if file.suffix != ".md"]
    scripts = "".join(file.read_text() for file in (ROOT / "benchmarks").glob("*.py"))
    for name in re.findall(r'"(benchmarks/results/[^"]+)"', scripts):
        assert (ROOT / name).exists(), name
