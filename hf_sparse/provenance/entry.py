"""The provenance as an entry of `config.json`: plain values for JSON, and their strict reading.

`docs/format.md` describes the entry. Anybody may have written it: every text is one bounded line of
printable characters, every list is bounded, and what is not known is refused.
"""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import fields
from typing import Any, TypeVar

from hf_sparse.formats.error import FormatError
from hf_sparse.provenance.values import (
    CARD_DATA,
    LONGEST_LIST,
    LONGEST_TEXT,
    Calibration,
    Metric,
    Pairs,
    Provenance,
    Step,
    Value,
    is_line,
    is_number,
)

# The key of the entry in `config.json`.
ENTRY = "hf_sparse_provenance"
VERSION = 1

_Value = TypeVar("_Value")


def to_dict(provenance: Provenance) -> dict[str, Any]:
    """Plain values for JSON, without what is not known."""
    described = {
        "base_model": provenance.base_model,
        "steps": [_plain_step(step) for step in provenance.steps],
        "metrics": [_plain_metric(metric) for metric in provenance.metrics],
        "weights": provenance.weights,
        "card": {k: v if isinstance(v, str) else list(v) for k, v in provenance.card},
    }
    return {"version": VERSION, **_without_unknown(described)}


def _plain_step(step: Step) -> dict[str, Any]:
    calibration = step.calibration
    return _without_unknown(
        {
            **vars(step),
            "options": dict(step.options),
            "targets": None if step.targets is None else list(step.targets),
            "ignore": list(step.ignore),
            "calibration": None if calibration is None else _without_unknown(vars(calibration)),
            "distillation": dict(step.distillation),
            "versions": dict(step.versions),
            "metrics": [_plain_metric(metric) for metric in step.metrics],
        }
    )


def _plain_metric(metric: Metric) -> dict[str, Any]:
    return _without_unknown(
        {
            # JSON has no infinity.
            name: str(value) if isinstance(value, float) and not math.isfinite(value) else value
            for name, value in vars(metric).items()
        }
    )


def _without_unknown(values: Mapping[str, Any]) -> dict[str, Any]:
    return {
        key: value for key, value in values.items() if value is not None and value not in ([], {})
    }


def from_dict(values: Any) -> Provenance:
    """Read what `to_dict` wrote.

    Raises:
        FormatError: damaged, out of bounds, or written by a newer version.
    """
    version = _object(values, "the entry").get("version")
    if version != VERSION or type(version) is not int:
        raise FormatError(f"version is {version!r:.80}; this hf_sparse reads version {VERSION}")
    values = {key: value for key, value in values.items() if key != "version"}
    readers: dict[str, Callable[[Any, str], Any]] = {
        "base_model": _line,
        "steps": _list_of(_step),
        "metrics": _list_of(_metric),
        "weights": _line,
        "card": _card,
    }
    return Provenance(**_read(values, readers, "the entry"))


def _step(values: Any, name: str) -> Step:
    readers: dict[str, Callable[[Any, str], Any]] = {
        **dict.fromkeys(("method", "pattern"), _line),
        **dict.fromkeys(("options", "distillation", "versions"), _pairs),
        **dict.fromkeys(("targets", "ignore"), _list_of(_line)),
        "sparsity": _share,
        "calibration": _calibration,
        "seed": _integer,
        "date": _date,
        "metrics": _list_of(_metric),
    }
    return _made(Step, values, readers, name)


def _calibration(values: Any, name: str) -> Calibration:
    counts = {item.name: _integer for item in fields(Calibration) if item.name != "fingerprint"}
    return _made(Calibration, values, {**counts, "fingerprint": _line}, name)


def _metric(values: Any, name: str) -> Metric:
    figures = dict.fromkeys(("sparse", "dense"), _figure)
    return _made(
        Metric, values, {**dict.fromkeys(("name", "dataset", "task"), _line), **figures}, name
    )


def _made(
    kind: type[_Value],
    values: Any,
    readers: Mapping[str, Callable[[Any, str], Any]],
    name: str,
) -> _Value:
    read = _read(values, readers, name)
    parameters = inspect.signature(kind).parameters.values()
    needed = [parameter.name for parameter in parameters if parameter.default is parameter.empty]
    if missing := [key for key in needed if key not in read]:
        raise FormatError(f"{name} lacks the key {missing[0]!r}")
    try:
        return kind(**read)
    except ValueError as error:  # such as "|" in a metric's name
        raise FormatError(f"{name}: {error}") from error


def _read(
    values: Any, readers: Mapping[str, Callable[[Any, str], Any]], name: str
) -> dict[str, Any]:
    values = _object(values, name)
    if unknown := sorted(values.keys() - readers.keys()):
        raise FormatError(f"{name} has the unknown key {unknown[0]!r:.80}")
    return {key: readers[key](value, f"{name}: {key}") for key, value in values.items()}


def _object(value: Any, name: str) -> dict[str, Any]:
    if not isinstance(value, dict) or len(value) > LONGEST_LIST:
        raise _refused(name, value, f"an object of at most {LONGEST_LIST} keys")
    return value


def _list_of(read: Callable[[Any, str], Any]) -> Callable[[Any, str], tuple[Any, ...]]:
    def read_list(value: Any, name: str) -> tuple[Any, ...]:
        if not isinstance(value, list) or len(value) > LONGEST_LIST:
            raise _refused(name, value, f"a list of at most {LONGEST_LIST}")
        return tuple(read(item, name) for item in value)

    return read_list


def _pairs(value: Any, name: str) -> Pairs:
    read = {_line(key, name): _value(item, name) for key, item in _object(value, name).items()}
    return tuple(sorted(read.items(), key=lambda pair: pair[0]))


def _card(values: Any, name: str) -> tuple[tuple[str, str | tuple[str, ...]], ...]:
    def lines(value: Any, name: str) -> str | tuple[str, ...]:
        return _list_of(_line)(value, name) if isinstance(value, list) else _line(value, name)

    readers = {key: _line if key.startswith("license") else lines for key in CARD_DATA}
    return tuple(sorted(_read(values, readers, name).items()))


def _line(value: Any, name: str) -> str:
    if not isinstance(value, str) or not is_line(value):
        raise _refused(
            name, value, f"one line of printable text, of 1 to {LONGEST_TEXT} characters"
        )
    return value


def _value(value: Any, name: str) -> Value:
    """A line that may be empty, a number, a truth value, or null."""
    if value is None or value == "" or type(value) is bool or is_number(value):
        plain: Value = value
        return plain
    if not isinstance(value, str):
        raise _refused(name, value, "a text, a finite number, true, false or null")
    return _line(value, name)


def _integer(value: Any, name: str) -> int:
    if type(value) is not int or not -(2**63) <= value < 2**63:
        raise _refused(name, value, "a whole number")
    return value


def _share(value: Any, name: str) -> float:
    if type(value) not in (int, float) or not 0 <= value <= 1:
        raise _refused(name, value, "a number in [0, 1]")
    return float(value)


def _figure(value: Any, name: str) -> float:
    if type(value) not in (int, float) and value not in ("inf", "-inf", "nan"):
        raise _refused(name, value, "a number")
    try:
        return float(value)
    except OverflowError as error:
        raise _refused(name, "an integer", "a number") from error


def _date(value: Any, name: str) -> str:
    if not isinstance(value, str) or not re.fullmatch(r"\d{4}-\d\d-\d\d", value, re.ASCII):
        raise _refused(name, value, "a day such as 2026-01-31")
    return value


def _refused(name: str, value: Any, wanted: str) -> FormatError:
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) >= 2**63:
        value = "a huge number"
    return FormatError(f"{name} is {str(value)[:80]!r}; wanted {wanted}")
