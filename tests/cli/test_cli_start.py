"""The command line before it runs: help and wrong usage, without torch; how it ends when stopped."""

from __future__ import annotations

import argparse
import json
import re
import signal
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path

import pytest

from hf_sparse.cli import commands
from hf_sparse.effort.stages import EFFORTS
from hf_sparse.exporters import QUANTIZATIONS
from hf_sparse.formats import FORMATS
from hf_sparse.patterns import Pattern
from hf_sparse.pruning import on_disk, streaming
from hf_sparse.pruning.allocation import ALLOCATIONS
from hf_sparse.pruning.composition import REFINEMENTS, TOKEN_WEIGHTS, Composition
from hf_sparse.pruning.methods import EXPERT_METHODS, METHODS
from hf_sparse.pruning.options import SCOPES
from hf_sparse.pruning.quantize import ROUNDINGS
from hf_sparse.quantization import BITS, GROUP_SIZES
from hf_sparse.recovery.methods import RECOVERIES
from hf_sparse.zeroshot.tasks import TASKS
from hf_sparse_cli import choices, main
from hf_sparse_cli.parser import make_parser
from hf_sparse_cli.places import unfinished
from hf_sparse_cli.usage import implied_sparsity
from tests.support.dense_folders import calibration, dense_folder
from tests.support.processes import command, environment, run

# Arguments that are refused, and what is told. OLD: an earlier output, FILE: a text, EMPTY: a folder.
USAGE = [
    ("--quiet", "the following arguments are required: COMMAND"),
    ("prun", "invalid choice: 'prun'.*Did you mean 'prune'?"),
    ("prun a b --sparsity 0.5", "Did you mean 'prune'?"),
    ("--verison", "unknown flag --verison. Did you mean '--version'?"),
    ("prune EMPTY", "required: OUTPUT"),
    (
        "prune EMPTY out --sparsity 0.5 --methd wanda",
        "unknown flag --methd. Did you mean '--method'?",
    ),
    ("prune EMPTY --patern 2:4", "unknown flag --patern. Did you mean '--pattern'?"),
    ("prune EMPTY out --patern=2:4", "unknown flag --patern. Did you mean '--pattern'?"),
    ("prune EMPTY out --xyz 1", "unknown flag --xyz."),
    ("eval EMPTY --txt FILE", "unknown flag --txt. Did you mean '--text'?"),
    (
        "prune EMPTY out --sparsity 0.5 --method wonda",
        "invalid choice: 'wonda'.*Did you mean 'wanda'?",
    ),
    ("prune EMPTY out --sparsity 0.5 --format gap5", "invalid choice: 'gap5'.*Did you mean 'gap"),
    (
        "prune EMPTY out --sparsity 0.5 --dtype flaot32",
        "invalid choice: 'flaot32'.*Did you mean 'float32'?",
    ),
    ("prune EMPTY out --sparsity half", "'half' is no number; wanted a fraction of zeros, as 0.5."),
    ("prune EMPTY out --sparsity 50%", "'50%' is no number.*Did you mean 0.5?"),
    ("prune EMPTY out --sparsity 0,25", "'0,25' is no number.*Did you mean 0.25?"),
    ("prune EMPTY out --pattern 2:4", "needs calibration text: --calibration FILE"),
    ("prune EMPTY out --pattern 2:4 --method magnitude --refine swaps", "needs calibration text"),
    ("prune EMPTY out --pattern 2-4", "unknown pattern '2-4'.*Did you mean '2:4'?"),
    ("prune EMPTY out --pattern 4x1", "Did you mean 'block:4x1'?"),
    ("prune EMPTY out --pattern colum", "Did you mean 'column'?"),
    ("prune EMPTY out --pattern 4:2", "wanted N:M with 1 <= N < M"),
    ("prune EMPTY out --sparsity 80", "sparsity is 80.*Did you mean --sparsity 0.8?"),
    ("prune EMPTY out --sparsity 1", r"sparsity is 1; wanted a fraction of zeros in [0, 1)."),
    ("prune EMPTY out --sparsity nan", "sparsity is nan; wanted a fraction"),
    ("prune EMPTY out", "pattern 'unstructured' needs a sparsity"),
    ("prune EMPTY out --pattern 2:4 --sparsity 0.7", "fixes the sparsity at 0.5"),
    (
        "prune EMPTY out --sparsity 0.5 --scope layer",
        "--scope is for the methods magnitude and taylor",
    ),
    ("prune EMPTY out --sparsity 0.5 --method magnitude --scope all", "one of layer, global"),
    (
        "prune EMPTY out --sparsity 0.5 --method magnitude --option scope=all",
        "one of layer, global",
    ),
    ("prune EMPTY out --sparsity 0.5 --method alps --option a=1", "has the options damping=0.01"),
    (
        "prune EMPTY out --sparsity 0.5 --method sparsegpt --option blocksize=3",
        "method 'sparsegpt' has the options damping=0.01, block_size=128. Did you mean 'block_size'?",
    ),
    ("prune EMPTY out --sparsity 0.5 --option blocksize=3", "'wanda' has no options of its own"),
    (
        "prune EMPTY out --sparsity 0.5 --method alps --option damping",
        "wanted a value too, as --option damping=0.01",
    ),
    ("prune EMPTY out --sparsity 0.5 --option refine=swaps", "a flag of its own: --refine swaps"),
    ("prune EMPTY out --sparsity 0.5 --method prox_local", "learns N:M masks"),
    ("prune EMPTY out --pattern 2:4 --allocation owl", "fixes the sparsity of every block"),
    ("prune EMPTY out --sparsity 0.5 --calibration none.txt", "no such file: none.txt"),
    ("prune EMPTY out --sparsity 0.5 --calibration EMPTY", "is a folder; wanted a file of text"),
    ("prune EMPTY out --sparsity 0.5 --calibration FILE --window 0", "--window is 0; wanted at le"),
    ("prune EMPTY out --sparsity 0.5 --calibration FILE --resume", "give --stream too"),
    ("prune EMPTY out --sparsity 0.5 --method taylor --labels FILE --stream", "do not --stream"),
    ("prune EMPTY out --sparsity 0.5 --labels FILE --fields a,a", "the name of a text, or two"),
    ("prune ./none out --sparsity 0.5 --calibration FILE", "no such folder: ./none"),
    ("prune FILE out --sparsity 0.5 --calibration FILE", "is a file; wanted a folder, or a model"),
    ("prune EMPTY EMPTY --sparsity 0.5 --calibration FILE", "the dense model would be lost"),
    ("prune EMPTY OLD --sparsity 0.5 --calibration FILE", "holds config.json and 1 more.*--overwr"),
    ("prune EMPTY FILE --sparsity 0.5 --calibration FILE", "is a file; wanted a folder to save in"),
    ("prune EMPTY FILE/out --sparsity 0.5 --calibration FILE", "is a file; wanted a folder to sav"),
    ("prune EMPTY out --sparsity 0.5 --effort minute", "Did you mean 'minutes'?"),
    ("prune EMPTY out --effort minutes --calibration FILE", "needs a sparsity: --sparsity 0.5"),
    ("prune EMPTY out --pattern 2:4 --effort hours", "--effort needs calibration text"),
    (
        "prune EMPTY out --pattern 2:4 --effort hours --method alps --calibration FILE",
        "--effort chooses what --method tells",
    ),
    (
        "prune EMPTY out --pattern 2:4 --effort hours --stream --calibration FILE",
        "--effort chooses what --stream tells",
    ),
    ("prune EMPTY out --recipe none.json --calibration FILE", "no such recipe: none.json"),
    ("prune EMPTY out --recipe FILE --effort hours --calibration FILE", "give one of them"),
    (
        "prune EMPTY out --recipe FILE --pattern 2:4 --calibration FILE",
        "--recipe tells what --pattern",
    ),
    ("prune EMPTY out --recipe FILE --format gap8 --calibration FILE", "--recipe tells what --for"),
    ("prune EMPTY out --sparsity 0.5 --save-recipe a --calibration FILE", "is for --effort and"),
    ("recover EMPTY out", "required: --data"),
    ("recover EMPTY OLD --data FILE", "--overwrite"),
    ("recover EMPTY out --data FILE --lr 0", "--lr is 0.0; wanted a number > 0"),
    ("recover EMPTY out --data FILE --r 4", "--r is for the methods lora and shira"),
    ("recover EMPTY out --data FILE --epochs 0", "--epochs is 0; wanted at least 1"),
    ("eval EMPTY", "one of the arguments --text --labels --tasks is required"),
    ("eval EMPTY --tasks piqa,arc_esay", "unknown task 'arc_esay'.*Did you mean 'arc_easy'?"),
    ("eval EMPTY --tasks piqa --task-data none", "no such folder: none"),
    ("eval user/name --tasks piqa --record", "--record writes into MODEL's folder"),
    ("eval EMPTY --tasks piqa --limit 0", "--limit is 0; wanted at least 1"),
    ("eval user/name --text FILE --record", "--record writes into MODEL's folder"),
    ("eval EMPTY --text FILE --limit 3", "--limit is for --tasks alone"),
    ("eval EMPTY --text none.txt", "no such file: none.txt"),
    ("inspect none", "no such folder: none"),
    ("inspect odl", "no such folder: odl. Did you mean old?"),
    ("bench EMPTY --threads 0", "--threads is 0; wanted at least 1"),
    ("shrink EMPTY EMPTY", "the larger model would be lost"),
    ("shrink EMPTY OLD", "--overwrite"),
    ("export EMPTY out --quantize static", "--quantize static calibrates on text"),
    ("export EMPTY out --calibration FILE", "is for --quantize static alone"),
    ("export EMPTY FILE", "is a file; wanted a folder to save in"),
    ("push none user/name", "no such folder: none"),
    ("convert none out", "no such folder: none"),
    ("convert EMPTY OLD", "--overwrite"),
]


@pytest.fixture
def places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    monkeypatch.chdir(tmp_path)
    for name in ("old", "empty"):
        (tmp_path / name).mkdir()
    for name in ("old/config.json", "old/README.md", "text.jsonl"):
        (tmp_path / name).write_text("{}")
    return {name: str(tmp_path / place) for name, place in _PLACES.items()}


_PLACES = {"OLD": "old", "EMPTY": "empty", "FILE": "text.jsonl"}


def test_help_and_wrong_usage_are_told_without_torch(places: dict[str, str]) -> None:
    lines = [line for line, _ in USAGE]
    for name, place in places.items():
        lines = [line.replace(name, place) for line in lines]
    helps = ["--help", *(f"{command} --help" for command in commands.COMMANDS), "--version"]
    done = run("run_command_lines", text=json.dumps([*helps, *lines]))
    assert done.returncode == 0, done.stderr
    told, slow = json.loads(done.stdout)
    assert slow == []
    for line, (code, text) in zip(helps, told, strict=False):
        assert code == 0, (line, text)
    for (line, message), (code, text) in zip(USAGE, told[len(helps) :], strict=True):
        assert code in (1, 2), (line, text)
        first, _, second = message.partition(".*")
        assert first in text, (line, text)
        assert second in text.partition(first)[2], (line, text)
        assert "Traceback" not in text


@pytest.mark.parametrize("arguments", [["--help"], ["prune", "--help"], ["prune", "model", "out"]])
def test_the_start_loads_nothing_slow(arguments: list[str]) -> None:
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "hf_sparse_cli", *arguments],
        capture_output=True,
        text=True,
        env=environment(),
        check=False,
    )
    loaded = set(re.findall(r"^import time:.*\| +(\S+)$", done.stderr, flags=re.MULTILINE))
    assert "hf_sparse_cli.parser" in loaded
    assert not loaded & {"torch", "transformers", "numpy", "hf_sparse"}


def test_the_choices_are_those_of_the_package() -> None:
    assert list(choices.METHODS) == list(METHODS)
    assert list(choices.EXPERT_METHODS) == list(EXPERT_METHODS)
    for told, (name, method) in zip(
        (*choices.METHODS.values(), *choices.EXPERT_METHODS.values()),
        (*METHODS.items(), *EXPERT_METHODS.items()),
        strict=True,
    ):
        assert told.summary == method.summary
        assert dict(told.options) == method.options(), name
        assert told.needs_calibration == method.needs_calibration
        assert told.streams == (method.masks is None)
        assert told.nm_only == method.nm_only
    assert asdict(Composition()) == choices.COMPOSITION
    assert {name: recovery.summary for name, recovery in RECOVERIES.items()} == choices.RECOVERIES
    assert {name: row.summary for name, row in FORMATS.items()} == choices.FORMATS
    assert choices.ROUNDINGS == ROUNDINGS
    assert (choices.BITS, (None, *choices.GROUP_SIZES)) == (BITS, GROUP_SIZES)
    assert EFFORTS == choices.EFFORTS
    assert list(TASKS) == list(choices.TASKS)
    others = {other: name for name, task in TASKS.items() for other in task.others}
    assert others == choices.TASK_ALIASES
    ours = (choices.SCOPES, choices.ALLOCATIONS, choices.REFINEMENTS, choices.QUANTIZATIONS)
    assert ours == (SCOPES, ALLOCATIONS, REFINEMENTS, QUANTIZATIONS)
    assert choices.TOKEN_WEIGHTS == TOKEN_WEIGHTS
    [parsers] = [
        action.choices
        for action in make_parser()._actions
        if isinstance(action, argparse._SubParsersAction)
    ]
    assert list(parsers) == list(commands.COMMANDS)


@pytest.mark.parametrize(
    "notation",
    ["unstructured", "2:4", "4:8", "1:16", "block:4x1", "block:16x16", "row", "column", "head"]
    + ["expert", "expert:2", "experts"]
    + ["head:64", "head_in:64", "", "N:M", "block:RxC", "2:2", "4:2", "0:4", "2:4 ", "02:4"]
    + ["block:4", "block:4x", "heads", "head:", "Row", "12345:99999", "\u0662:\u0664"],
)
def test_patterns_are_those_of_the_package(notation: str) -> None:
    try:
        expected = Pattern.parse(notation).implied_sparsity
    except ValueError:
        with pytest.raises(ValueError, match="pattern"):
            implied_sparsity(notation)
    else:
        assert implied_sparsity(notation) == expected


@pytest.mark.parametrize("command", commands.COMMANDS)
def test_help_has_groups_and_examples(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main([command, "--help"])
    text = capsys.readouterr().out
    assert "\noutput:\n" in text or command == "push"
    examples = text.split("\nexamples:\n")[1].splitlines()
    for line in examples:  # each of them can be parsed
        make_parser().parse_args(line.split()[1:])
    if command == "prune":
        for name, method in METHODS.items():
            assert f"    {name:10}  {method.summary}\n" in text


@pytest.mark.parametrize("arguments", [["inspect", "."], ["prune", "--help"]])
def test_a_reader_that_leaves_ends_it_quietly(arguments: list[str]) -> None:
    with subprocess.Popen(
        command("print_much", *arguments),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=environment(),
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait() in (0, 141)  # argparse itself passes over the error


def test_an_interruption_is_told_without_a_traceback(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def stopped(options: argparse.Namespace) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(commands, "run", stopped)
    assert main(["inspect", str(tmp_path)]) == 130
    assert capsys.readouterr().err == "\nhf-sparse: interrupted.\n"


def test_an_interrupted_stream_tells_how_to_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    dense, out = dense_folder(tmp_path), tmp_path / "out"
    command = ["prune", str(dense), str(out), *calibration(tmp_path), "--stream"]
    finish, done = on_disk.OnDisk.finish, []

    def stopping(self, step) -> None:
        finish(self, step)
        done.append(step)
        if len(done) == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(on_disk.OnDisk, "finish", stopping)
        assert main([*command, "--sparsity", "0.6"]) == 130
    told = capsys.readouterr().err
    assert f"Finished blocks are in {unfinished(str(out))}" in told
    assert "the same command with --resume goes on from there" in told

    def never(*arguments, **options):
        raise AssertionError("the model was loaded")

    with monkeypatch.context() as patch:  # both are told before the texts are read
        patch.setattr(commands, "read_documents", never)
        patch.setattr(streaming, "dense_model_class", never)
        assert main([*command, "--sparsity", "0.6"]) == 1
        assert "a run was stopped. Go on with it by --resume" in capsys.readouterr().err
        assert main([*command, "--sparsity", "0.5", "--resume"]) == 1
        told = capsys.readouterr().err
        assert "is of a run with another config: sparsity was 0.6, now 0.5. Resume with" in told
        assert main([*command, "--sparsity", "0.6", "--resume", "--method", "sparsegpt"]) == 1
        told = capsys.readouterr().err
        assert 'another method, options: method was "wanda", now "sparsegpt"; damping was' in told
    assert main([*command, "--sparsity", "0.6", "--resume"]) == 0
    assert not unfinished(str(out)).exists()


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="no SIGINT for one process")
def test_a_signal_while_torch_is_imported(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    command = [sys.executable, "-m", "hf_sparse_cli", "inspect", str(tmp_path)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        time.sleep(0.5)
        process.send_signal(signal.SIGINT)
        told = process.communicate()[1]
    assert process.returncode == 130
    assert told == "\nhf-sparse: interrupted.\n"
