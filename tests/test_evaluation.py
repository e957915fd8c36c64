"""Perplexity and accuracy against plain references; calibration windows."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from transformers import BertForMaskedLM

import hf_sparse
from hf_sparse import accuracy, calibration_batches, perplexity
from hf_sparse.calibration.windows import token_windows
from tests.support.tiny_models import VOCABULARY, prose, tiny_classifier, tiny_model, tiny_tokenizer


@pytest.mark.few(1)
@pytest.mark.parametrize("batch_size", [1, 3])
def test_perplexity_equals_a_token_by_token_reference(batch_size: int) -> None:
    model, tokenizer, text = tiny_model("llama").train(), tiny_tokenizer(), prose()[:2000]
    found = perplexity(model, tokenizer, text, window=16, max_windows=7, batch_size=batch_size)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    losses = []
    for start in range(0, 7 * 16, 16):
        for end in range(1, 16):
            with torch.no_grad():
                logits = model.eval()(torch.tensor([ids[start : start + end]])).logits[0, -1]
            losses.append(-logits.log_softmax(-1)[ids[start + end]].item())
    assert len(losses) == 7 * 15
    assert found == pytest.approx(math.exp(sum(losses) / len(losses)), rel=1e-5)


def test_a_model_that_knows_nothing_has_the_perplexity_of_its_vocabulary() -> None:
    model = tiny_model("llama", tie_word_embeddings=False)
    nn.init.zeros_(model.lm_head.weight)
    assert perplexity(model, tiny_tokenizer(), prose()[:3000], 32) == pytest.approx(VOCABULARY)


def test_the_model_comes_back_in_its_mode() -> None:
    model = tiny_model("llama").train()
    perplexity(model, tiny_tokenizer(), prose()[:500], 16)
    assert model.training


def test_perplexity_refuses_models_without_a_language_head_and_short_texts() -> None:
    with pytest.raises(ValueError, match="BertModel gives no logits"):
        perplexity(tiny_model("bert"), tiny_tokenizer(), prose()[:500], 16)
    with pytest.raises(ValueError, match="less than one window of 512"):
        perplexity(tiny_model("llama"), tiny_tokenizer(), "short", 512)
    with pytest.raises(ValueError, match="window is 1"):
        perplexity(tiny_model("llama"), tiny_tokenizer(), prose()[:500], 1)


def test_perplexity_refuses_models_that_see_what_they_predict() -> None:
    config = tiny_model("bert").config
    with pytest.raises(ValueError, match="BertForMaskedLM sees the tokens that it is to predict"):
        perplexity(BertForMaskedLM(config), tiny_tokenizer(), prose()[:2000], 32)


@pytest.mark.slow
def test_perplexity_tells_what_it_cannot_measure() -> None:
    model, tokenizer, text = tiny_model("gpt2"), tiny_tokenizer(), prose()[:20_000]
    with pytest.raises(ValueError, match="GPT2LMHeadModel cannot take 512 tokens"):
        perplexity(model, tokenizer, text, 512)
    for wrong in ({"batch_size": 0}, {"max_windows": 0}):
        with pytest.raises(ValueError, match="wanted 1 or more"):
            perplexity(model, tokenizer, text, 32, **wrong)
    with torch.no_grad():
        model.transformer.ln_f.weight.fill_(float("nan"))
    with pytest.raises(ValueError, match="not finite"):
        perplexity(model, tokenizer, text, 32)


def test_documents_are_joined_by_one_end_of_sequence_token() -> None:
    tokenizer = tiny_tokenizer()
    windows = token_windows(tokenizer, ["a b", "c d e"], 2)
    ids = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in ("a b", "c d e")]
    joined = [*ids[0], tokenizer.eos_token_id, *ids[1]]
    assert windows.reshape(-1).tolist() == joined[: len(joined) // 2 * 2]


def test_calibration_batches_are_cut_in_order() -> None:
    batches = calibration_batches(
        tiny_tokenizer(), [prose()], num_samples=5, window=16, batch_size=2
    )
    assert [tuple(batch["input_ids"].shape) for batch in batches] == [(2, 16), (2, 16), (1, 16)]
    ids = torch.cat([batch["input_ids"].reshape(-1) for batch in batches]).tolist()
    assert ids == tiny_tokenizer()(prose(), add_special_tokens=False)["input_ids"][:80]


def test_too_little_calibration_text_is_an_error() -> None:
    with pytest.raises(ValueError, match="less than one window of 512"):
        calibration_batches(tiny_tokenizer(), ["short"])
    with pytest.raises(ValueError, match=r"fills \d+ windows of 16 tokens, but num_samples is 128"):
        calibration_batches(tiny_tokenizer(), [prose()[:300]], window=16)


@pytest.mark.parametrize("pairs", [False, True])
def test_accuracy_counts_each_text_once_whatever_the_padding(pairs: bool) -> None:
    model, tokenizer = tiny_classifier(), tiny_tokenizer()
    words = prose().split()[:300]
    texts = [" ".join(words[i * 7 : i * 7 + 1 + i % 9]) for i in range(20)]
    inputs = list(zip(texts, reversed(texts), strict=True)) if pairs else texts
    guesses = []
    for text in inputs:
        arguments = text if pairs else (text,)
        encoded = tokenizer(*arguments, return_tensors="pt")
        with torch.no_grad():
            guesses.append(model(**encoded).logits.argmax().item())
    assert len(set(guesses)) > 1
    labels = [(guess + (index < 5)) % 3 for index, guess in enumerate(guesses)]
    assert accuracy(model, tokenizer, inputs, labels, batch_size=6) == 15 / 20


def test_labels_may_be_names_and_must_be_classes() -> None:
    model, texts = tiny_classifier(), ["a", "b"]
    figures = [
        accuracy(model, tiny_tokenizer(), texts, labels)
        for labels in ([0, 2], ["LABEL_0", "LABEL_2"])
    ]
    assert figures[0] == figures[1]
    for wrong in ("0", 3, -1, 1.0, None):
        with pytest.raises(ValueError, match="is no class of the model; wanted 0 to 2"):
            accuracy(model, tiny_tokenizer(), texts, [0, wrong])


def test_accuracy_refuses_texts_and_labels_of_different_number() -> None:
    with pytest.raises(ValueError, match="found 1 texts and 2 labels"):
        accuracy(tiny_classifier(), tiny_tokenizer(), ["a"], [0, 1])


def test_pruning_changes_perplexity_a_little_and_everything_pruned_a_lot() -> None:
    model = tiny_model("llama")
    text = prose()[:3000]
    dense = perplexity(model, tiny_tokenizer(), text, 32)
    hf_sparse.prune_(model, hf_sparse.SparsityConfig("unstructured", 0.0), "magnitude")
    assert perplexity(model, tiny_tokenizer(), text, 32) == pytest.approx(dense, rel=1e-4)
    hf_sparse.prune_(model, hf_sparse.SparsityConfig("unstructured", 0.9), "magnitude")
    assert perplexity(model, tiny_tokenizer(), text, 32) != dense
