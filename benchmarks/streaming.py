"""Prune a model larger than memory: a random Llama of 6.2 GB under a hard limit on memory.

    python benchmarks/streaming.py                    # SparseGPT 2:4, limit 3 GB
    python benchmarks/streaming.py --kill-after 60    # kill it once, resume, compare bit for bit

Prints the bound that `prune_checkpoint` promises beside the peak memory (RSS) that was reached. The
limit is that of a memory control group (Linux, as root): all that the process allocates and the
pages of files that it uses. Where none can be made, the script says so and only measures.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

if __name__ == "__main__":  # help and wrong usage need no slow import
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--method", default="sparsegpt")
    parser.add_argument("--num-samples", type=int, default=12, help="windows of 512 tokens")
    parser.add_argument("--limit-gb", type=float, default=3.0)
    parser.add_argument(
        "--kill-after", type=float, help="seconds after which a second run is killed"
    )
    parser.add_argument("--work", type=Path, help="where there are 20 GB of disk")
    parser.add_argument("--source", help=argparse.SUPPRESS)
    parser.add_argument("--output", help=argparse.SUPPRESS)
    parser.add_argument("--resume", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()

import torch
from real_models import machine, peak_mb
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, LlamaConfig

import hf_sparse
from hf_sparse import SparsityConfig

SHAPE = LlamaConfig(
    architectures=["LlamaForCausalLM"],
    hidden_size=2048,
    intermediate_size=5632,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=4,
    vocab_size=32000,
    dtype="float32",
)


def main(options: argparse.Namespace) -> None:
    """Make the model, prune it in a limited process, and tell what that took."""
    if options.source:
        prune(options)
        return
    print(machine())
    with tempfile.TemporaryDirectory(dir=options.work) as temporary:
        folder = Path(temporary)
        size = make_checkpoint(folder / "dense")
        print(
            f"{size / 1e9:.2f} GB of weights, limit {options.limit_gb} GB, bound {bound():.2f} GB"
        )
        outputs = [folder / "out"]
        run(options, folder / "dense", outputs[0])
        if options.kill_after:
            outputs.append(folder / "resumed")
            run(options, folder / "dense", outputs[1], options.kill_after)
            run(options, folder / "dense", outputs[1], resume=True)
            first, second = ((out / "model.safetensors.index.json").read_text() for out in outputs)
            files = sorted(set(json.loads(first)["weight_map"].values()))
            same = first == second and all(
                (outputs[0] / name).read_bytes() == (outputs[1] / name).read_bytes()
                for name in files
            )
            print(f"killed after {options.kill_after} s and resumed: files equal: {same}")


def make_checkpoint(folder: Path) -> int:
    """Write random weights shard by shard; returns their bytes."""
    folder.mkdir()
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(SHAPE, dtype=torch.float32)
    SHAPE.save_pretrained(folder)
    weight_map, size = {}, 0
    groups: dict[str, list[str]] = {}
    for name in model.state_dict():
        parts = name.split(".")
        groups.setdefault(parts[2] if parts[1] == "layers" else "rest", []).append(name)
    torch.manual_seed(0)
    for number, names in enumerate(groups.values()):
        shapes = {name: model.state_dict()[name].shape for name in names}
        tensors = {
            name: torch.ones(shape) if len(shape) == 1 else 0.02 * torch.randn(shape)
            for name, shape in shapes.items()
        }
        file = f"model-{number:05d}.safetensors"
        save_file(tensors, folder / file, {"format": "pt"})
        weight_map.update(dict.fromkeys(names, file))
        size += sum(tensor.numel() * 4 for tensor in tensors.values())
    index = {"metadata": {"total_size": size}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return size


def bound() -> float:
    """Two blocks, their Gram matrices in fp64, the activations of one batch, and 1 GB; in GB."""
    hidden, inner = SHAPE.hidden_size, SHAPE.intermediate_size
    heads = SHAPE.num_key_value_heads / SHAPE.num_attention_heads
    block = hidden * (2 * hidden + 2 * heads * hidden + 3 * inner)
    grams = 3 * hidden**2 + inner**2
    activations = 512 * (10 * hidden + 4 * inner)
    return (2 * (block + 2 * grams) + activations) * 4 / 1e9 + 1


def run(
    options: argparse.Namespace,
    source: Path,
    output: Path,
    kill_after: float | None = None,
    *,
    resume: bool = False,
) -> None:
    """Prune in a process of its own, which may be killed."""
    arguments = ["--source", str(source), "--output", str(output)]
    arguments += ["--limit-gb", str(options.limit_gb), "--num-samples", str(options.num_samples)]
    arguments += ["--method", options.method, *(["--resume"] if resume else [])]
    start = time.perf_counter()
    try:
        done = subprocess.run(
            [sys.executable, __file__, *arguments],
            check=True,
            stdout=subprocess.PIPE,
            text=True,
            timeout=kill_after,
        )
    except subprocess.TimeoutExpired:
        print(f"killed after {time.perf_counter() - start:.0f} s")
        return
    print(done.stdout.strip())


def prune(options: argparse.Namespace) -> None:
    """In the limited process: prune from disk to disk."""
    limited = enter_group(int(options.limit_gb * 1e9))
    generator = torch.Generator().manual_seed(0)
    batches = [
        torch.randint(0, SHAPE.vocab_size, (1, 512), generator=generator)
        for _ in range(options.num_samples)
    ]
    report = hf_sparse.prune_checkpoint(
        options.source,
        options.output,
        SparsityConfig("2:4"),
        options.method,
        batches,
        resume=options.resume,
    )
    hard = f"hard limit {options.limit_gb} GB" if limited else "no hard limit could be set"
    print(f"{report.summary()}\npeak RSS {peak_mb() / 1000:.2f} GB, {hard}")


def enter_group(limit: int) -> bool:
    """Put this process into a control group with so much memory; False if that is not allowed."""
    for root, name in (
        ("/sys/fs/cgroup/memory", "memory.limit_in_bytes"),
        ("/sys/fs/cgroup", "memory.max"),
    ):
        group = Path(root) / f"hf_sparse-{os.getpid()}"
        try:
            group.mkdir()
            (group / name).write_text(str(limit))
            (group / "cgroup.procs").write_text(str(os.getpid()))
        except OSError:
            continue
        return True
    return False


if __name__ == "__main__":
    main(options)
