"""What the command line tells beside results: the tour, progress, warnings, errors, completion."""

from __future__ import annotations

import argparse
import logging
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
from transformers.utils import logging as transformers_logging

from hf_sparse.cli import commands
from hf_sparse.cli.messages import _Once, messages
from hf_sparse_cli import main
from hf_sparse_cli.completion import SHELLS, script
from hf_sparse_cli.messages import EXIT_CODES
from hf_sparse_cli.parser import make_parser
from hf_sparse_cli.tour import PURPOSES
from hf_sparse_cli.upstream import commands_of
from tests.support.dense_folders import dense_folder


def run(monkeypatch: pytest.MonkeyPatch, action: Any, *flags: str) -> int:
    """The exit code of a command whose work is an action of ours."""
    monkeypatch.setattr(commands, "run", lambda options: action() or 0)
    return main(["inspect", ".", *flags])


def test_without_arguments_there_is_a_tour_of_all_commands(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main([]) == 0
    told = capsys.readouterr().out
    for name in commands_of(make_parser()):
        assert told.count(f"\n  {name} ") == 1, name
    shown = [line.strip() for line in told.splitlines() if line.startswith("  hf-sparse")]
    assert len(shown) >= 3
    for line in shown:
        make_parser().parse_args(line.split()[1:])


def test_each_command_has_one_purpose() -> None:
    names = [name for names in PURPOSES.values() for name in names]
    assert len(names) == len(set(names))
    assert set(names) <= set(commands_of(make_parser()))


@pytest.mark.parametrize("command", commands.COMMANDS)
def test_every_command_prints_json_and_has_the_flags_of_messages(
    command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="0"):
        main([command, "--help"])
    told = capsys.readouterr().out
    for flag in ("--json", "--quiet", "--verbose", "--debug"):
        assert f" {flag}" in told


def test_help_tells_the_exit_codes(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main(["--help"])
    told = capsys.readouterr().out
    for code, meaning in EXIT_CODES.items():
        assert f"{code:3}  {meaning}" in told


@pytest.mark.parametrize("line", ["--debug inspect .", "inspect . --debug"])
def test_the_flags_of_messages_stand_before_a_command_or_behind(line: str) -> None:
    assert make_parser().parse_args(line.split()).debug
    assert not hasattr(make_parser().parse_args(["inspect", "."]), "debug")


@pytest.mark.parametrize("error", [ValueError("so so"), RuntimeError("so so"), KeyError("so so")])
def test_an_error_has_a_traceback_only_where_it_is_asked_for(
    error: Exception, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail() -> None:
        raise error

    assert run(monkeypatch, fail) == 1
    told = capsys.readouterr()
    assert told.out == ""
    assert "so so" in told.err
    assert "Traceback" not in told.err
    assert ("--debug" in told.err) is not isinstance(error, ValueError)
    assert run(monkeypatch, fail, "--debug") == 1
    told = capsys.readouterr()
    assert "Traceback" in told.err
    assert "in fail" in told.err


def warn_of(module: str, text: str) -> None:
    """A warning as of a line of a module."""
    warnings.warn_explicit(text, UserWarning, f"{module}.py", 1, module=module)


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        ([], "hf-sparse: warning: give --num-samples\n"),
        (["--quiet"], ""),
        (["--verbose"], "hf-sparse: warning: give --num-samples\nhf-sparse: warning: theirs\n"),
    ],
)
def test_warnings_are_told_once_in_a_line_and_those_of_others_on_request(
    flags: list[str],
    told: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def work() -> None:
        warnings.simplefilter("always")
        if not (flags and flags[0] == "--verbose"):  # as the command line has set it before
            warnings.filterwarnings("ignore", module=r"(?!hf_sparse)")
        for _ in range(2):
            warn_of("hf_sparse.saving", "give num_samples")
            warn_of("torch.nn", "theirs")

    filters = list(warnings.filters)
    assert run(monkeypatch, work, *flags) == 0
    assert capsys.readouterr().err == told
    assert warnings.filters == filters


def options(**given: bool) -> argparse.Namespace:
    return argparse.Namespace(**{"json": False, **given})


@pytest.mark.parametrize(
    ("given", "terminal", "shown"),
    [
        ({}, True, True),
        ({}, False, False),
        ({"verbose": True}, False, True),
        ({"quiet": True}, True, False),
        ({"json": True}, True, False),
    ],
)
def test_progress_bars_are_for_people(
    given: dict[str, bool], terminal: bool, shown: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal, raising=False)
    with messages(options(**given)):
        assert transformers_logging.is_progress_bar_enabled() is shown
    assert transformers_logging.is_progress_bar_enabled()


@pytest.mark.parametrize(
    ("given", "count"), [({}, 1), ({"quiet": True}, 0), ({"verbose": True}, 2)]
)
def test_what_a_library_logs_is_told_once(given: dict[str, bool], count: int) -> None:
    told: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: told.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("transformers")
    logger.addHandler(handler)
    try:
        with messages(options(**given)):
            for _ in range(2):
                logging.getLogger("transformers.modeling_utils").warning("some weights")
        logging.getLogger("transformers.modeling_utils").warning("some weights")
    finally:
        logger.removeHandler(handler)
    assert told == ["some weights"] * (count + 1)


def test_a_run_shows_one_bar_for_each_stage_with_the_time_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    dense_folder(tmp_path)
    monkeypatch.chdir(tmp_path)
    capsys.readouterr()
    line = "prune dense out --pattern 2:4 --calibration text.txt --num-samples 2 --window 16"
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    assert main(line.split()) == 0
    told = capsys.readouterr()
    bars = told.err.replace("\r", "\n").split("\n")
    for stage in ("Loading weights", "Pruning blocks", "Saving"):
        (last,) = [bar for bar in bars if bar.startswith(f"{stage}: 100%")][-1:]
        assert "<00:00" in last  # the time left
    assert "saved to out" in told.out
    assert main([*line.split(), "--overwrite", "--quiet"]) == 0
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("shell", SHELLS)
def test_the_shell_completes_commands_and_flags(shell: str, tmp_path: Path) -> None:
    pytest.importorskip("shtab")
    text = script(make_parser(), shell)
    for name in (*commands.COMMANDS, "calibration", "sparsegpt"):
        assert name in text
    if shell == "bash":
        file = tmp_path / "hf-sparse"
        file.write_text(text)
        subprocess.run(["bash", "-n", str(file)], check=True)
        ask = "COMP_WORDS=(hf-sparse pru); COMP_CWORD=1; _shtab_hf_sparse; echo ${COMPREPLY[@]}"
        done = subprocess.run(
            ["bash", "-c", f"source {file}; {ask}"], capture_output=True, text=True, check=True
        )
        assert done.stdout.split() == ["prune"]


def test_without_shtab_its_install_line_is_told(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "shtab", None)
    assert main(["--completion", "bash"]) == 1
    assert "pip install 'hf_sparse[completion]'" in capsys.readouterr().err


def test_a_hub_that_does_not_answer_is_told_of_once() -> None:
    once = _Once(logging.WARNING)
    texts = [
        "'[Errno -2] Name or service not known' thrown while requesting HEAD an address",
        "Retrying in 1s [Retry 1/5].",
        "Retrying in 2s [Retry 2/5].",
        "another warning",
    ]
    records = [logging.makeLogRecord({"msg": text, "levelno": logging.WARNING}) for text in texts]
    shown = [record.getMessage() for record in records if once.filter(record)]
    assert shown == [
        "hf-sparse: the Hub does not answer; trying again, for half a minute at most",
        "another warning",
    ]
