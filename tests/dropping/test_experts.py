"""drop_experts_: which experts go, against slow references, and the plain models that are left."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

import hf_sparse
from hf_sparse import SparsityConfig, drop_experts_
from hf_sparse.dropping.experts import METHODS
from hf_sparse.provenance.record import provenance_of
from hf_sparse.structure.layers import promised_config
from hf_sparse.structure.mixtures import Mixtures
from hf_sparse_cli.choices import EXPERT_CHOICES
from tests.support.any_models import tiny_config
from tests.support.deep_models import adapted, quantized
from tests.support.dense_folders import calibration, check_refused, shrunk
from tests.support.mixtures import (
    MIXTURES,
    SeparateExperts,
    grouped_mixture,
    mixture_batches,
    tiny_mixture,
)
from tests.support.plain_models import check_plain
from tests.support.tiny_models import tiny_model
from tests.support.unchanged import unchanged


def blocks_of(model: Any) -> list[Any]:
    return [block.mlp for block in model.model.layers]


def router_of(mlp: Any) -> Any:
    return mlp.gate if hasattr(mlp, "gate") else mlp.router


@torch.no_grad()
def slow_scores(model: PreTrainedModel, batches: list[Any]) -> tuple[Tensor, Tensor]:
    """The sums of weight x norm of the output and of tokens, `(blocks, experts)`, token by token."""
    added, counts = torch.zeros(2, 4).double(), torch.zeros(2, 4).double()
    for number, mlp in enumerate(blocks_of(model)):
        separate, router = SeparateExperts(mlp.experts), router_of(mlp)
        entry, inner = (getattr(separate, path) for path in separate.paths)
        for batch in batches:
            hidden = inputs_of(router, model, batch)
            _, weights, chosen = router(hidden)
            for token in batch["attention_mask"].reshape(-1).nonzero()[:, 0].tolist():
                for expert, weight in zip(chosen[token].tolist(), weights[token], strict=True):
                    first = entry[expert](hidden[token : token + 1])
                    out = inner[expert](mlp.experts._apply_gate(first))
                    added[number, expert] += float(weight * out.norm())
                    counts[number, expert] += 1
    return added, counts


def inputs_of(module: nn.Module, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """What enters a module when a model runs, flat over tokens."""
    seen: list[Tensor] = []
    hook = module.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    model(**batch)
    hook.remove()
    return seen[0].reshape(-1, seen[0].shape[-1])


def padded() -> list[dict[str, Tensor]]:
    batches = []
    for ids in mixture_batches(2, 12):
        mask = torch.ones_like(ids)
        mask[0, 9:] = 0
        batches.append({"input_ids": ids, "attention_mask": mask})
    return batches


@pytest.mark.parametrize("family", MIXTURES)
def test_scores_are_those_of_the_paper_over_all_tokens_but_padding(family: str) -> None:
    model, batches = tiny_mixture(family), padded()
    added, counts = slow_scores(model, batches)
    report = drop_experts_(copy.deepcopy(model), 1, batches)
    wanted = added / counts.clamp(min=1)
    torch.testing.assert_close(torch.tensor(report.scores).double(), wanted, atol=1e-6, rtol=1e-4)
    for row, (gone,) in zip(wanted, report.removed, strict=True):
        assert float(row[gone]) == pytest.approx(float(row.min()), abs=1e-6)
    report = drop_experts_(copy.deepcopy(model), 1, batches, by="frequency")
    assert report.scores == tuple(map(tuple, counts.tolist()))
    assert report.tokens is not None
    assert report.tokens == tuple(map(tuple, counts.long().tolist()))
    report = drop_experts_(model, 2, by="magnitude")
    for scores, gone in zip(report.scores, report.removed, strict=True):
        assert {scores[number] for number in gone} == set(sorted(scores)[:2])
    assert report.tokens is None


@torch.no_grad()
def test_what_is_left_is_what_the_router_chooses_among_those_that_stay() -> None:
    for family in MIXTURES:
        model = tiny_mixture(family)
        masked, ids = copy.deepcopy(model), mixture_batches(1)[0]
        report = drop_experts_(model, 1, mixture_batches())
        for mlp, (gone,) in zip(blocks_of(masked), report.removed, strict=True):
            router = router_of(mlp)

            # A router that sees no score of an expert never chooses it.
            def forward(hidden: Tensor, gone: int = gone, router: Any = router) -> Any:
                logits = nn.functional.linear(hidden, router.weight, getattr(router, "bias", None))
                logits[:, gone] = -torch.inf
                if hasattr(router, "bias"):
                    top, chosen = logits.topk(router.top_k, dim=-1)
                    return logits, top.softmax(-1), chosen
                top, chosen = logits.softmax(-1).topk(router.top_k, dim=-1)
                if getattr(router, "norm_topk_prob", True):
                    top = top / top.sum(-1, keepdim=True)
                return logits, top, chosen

            router.forward = forward
        torch.testing.assert_close(
            model(ids).logits, masked(ids).logits, atol=1e-5, rtol=1e-4, msg=family
        )


@pytest.mark.slow
def test_what_is_left_loads_and_generates_without_the_package(tmp_path: Path) -> None:
    ids, models, generated = mixture_batches(1)[0], {}, {}
    for family in MIXTURES:
        model = tiny_mixture(family)
        report = drop_experts_(model, 0.25, mixture_batches())
        assert (report.experts, report.parameters[1]) == ((4, 3), model.num_parameters())
        with torch.no_grad():
            expected = {"input_ids": ids, "output": model(input_ids=ids)[0]}
        save_file(expected, tmp_path / f"{family}.safetensors")
        hf_sparse.save_pretrained(model, tmp_path / family)
        settings: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 1}
        generated[family] = model.generate(ids, **settings).tolist()
        models[family] = model
    check_plain(tmp_path, models, generated)
    card = (tmp_path / "mixtral" / "README.md").read_text()
    assert "drop_experts" in card
    assert "3 of 4" in card


def test_zeros_and_their_promise_stay(tmp_path: Path) -> None:
    model = tiny_mixture("qwen3_moe")
    hf_sparse.prune_(model, SparsityConfig("2:4"), "magnitude")
    drop_experts_(model, 1, mixture_batches())
    hf_sparse.save_pretrained(model, tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    report = hf_sparse.measure_sparsity(loaded)
    assert (report.pattern, report.violations) == ("2:4", 0)
    assert report.sparsity == pytest.approx(0.5)
    assert [step.method for step in provenance_of(loaded).steps] == ["magnitude", "drop_experts"]
    ids = mixture_batches(1)[0]
    with torch.no_grad():
        torch.testing.assert_close(loaded(ids).logits, model(ids).logits, atol=1e-5, rtol=1e-4)
    assert drop_experts_(loaded, 1, by="magnitude").experts == (3, 2)


def test_a_promise_that_names_experts_by_number_is_forgotten() -> None:
    model = tiny_mixture("mixtral")
    names = [f"experts.*_proj.{number}" for number in (0, 2)]
    hf_sparse.prune_(model, SparsityConfig("unstructured", 0.5, names), "magnitude")
    # Of the others all weights are larger.
    with torch.no_grad():
        for mlp in blocks_of(model):
            for matrices in (mlp.experts.gate_up_proj, mlp.experts.down_proj):
                matrices[2:] *= 3
    every = copy.deepcopy(model)
    report = drop_experts_(model, 2, by="magnitude")
    assert report.removed == ((0, 1), (0, 1))
    assert promised_config(model) is None  # what was expert 2 is 0 now, and 3 is 1
    hf_sparse.prune_(every, SparsityConfig("2:4"), "magnitude")
    drop_experts_(every, 2, by="magnitude")
    assert promised_config(every) is not None


@torch.no_grad()
def test_merged_experts_are_the_mean_by_tokens_of_those_that_went() -> None:
    model: Any = tiny_mixture("mixtral")
    dense: Any = copy.deepcopy(model)
    report = drop_experts_(model, 1, mixture_batches(), by="frequency", merge=True)
    assert report.tokens is not None
    for number, (gone,) in enumerate(report.removed):
        mlp, was = blocks_of(model)[number], blocks_of(dense)[number]
        left = [expert for expert in range(4) if expert != gone]
        rows = was.gate.weight
        cosines = torch.cosine_similarity(rows[left], rows[gone], dim=-1)
        target = left[int(cosines.argmax())]
        counts = report.tokens[number]
        share = counts[gone] / (counts[gone] + counts[target])
        for name in ("gate_up_proj", "down_proj"):
            held = getattr(was.experts, name)
            wanted = held[left].clone()
            wanted[left.index(target)] = (1 - share) * held[target] + share * held[gone]
            torch.testing.assert_close(getattr(mlp.experts, name).data, wanted)
        torch.testing.assert_close(mlp.gate.weight.data, rows[left])


@torch.no_grad()
def test_merging_equal_experts_changes_nothing_where_their_router_rows_are_equal() -> None:
    model: Any = tiny_mixture("mixtral", num_experts_per_tok=1)
    for mlp in blocks_of(model):
        for parameter in (mlp.experts.gate_up_proj, mlp.experts.down_proj, mlp.gate.weight):
            parameter[2] = parameter[0]
    ids, dense = mixture_batches(1)[0], copy.deepcopy(model)
    drop_experts_(model, 1, mixture_batches(), by="frequency", merge=True)
    torch.testing.assert_close(model(ids).logits, dense(ids).logits, atol=1e-5, rtol=1e-4)


def test_as_many_of_each_group_go_and_corrections_with_them(tmp_path: Path) -> None:
    model: Any = grouped_mixture()
    was = copy.deepcopy(model)
    report = drop_experts_(model, 4, mixture_batches())
    for gone in report.removed:
        assert [sum(number // 4 == group for number in gone) for group in (0, 1)] == [2, 2]
    [gone] = report.removed  # of the only block with experts
    left = [number for number in range(8) if number not in gone]
    gate, before = model.model.layers[1].mlp.gate, was.model.layers[1].mlp.gate
    bias = "e_score_correction_bias"
    assert torch.equal(getattr(gate, bias), getattr(before, bias)[left])
    hf_sparse.save_pretrained(model, tmp_path)
    loaded: Any = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert loaded.config.n_routed_experts == 4
    ids = mixture_batches(1)[0]
    with torch.no_grad():
        torch.testing.assert_close(loaded(ids).logits, model(ids).logits, atol=1e-5, rtol=1e-4)
    for count, message in (
        (3, "2 groups of equal size.* nearest that is possible is 6"),
        (6, "2 best|two best"),
    ):
        with pytest.raises(ValueError, match=message):
            drop_experts_(grouped_mixture(), count, mixture_batches())


FAMILIES = ["deepseek_v2", "qwen2_moe", "olmoe", "granitemoe", "phimoe", "glm4_moe", "jamba"]
FAMILIES += ["ernie4_5_moe", "minimax_m2", "llama4_text", "nemotron_h", "afmoe"]


@pytest.mark.few(3)
@pytest.mark.parametrize("family", FAMILIES)
def test_what_belongs_to_experts_is_found_from_the_structure(family: str) -> None:
    config = copy.deepcopy(tiny_config(family))
    if family == "deepseek_v2":
        config.num_experts_per_tok, config.num_key_value_heads = 2, config.num_attention_heads
    model = AutoModelForCausalLM.from_config(config).eval()
    ids = mixture_batches(1)[0]
    dense = copy.deepcopy(model)
    report = drop_experts_(model, 1, [ids])
    shared = [name for name, _ in model.named_parameters() if "shared" in name]
    held = dict(model.named_parameters())
    assert all(torch.equal(held[name], dense.get_parameter(name)) for name in shared)
    fresh = AutoModelForCausalLM.from_config(type(config).from_dict(model.config.to_dict()))
    shapes = {name: tensor.shape for name, tensor in fresh.state_dict().items()}
    assert {name: tensor.shape for name, tensor in model.state_dict().items()} == shapes
    with torch.no_grad():
        assert model(ids, use_cache=False).logits.isfinite().all()
    assert report.experts == (4, 3)


def mixtral() -> PreTrainedModel:
    return tiny_mixture("mixtral")


def of_two_sizes() -> PreTrainedModel:
    model: Any = tiny_mixture("mixtral")
    experts = model.model.layers[1].mlp.experts
    for name in ("gate_up_proj", "down_proj"):
        setattr(experts, name, nn.Parameter(getattr(experts, name)[:3].clone()))
    return model


def sharing() -> PreTrainedModel:
    model: Any = tiny_mixture("mixtral")
    model.model.layers[1].mlp.experts = copy.copy(model.model.layers[0].mlp.experts)
    return model


def pruned() -> PreTrainedModel:
    model = tiny_mixture("mixtral")
    hf_sparse.prune_(model, SparsityConfig("2:4"), "magnitude")
    return model


REFUSED: list[tuple[Any, dict[str, Any], str]] = [
    (mixtral, {"count": 4}, "leaves 0 experts; wanted at most 2 of the 4"),
    (mixtral, {"count": 3}, "leaves 1 experts; .* each token is given 2"),
    (mixtral, {"count": 0.9}, "leaves 0 experts"),
    (mixtral, {"count": 0}, "no expert of 4"),
    (mixtral, {"count": 0.1}, r"no expert of 4; .* is an expert is 0\.25"),
    (mixtral, {"count": 1.5}, r"count is 1\.5; wanted at most 2"),
    (mixtral, {"count": "2"}, "count is '2'"),
    (mixtral, {"by": "reep"}, "Did you mean 'reap'"),
    (mixtral, {"batches": None}, "'reap' needs calibration data"),
    (mixtral, {"batches": None, "by": "frequency"}, "'frequency' needs calibration data"),
    (mixtral, {"by": "magnitude"}, "leave them out"),
    (mixtral, {"batches": None, "by": "magnitude", "merge": True}, "'merge=True' needs calibr"),
    (pruned, {"merge": True}, "fills zeros"),
    (lambda: tiny_model("llama"), {}, "no experts were found"),
    (of_two_sizes, {}, r"have \[3, 4\] experts"),
    (sharing, {}, "shares a weight"),
    (lambda: adapted(mixtral()), {}, "has adapters"),
    (lambda: quantized(mixtral()), {}, "is quantized"),
    (lambda: mixtral().to("meta"), {}, "meta device"),
    (lambda: nn.Linear(2, 2), {}, "takes a transformers model"),
]


@pytest.mark.parametrize(("make", "changes", "message"), REFUSED, ids=[row[2] for row in REFUSED])
def test_it_is_refused_before_work(make: Any, changes: dict[str, Any], message: str) -> None:
    model = make()
    arguments = {"count": 1, "batches": mixture_batches(1), **changes}
    with unchanged(model), pytest.raises(ValueError, match=message):
        drop_experts_(model, **arguments)


def test_tables_of_experts_by_number_are_refused() -> None:
    model = AutoModelForCausalLM.from_config(copy.deepcopy(tiny_config("deepseek_v4")))
    with pytest.raises(ValueError, match="tid2eid is a table of whole numbers"):
        Mixtures.of(model)


@torch.no_grad()
def test_values_that_are_not_finite_are_refused_and_nothing_is_lost() -> None:
    model: Any = tiny_mixture("mixtral")
    blocks_of(model)[1].experts.down_proj[:, 0, 0] = torch.nan
    for by, batches, message in (
        ("reap", mixture_batches(1), "not finite on the calibration data"),
        ("magnitude", None, "NaN or infinite"),
    ):
        with pytest.raises(ValueError, match=message):
            drop_experts_(model, 1, batches, by=by)
    assert model.config.num_local_experts == len(blocks_of(model)[0].experts.down_proj) == 4


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert list(EXPERT_CHOICES) == list(METHODS)
    printed, config = shrunk(tiny_mixture("mixtral"), tmp_path, "--experts 0.5", capsys)
    assert printed["experts"] == [4, 2]
    assert (config["model_type"], config["num_local_experts"]) == ("mixtral", 2)
    data = calibration(tmp_path)
    cases = (
        (["--experts", "3", *data], "--experts is 3, which leaves 1 experts"),
        (["--experts", "1"], "--experts looks at data"),
        (["--experts", "1", "--by", "magnitude", *data], "looks at no data"),
        (["--experts", "1", "--by", "loss", *data], "--by loss is not for --experts"),
        (["--blocks", "1", "--merge", *data], "--merge is for --experts"),
        (["--experts", "1", "--uniform", *data], "--uniform is for heads and neurons"),
        (["--merge"], "--merge is for --blocks N, --experts N"),
    )
    check_refused(tmp_path, cases, capsys)
