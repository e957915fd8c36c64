"""Zero-shot tasks: likelihoods against plain forward passes, scores against the harness's formulas."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import hf_sparse
from hf_sparse.provenance.record import provenance_of
from hf_sparse.zeroshot import likelihood
from hf_sparse.zeroshot.likelihood import Reader, Request, likelihoods
from tests.support.tiny_models import prose, tiny_model, tiny_tokenizer

WORDS = prose().split()


def words(start: int, count: int) -> str:
    return " ".join(WORDS[start : start + count])


def choice_rows(count: int = 9) -> list[dict[str, Any]]:
    return [
        {
            "context": words(20 * i, 4 + i % 3),
            "choices": [words(20 * i + 7 * j, 1 + j) for j in range(2 + i % 3)],
            "label": i % 2,
        }
        for i in range(count)
    ]


def plain(model: Any, request: Request) -> tuple[float, bool]:
    """The likelihood of a request from one forward pass of its own."""
    ids = torch.tensor([[*request.context, *request.target]])
    with torch.no_grad():
        logs = model(input_ids=ids).logits.double().log_softmax(-1)[0]
    places = range(len(request.context) - 1, ids.shape[1] - 1)
    found = [(logs[place, ids[0, place + 1]], logs[place].argmax()) for place in places]
    greedy = [int(best) for _, best in found] == list(request.target)
    return float(sum(log for log, _ in found)), greedy


@pytest.mark.few(1)
@pytest.mark.parametrize("family", ["llama", "gpt2", "mistral", "opt", "gemma"])
def test_likelihoods_are_those_of_one_forward_pass_each(family: str) -> None:
    model = tiny_model(family)
    reader = Reader(model, tiny_tokenizer())
    texts = [(row["context"], " " + choice) for row in choice_rows() for choice in row["choices"]]
    texts += [("", " a b c"), (words(3, 5), " x")]
    requests = [reader.request(*pair, "here") for pair in texts]
    for batch_size in (1, 4):
        found = likelihoods(model, requests, batch_size, "test")
        for request, one in zip(requests, found, strict=True):
            log, greedy = plain(model, request)
            assert one.log == pytest.approx(log, abs=1e-4)
            assert one.greedy == greedy


def test_a_context_goes_through_the_model_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokens = tiny_model("llama"), []
    model.register_forward_pre_hook(
        lambda _, args, kwargs: tokens.append(kwargs["input_ids"].numel()), with_kwargs=True
    )
    reader = Reader(model, tiny_tokenizer())
    requests = [reader.request(words(0, 9), f" {letter}", "here") for letter in "abcd"]
    likelihoods(model, requests, 4, "test")
    assert sum(tokens[2:]) == len(requests[0].context)  # the first two look whether it is causal
    tokens.clear()
    monkeypatch.setattr(likelihood, "_LEAST_SHARED", 1000)
    likelihoods(model, requests, 4, "test")
    assert sum(tokens[2:]) == 4 * len(requests[0].context)


def by_harness(model: Any, rows: list[dict[str, Any]]) -> tuple[list[float], list[float]]:
    """`acc` and `acc_norm` of each row, as lm-evaluation-harness computes them."""
    reader, acc, acc_norm = Reader(model, tiny_tokenizer()), [], []
    for row in rows:
        logs = np.array(
            [plain(model, reader.request(row["context"], f" {c}", ""))[0] for c in row["choices"]]
        )
        lengths = np.array([float(len(choice)) for choice in row["choices"]])
        acc.append(float(np.argmax(logs) == row["label"]))
        acc_norm.append(float(np.argmax(logs / lengths) == row["label"]))
    return acc, acc_norm


def test_scores_are_those_of_the_harness() -> None:
    model, rows = tiny_model("llama"), choice_rows(20)
    report = hf_sparse.evaluate_choices(model, tiny_tokenizer(), {"mine": rows}, batch_size=3)
    [score] = report.scores
    acc, acc_norm = by_harness(model, rows)
    assert score.acc == pytest.approx(np.mean(acc))
    assert score.acc_norm == pytest.approx(np.mean(acc_norm))
    assert score.acc_stderr == pytest.approx(np.std(acc, ddof=1) / math.sqrt(len(acc)))
    assert score.acc_norm_stderr == pytest.approx(np.std(acc_norm, ddof=1) / math.sqrt(len(acc)))
    assert 0 < score.acc < 1


def test_swapping_the_labels_of_two_choices_turns_the_score() -> None:
    model = tiny_model("llama")
    rows = [{**row, "choices": row["choices"][:2]} for row in choice_rows(12)]
    turned = [{**row, "label": 1 - row["label"]} for row in rows]
    found = hf_sparse.evaluate_choices(model, tiny_tokenizer(), {"a": rows, "b": turned})
    assert found["a"].acc + found["b"].acc == pytest.approx(1)
    with pytest.raises(KeyError):
        found["c"]


def test_a_greedy_continuation_is_what_the_model_generates() -> None:
    model, tokenizer = tiny_model("llama"), tiny_tokenizer()
    reader = Reader(model, tokenizer)
    request = reader.request(words(0, 6), " x", "here")
    ids = list(request.context)
    for _ in range(3):
        with torch.no_grad():
            ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
    said = tuple(ids[len(request.context) :])
    other = (*said[:-1], (said[-1] + 1) % 256)
    asked = [Request(request.context, target, cut=False) for target in (said, other, said[:1])]
    found = likelihoods(model, asked, 2, "test")
    assert [one.greedy for one in found] == [True, False, True]


def test_last_words_pairs_and_contexts() -> None:
    model, tokenizer = tiny_model("llama"), tiny_tokenizer()
    last = [{"context": words(9 * i, 5), "continuation": words(9 * i + 5, 1)} for i in range(4)]
    pairs = [
        {"good": words(i, 4), "bad": words(i + 5, 4), "paradigm": "ab"[i > 0]} for i in range(5)
    ]
    contexts = [
        {"contexts": [words(i, 3), words(i + 4, 3)], "continuation": words(i + 8, 3), "label": 1}
        for i in range(4)
    ]
    tasks = {"last": last, "pairs": pairs, "contexts": contexts}
    report = hf_sparse.evaluate_choices(model, tokenizer, tasks, dense=tiny_model("llama", 1))
    reader = Reader(model, tokenizer)
    logs = [
        plain(model, reader.request(r["context"], f" {r['continuation']}", ""))[0] for r in last
    ]
    assert report["last"].perplexity == pytest.approx(math.exp(-sum(logs) / 4), rel=1e-3)
    assert report["last"].acc_norm is None
    right = [
        plain(model, reader.request("", f" {row['good']}", ""))[0]
        > plain(model, reader.request("", f" {row['bad']}", ""))[0]
        for row in pairs
    ]
    assert report["pairs"].acc == pytest.approx((right[0] + sum(right[1:]) / 4) / 2)
    assert report["pairs"].acc_stderr is None  # of a group of one nothing is known
    assert report["contexts"].acc_norm is None
    assert report.mean == pytest.approx(sum(score.acc for score in report.scores) / 3)
    assert len(report.dense) == 3
    text = str(report)
    assert "dense" in text
    assert "perplexity" in text
    assert json.loads(json.dumps(report.to_dict()))["scores"][0]["task"] == "last"


def test_long_contexts_lose_their_beginning_and_long_choices_are_refused() -> None:
    model, tokenizer = tiny_model("gpt2"), tiny_tokenizer()
    row = {"context": words(0, 150), "choices": [words(3, 2), words(9, 3)], "label": 0}
    report = hf_sparse.evaluate_choices(model, tokenizer, {"long": [row]})
    assert report["long"].cut == 2
    assert "lost" not in str(report)
    assert "their beginnings were cut" in str(report)
    request = Reader(model, tokenizer).request(row["context"], " a", "here")
    assert len(request.context) + len(request.target) == 128 + 1
    row = {**row, "choices": [words(0, 150), "a"]}
    with pytest.raises(
        ValueError, match=r"'long', example 1: a choice has \d+ tokens.* 128 at most"
    ):
        hf_sparse.evaluate_choices(model, tokenizer, {"long": [row]})


def test_what_is_no_causal_model_is_refused() -> None:
    tasks = {"mine": choice_rows()}
    with pytest.raises(ValueError, match="BertModel gives no logits"):
        hf_sparse.evaluate_choices(tiny_model("bert"), tiny_tokenizer(), tasks)
    with pytest.raises(ValueError, match="tokenizer is 'x'; wanted"):
        hf_sparse.evaluate_choices(tiny_model("llama"), "x", tasks)
    small = tiny_model("llama", vocab_size=40)
    with pytest.raises(ValueError, match=r"token \d+ is unknown to the model, which has 40"):
        hf_sparse.evaluate_choices(small, tiny_tokenizer(), tasks)
    broken = tiny_model("llama")
    with torch.no_grad():
        broken.model.norm.weight.fill_(float("nan"))
    with pytest.raises(ValueError, match="not finite"):
        hf_sparse.evaluate_choices(broken, tiny_tokenizer(), tasks)


def test_the_card_tells_the_figures_while_the_weights_are_the_same(tmp_path: Path) -> None:
    model, tasks = tiny_model("llama"), {"mine": choice_rows()}
    hf_sparse.prune_(model, hf_sparse.SparsityConfig("unstructured", 0.5), "magnitude")
    report = hf_sparse.evaluate_choices(
        model, tiny_tokenizer(), tasks, dense=tiny_model("llama", 1)
    )
    again = hf_sparse.evaluate_choices(model, tiny_tokenizer(), {"other": choice_rows()})
    hf_sparse.save_pretrained(model, tmp_path / "told")
    told = (tmp_path / "told" / "README.md").read_text()
    for metric in (*report.metrics, *again.metrics):
        assert metric.name in told
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.mul_(2)
    hf_sparse.save_pretrained(model, tmp_path / "changed")
    assert "zero-shot" not in (tmp_path / "changed" / "README.md").read_text()
    hf_sparse.evaluate_choices(model, tiny_tokenizer(), {"new": choice_rows()})
    assert {metric.name.split(",")[0] for metric in provenance_of(model).metrics} == {
        "zero-shot new"
    }


def test_a_compiled_model_has_the_same_figures() -> None:
    pytest.importorskip("llvmlite")
    model, tasks = tiny_model("llama"), {"mine": choice_rows()}
    hf_sparse.prune_(model, hf_sparse.SparsityConfig("unstructured", 0.5), "magnitude")
    expected = hf_sparse.evaluate_choices(model, tiny_tokenizer(), tasks)["mine"]
    compiled = hf_sparse.compile(model)
    found = hf_sparse.evaluate_choices(compiled, tiny_tokenizer(), tasks)["mine"]
    assert (found.acc, found.acc_norm) == (expected.acc, expected.acc_norm)
