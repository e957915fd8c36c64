"""What `mkdocs build` does beside rendering docs/: files from outside of it, and llms.txt.

Pages link to files of the repository as GitHub wants it (`../CONTRIBUTING.md`). On the site docs/ is
the root, and what is linked outside of it lies beside the pages, under its own path.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parent
# Files outside of docs/ that the site has; a link to another one is a broken link.
BROUGHT = (
    "CONTRIBUTING.md",
    "SECURITY.md",
    "CHANGELOG.md",
    "model_cards/*.md",
    "benchmarks/results/*",
)
LINK = re.compile(r"(?<=\]\()[^)\s#:]+(?=[)#])")


def on_files(files: Files, config: Any) -> Files:
    """Add what lies outside of docs/."""
    for pattern in BROUGHT:
        for path in sorted(ROOT.glob(pattern)):
            if path.is_file():
                place = path.relative_to(ROOT).as_posix()
                files.append(File.generated(config, place, abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Turn links from places in the repository into links from places on the site."""
    return LINK.sub(lambda match: site_link(page.file.src_uri, match[0]), markdown)


def site_link(page: str, link: str) -> str:
    """A link of a page, as it is on the site.

    Args:
        page: its place on the site.
        link: to a file, from the page's place in the repository.
    """
    brought = not (ROOT / "docs" / page).exists()
    folder = (ROOT / page if brought else ROOT / "docs" / page).parent
    target = (folder / link).resolve()
    if target.is_dir():
        target = min(target.glob("*.md"), default=target)
    if not target.is_relative_to(ROOT):
        return link
    place = target.relative_to(ROOT).as_posix().removeprefix("docs/")
    place = "index.md" if place == "README.md" else place
    return "../" * page.count("/") + place


def on_post_build(config: Any) -> None:
    """Write llms.txt: what the site has, for programs that read it."""
    lines = [f"# {config.site_name}", "", f"> {config.site_description}", ""]
    for section in config.nav:
        for title, pages in section.items():
            lines += [f"## {title}", "", *(f"- {described(page)}" for page in pages), ""]
    (Path(config.site_dir) / "llms.txt").write_text("\n".join(lines), encoding="utf-8")


def described(page: str) -> str:
    """A page's link, with its title and its first sentence."""
    file = ROOT / "docs" / page
    text = (file if file.exists() else ROOT / page).read_text(encoding="utf-8")
    title = re.search(r"^# (.*)$", text, re.MULTILINE)
    head, body = (title[1], text[title.end() :]) if title else (page, text)
    body = re.sub(r"^```.*?^```$", "", body, flags=re.DOTALL | re.MULTILINE)
    prose = [part for part in body.split("\n\n") if re.match(r"\s*[\w`\[]", part)]
    told = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", " ".join(prose[0].split())) if prose else ""
    sentence = re.split(r"(?<=[.])\s(?=[A-Z`])", told)[0]
    return f"[{head}]({page.removesuffix('.md')}.html): {sentence}"
