"""What fuzzing found stays fixed, and the harness finds what it is for."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.fuzz import trial as trials
from tests.fuzz.choices import Choices
from tests.fuzz.run import CORPUS
from tests.fuzz.subjects import SUBJECTS, Subject

FAST = [name for name, subject in SUBJECTS.items() if subject.fast]
FOUND = [
    pytest.param(folder.name, file, id=f"{folder.name}/{file.name}")
    for folder in sorted(CORPUS.iterdir())
    if folder.is_dir()
    for file in sorted(folder.iterdir())
]


@pytest.mark.few(2)
@pytest.mark.parametrize(("name", "file"), FOUND)
def test_what_was_found_once_is_handled(name: str, file: Path) -> None:
    assert trials.trial(name, file.read_bytes()) in ("refused", "same", "other")


@pytest.mark.few(6)
@pytest.mark.parametrize("name", FAST)
@settings(max_examples=15, deadline=None, derandomize=True, database=None)
@given(data=st.binary(min_size=8, max_size=64))
def test_changed_files_are_refused_or_read(name: str, data: bytes) -> None:
    trials.trial(name, data)


@pytest.mark.slow
@pytest.mark.parametrize("name", SUBJECTS)
@settings(max_examples=200, deadline=None, database=None, suppress_health_check=list(HealthCheck))
@given(data=st.binary(min_size=8, max_size=96))
def test_many_changed_files_are_refused_or_read(name: str, data: bytes) -> None:
    trials.trial(name, data)


def many_trials(name: str) -> None:
    for number in range(2000):
        trials.trial(name, number.to_bytes(2, "little") * 8)


def test_what_is_no_refusal_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def make(folder: Path) -> None:
        (folder / "a.json").write_text('{"numbers": [1, 2, 3]}')

    def read(folder: Path) -> str:
        text = (folder / "a.json").read_text()
        return str(len(text) // len(text[:22]) and 1 // text.count("3"))

    monkeypatch.setitem(SUBJECTS, "careless", Subject(make, read))
    monkeypatch.setattr(trials, "_is_ours", lambda error: True)
    with pytest.raises(trials.FindingError, match="ZeroDivisionError"):
        many_trials("careless")
    trials.honest.cache_clear()


def test_a_silent_change_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def make(folder: Path) -> None:
        (folder / "a.json").write_text('{"digests": 1, "numbers": [1, 2, 3]}')

    def read(folder: Path) -> str:
        return (folder / "a.json").read_text()

    subject = Subject(make, read, sealed=("a.json",))
    monkeypatch.setitem(SUBJECTS, "silent", subject)
    with pytest.raises(trials.FindingError, match="loads as something else"):
        many_trials("silent")
    trials.honest.cache_clear()


def test_choices_end_in_the_first_thing() -> None:
    choices = Choices(b"\x05")
    assert [choices.number(10), choices.number(10), choices.pick("xyz")] == [5, 0, "x"]
    assert not choices.once_in(1)
