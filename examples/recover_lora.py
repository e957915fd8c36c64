# /// script
# requires-python = ">=3.11"
# dependencies = ["hf_sparse[peft]"]
#
# [tool.uv.sources]
# hf_sparse = { path = ".." }
# ///
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

import language_models

if __name__ == "__main__":  # help and wrong usage need no slow import
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    language_models.add_recovery(parser)
    parser.add_argument("--kind", choices=["lora", "shira"], default="lora")
    parser.add_argument("--r", type=int, default=16, help="rank, or ShiRA's measure of as much")
    parser.add_argument(
        "--targets",
        nargs="+",
        default=["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
        help="layers of ShiRA",
    )
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--lr", type=float, help="default: 2e-3 for lora, 5e-3 for shira")
    options = parser.parse_args()
    options.lr = options.lr or {"lora": 2e-3, "shira": 5e-3}[options.kind]

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer

import hf_sparse

try:
    from peft import LoraConfig, ShiraConfig
except ImportError as error:
    raise SystemExit("PEFT is needed: pip install 'hf_sparse[peft]'") from error


def main(options: argparse.Namespace) -> None:
    """Train, save the adapter, merge, compare, save."""
    tokenizer = AutoTokenizer.from_pretrained(options.sparse)
    base = AutoModelForCausalLM.from_pretrained(options.sparse, dtype=getattr(torch, options.dtype))
    before = hf_sparse.measure_sparsity(base)
    if options.kind == "lora":
        config = LoraConfig(r=options.r, lora_alpha=2 * options.r, target_modules="all-linear")
    else:
        config = ShiraConfig(r=options.r, target_modules=options.targets)
    model = hf_sparse.get_peft_model(base, config)  # instead of peft.get_peft_model
    pruned = language_models.perplexity(options, model, tokenizer)
    model.print_trainable_parameters()
    language_models.attach_teacher(options, model)
    trainer = Trainer(
        model,
        language_models.training_arguments(options),
        train_dataset=language_models.rows(options, tokenizer),
    )
    trainer.train()
    model.save_pretrained(Path(options.output, "adapter"))  # back by hf_sparse.load_adapter
    recovered = language_models.perplexity(options, model, tokenizer)
    hf_sparse.save_pretrained(model, options.output, tokenizer=tokenizer)  # merges a copy
    after = hf_sparse.measure_sparsity(AutoModelForCausalLM.from_pretrained(options.output))
    print(f"zeros: {before.zeros:,} before, {after.zeros:,} after")
    print(f"perplexity, {options.held_out.name}: pruned {pruned:.2f}, recovered {recovered:.2f}")
    print(f"saved to {options.output}")


if __name__ == "__main__":
    main(options)
