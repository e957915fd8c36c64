"""What calls take as texts: one string is one document, and what is no text is told."""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import hf_sparse
from hf_sparse import accuracy, calibration_batches, labelled_batches, perplexity, prune_, recover_
from tests.support.tiny_models import prose, tiny_classifier, tiny_model, tiny_tokenizer

TEXT = prose()[:3000]


def windows_of(texts: Any, count: int = 4) -> torch.Tensor:
    batches = calibration_batches(tiny_tokenizer(), texts, num_samples=count, window=16)
    return torch.cat([batch["input_ids"] for batch in batches])


def test_a_string_is_one_document() -> None:
    ids = tiny_tokenizer()(TEXT, add_special_tokens=False)["input_ids"][:64]
    assert windows_of(TEXT).reshape(-1).tolist() == ids
    assert windows_of([TEXT]).reshape(-1).tolist() == ids
    model = tiny_model("llama")
    assert perplexity(model, tiny_tokenizer(), TEXT, 32) == pytest.approx(
        perplexity(model, tiny_tokenizer(), [TEXT], 32)
    )


def test_blank_documents_put_no_separator() -> None:
    first, second = TEXT[:1000], TEXT[1000:]
    assert torch.equal(windows_of([first, second]), windows_of(["", first, " \n", "", second]))
    with pytest.raises(ValueError, match="0 tokens, less than one window"):
        windows_of(["", "\n"])


def test_lines_of_a_file_are_told_from_documents() -> None:
    lines = TEXT.splitlines(keepends=True)
    with pytest.warns(UserWarning, match=r'lines of one text, give that: "".join\(lines\)') as told:
        windows_of(lines, 30)
    assert Path(told[0].filename).name == Path(__file__).name
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        windows_of("".join(lines), 30)
        windows_of([line.rstrip("\n") for line in lines], 30)  # short documents
        windows_of([f"{line}{line}" for line in lines], 30)


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        ([{"text": "a"}], r"text 0 is a dict with the fields text.*row\['text'\] for row in rows"),
        ({"label": [1], "text": ["a"]}, r"rows\['text'\]"),
        ({"train": object()}, r'data\["train"\]\["text"\]'),
        (b"bytes", r'data.decode\("utf-8"\)'),
        ([b"bytes"], r'text 0 is .*data.decode\("utf-8"\)'),
        ([["a", "b"]], "not nested"),
        ([TEXT[:30], None], "text 1 is None"),
        (None, "found None"),
        (3, "found 3"),
        (Path("text.txt"), r"path.read_text\(\)"),
        (io.StringIO("a\nb"), r"file.read\(\)"),
        (["half \ud800"], "whole Unicode characters"),
        ([torch.ones(2)], "text 0 is tensor"),
        ([], "0 tokens"),
        ("", "0 tokens"),
    ],
)
def test_what_is_no_text_is_refused(texts: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        windows_of(texts)
    with pytest.raises(ValueError, match=message):
        perplexity(tiny_model("llama"), tiny_tokenizer(), texts, 16)


@pytest.mark.parametrize(
    "call",
    [
        lambda texts, labels: labelled_batches(tiny_classifier(), tiny_tokenizer(), texts, labels),
        lambda texts, labels: accuracy(tiny_classifier(), tiny_tokenizer(), texts, labels),
    ],
    ids=["labelled_batches", "accuracy"],
)
@pytest.mark.parametrize(
    ("texts", "labels", "message"),
    [
        ("one text", [0], "found one text"),
        (["a"], "LABEL_0", "found one text or label"),
        ([{"text": "a", "label": 0}], [0], r"dict with the fields text, label.*row\[\"text\"\]"),
        ({"text": ["a"]}, [0], r"texts is a dict; wanted a list.*row\['text'\]"),
        (b"a", [0], "texts is a bytes"),
        ((text for text in ["a"]), [0], "texts is a generator; wanted a list"),
        (["a"], None, r"labels is a NoneType.*row\['label'\]"),
        ([b"a"], [0], "found b'a'"),
        ([["a", "b", "c"]], [0], "a pair of texts"),
    ],
)
def test_labelled_texts_are_checked(
    call: Callable[..., Any], texts: Any, labels: Any, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        call(texts, labels)


@pytest.mark.parametrize("tokenizer", ["gpt2", ["a text"], None])
def test_what_is_no_tokenizer_is_refused(tokenizer: Any) -> None:
    calls: list[Callable[[], Any]] = [
        lambda: calibration_batches(tokenizer, TEXT, num_samples=1, window=8),
        lambda: perplexity(tiny_model("llama"), tokenizer, TEXT, 8),
        lambda: labelled_batches(tiny_classifier(), tokenizer, ["a"], [0]),
        lambda: accuracy(tiny_classifier(), tokenizer, ["a"], [0]),
    ]
    for call in calls:
        with pytest.raises(ValueError, match="wanted the model's tokenizer"):
            call()


@pytest.mark.parametrize("texts", ["one text", [TEXT], 3])
def test_texts_in_place_of_batches_are_told(texts: Any) -> None:
    model = tiny_model("llama")
    config = hf_sparse.SparsityConfig("2:4")
    with pytest.raises(ValueError, match=r"hf_sparse.calibration_batches\(tokenizer, texts\)"):
        prune_(model, config, "wanda", texts)
    prune_(model, config, "magnitude")
    with pytest.raises(ValueError, match=r"hf_sparse.calibration_batches\(tokenizer, texts\)"):
        recover_(model, texts)
    with pytest.raises(ValueError, match=r"hf_sparse.calibration_batches\(tokenizer, texts\)"):
        hf_sparse.allocate(model, 0.5, texts)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"window": "512"}, "window is '512'"),
        ({"num_samples": 1.5}, r"num_samples is 1\.5; wanted a whole number"),
        ({"batch_size": "8"}, "batch_size is '8'"),
    ],
)
def test_numbers_are_whole_numbers(setting: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        calibration_batches(tiny_tokenizer(), TEXT, **{"num_samples": 1, "window": 8, **setting})
