"""Examples of zero-shot tasks: what a model is asked, in the four layouts that rows may have.

| a row has                       | the model is asked                                             |
|---------------------------------|----------------------------------------------------------------|
| context, choices, label         | which choice follows the context most likely                   |
| contexts, continuation, label   | after which context the continuation is most likely            |
| good, bad (paradigm)            | which sentence is more likely                                  |
| context, continuation           | whether the continuation is what it would say, token for token |

Texts are joined as lm-evaluation-harness joins them: one space before a choice, a continuation and a
sentence (https://github.com/EleutherAI/lm-evaluation-harness, its `target_delimiter`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hf_sparse.calibration.texts import check_unicode
from hf_sparse.suggestions import shortened

_DELIMITER = " "
LAYOUTS = (
    ("context", "choices", "label"),
    ("contexts", "continuation", "label"),
    ("good", "bad"),
    ("context", "continuation"),
)


@dataclass(frozen=True)
class Example:
    """One question.

    Attributes:
        requests: the context and the continuation of each choice; of a single one only whether it is
            greedy counts.
        label: index of the right choice; None of a single continuation.
        lengths: characters of each choice, by which `acc_norm` divides; empty where the choices are
            contexts or sentences.
        group: the mean over an example's task is the mean of its groups' means; None: it has none.
    """

    requests: tuple[tuple[str, str], ...]
    label: int | None
    lengths: tuple[int, ...] = ()
    group: str | None = None


def example_of(row: Any, place: str) -> Example:
    """The question that a row asks.

    Args:
        row: in one of the layouts above; other fields are passed over.
        place: of the row, for errors.

    Raises:
        ValueError: it has none of the layouts, or a value of another kind.
    """
    fields = layout_of(row)
    if fields is None:
        found = ", ".join(map(str, row)) if isinstance(row, Mapping) else shortened(row)
        wanted = "; or ".join(", ".join(fields) for fields in LAYOUTS)
        raise ValueError(f"{place} has {found or 'no fields'}; wanted the fields {wanted}.")
    if fields == ("good", "bad"):
        pair = [_text(row, name, place) for name in fields]
        paradigm = row.get("paradigm")
        group = None if paradigm is None else str(paradigm)
        return Example(tuple(("", _DELIMITER + text) for text in pair), 0, group=group)
    if fields == ("context", "continuation"):
        request = (
            _text(row, "context", place, empty=True),
            _DELIMITER + _text(row, fields[1], place),
        )
        return Example((request,), None)
    if fields[0] == "contexts":
        contexts, after = _texts(row, "contexts", place), _text(row, "continuation", place)
        requests = tuple((context, _DELIMITER + after) for context in contexts)
        return Example(requests, _label(row, len(contexts), place))
    context = _text(row, "context", place, empty=True)
    choices = _texts(row, "choices", place)
    requests = tuple((context, _DELIMITER + choice) for choice in choices)
    return Example(requests, _label(row, len(choices), place), tuple(map(len, choices)))


def layout_of(row: Any) -> tuple[str, ...] | None:
    """The fields of the layout that a row has; None if it has none."""
    if not isinstance(row, Mapping):
        return None
    return next((fields for fields in LAYOUTS if all(name in row for name in fields)), None)


def _text(row: Mapping[str, Any], name: str, place: str, *, empty: bool = False) -> str:
    text = row[name]
    if not isinstance(text, str) or not (text or empty):
        raise ValueError(f"{place}: {name} is {shortened(text)}; wanted a text.")
    check_unicode(text)
    return text


def _texts(row: Mapping[str, Any], name: str, place: str) -> Sequence[str]:
    texts = row[name]
    if not isinstance(texts, Sequence) or isinstance(texts, str) or len(texts) < 2:
        raise ValueError(
            f"{place}: {name} is {shortened(texts)}; wanted a list of two texts or more."
        )
    return [_text({f"{name}[{i}]": text}, f"{name}[{i}]", place) for i, text in enumerate(texts)]


def _label(row: Mapping[str, Any], count: int, place: str) -> int:
    label = row["label"]
    if type(label) is not int or not 0 <= label < count:
        raise ValueError(
            f"{place}: label is {shortened(label)}; wanted the index of the right one of {count}, 0 to "
            f"{count - 1}."
        )
    return label
