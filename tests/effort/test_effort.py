"""One knob: what an effort chooses and does, its recipe, and how a stopped run goes on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import hf_sparse
from hf_sparse import SparsifyPlan, SparsityConfig
from hf_sparse.calibration import progress
from hf_sparse.effort import run as effort_run
from hf_sparse.effort import stages as effort_stages
from hf_sparse.effort.stages import Stage, stages_for
from hf_sparse.effort.work import KeptBlocks
from hf_sparse.formats import FormatError
from hf_sparse.provenance.record import provenance_of
from hf_sparse.structure.targets import Targets
from tests.support.closeness import nearly_same
from tests.support.tiny_models import tiny_batches, tiny_model

CONFIG = SparsityConfig("2:4")
TAUGHT = "epochs=1, logits=1.0, temperature=1.0, hidden=1.0, distilled=True"


def data(family: str = "llama", count: int = 16) -> list[Any]:
    return tiny_batches(family, count, 32)


def weights(model: Any) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(model: Any, other: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(tensor, other[name]) for name, tensor in model.state_dict().items())


def check_nearly_same(model: Any, other: Any) -> None:
    for name, tensor in model.state_dict().items():
        assert nearly_same(tensor, other.state_dict()[name]), name


def run_until_stopped(effort: str, out: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        hf_sparse.sparsify_(tiny_model("llama"), CONFIG, data(), effort, folder=out)


def chosen(family: str, config: SparsityConfig, effort: str) -> list[str]:
    model = tiny_model(family)
    targets = Targets.of(model, config)
    return [str(stage) for stage in stages_for(model, targets, data(family), effort)[0]]


@pytest.mark.parametrize(
    ("family", "pattern", "sparsity", "effort", "expected"),
    [
        ("llama", "2:4", None, "seconds", ["sparsegpt"]),
        ("llama", "2:4", None, "minutes", ["alps, reconstruct=2"]),
        ("llama", "2:4", None, "hours", ["alps, reconstruct=2", f"recovery by finetune, {TAUGHT}"]),
        ("llama", "unstructured", 0.5, "minutes", ["alps, reconstruct=2"]),
        ("llama", "unstructured", 0.7, "minutes", ["alps, allocation=owl, reconstruct=2"]),
        (
            "llama",
            "unstructured",
            0.8,
            "minutes",
            ["sparsellm, solver=alps, allocation=owl, reconstruct=2"],
        ),
        ("bert", "block:4x1", 0.5, "hours", ["alps, reconstruct=2"]),
        ("llama", "column", 0.5, "seconds", ["taylor, scope=global, refine=refit"]),
        ("bert", "head", 0.5, "minutes", ["wanda, refine=refit, reconstruct=2"]),
        ("llama", "row", 0.5, "seconds", ["taylor, scope=global"]),
    ],
)
def test_what_is_chosen(
    family: str, pattern: str, sparsity: float | None, effort: str, expected: list[str]
) -> None:
    pytest.importorskip("peft")
    assert chosen(family, SparsityConfig(pattern, sparsity), effort) == expected


def test_half_precision_is_recovered_by_adapters(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("peft")
    half = tiny_model("llama").bfloat16()
    targets = Targets.of(half, CONFIG)
    assert str(stages_for(half, targets, data(), "hours")[0][1]) == "recovery by lora, epochs=1"
    monkeypatch.setattr(effort_stages, "find_spec", lambda name: None)
    before = weights(half)
    with pytest.raises(ValueError, match="in half precision small updates are lost"):
        hf_sparse.sparsify_(half, CONFIG, data(), "hours")
    assert same(half, before)


def test_a_plan_leaves_the_model_as_it_was(capsys: pytest.CaptureFixture[str]) -> None:
    model = tiny_model("llama")
    before, known = weights(model), provenance_of(model)
    plan = hf_sparse.plan_sparsify(model, SparsityConfig("unstructured", 0.7), data(), "hours")
    assert same(model, before)
    assert provenance_of(model) == known
    assert hf_sparse.measure_sparsity(model).zeros == 0
    assert [len(seconds) for seconds in plan.seconds] == [2, 1]  # the walk of owl, and that of alps
    assert all(second > 0 for seconds in plan.seconds for second in seconds)
    assert all(memory > 0 for memory in plan.memory_mb)
    told = str(plan)
    assert "estimated from a short measurement" in told
    assert "recipe " in told
    assert capsys.readouterr().out == ""


def test_it_does_what_the_single_calls_do() -> None:
    pytest.importorskip("peft")
    config, batches = SparsityConfig("unstructured", 0.5), data()
    model, other = tiny_model("llama"), tiny_model("llama")
    report = hf_sparse.sparsify_(model, config, batches, "hours")
    hf_sparse.prune_(other, config, "alps", batches[:15], reconstruct=2)
    middle = weights(other)
    settings = {"logits": 1.0, "temperature": 1.0, "hidden": 1.0}
    hf_sparse.recover_(other, batches[:15], "finetune", teacher=tiny_model("llama"), **settings)
    if any("taken back" in note for note in report.notes):
        other.load_state_dict(middle)
    check_nearly_same(model, other)
    assert report.sparsity == pytest.approx(0.5, abs=1e-3)
    steps = provenance_of(model).steps
    assert steps[0].method == "alps"
    assert {"effort", "recipe", "reconstruct"} <= set(dict(steps[0].options))


@pytest.mark.slow
def test_a_recovery_that_does_not_help_is_taken_back(monkeypatch: pytest.MonkeyPatch) -> None:
    def worse(model: Any, batches: Any, method: str, **options: Any) -> Any:
        with torch.no_grad():
            model.model.norm.weight.mul_(-3)
        return hf_sparse.measure_sparsity(model)

    monkeypatch.setattr(effort_run, "recover_", worse)
    model, other = tiny_model("llama"), tiny_model("llama")
    report = hf_sparse.sparsify_(model, CONFIG, data(), "hours")
    assert any("it did not help, and was taken back" in note for note in report.notes)
    hf_sparse.prune_(other, CONFIG, "alps", data()[:15], reconstruct=2)
    check_nearly_same(model, other)
    [step] = provenance_of(model).steps
    assert step.method == "alps"
    assert str(dict(step.options)["recovery by finetune"]).startswith(
        "taken back: loss on 1 held-out"
    )
    assert report.method == "alps"


@pytest.mark.slow
def test_a_recipe_repeats_a_run(tmp_path: Path) -> None:
    model, again = tiny_model("llama"), tiny_model("llama")
    plan = hf_sparse.plan_sparsify(model, CONFIG, data(), "minutes")
    file = plan.save(tmp_path / "new" / "recipe.json")
    read = SparsifyPlan.load(file)
    assert (read.stages, read.config, read.data) == (plan.stages, plan.config, plan.data)
    assert read.digest == plan.digest
    hf_sparse.sparsify_(model, CONFIG, data(), plan)
    hf_sparse.sparsify_(again, None, data(), file)
    check_nearly_same(model, again)
    assert provenance_of(model).steps == provenance_of(again).steps
    hf_sparse.save_pretrained(again, tmp_path / "sparse")
    assert f"{plan.digest}, stage 1 of 1" in (tmp_path / "sparse" / "README.md").read_text()
    other = tiny_batches("llama", 30, 32)
    told = str(hf_sparse.plan_sparsify(tiny_model("llama"), None, other, file))
    assert "the data are not those that the recipe was made with" in told


@pytest.mark.few(3)
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 2}, "is a recipe of version 2, this hf_sparse .* reads up to 1. Install"),
        ({"version": "1"}, "is a recipe of version '1'"),
        ({"format": "x"}, "is no recipe of hf_sparse"),
        ({"effort": "days"}, "damaged recipe: unknown effort 'days'"),
        ({"stages": []}, "its first stage is no pruning"),
        ({"stages": [{"kind": "prune", "method": "alp"}]}, "unknown method 'alp'"),
        ({"stages": [{"kind": "prune", "method": "alps", "batches": 0}]}, "batches is 0; wanted"),
        ({"stages": [{"kind": "prune", "method": "alps", "options": {"lam": 1}}]}, "no option lam"),
        ({"stages": [{"kind": "cook", "method": "alps"}]}, "its first stage is no pruning"),
        ({"more": 1}, "it has the unknown key 'more'"),
        ({"config": {"pattern": "2-4"}}, "damaged recipe: unknown pattern"),
        ({"data": None}, "damaged recipe"),
    ],
    ids=str,
)
def test_recipes_that_cannot_be_followed(
    change: dict[str, Any], message: str, tmp_path: Path
) -> None:
    model = tiny_model("llama")
    file = hf_sparse.plan_sparsify(model, CONFIG, data(), "seconds").save(tmp_path / "a.json")
    file.write_text(json.dumps({**json.loads(file.read_text()), **change}))
    with pytest.raises(ValueError, match=message):
        hf_sparse.sparsify_(model, None, data(), str(file))


def test_recipes_for_other_models_configs_and_data(tmp_path: Path) -> None:
    model = tiny_model("llama")
    file = hf_sparse.plan_sparsify(model, CONFIG, data(), "seconds").save(tmp_path / "a.json")
    with pytest.raises(ValueError, match="for models of type 'llama', and this is 'gpt2'"):
        hf_sparse.sparsify_(tiny_model("gpt2"), None, data(), file)
    with pytest.raises(
        ValueError, match=r"the recipe makes SparsityConfig\('2:4'\), and the config"
    ):
        hf_sparse.sparsify_(model, SparsityConfig("1:4"), data(), file)
    with pytest.raises(ValueError, match="looks at 16 batches, and the data have 8"):
        hf_sparse.sparsify_(model, None, data()[:8], file)
    with pytest.raises(FileNotFoundError, match="no such recipe"):
        hf_sparse.sparsify_(model, None, data(), tmp_path / "none.json")
    (tmp_path / "text.json").write_text("{")
    with pytest.raises(ValueError, match="it is no JSON"):
        SparsifyPlan.load(tmp_path / "text.json")


def test_bad_input_is_told_before_any_work() -> None:
    model = tiny_model("llama")
    before = weights(model)
    few = data()[:1]
    for effort, message in (
        ("hours", r"64 tokens; effort='hours' wants at least 1,024.* or take effort='seconds'"),
        ("minute", "effort is 'minute'; wanted one of seconds.*Did you mean 'minutes'"),
        (3, "effort is 3; wanted one of"),
    ):
        with pytest.raises(ValueError, match=message):
            hf_sparse.sparsify_(model, CONFIG, few, effort)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="config is None; wanted a SparsityConfig"):
        hf_sparse.sparsify_(model, None, data())
    with pytest.raises(ValueError, match="the config asks for few bits"):
        hf_sparse.sparsify_(model, SparsityConfig("2:4", bits=8), data())
    with pytest.raises(ValueError, match="none was given: folder="):
        hf_sparse.sparsify_(model, CONFIG, data(), resume=True)
    with pytest.raises(ValueError, match="wanted at least 4, one of which is held out"):
        hf_sparse.sparsify_(model, CONFIG, tiny_batches("llama", 3, 512), "hours")
    assert same(model, before)


@pytest.mark.slow
def test_a_stopped_run_goes_on_inside_a_stage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, out = tiny_model("llama"), tmp_path / "out"
    hf_sparse.sparsify_(whole, CONFIG, data(), "minutes")
    finish, finished = KeptBlocks.finish, []

    def stopping(self: Any, step: Any) -> None:
        finish(self, step)
        finished.append(step.name)
        if len(finished) == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(KeptBlocks, "finish", stopping)
        run_until_stopped("minutes", out)
    work = tmp_path / "out.unfinished"
    kept = sorted(file.name for file in work.glob("*.safetensors"))
    assert len(kept) == 2
    with pytest.raises(ValueError, match=r"a run was stopped\. Go on with it by resume=True"):
        hf_sparse.sparsify_(tiny_model("llama"), CONFIG, data(), "minutes", folder=out)
    other = tiny_batches("llama", 25, 32)
    for wrong, given in (("data", other), ("stages", data())):
        effort = "minutes" if wrong == "data" else "seconds"
        with pytest.raises(ValueError, match=f"is of a run with another .*{wrong}"):
            hf_sparse.sparsify_(tiny_model("llama"), CONFIG, given, effort, folder=out, resume=True)
    with pytest.raises(ValueError, match="is of a run with another model"):
        hf_sparse.sparsify_(
            tiny_model("llama", 1), CONFIG, data(), "minutes", folder=out, resume=True
        )
    assert sorted(file.name for file in work.glob("*.safetensors")) == kept
    finished.clear()
    monkeypatch.setattr(KeptBlocks, "finish", lambda self, step: finished.append(step.name))
    model = tiny_model("llama")
    hf_sparse.sparsify_(model, CONFIG, data(), "minutes", folder=out, resume=True)
    assert finished == ["model.layers.2"]
    check_nearly_same(model, whole)
    assert not work.exists()


@pytest.mark.slow
def test_a_stopped_run_goes_on_between_stages(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, out = tiny_model("llama"), tmp_path / "out"
    hf_sparse.sparsify_(whole, CONFIG, data(), "hours")

    def stopped(*arguments: Any, **options: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(effort_run, "recover_", stopped)
        run_until_stopped("hours", out)
    work = tmp_path / "out.unfinished"
    assert [file.name for file in work.glob("*.safetensors")] == ["stage-1.safetensors"]
    whole_file = (work / "stage-1.safetensors").read_bytes()
    (work / "stage-1.safetensors").write_bytes(whole_file[:-100])
    with pytest.raises(FormatError, match=r"stage-1\.safetensors is damaged"):
        hf_sparse.sparsify_(tiny_model("llama"), CONFIG, data(), "hours", folder=out, resume=True)
    (work / "stage-1.safetensors").write_bytes(whole_file)
    monkeypatch.setattr(effort_run, "prune_kept", stopped)
    model = tiny_model("llama")
    hf_sparse.sparsify_(model, CONFIG, data(), "hours", folder=out, resume=True)
    check_nearly_same(model, whole)
    told = [
        [(s.method, dict(s.options)["recipe"]) for s in provenance_of(m).steps]
        for m in (model, whole)
    ]
    assert told[0] == told[1]
    assert hf_sparse.measure_sparsity(model).pattern == "2:4"


@pytest.mark.slow
def test_one_bar_goes_over_all_stages(monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[Any] = []

    class Bar:
        def __init__(self, total: float, **_: Any) -> None:
            self.total, self.n = total, 0.0
            shown.append(self)

        def update(self, more: float) -> None:
            assert more >= 0
            self.n += more

        def set_postfix_str(self, text: str) -> None:
            pass

        def close(self) -> None:
            self.closed = True

    monkeypatch.setattr(progress, "tqdm", Bar)
    plan = hf_sparse.plan_sparsify(
        tiny_model("llama"), SparsityConfig("unstructured", 0.7), data(), "hours"
    )
    assert shown == []  # the measurement shows none
    hf_sparse.sparsify_(tiny_model("llama"), None, data(), plan)
    [bar] = shown
    assert bar.closed
    assert bar.n == pytest.approx(plan.total_seconds)


def test_a_stage_tells_itself() -> None:
    assert str(Stage("recover", "lora", {"epochs": 1})) == "recovery by lora, epochs=1"
