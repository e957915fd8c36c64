"""Prune a model larger than memory: a random Llama of 6.2 GB under a hard limit on memory.

    python benchmarks/streaming.py                    # SparseGPT 2:4, limit 3 GB
    python benchmarks/streaming.py --kill-after 60    # kill it once, resume, compare bit for bit
    python benchmarks/streaming.py --model mixture --limit-gb 8    # 3 B weights, 64 experts a block

Prints the bound that `prune_checkpoint` promises beside the peak memory (RSS) that was reached, and
what the files that were written hold: zeros and violations, counted anew. The
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
import threading
import time
from collections.abc import Iterator
from pathlib import Path

if __name__ == "__main__":  # help and wrong usage need no slow import
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--model", choices=("llama", "mixture"), default="llama")
    parser.add_argument("--method", default="sparsegpt")
    parser.add_argument("--num-samples", type=int, default=12, help="windows of 512 tokens")
    parser.add_argument("--blocks", type=int, help="of the model (default: those of its shape)")
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
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedConfig, Qwen3MoeConfig

import hf_sparse
from hf_sparse import SparsityConfig

SHAPES = {
    "llama": LlamaConfig(
        architectures=["LlamaForCausalLM"],
        hidden_size=2048,
        intermediate_size=5632,
        num_hidden_layers=32,
        vocab_size=32000,
        **{"num_attention_heads": 32, "num_key_value_heads": 4},
        dtype="float32",
    ),
    "mixture": Qwen3MoeConfig(
        architectures=["Qwen3MoeForCausalLM"],
        hidden_size=1024,
        num_hidden_layers=30,
        vocab_size=32000,
        **{"num_experts": 64, "num_experts_per_tok": 8, "moe_intermediate_size": 512},
        **{"num_attention_heads": 16, "num_key_value_heads": 4, "head_dim": 64},
        dtype="bfloat16",
    ),
}


def main(options: argparse.Namespace) -> None:
    """Make the model, prune it in a limited process, and tell what that took."""
    if options.source:
        prune(options)
        return
    print(machine())
    with tempfile.TemporaryDirectory(dir=options.work) as temporary:
        folder = Path(temporary)
        shape = SHAPES[options.model]
        if options.blocks is not None:
            shape = type(shape)(**{**shape.to_dict(), "num_hidden_layers": options.blocks})
        weights = make_checkpoint(shape, folder / "dense")
        size = weights * shape.dtype.itemsize
        print(
            f"{weights / 1e9:.2f} B weights, {size / 1e9:.2f} GB, limit {options.limit_gb} GB, bound "
            f"{bound(shape):.2f} GB",
            flush=True,
        )
        outputs = [folder / "out"]
        run(options, folder / "dense", outputs[0])
        print(f"read back: {hf_sparse.inspect_checkpoint(outputs[0])}", flush=True)
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


def make_checkpoint(shape: PreTrainedConfig, folder: Path) -> int:
    """Write random weights shard by shard, experts one by one as families do; returns their number."""
    folder.mkdir()
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(shape, dtype=shape.dtype)
    shape.save_pretrained(folder)
    weight_map, count = {}, 0
    groups: dict[str, list[str]] = {}
    for name in model.state_dict():
        parts = name.split(".")
        groups.setdefault(parts[2] if parts[1] == "layers" else "rest", []).append(name)
    torch.manual_seed(0)
    for number, names in enumerate(groups.values()):
        shapes = {name: model.state_dict()[name].shape for name in names}
        tensors = {
            name: torch.ones(size) if len(size) == 1 else 0.02 * torch.randn(size)
            for name, size in shapes.items()
        }
        tensors = {
            name: tensor.to(shape.dtype).contiguous()
            for stored, value in tensors.items()
            for name, tensor in one_by_one(stored, value)
        }
        file = f"model-{number:05d}.safetensors"
        save_file(tensors, folder / file, {"format": "pt"})
        weight_map.update(dict.fromkeys(tensors, file))
        count += sum(tensor.numel() for tensor in tensors.values())
    index = {"metadata": {"total_size": count * shape.dtype.itemsize}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return count


def one_by_one(name: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
    """A tensor under the names that a checkpoint of the family has."""
    module, _, own = name.rpartition(".")
    if tensor.ndim != 3:
        yield name, tensor
        return
    for number, matrix in enumerate(tensor):
        if own == "gate_up_proj":
            for part, half in zip(("gate_proj", "up_proj"), matrix.chunk(2), strict=True):
                yield f"{module}.{number}.{part}.weight", half
        else:
            yield f"{module}.{number}.{own}.weight", matrix


def bound(shape: PreTrainedConfig) -> float:
    """Two blocks, their Gram matrices in fp64, the activations of one batch, and 1 GB; in GB.

    Of a mixture three blocks, and at most 1 GB of Gram matrices for the experts.
    """
    hidden = shape.hidden_size
    heads = shape.num_key_value_heads / shape.num_attention_heads
    attention = hidden * (2 * hidden + 2 * heads * hidden)
    experts = getattr(shape, "num_experts", 0)
    inner = shape.moe_intermediate_size if experts else shape.intermediate_size
    block = attention + max(experts, 1) * 3 * hidden * inner
    blocks = (3 if experts else 2) * block * shape.dtype.itemsize
    activations = 512 * (10 * hidden + 4 * inner) * 4
    grams = (1 << 30) + 16 * hidden**2 if experts else 16 * (3 * hidden**2 + inner**2)
    return (blocks + grams + activations) / 1e9 + 1


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
    arguments += [
        "--model",
        options.model,
        "--method",
        options.method,
        *(["--resume"] if resume else []),
    ]
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
    print(done.stdout.strip(), flush=True)


def prune(options: argparse.Namespace) -> None:
    """In the limited process: prune from disk to disk."""
    limited = enter_group(int(options.limit_gb * 1e9))
    begin, cpu = time.perf_counter(), time.process_time()
    generator = torch.Generator().manual_seed(0)
    batches = [
        torch.randint(0, SHAPES[options.model].vocab_size, (1, 512), generator=generator)
        for _ in range(options.num_samples)
    ]
    watch = Anonymous()
    watch.start()
    report = hf_sparse.prune_checkpoint(
        options.source,
        options.output,
        SparsityConfig("2:4"),
        options.method,
        batches,
        resume=options.resume,
    )
    hard = f"hard limit {options.limit_gb} GB" if limited else "no hard limit could be set"
    taken = [(time.perf_counter() - begin) / 60, (time.process_time() - cpu) / 60]
    print(report.summary())
    print(
        f"{len(batches)} windows of 512 tokens, {torch.get_num_threads()} threads: {taken[0]:.1f} "
        f"minutes with loading and saving, {taken[1]:.1f} of CPU; peak RSS {peak_mb() / 1000:.2f} GB, "
        f"without pages of files {watch.peak:.2f} GB, {hard}"
    )


class Anonymous(threading.Thread):
    """Watches the memory of this process that is no page of a file, ten times a second (Linux).

    Attributes:
        peak: the most so far, in GB.
    """

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.peak = 0.0

    def run(self) -> None:
        """Watch until the process ends."""
        while True:
            status = Path("/proc/self/status").read_text()
            line = next(line for line in status.splitlines() if line.startswith("RssAnon:"))
            self.peak = max(self.peak, int(line.split()[1]) * 1024 / 1e9)
            time.sleep(0.1)


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
