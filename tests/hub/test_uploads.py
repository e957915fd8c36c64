"""What an upload does is planned first, asked for, and done in one commit."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import HfApi, parse_eval_result_entries

import hf_sparse
from hf_sparse import Metric, SparsityConfig
from hf_sparse.checkpoint.source import stored_in
from hf_sparse.cli import main, pushing
from hf_sparse.uploads import RESULTS_NAME, Upload, carry_out, plan_upload
from tests.support.hub_stand_in import HubStandIn
from tests.support.tiny_models import tiny_classifier

ACCURACY = Metric("accuracy, SST-2", 0.9, 0.92, dataset="nyu-mll/glue", task="sst2")


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)  # the stand-in is here
    with HubStandIn(lfs=False) as hub:
        hub.api = HfApi(endpoint=hub.endpoint, token="hf_dummy")  # type: ignore[attr-defined]
        monkeypatch.setattr(pushing, "HfApi", lambda: hub.api)  # type: ignore[attr-defined]
        monkeypatch.setattr(pushing, "check_can_push", lambda repo_id: None)
        yield hub


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    model = tiny_classifier()
    hf_sparse.prune_(model, SparsityConfig("2:4"), "magnitude")
    other = Metric("loss, somewhere", 1.0)
    return hf_sparse.save_pretrained(model, tmp_path / "model", metrics=[ACCURACY, other])


def push(*arguments: object) -> int:
    return main(["push", *map(str, arguments)])


def test_a_dry_run_lists_all_and_changes_nothing(
    hub: Any, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert push(folder, "user/new", "--dry-run", "--json") == 0
    told = json.loads(capsys.readouterr().out)
    assert not hub.repos
    assert not told["exists"]
    sizes = {p.name: p.stat().st_size for p in folder.iterdir()}
    assert {name: told["files"][name] for name in sizes} == sizes
    assert set(told["files"]) - set(sizes) == {RESULTS_NAME}
    assert push(folder, "user/new") == 0
    assert set(hub.files("user/new")) == {*told["files"], ".gitattributes"}
    assert len(hub.commits("user/new")) == 2
    assert push(folder, "user/new", "--dry-run") == 0
    assert "  replace config.json" in capsys.readouterr().out


def test_results_are_in_the_form_of_the_hub(hub: Any, folder: Path) -> None:
    assert push(folder, "user/new") == 0
    entries = parse_eval_result_entries(yaml.safe_load(hub.files("user/new")[RESULTS_NAME]))
    assert [(e.dataset_id, e.task_id, e.value) for e in entries] == [("nyu-mll/glue", "sst2", 0.9)]
    assert entries[0].notes == "accuracy, SST-2; dense 0.92"
    assert stored_in(folder).metrics[0] == ACCURACY
    # Without such metrics, results of an earlier upload would be of another model.
    model = tiny_classifier()
    hf_sparse.prune_(model, SparsityConfig("2:4"), "magnitude")
    again = hf_sparse.save_pretrained(model, folder.parent / "again")
    assert push(again, "user/new") == 0
    assert RESULTS_NAME not in hub.files("user/new")


def test_another_model_is_replaced_only_when_asked_for(
    hub: Any, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    hub.api.create_repo("user/other")
    place = folder.parent / "other"
    place.mkdir()
    (place / "config.json").write_text("{}")
    (place / "pytorch_model.bin").write_text("weights")
    hub.api.upload_folder(repo_id="user/other", folder_path=place)
    before = hub.files("user/other")
    assert push(folder, "user/other") == 1
    assert "no card of hf_sparse" in (told := capsys.readouterr().err)
    assert "--overwrite" in told
    answers = {"n\n": 1, "\n": 1, "": 1, "y\n": 0}
    for answer, code in answers.items():
        assert hub.files("user/other") == before
        stdin = io.StringIO(answer)
        stdin.isatty = lambda: True  # type: ignore[method-assign]
        monkeypatch.setattr("sys.stdin", stdin)
        assert push(folder, "user/other") == code
    assert "pytorch_model.bin" not in hub.files("user/other")
    assert push(folder, "user/other") == 0  # it is ours now


def test_an_upload_that_somebody_came_before_is_refused(hub: Any, folder: Path) -> None:
    assert push(folder, "user/new") == 0
    plan = plan_upload(hub.api, folder, "new")
    assert plan.repo_id == "user/new"
    hub.api.delete_file("config.json", "user/new")
    there = hub.files("user/new")
    with pytest.raises(Exception, match="A commit has happened since"):
        carry_out(hub.api, plan)
    assert hub.files("user/new") == there


def test_branches_and_pull_requests_are_passed_on() -> None:
    calls: list[tuple[str, Any]] = []

    class Api:
        def __getattr__(self, name: str) -> Any:
            def call(*given: Any, **named: Any) -> Any:
                calls.append((name, named))
                return type("Repo", (), {"repo_id": "user/x", "pr_url": "url"})

            return call

    plan = Upload("user/x", True, {}, makes_branch=True, head="abc")
    api: Any = Api()
    carry_out(api, plan, revision="mine", create_pr=True)
    assert [name for name, _ in calls] == ["create_repo", "create_branch", "create_commit"]
    assert calls[1][1]["branch"] == "mine"
    wanted = {"revision": "mine", "create_pr": True, "parent_commit": "abc"}
    assert wanted.items() <= calls[2][1].items()


@pytest.mark.parametrize("given", [{"dataset": "a/b"}, {"task": "x"}, {"dataset": "", "task": "x"}])
def test_half_a_benchmark_is_refused(given: dict[str, str]) -> None:
    with pytest.raises(ValueError, match="dataset"):
        Metric("accuracy", 0.5, **given)
