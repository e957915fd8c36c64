"""Train an adapter for a pruned language model in Trainer, and merge it; its zeros stay zero.

    python examples/recover_lora.py SPARSE OUTPUT --data train.jsonl --held-out wikitext.txt \
        --kind lora --r 16 --dtype bfloat16

SPARSE is a folder that `hf_sparse.save_pretrained` wrote, or a Hub name. `--kind lora` masks PEFT's
LoRA, `--kind shira` trains single kept weights. The adapter is saved in OUTPUT/adapter, the merged
model, which is what to publish, in OUTPUT. `--dtype bfloat16` halves the memory of the frozen base.
"""

from __future__ import annotations

import argparse
from pathlib import Path

if __name__ == "__main__":  # help and wrong usage need no slow import
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("sparse", help="folder or Hub name of the sparse model")
    parser.add_argument("output", help="folder for the merged model")
    parser.add_argument("--data", type=Path, required=True, help=".jsonl or plain text")
    parser.add_argument("--held-out", type=Path, required=True, help="text to measure on")
    parser.add_argument("--kind", choices=["lora", "shira"], default="lora")
    parser.add_argument("--r", type=int, default=16, help="rank, or ShiRA's measure of as much")
    parser.add_argument(
        "--targets",
        nargs="+",
        default=["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
        help="layers of ShiRA",
    )
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--teacher", help="the dense model, to learn from")
    parser.add_argument("--num-samples", type=int, default=780, help="training windows")
    parser.add_argument("--window", type=int, default=512, help="tokens in a window")
    parser.add_argument("--max-windows", type=int, default=32, help="windows to measure on")
    parser.add_argument("--accumulate", type=int, default=2, help="windows in a step")
    parser.add_argument("--epochs", type=float, default=1)
    parser.add_argument("--lr", type=float, help="default: 2e-3 for lora, 5e-3 for shira")
    options = parser.parse_args()
    options.lr = options.lr or {"lora": 2e-3, "shira": 5e-3}[options.kind]

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

import hf_sparse
from hf_sparse.calibration.documents import read_documents

try:
    from peft import LoraConfig, ShiraConfig
except ImportError as error:
    raise SystemExit("PEFT is needed: pip install 'hf_sparse[peft]'") from error


def main(options: argparse.Namespace) -> None:
    """Train, save the adapter, merge, compare, save."""
    tokenizer = AutoTokenizer.from_pretrained(options.sparse)
    base = AutoModelForCausalLM.from_pretrained(options.sparse, dtype=getattr(torch, options.dtype))
    held_out = options.held_out.read_text()
    before = hf_sparse.measure_sparsity(base)

    def measure() -> float:
        return hf_sparse.perplexity(
            model, tokenizer, held_out, options.window, max_windows=options.max_windows
        )

    if options.kind == "lora":
        config = LoraConfig(r=options.r, lora_alpha=2 * options.r, target_modules="all-linear")
    else:
        config = ShiraConfig(r=options.r, target_modules=options.targets)
    model = hf_sparse.get_peft_model(base, config)  # instead of peft.get_peft_model
    pruned = measure()
    model.print_trainable_parameters()
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
    )
    trainer.train()
    model.save_pretrained(Path(options.output, "adapter"))  # back by hf_sparse.load_adapter
    recovered = measure()
    hf_sparse.save_pretrained(model, options.output, tokenizer=tokenizer)  # merges a copy
    after = hf_sparse.measure_sparsity(AutoModelForCausalLM.from_pretrained(options.output))
    print(f"zeros: {before.zeros:,} before, {after.zeros:,} after")
    print(f"perplexity, {options.held_out.name}: pruned {pruned:.2f}, recovered {recovered:.2f}")
    print(f"saved to {options.output}")


if __name__ == "__main__":
    main(options)
