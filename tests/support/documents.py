"""The pages of the documentation: their code blocks, and tiny stand-ins for what these name."""

from __future__ import annotations

import copy
import inspect
import re
import textwrap
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import accelerate
import torch
import transformers

import hf_sparse
from tests.support.mixtures import tiny_mixture
from tests.support.tiny_models import (
    prose,
    tiny_batches,
    tiny_classifier,
    tiny_model,
    tiny_tokenizer,
)

ROOT = Path(__file__).parents[2]
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").rglob("*.md")])
# Pages that are programs: a block goes on with what the blocks before it have made.
PROGRAMS = ("quickstart", "concepts", "how-to", "llm-compressor", "torch-prune", "torchao")
_BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
# The names that pages load models by; each is a folder here.
CAUSAL, BERT, LARGE, SPARSE = (
    "HuggingFaceTB/SmolLM2-135M",
    "bert-base-uncased",
    "big-model",
    "model-sparse",
)


@dataclass(frozen=True)
class Block:
    """A block of code on a page.

    Attributes:
        page: the page's name.
        number: of the block among those of its language, from 1.
        code: what stands in it.
    """

    page: str
    number: int
    code: str

    def __str__(self) -> str:
        return f"{self.page}-{self.number}"


def blocks(language: str) -> Iterator[Block]:
    """The blocks of a language, page by page."""
    for page in PAGES:
        found = [code for name, code in _BLOCK.findall(page.read_text()) if name == language]
        for number, code in enumerate(found, 1):
            yield Block(page.stem, number, textwrap.dedent(code))


def folders() -> None:
    """Make the folders and files that pages name, in the current directory."""
    large = {"num_hidden_layers": 4, "hidden_size": 128, "intermediate_size": 256}
    tiny_model("llama", **large).save_pretrained(CAUSAL)
    tiny_model("llama").save_pretrained(LARGE)
    tiny_model("bert").save_pretrained(BERT)
    for folder in (CAUSAL, LARGE, BERT):
        tiny_tokenizer().save_pretrained(folder)
    classifier = tiny_classifier()
    config = hf_sparse.SparsityConfig("unstructured", sparsity=0.8)
    hf_sparse.prune_(classifier, config, "magnitude")
    hf_sparse.save_pretrained(classifier, SPARSE, config, tokenizer=tiny_tokenizer())
    for name in ("calibration.txt", "held_out.txt"):
        Path(name).write_text(prose()[:12_000])


def given() -> dict[str, Any]:
    """What pages take for granted: a sparse model, its dense one, data, arguments of a Trainer."""
    dense = transformers.AutoModelForCausalLM.from_pretrained(CAUSAL)
    model = transformers.AutoModelForCausalLM.from_pretrained(CAUSAL)
    config = hf_sparse.SparsityConfig("2:4")
    report = hf_sparse.prune_(model, config, "magnitude")
    batches = tiny_batches("llama")
    loader = [{**batch, "labels": batch["input_ids"]} for batch in batches]
    rows = [row for batch in batches for row in batch["input_ids"]]
    return {
        **dict.fromkeys(("dense", "dense_model", "whole"), dense),
        **{"model": model, "sparse_base": copy.deepcopy(model), "config": config, "report": report},
        **{"batches": batches, "loader": loader, "inputs": batches[0]},
        "tokenizer": tiny_tokenizer(),
        "texts": prose()[:12_000].split("\n\n"),
        "dataset": [{"input_ids": row, "labels": row} for row in rows],
        "args": arguments(),
        "hf_sparse": hf_sparse,
        "torch": torch,
        "accelerate": accelerate,
        "accelerator": accelerate.Accelerator(),
        "Trainer": transformers.Trainer,
        "AutoModelForSequenceClassification": transformers.AutoModelForSequenceClassification,
    }


def arguments() -> transformers.TrainingArguments:
    """Of a short training."""
    return transformers.TrainingArguments(
        "out", per_device_train_batch_size=1, num_train_epochs=3, report_to="none", use_cpu=True
    )


def classifier_given() -> dict[str, Any]:
    """A classifier, and texts with labels."""
    texts = [text[:60] for text in prose()[:4000].split("\n\n")][:9]
    return {
        "model": tiny_classifier(),
        "texts": texts,
        "labels": [i % 3 for i in range(len(texts))],
    }


def quantized_given() -> dict[str, Any]:
    """A model of few bits; the tiny tokenizer is no byte-level one, which GGUF files want."""
    model = tiny_model("llama")
    hf_sparse.quantize_(model, bits=8)
    return {"model": model, "tokenizer": None}


_OPTIMIZING = ("SparseAdamW", "sparse_param_groups")
# What a block needs beside, or instead: by what stands in it.
BESIDE: dict[str, Callable[[], dict[str, Any]]] = {
    "labelled_batches(": classifier_given,
    "export_gguf(": quantized_given,
    "bit_budget(": lambda: {"model": tiny_model("llama")},
    "drop_experts_(": lambda: {"model": tiny_mixture("mixtral")},
    "drop_hidden_(": lambda: {"model": transformers.AutoModelForCausalLM.from_pretrained(CAUSAL)},
    "optimize_model(": lambda: {"model": tiny_model("llama", num_hidden_layers=2)},
    "freeze_zeros_(": lambda: {name: getattr(hf_sparse, name) for name in _OPTIMIZING},
}


def beside(code: str) -> dict[str, Any]:
    """What a block needs beside what is given."""
    return next((make() for text, make in BESIDE.items() if text in code), {})


def shortened(call: Callable[..., Any], **most: int) -> Callable[..., Any]:
    """A call whose arguments of these names are never more than that, for models with few positions."""

    def short(*values: Any, **named: Any) -> Any:
        bound = inspect.signature(call).bind(*values, **named)
        bound.apply_defaults()
        for name, limit in most.items():
            bound.arguments[name] = min(bound.arguments[name] or limit, limit)
        return call(*bound.args, **bound.kwargs)

    return short
