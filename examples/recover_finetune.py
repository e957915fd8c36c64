"""Fine-tune a pruned language model in Trainer; its zeros stay zero.

    python examples/recover_finetune.py SPARSE OUTPUT --data train.jsonl --held-out wikitext.txt \
        --teacher DENSE

SPARSE is a folder that `hf_sparse.save_pretrained` wrote, or a Hub name. What keeps the zeros is one
callback, `KeepZeros`. With `--teacher` the model also learns from the dense model's logits.
"""

from __future__ import annotations

import argparse
from pathlib import Path

if __name__ == "__main__":  # help and wrong usage need no slow import
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("sparse", help="folder or Hub name of the sparse model")
    parser.add_argument("output", help="folder for the recovered model")
    parser.add_argument("--data", type=Path, required=True, help=".jsonl or plain text")
    parser.add_argument("--held-out", type=Path, required=True, help="text to measure on")
    parser.add_argument("--teacher", help="the dense model, to learn from")
    parser.add_argument("--num-samples", type=int, default=780, help="training windows")
    parser.add_argument("--window", type=int, default=512, help="tokens in a window")
    parser.add_argument("--max-windows", type=int, default=32, help="windows to measure on")
    parser.add_argument("--accumulate", type=int, default=2, help="windows in a step")
    parser.add_argument("--epochs", type=float, default=1)
    parser.add_argument("--lr", type=float, default=3e-4)
    options = parser.parse_args()

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

import hf_sparse
from hf_sparse.calibration.documents import read_documents


def main(options: argparse.Namespace) -> None:
    """Train, check, compare, save."""
    tokenizer = AutoTokenizer.from_pretrained(options.sparse)
    model = AutoModelForCausalLM.from_pretrained(options.sparse, dtype=torch.float32)
    held_out = options.held_out.read_text()
    before = hf_sparse.measure_sparsity(model)

    def measure() -> float:
        return hf_sparse.perplexity(
            model, tokenizer, held_out, options.window, max_windows=options.max_windows
        )

    pruned = measure()
    windows = hf_sparse.calibration_batches(
        tokenizer,
        read_documents([options.data]),
        num_samples=options.num_samples,
        window=options.window,
    )
    rows = [{"input_ids": w["input_ids"][0], "labels": w["input_ids"][0]} for w in windows]
    if options.teacher:
        teacher = AutoModelForCausalLM.from_pretrained(options.teacher)
        hf_sparse.Distillation(teacher, logits=0.5).attach(model)
    trainer = Trainer(
        model,
        TrainingArguments(
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
        ),
        train_dataset=rows,
        callbacks=[hf_sparse.KeepZeros()],
    )
    trainer.train()
    after = hf_sparse.measure_sparsity(model)
    print(f"zeros: {before.zeros:,} before, {after.zeros:,} after")
    print(f"perplexity, {options.held_out.name}: pruned {pruned:.2f}, recovered {measure():.2f}")
    hf_sparse.save_pretrained(model, options.output, tokenizer=tokenizer)
    print(f"saved to {options.output}")


if __name__ == "__main__":
    main(options)
