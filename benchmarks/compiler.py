"""What compiling costs, how exact it is, and how fast single tokens are.

    python benchmarks/compiler.py                    kernels, costs, exactness
    python benchmarks/compiler.py --decode           tokens per second, SmolLM2 and a 1 B Llama
    python benchmarks/compiler.py --decode bfloat16  the same for weights in bfloat16
    python benchmarks/compiler.py --sst2 FOLDER --data DATA/glue    argmax on SST-2's validation set

Random weights of BERT-base's shape, pruned by magnitude; SmolLM2-135M from its package. Everything
that is compared takes turns in one process.
"""

from __future__ import annotations

import argparse
import copy
import gc
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # help and wrong usage need no slow import
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--decode",
        nargs="?",
        const="float32",
        choices=["float32", "bfloat16"],
        help="only tokens per second, of weights in this type",
    )
    parser.add_argument("--layers", type=int, default=22, help="of the large Llama")
    parser.add_argument("--sst2", type=Path, help="only this classifier's answers")
    parser.add_argument("--data", type=Path, help="folder with sst2")
    parser.add_argument("--work", type=Path, default=Path("bench_output"))
    args = parser.parse_args()

import torch
from real_models import dense_smollm2, machine
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertModel,
    DynamicCache,
    LlamaConfig,
    LlamaForCausalLM,
)

import hf_sparse
from hf_sparse.counts import format_table
from hf_sparse.runtime.kernels.all import kernel_functions
from hf_sparse.runtime.llvm.jit import DEFAULT_CACHE, compile_kernels
from hf_sparse.runtime.llvm.target import host
from hf_sparse.runtime.weights.rates import calibrate
from hf_sparse.upstream.transformers.caches import cache_name

PROMPTS = [
    "The capital of France is",
    "Once upon a time there was",
    "Water boils at",
    "def fibonacci(n):",
    "The three primary colours are",
    "In the year 1969",
    "A triangle has",
    "My favourite recipe begins with",
    "The theory of evolution says",
    "To be or not to be",
    "Photosynthesis is",
    "The fastest land animal",
    "Music makes people",
    "The internet was",
    "An apple a day",
    "Gravity is the force",
    "The largest ocean",
    "When it rains",
    "A good teacher",
    "The moon orbits",
]
NEW_TOKENS, STEPS = 64, 30
SPARSE = {
    "50 %": hf_sparse.SparsityConfig("unstructured", 0.5),
    "2:4": hf_sparse.SparsityConfig("2:4"),
    "60 %": hf_sparse.SparsityConfig("unstructured", 0.6),
    "70 %": hf_sparse.SparsityConfig("unstructured", 0.7),
}
MEMORY = """
import gc, psutil, torch, hf_sparse
from transformers import BertConfig, BertModel
from hf_sparse.runtime.model.compiled import linears_of
model = BertModel(BertConfig()).eval()
hf_sparse.prune_(model, hf_sparse.SparsityConfig('unstructured', {sparsity}), 'magnitude')
rest = sum(p.numel() * 4 for n, p in model.named_parameters() if 'encoder' not in n)
before = psutil.Process().memory_info().rss
dense = sum(p.numel() * 4 for n, p in model.named_parameters() if 'encoder' in n)
compiled = hf_sparse.compile(model)
del model; gc.collect()
with torch.inference_mode():
    compiled(torch.ones(8, 128, dtype=int))
packed = sum(l.nbytes for l in linears_of(compiled))
print(before - dense, psutil.Process().memory_info().rss, packed)
"""


def seconds(call: Callable[[], Any]) -> float:
    """The time of one call."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def rates() -> str:
    """The kernels' speed, GF/s per core of stored weights."""
    found = calibrate(host(), DEFAULT_CACHE)
    rows = [
        (f"blocks of {height} x 1", *(f"{speed:.0f}" for speed in speeds))
        for height, speeds in found.speeds.items()
    ]
    head = ("GF/s per core, 768 x 768", *(f"{100 * d:.0f} % kept" for d in found.densities))
    return format_table(head, rows)


def costs() -> str:
    """Seconds to compile and pack BERT-base, and the memory of the compiled model."""
    target = host()
    cold = seconds(lambda: compile_kernels(kernel_functions(target), target, None))
    with tempfile.TemporaryDirectory() as folder:
        compile_kernels(kernel_functions(target), target, Path(folder))
        warm = seconds(lambda: compile_kernels(kernel_functions(target), target, Path(folder)))
    rows = []
    for sparsity in (0.0, 0.5, 0.9):
        model = BertModel(BertConfig()).eval()
        hf_sparse.prune_(model, hf_sparse.SparsityConfig("unstructured", sparsity), "magnitude")
        hf_sparse.compile(model)
        pack = seconds(lambda model=model: hf_sparse.compile(model))
        script = MEMORY.format(sparsity=sparsity)
        done = subprocess.run([sys.executable, "-c", script], capture_output=True, check=True)
        base, after, packed = map(int, done.stdout.split())
        rows.append(
            (
                f"{100 * sparsity:.0f} %",
                f"{cold + pack:.2f}",
                f"{warm + pack:.2f}",
                f"{packed / 1e6:.0f}",
                f"{(after - base) / 1e6:.0f}",
            )
        )
    head = ("BERT-base, zeros", "cold, s", "cached, s", "packed, MB", "memory, MB")
    return format_table(head, rows)


def exactness() -> str:
    """The largest difference to torch in BERT-base's hidden states."""
    rows = []
    for sparsity in (0.0, 0.5, 0.9):
        torch.manual_seed(0)
        model = BertModel(BertConfig()).eval()
        hf_sparse.prune_(model, hf_sparse.SparsityConfig("unstructured", sparsity), "magnitude")
        compiled = hf_sparse.compile(model)
        for batch, tokens in ((1, 128), (8, 100)):
            ids = torch.randint(1000, 30000, (batch, tokens))
            with torch.inference_mode():
                found, wanted = (m(ids).last_hidden_state for m in (compiled, model))
            error = float((found - wanted).abs().max())
            rows.append((f"{100 * sparsity:.0f} %", f"{batch} x {tokens}", f"{error:.1e}"))
    return format_table(("BERT-base, zeros", "input", "largest difference"), rows)


def smollm2(work: Path) -> tuple[Any, Any]:
    """SmolLM2-135M in float32."""
    folder = work / "smollm2"
    if not (folder / "config.json").exists():
        dense_smollm2(folder)
    return AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(
        folder
    )


def greedy(work: Path) -> str:
    """Greedy generation against torch, and the gap of the two best logits where it differs."""
    model, tokenizer = smollm2(work)
    lines = []
    for name, config in {"dense": None, "50 %": SPARSE["50 %"]}.items():
        if config is not None:
            hf_sparse.prune_(model, config, "magnitude")
        compiled = hf_sparse.compile(model)
        same, gaps = 0, []
        for prompt in PROMPTS:
            ids = tokenizer(prompt, return_tensors="pt")
            length = {"max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS}
            wanted = model.generate(**ids, do_sample=False, **length)[0]
            found = compiled.generate(**ids, do_sample=False, **length)[0]
            differing = (wanted != found).nonzero()
            if not len(differing):
                same += 1
                continue
            with torch.inference_mode():
                logits = model(wanted[None, : int(differing[0])]).logits[0, -1]
            best = logits.topk(2).values
            gaps.append(float(best[0] - best[1]))
        text = f"SmolLM2 {name}: {same} of {len(PROMPTS)} prompts give the same {NEW_TOKENS} tokens"
        if gaps:
            text += f"; where not, torch's two best logits differ by {max(gaps):.1e} at most"
        lines.append(text)
    return "\n".join(lines)


def decode(name: str, model: Any) -> str:
    """Milliseconds of one new token behind 32, in turns."""
    ways: dict[str, Any] = {"torch": model, "own dense": hf_sparse.compile(model)}
    if model.dtype != torch.float32:
        ways["own dense, float32"] = hf_sparse.compile(copy.deepcopy(model).float())
    for sparse, config in SPARSE.items():
        pruned = copy.deepcopy(model)
        hf_sparse.prune_(pruned, config, "magnitude")
        ways[sparse] = hf_sparse.compile(pruned)
        del pruned
        gc.collect()
    ids = torch.randint(0, model.config.vocab_size, (1, 32))
    times: dict[str, list[float]] = {way: [] for way in ways}
    with torch.inference_mode():
        caches = {}
        for way, one in ways.items():
            caches[way] = DynamicCache(config=one.config)
            one(ids, **{cache_name(one.forward): caches[way]})
        for turn in range(STEPS + 2):
            for way, one in ways.items():
                for _ in range(2):  # the second is timed: its weights are where they would be
                    start = time.perf_counter()
                    one(ids[:, :1], **{cache_name(one.forward): caches[way]})
                    spent = time.perf_counter() - start
                if turn >= 2:
                    times[way].append(spent)
    dense = times["own dense"]
    rows = [
        (
            way,
            f"{statistics.median(found) * 1e3:.2f}",
            f"{1 / statistics.median(found):.1f}",
            f"{statistics.median(a / b for a, b in zip(dense, found, strict=True)):.2f}",
            f"{statistics.median(a / b for a, b in zip(times['torch'], found, strict=True)):.2f}",
        )
        for way, found in times.items()
    ]
    return format_table((name, "ms", "tokens/s", "own dense / it", "torch / it"), rows)


def sst2(folder: Path, data: Path) -> str:
    """How often a trained classifier's answer changes."""
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    compiled = hf_sparse.compile(model)
    rows = [json.loads(line) for line in (data / "sst2/validation.jsonl").read_text().splitlines()]
    changed = right = 0
    largest = 0.0
    for row in rows:
        given = tokenizer(row["sentence"], return_tensors="pt")
        with torch.inference_mode():
            found, wanted = (m(**given).logits[0] for m in (compiled, model))
        changed += int(found.argmax() != wanted.argmax())
        right += int(found.argmax()) == row["label"]
        largest = max(largest, float((found - wanted).abs().max()))
    sparsity = hf_sparse.measure_sparsity(model).sparsity
    return (
        f"SST-2, {100 * sparsity:.0f} % zeros: {changed} of {len(rows)} answers change, accuracy "
        f"{100 * right / len(rows):.2f}, largest difference of a logit {largest:.1e}"
    )


def main(args: argparse.Namespace) -> None:
    """Measure and print."""
    torch.set_num_threads(2)
    print(machine())
    if args.sst2:
        print(sst2(args.sst2, args.data))
    elif args.decode:
        kind = getattr(torch, args.decode)
        print(decode(f"SmolLM2-135M, {args.decode}", smollm2(args.work)[0].to(kind)), end="\n\n")
        config = LlamaConfig(
            hidden_size=2048,
            intermediate_size=5632,
            num_hidden_layers=args.layers,
            num_attention_heads=32,
            num_key_value_heads=4,
            vocab_size=32000,
        )
        llama = LlamaForCausalLM(config).to(kind).eval()
        billions = llama.num_parameters() / 1e9
        print(decode(f"Llama, {billions:.1f} B, random, {args.decode}", llama))
    else:
        for section in (rates, costs, exactness):
            print(section(), end="\n\n", flush=True)
        print(greedy(args.work))


if __name__ == "__main__":
    main(args)
