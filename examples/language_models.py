"""What the examples for language models share: flags, windows of texts, perplexity, a training run."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any


def add_texts(parser: argparse.ArgumentParser, samples: int, data: str = "--data") -> None:
    """Add the flags that name the texts, and tell how many windows of them are used."""
    what = data.removeprefix("--").replace("data", "training")
    parser.add_argument(data, dest="data", type=Path, required=True, help=".jsonl or plain text")
    parser.add_argument("--held-out", type=Path, required=True, help="text to measure on")
    parser.add_argument("--num-samples", type=int, default=samples, help=f"{what} windows")
    parser.add_argument("--window", type=int, default=512, help="tokens in a window")
    parser.add_argument("--max-windows", type=int, default=32, help="windows to measure on")


def add_recovery(parser: argparse.ArgumentParser) -> None:
    """Add the flags of a recovery: the sparse model, and its training without the learning rate."""
    parser.add_argument("sparse", help="folder or Hub name of the sparse model")
    parser.add_argument("output", help="folder for the recovered model")
    add_texts(parser, samples=780)
    parser.add_argument("--teacher", help="the dense model, to learn from")
    parser.add_argument("--accumulate", type=int, default=2, help="windows in a step")
    parser.add_argument("--epochs", type=float, default=1)


def windows(options: argparse.Namespace, tokenizer: Any) -> list[dict[str, Any]]:
    """Batches of one window each, `(1, window)`, of the texts to learn from."""
    import hf_sparse  # not above: help needs no slow import
    from hf_sparse.calibration.documents import read_documents

    documents = read_documents([options.data])
    return hf_sparse.calibration_batches(
        tokenizer, documents, num_samples=options.num_samples, window=options.window
    )


def perplexity(options: argparse.Namespace, model: Any, tokenizer: Any) -> float:
    """On the text that was held out."""
    import hf_sparse

    text = options.held_out.read_text()
    return hf_sparse.perplexity(
        model, tokenizer, text, options.window, max_windows=options.max_windows
    )


def rows(options: argparse.Namespace, tokenizer: Any) -> list[dict[str, Any]]:
    """The windows as a training set of Trainer."""
    texts = [window["input_ids"][0] for window in windows(options, tokenizer)]
    return [{"input_ids": ids, "labels": ids} for ids in texts]


def attach_teacher(options: argparse.Namespace, model: Any) -> None:
    """Let the model learn from the dense model's logits too, if there is a teacher."""
    from transformers import AutoModelForCausalLM

    import hf_sparse

    if options.teacher:
        teacher = AutoModelForCausalLM.from_pretrained(options.teacher)
        hf_sparse.Distillation(teacher, logits=0.5).attach(model)


def training_arguments(options: argparse.Namespace) -> Any:
    """One window at a time, a cosine, and no checkpoints."""
    import torch
    from transformers import TrainingArguments

    return TrainingArguments(
        options.output,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=options.accumulate,
        num_train_epochs=options.epochs,
        learning_rate=options.lr,
        lr_scheduler_type="cosine",
        warmup_steps=0.1,
        save_strategy="no",
        report_to=[],
        dataloader_pin_memory=torch.cuda.is_available(),
    )
