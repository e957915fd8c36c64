"""Pattern `expert`: which experts become zero, what is stored, and what is refused."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

import hf_sparse
from hf_sparse import SparsityConfig, drop_experts_, prune_
from hf_sparse.calibration.expert_scores import kept_over_all
from hf_sparse.cli import main
from hf_sparse.pruning.methods import EXPERT_METHODS
from hf_sparse.structure.mixtures import Mixtures
from tests.support.crosses import cross
from tests.support.mixtures import MIXTURES, grouped_mixture, mixture_batches, tiny_mixture
from tests.support.tiny_models import tiny_model

QUARTER = SparsityConfig("expert", 0.25)


def zeros_of(model: PreTrainedModel) -> list[list[int]]:
    return [mixture.zero.nonzero()[:, 0].tolist() for mixture in Mixtures.of(model).mixtures]


def data_of(method: str) -> list[Tensor] | None:
    return mixture_batches() if EXPERT_METHODS[method].needs_calibration else None


@cross("family, method", MIXTURES, EXPERT_METHODS)
def test_the_experts_become_zero_that_drop_experts_removes(family: str, method: str) -> None:
    model, data = tiny_mixture(family), data_of(method)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    dropped = drop_experts_(copy.deepcopy(model), 0.25, data, by=method)
    report = prune_(model, QUARTER, method, data)
    assert zeros_of(model) == [list(gone) for gone in dropped.removed]
    assert report.sparsity == 0.25
    assert report.violations == report.partial == 0
    assert "shrink_" in report.notes[0]
    for name, tensor in model.state_dict().items():  # nothing but whole experts has changed
        if ".experts." not in name:
            assert torch.equal(tensor, before[name])
        else:
            number = int(name.split("layers.")[1].split(".")[0])
            gone = list(dropped.removed[number])
            assert not tensor[gone].any()
            kept = [expert for expert in range(4) if expert not in gone]
            assert torch.equal(tensor[kept], before[name][kept])


@pytest.mark.parametrize("method", EXPERT_METHODS)
def test_over_all_blocks_those_go_that_are_least_of_their_block(method: str) -> None:
    model, data = tiny_mixture("mixtral", num_hidden_layers=3), data_of(method)
    with torch.no_grad():  # the first two of the last block are small, and seldom chosen
        mlp: Any = model.model.layers[2].mlp  # type: ignore[union-attr, index]
        for held in (mlp.experts.down_proj, mlp.experts.gate_up_proj, mlp.gate.weight):
            held[:2] *= 1e-3
    scores = drop_experts_(copy.deepcopy(model), 1, data, by=method).scores
    shares = torch.tensor(scores).double()
    shares /= shares.mean(dim=1, keepdim=True)
    order = shares.flatten().argsort(stable=True).tolist()
    wanted: list[list[int]] = [[], [], []]
    for place in order:  # a loop that takes one after another, two at most of a block
        block, expert = divmod(place, 4)
        if sum(map(len, wanted)) < 3 and len(wanted[block]) < 2:
            wanted[block].append(expert)
    report = prune_(model, QUARTER, method, data, scope="global")
    assert zeros_of(model) == [sorted(own) for own in wanted]
    assert report.options["scope"] == "global"


def test_no_block_keeps_fewer_than_a_token_is_given() -> None:
    scores = [torch.tensor([1.0, 1.0, 1.0, 1.0]), torch.tensor([1e-3, 1e-3, 1e-3, 4.0])]
    assert kept_over_all(scores, 2, 2) == [[0, 1, 2, 3], [0, 3]]
    assert kept_over_all(scores, 4, 2) == [[0, 1], [0, 3]]
    assert kept_over_all(scores, 0, 2) == [[0, 1, 2, 3]] * 2


def test_zero_experts_go_first() -> None:
    model = tiny_mixture("mixtral")
    prune_(model, QUARTER, "magnitude")
    first = zeros_of(model)
    prune_(model, SparsityConfig("expert", 0.5), "frequency", mixture_batches())
    for one, both in zip(first, zeros_of(model), strict=True):
        assert set(one) < set(both)
        assert len(both) == 2


@pytest.mark.few(1)
@pytest.mark.parametrize("family", MIXTURES)
def test_stored_and_loaded_again(family: str, tmp_path: Path) -> None:
    model = tiny_mixture(family)
    prune_(model, QUARTER, "magnitude", scope="global")
    hf_sparse.save_pretrained(model, tmp_path / "saved")
    stored = json.loads((tmp_path / "saved" / "config.json").read_text())["quantization_config"]
    assert (stored["pattern"], stored["sparsity"]) == ("expert", 0.25)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor)
    assert hf_sparse.inspect_checkpoint(tmp_path / "saved").report.sparsity == 0.25
    size = (tmp_path / "saved" / "model.safetensors").stat().st_size
    held = sum(tensor.nbytes for tensor in model.state_dict().values())
    zeros = sum(int((p == 0).sum()) * 4 for n, p in model.named_parameters() if "proj" in n)
    assert size < held - 0.9 * zeros + 10_000
    prune_(loaded, QUARTER, "magnitude")  # the config that was stored names the same matrices
    for gone in zeros_of(loaded):
        assert gone


@pytest.mark.parametrize("sparsity", [0.3, 0.2])
def test_what_is_promised_is_what_whole_experts_make(sparsity: float, tmp_path: Path) -> None:
    model = tiny_mixture("mixtral")
    prune_(model, SparsityConfig("expert", sparsity), "magnitude")  # one of four
    hf_sparse.save_pretrained(model, tmp_path / "saved")
    stored = json.loads((tmp_path / "saved" / "config.json").read_text())["quantization_config"]
    assert stored["sparsity"] == 0.25


@pytest.mark.parametrize(
    ("config", "method", "options", "message"),
    [
        (
            QUARTER,
            "wanda",
            {},
            "'wanda' prunes inside of matrices.*'reap', 'frequency', 'magnitude'",
        ),
        (QUARTER, "reip", {}, "unknown method of pattern 'expert' 'reip'.*Did you mean 'reap'"),
        (SparsityConfig("2:4"), "reap", {}, "'reap' chooses whole experts.*pattern 'expert'"),
        (SparsityConfig("expert", 0.75), "magnitude", {}, "each token is given 2.*nearest.* is 2"),
        (SparsityConfig("expert", 0.1), "magnitude", {}, "no expert of the 4.*at least 0.25"),
        (SparsityConfig("expert", 0.6), "magnitude", {"scope": "global"}, "Wanted at most 0.5"),
        (QUARTER, "magnitude", {"refine": "swaps"}, "nothing goes with pattern 'expert'"),
        (QUARTER, "magnitude", {"allocation": "alpha"}, "nothing goes with pattern 'expert'"),
        (QUARTER, "magnitude", {"scope": "all"}, "scope is 'all'"),
        (
            SparsityConfig("expert", 0.25, ignore="layers.0.*"),
            "magnitude",
            {},
            "name 8 of their 16 matrices. Leave targets and ignore out",
        ),
        (
            SparsityConfig("expert", 0.25, targets="q_proj"),
            "magnitude",
            {},
            "name 0 of their 16 matrices and others",
        ),
    ],
)
def test_refused_before_anything_changes(
    config: SparsityConfig, method: str, options: dict[str, Any], message: str
) -> None:
    model = tiny_mixture("mixtral")
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=f"(?s){message}"):
        prune_(model, config, method, **options)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name])


def test_other_models_and_ways_are_refused() -> None:
    with pytest.raises(ValueError, match="no experts were found in this LlamaForCausalLM"):
        prune_(tiny_model("llama"), QUARTER, "magnitude")
    mixture = tiny_mixture("mixtral")
    with pytest.raises(
        ValueError, match="is a ModuleDict; pattern 'expert' wants a model of trans"
    ):
        prune_(nn.ModuleDict({"model": mixture}), QUARTER, "magnitude")
    groups = hf_sparse.sparse_param_groups(mixture, QUARTER)
    with pytest.raises(ValueError, match="takes whole experts, which no optimizer chooses"):
        hf_sparse.SparseAdamW(groups)
    with pytest.raises(ValueError, match="no layer's time falls with it"):
        hf_sparse.allocate(mixture, "0.5x", patterns=["expert"])
    with pytest.raises(ValueError, match="Did you mean 'expert'"):
        SparsityConfig("experts", 0.25)


def test_groups_of_experts_lose_as_many_each() -> None:
    model = grouped_mixture()
    with pytest.raises(ValueError, match=r"scope='global'.*2 groups of equal size"):
        prune_(model, QUARTER, "magnitude", scope="global")
    prune_(model, QUARTER, "magnitude")
    for gone in zeros_of(model):
        assert [expert // 4 for expert in gone] == [0, 1]


def test_from_the_shell(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = tiny_mixture("mixtral")
    model.save_pretrained(tmp_path / "mixture")
    source, pruned, fewer = (str(tmp_path / name) for name in ("mixture", "pruned", "fewer"))
    flags = ["--pattern", "expert", "--sparsity", "0.3"]
    assert main(["prune", source, pruned, *flags, "--method", "magnitude"]) == 0
    assert main(["shrink", pruned, fewer]) == 0
    assert "3 of 4 experts are left" in capsys.readouterr().out
    assert AutoModelForCausalLM.from_pretrained(fewer).config.num_local_experts == 3
    for more, message in (
        (flags, "'wanda' is for another pattern; the pattern is 'expert'. Give --method reap"),
        (["--sparsity", "0.3", "--method", "reap"], "'reap' is for --pattern expert"),
        (["--pattern", "expert", "--sparsity", "0.9", "--method", "magnitude"], "nearest"),
        ([*flags, "--method", "magnitude", "--stream"], "do not --stream"),
    ):
        assert main(["prune", source, str(tmp_path / "other"), *more]) in (1, 2)
        assert message in " ".join(capsys.readouterr().err.split())
