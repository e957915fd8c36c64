"""Make the models of model_cards/ on this machine, measure them, and write down what their cards tell.

    python benchmarks/own_models.py --data FOLDER    # WikiText-2, C4 and GLUE, see real_models.texts
    python benchmarks/own_models.py --data FOLDER --only smollm2-135m-2-4

A model that is in `--out` is not made again, so that a run can be stopped and started. Each is saved
with its figures, dense beside sparse, by the same measurement; `benchmarks/cards.py` renders the cards.
The trainings are short, on one thread: they show how a model is made, not the best that it can be.
"""

from __future__ import annotations

import argparse
import copy
import math
import random
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # help and wrong usage need no slow import
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--data", type=Path, required=True, help="folder with lm/ and glue/")
    parser.add_argument("--out", type=Path, default=Path("bench_output/own_models"))
    parser.add_argument("--results", type=Path, default=Path("benchmarks/results/own_models"))
    parser.add_argument("--only", nargs="+", metavar="NAME", help="such as smollm2-135m-2-4")
    parser.add_argument("--steps", type=int, default=400, help="steps of each training")
    options = parser.parse_args()

import torch
from cards import written_down
from glue import TASKS, Data, evaluate, load_model
from real_models import dense_smollm2, machine, texts
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import (
    AlbertConfig,
    AlbertForSequenceClassification,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedTokenizerFast,
    get_scheduler,
)

import hf_sparse
from hf_sparse import Distillation, Metric, Schedule, SparseAdamW, Sparsifier, SparsityConfig

SMOLLM2, MINILM = "HuggingFaceTB/SmolLM2-135M-Instruct", "sentence-transformers/all-MiniLM-L6-v2"
PLAIN = SparsityConfig("unstructured", sparsity=0.0, format="dense")
SST2 = TASKS["sst2"]
BATCH, WINDOW, MAX_WINDOWS, SEED = 32, 512, 16, 0
LENGTH, VOCABULARY = 128, 4096
DATA = {"datasets": ["nyu-mll/glue"], "language": "en"}


class Place:
    """Where models are, and the data of the run."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.folder, self.data, self.steps = options.out, options.data, options.steps

    def of(self, name: str) -> Path:
        """The folder of a model."""
        return self.folder / name

    def dense(self, name: str) -> Path:
        """The folder of the dense model of that name, which is made if it is not there."""
        folder = self.folder / "dense" / name
        if not (folder / "config.json").exists():
            start = time.perf_counter()
            DENSE[name](self, folder)
            print(f"dense {name}: {time.perf_counter() - start:.0f} s", flush=True)
        return folder


def perplexities(
    place: Place, model: Any, tokenizer: Any, window: int = WINDOW
) -> dict[str, float]:
    """Of WikiText-2 and C4, on the first windows of each."""
    _, held_out = texts(place.data / "lm")
    return {
        f"perplexity, {name}, {MAX_WINDOWS} x {window} tokens": hf_sparse.perplexity(
            model, tokenizer, documents, window, max_windows=MAX_WINDOWS
        )
        for name, documents in held_out.items()
    }


def metrics(sparse: dict[str, float], dense: dict[str, float]) -> list[Metric]:
    """Both figures of each measurement."""
    return [Metric(name, value, dense[name]) for name, value in sparse.items()]


def windows(place: Place, tokenizer: Any, number: int, window: int = WINDOW) -> list[Any]:
    """Calibration windows of C4."""
    documents, _ = texts(place.data / "lm")
    return hf_sparse.calibration_batches(tokenizer, documents, num_samples=number, window=window)


def save(
    place: Place,
    name: str,
    model: Any,
    config: SparsityConfig | None,
    tokenizer: Any,
    report: Any,
    metrics: list[Metric],
    **told: Any,
) -> None:
    """Save a sparse model with its figures, and what else its card tells."""
    made = {"tokenizer": tokenizer, "report": report, "metrics": metrics}
    hf_sparse.save_pretrained(model, place.of(name), config, **made, **told)


def prune_smollm2(place: Place, name: str, config: SparsityConfig, recovered: int) -> None:
    """SparseGPT, and recovery by masked LoRA on so many windows."""
    dense = place.dense("smollm2")
    tokenizer = AutoTokenizer.from_pretrained(dense)
    teacher = AutoModelForCausalLM.from_pretrained(dense)
    model = copy.deepcopy(teacher)
    report = hf_sparse.prune_(model, config, "sparsegpt", windows(place, tokenizer, 32))
    if recovered:
        hf_sparse.recover_(model, windows(place, tokenizer, recovered), "lora", seed=SEED)
        report = None
    found = metrics(perplexities(place, model, tokenizer), perplexities(place, teacher, tokenizer))
    card = {"license": "apache-2.0", "language": "en"}
    save(place, name, model, config, tokenizer, report, found, base_model=SMOLLM2, card_data=card)


def learn(
    work: Path,
    model: Any,
    optimizer: Any,
    batches: Iterator[Any],
    steps: int,
    driven_by: Callable[[Any], Any] = lambda optimizer: None,
) -> Any:
    """Train on CPU in float32, with a linear warm-up and decay; goes on where a run was stopped.

    Args:
        work: file of what a stopped run has left.
        model, optimizer, batches, steps: of the training.
        driven_by: makes what drives the optimizer to its zeros.

    Returns:
        What it made.
    """
    torch.manual_seed(SEED)
    scheduler = get_scheduler("linear", optimizer, steps // 10, steps)
    parts, done = (model, optimizer, scheduler), 0
    if work.exists():
        done, states = torch.load(work, weights_only=False)
        for part, state in zip(parts, states, strict=True):
            part.load_state_dict(state)
    sparsifier = driven_by(optimizer)
    model.train()
    for number, batch in zip(range(steps), batches, strict=False):
        if number < done:
            continue
        model(**batch).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        if sparsifier is not None:
            sparsifier.step()
        if number % 25 == 24:
            work.parent.mkdir(parents=True, exist_ok=True)
            torch.save((number + 1, [part.state_dict() for part in parts]), work)
            print(f"{work.stem}: {number + 1} of {steps} steps", flush=True)
    model.eval()
    return sparsifier


def sentences(place: Place, tokenizer: Any) -> tuple[Iterator[dict[str, Tensor]], Data]:
    """Endless batches of SST-2, and its validation set."""
    training, validation = (
        Data(place.data / "glue" / "sst2", SST2, split, tokenizer, most=place.steps * BATCH)
        for split in ("train", "validation")
    )

    def endless() -> Iterator[dict[str, Tensor]]:
        chooser = random.Random(SEED)
        while True:
            yield from training.batches(BATCH, chooser)

    return endless(), validation


def dense_classifier(place: Place, folder: Path, model: Any, tokenizer: Any) -> None:
    """Train a classifier of SST-2 without zeros."""
    batches, _ = sentences(place, tokenizer)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-4, weight_decay=0.01)
    learn(folder.with_suffix(".part"), model, optimizer, batches, place.steps)
    hf_sparse.save_pretrained(model, folder, PLAIN, tokenizer=tokenizer)


def dense_minilm(place: Place, folder: Path) -> None:
    """MiniLM, fine-tuned on SST-2."""
    torch.manual_seed(SEED)
    dense_classifier(place, folder, *load_model(SST2))


def dense_albert(place: Place, folder: Path) -> None:
    """A small ALBERT (6 layers that share their weights) from scratch, with MiniLM's tokenizer."""
    torch.manual_seed(SEED)
    tokenizer = load_model(SST2)[1]
    config = AlbertConfig(
        vocab_size=len(tokenizer),
        embedding_size=64,
        hidden_size=256,
        intermediate_size=1024,
        num_hidden_layers=6,
        num_attention_heads=4,
        pad_token_id=tokenizer.pad_token_id,
        num_labels=2,
    )
    dense_classifier(place, folder, AlbertForSequenceClassification(config), tokenizer)


def sparse_classifier(
    place: Place, name: str, start: str, config: SparsityConfig, base: str | None
) -> None:
    """SparseAdamW from the dense classifier on, with it as teacher."""
    torch.manual_seed(SEED)
    dense = place.dense(start)
    tokenizer = AutoTokenizer.from_pretrained(dense)
    teacher = AutoModelForSequenceClassification.from_pretrained(dense)
    model = copy.deepcopy(teacher)
    batches, validation = sentences(place, tokenizer)
    optimizer = SparseAdamW(
        hf_sparse.sparse_param_groups(model, config, weight_decay=0.01), lr=2e-4, penalty="l0",
        scale="adaptive",
    )  # fmt: skip
    Distillation(teacher, logits=0.5, hidden=1.0, temperature=2.0).attach(model)

    def driven(optimizer: Any) -> Sparsifier:
        shape = Schedule("cubic", 0.1, 0.6)
        return Sparsifier(optimizer, config, place.steps, schedule=shape, interval=10)

    work = place.folder / f"{name}.part"
    report = learn(work, model, optimizer, batches, place.steps, driven).report(model)
    save_classifier(place, name, model, teacher, validation, tokenizer, base, config, report)


def save_classifier(
    place: Place,
    name: str,
    model: Any,
    dense: Any,
    validation: Data,
    tokenizer: Any,
    base: str | None,
    config: SparsityConfig | None = None,
    report: Any = None,
) -> None:
    """Measure both models and save one."""
    scores = [evaluate(found, validation, "accuracy") for found in (model, dense)]
    model.eval()
    measured = [Metric("accuracy, SST-2 validation, %", *scores)]
    card = {"license": "apache-2.0", **DATA} if base else DATA
    save(place, name, model, config, tokenizer, report, measured, base_model=base, card_data=card)


def shrunk_minilm(place: Place, name: str) -> None:
    """Half of the neurons and a quarter of the heads go, the rest is refitted."""
    dense = place.dense("minilm-sst2")
    tokenizer = AutoTokenizer.from_pretrained(dense)
    teacher = AutoModelForSequenceClassification.from_pretrained(dense)
    model = copy.deepcopy(teacher)
    batches, validation = sentences(place, tokenizer)
    calibration = [next(batches) for _ in range(32)]
    for pattern, sparsity in (("head", 0.25), ("column", 0.5)):
        config = SparsityConfig(pattern, sparsity)
        hf_sparse.prune_(model, config, "taylor", calibration, scope="global", refine="refit")
    hf_sparse.shrink_(model)
    save_classifier(place, name, model, teacher, validation, tokenizer, MINILM)


def dense_gpt2(place: Place, folder: Path) -> None:
    """A small GPT-2 (4 layers x 256) and its byte-level tokenizer, from scratch on C4."""
    torch.manual_seed(SEED)
    documents, _ = texts(place.data / "lm")
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    end = "<|endoftext|>"
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=[end], initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(documents, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=end, bos_token=end)
    config = GPT2Config(
        vocab_size=VOCABULARY, n_embd=256, n_layer=4, n_head=4, n_positions=LENGTH,
        bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    model = GPT2LMHeadModel(config)
    ids = torch.tensor(tokenizer(end.join(documents))["input_ids"])
    rows = ids[: len(ids) // LENGTH * LENGTH].view(-1, LENGTH)

    def endless() -> Iterator[dict[str, Tensor]]:
        for epoch in range(1000):
            order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(epoch))
            for chunk in order.split(BATCH // 2):
                yield {"input_ids": rows[chunk], "labels": rows[chunk]}

    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.01)
    learn(folder.with_suffix(".part"), model, optimizer, endless(), place.steps)
    hf_sparse.save_pretrained(model, folder, PLAIN, tokenizer=tokenizer)


def pruned_gpt2(place: Place, name: str, config: SparsityConfig) -> None:
    """ALPS on windows of the text that the model has learned from."""
    dense = place.dense("gpt2-c4")
    tokenizer = AutoTokenizer.from_pretrained(dense)
    teacher = AutoModelForCausalLM.from_pretrained(dense)
    model = copy.deepcopy(teacher)
    report = hf_sparse.prune_(model, config, "alps", windows(place, tokenizer, 64, LENGTH))
    found = [perplexities(place, one, tokenizer, LENGTH) for one in (model, teacher)]
    card = {"language": "en", "datasets": ["allenai/c4"]}
    save(place, name, model, config, tokenizer, report, metrics(*found), card_data=card)


DENSE: dict[str, Callable[[Place, Path], Any]] = {
    "smollm2": lambda place, folder: dense_smollm2(folder),
    "minilm-sst2": dense_minilm,
    "albert-sst2": dense_albert,
    "gpt2-c4": dense_gpt2,
}
UNSTRUCTURED = SparsityConfig("unstructured", 0.8)
SPARSE: dict[str, Callable[[Place, str], Any]] = {
    "minilm-sst2-unstructured-80": lambda p, n: sparse_classifier(
        p, n, "minilm-sst2", UNSTRUCTURED, MINILM
    ),
    "minilm-sst2-4x1-80": lambda p, n: sparse_classifier(
        p, n, "minilm-sst2", SparsityConfig("block:4x1", 0.8), MINILM
    ),
    "minilm-sst2-shrunk": shrunk_minilm,
    "albert-sst2-unstructured-80": lambda p, n: sparse_classifier(
        p, n, "albert-sst2", UNSTRUCTURED, None
    ),
    "gpt2-c4-2-4": lambda p, n: pruned_gpt2(p, n, SparsityConfig("2:4")),
    "smollm2-135m-2-4": lambda p, n: prune_smollm2(p, n, SparsityConfig("2:4"), 0),
    "smollm2-135m-unstructured-60-recovered": lambda p, n: prune_smollm2(
        p, n, SparsityConfig("unstructured", 0.6), 128
    ),
}


def main(options: argparse.Namespace) -> None:
    """Make what is missing, a line each."""
    if unknown := set(options.only or ()) - SPARSE.keys():
        raise SystemExit(f"no model {', '.join(unknown)}; there are: {', '.join(SPARSE)}")
    print(machine(), flush=True)
    place = Place(options)
    options.results.mkdir(parents=True, exist_ok=True)
    for name in options.only or SPARSE:
        start = time.perf_counter()
        if not (place.of(name) / "config.json").exists():
            SPARSE[name](place, name)
        result = options.results / f"{name}.json"
        result.write_text(written_down(place.of(name), machine()))
        told = hf_sparse.inspect_checkpoint(place.of(name))
        assert math.isfinite(told.report.sparsity)
        print(f"{name}: {time.perf_counter() - start:.0f} s; {told.report.summary()}", flush=True)


if __name__ == "__main__":
    main(options)
