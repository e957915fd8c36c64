"""The file of a model card: which card is written where one may be already."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from hf_sparse.checkpoint.card import METRICS_TITLE, NO_METRICS, OUR_FACT, Card, metrics_table
from hf_sparse.files.single import write_file
from hf_sparse.provenance.values import Metric

_PICTURES_TITLE = "## Pictures"
# Metadata that an older card may have got by hand, and that its successor keeps.
_KEPT_DATA = ("license", "license_name", "license_link", "language", "datasets")


def settle(new: str, old: str | None, place: str) -> tuple[str, str | None]:
    """Decide which card is written where one may be already.

    A card of somebody else stays, with a warning. A card of ours stays, with what was added to it by
    hand, as long as it tells all that the new one does. Else the new one takes its place, and keeps the
    license, the language and the data sets of the old metadata.

    Args:
        new: the text of the card that is to be written.
        old: the text that is there; None: nothing.
        place: of the old one, for the warning.

    Returns:
        The card, and a warning if the new one is not written.
    """
    if old is None:
        return new, None
    if OUR_FACT not in old and _body(old):
        return old, (
            f"{place} is no card of hf_sparse and stays: the model card was not written. To get it, "
            "move that file away and save again."
        )
    new = _with_data(new, _metadata(old))
    missing = [part for part in _body(new).split("\n\n") if part[0] != "#" and part not in old]
    if not missing and _covers(_metadata(old), _metadata(new)):
        return old, None
    if missing == [NO_METRICS] and METRICS_TITLE in old:
        return _with_section(old, NO_METRICS), None
    return new, None


def write_card(card: Card, file: Path, old: Path) -> str | None:
    """Write a card to `file`, or the one at `old` if that is to stay: see `settle`.

    Returns:
        A warning if the new one is not written.
    """
    text = old.read_text(encoding="utf-8", errors="replace") if old.exists() else None
    settled, warning = settle(card.text(), text, str(old))
    if settled != text:
        file.write_text(settled, encoding="utf-8")
    return warning


def add_pictures(file: Path, pictures: Mapping[str, str]) -> bool:
    """Let a card of ours show pictures, instead of those that it showed.

    Args:
        file: the card.
        pictures: what is to be seen on each, by its path from the card's folder.

    Returns:
        Whether there is such a card.
    """
    text = file.read_text(encoding="utf-8", errors="replace") if file.is_file() else ""
    if OUR_FACT not in text:
        return False
    before, title, rest = text.partition(f"\n{_PICTURES_TITLE}\n")
    _, next_title, after = rest.partition("\n## ")
    shown = "\n\n".join(f"![{_alt(alt)}]({path})" for path, alt in pictures.items())
    text = f"{before.rstrip()}\n{next_title}{after}" if title else text
    write_file(file, f"{text.rstrip()}\n\n{_PICTURES_TITLE}\n\n{shown}\n".encode())
    return True


def _alt(text: str) -> str:
    """A line of text in the brackets of a picture."""
    return re.sub(r"([\\`\[\]<>|])", r"\\\1", " ".join(text.split()))


def with_metrics(text: str, metrics: Sequence[Metric]) -> str | None:
    """A card of ours with these figures in its section of metrics; None if it is no card of ours."""
    if OUR_FACT not in text or METRICS_TITLE not in text:
        return None
    return _with_section(text, metrics_table(metrics))


def _with_section(text: str, section: str) -> str:
    """A card with another text in its section of metrics."""
    before, title, rest = text.partition(METRICS_TITLE)
    _, next_title, after = rest.partition("\n## ")
    return f"{before}{title}\n\n{section}\n{next_title}{after}"


def _body(text: str) -> str:
    """A card without its metadata."""
    return re.sub(r"\A\s*---\r?\n.*?\r?\n---[ \t]*(\r?\n|\Z)", "", text, flags=re.DOTALL).strip()


def _metadata(text: str) -> dict[str, Any]:
    """The metadata of a card; none if they cannot be read."""
    if _body(text) == text.strip():
        return {}
    try:
        return dict(ModelCard(text, ignore_metadata_errors=True).data.to_dict())
    except Exception:  # whatever YAML makes of a file by hand
        return {}


def _with_data(text: str, old: Mapping[str, Any]) -> str:
    """A card with metadata of an older one that it does not have itself."""
    data = _metadata(text)
    kept = {key: old[key] for key in _KEPT_DATA if key in old and key not in data}
    if not kept:
        return text
    return f"---\n{ModelCardData(**{**data, **kept}).to_yaml()}\n---\n\n{_body(text)}\n"


def _covers(old: Mapping[str, Any], new: Mapping[str, Any]) -> bool:
    """Whether the old metadata hold every entry of the new ones."""

    def texts(value: Any) -> set[str]:
        return set(map(str, value)) if isinstance(value, list) else {str(value)}

    return all(key in old and texts(value) <= texts(old[key]) for key, value in new.items())
