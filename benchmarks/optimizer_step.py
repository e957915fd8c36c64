"""What the proximal step costs: SparseAdamW's step over torch AdamW's, on BERT-base's parameters.

    python benchmarks/optimizer_step.py

The optimizers take turns on parameters of the same shapes; ratios are of medians over the turns.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import time
from typing import Any

if __name__ == "__main__":  # help and wrong usage need no slow import
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--turns", type=int, default=7)
    parser.add_argument("--threads", type=int, help="default: torch's")
    options = parser.parse_args()

import torch
from transformers import BertConfig, BertModel

import hf_sparse
from hf_sparse.counts import format_table
from hf_sparse.optim.shrinkage import freeze_zeros_

# Rows: what is measured beside AdamW, as settings of SparseAdamW.
VARIANTS: dict[str, dict[str, Any]] = {
    "lam = 0": {},
    "l1, lr": {"lam": 1e-3},
    "l1, adaptive": {"lam": 1e-9, "scale": "adaptive"},
    "reweighted l1, lr": {"lam": 1e-3, "penalty": "reweighted_l1"},
    "l0, adaptive": {"lam": 1e-12, "penalty": "l0", "scale": "adaptive"},
    "group l2 4x1, lr": {"lam": 1e-3, "pattern": "block:4x1"},
    "l0 4x1, adaptive": {
        "lam": 1e-12, "penalty": "l0", "scale": "adaptive", "pattern": "block:4x1"
    },
    "l0 2:4, adaptive": {"lam": 1e-12, "penalty": "l0", "scale": "adaptive", "pattern": "2:4"},
    "frozen zeros": {"frozen": True},
}  # fmt: skip
KINDS = {
    "foreach=False": {"foreach": False},
    "foreach=True": {"foreach": True},
    "fused=True": {"fused": True},
}


def make(cls: Any, **settings: Any) -> torch.optim.Optimizer:
    """An optimizer with parameters of its own: encoder matrices first, then the rest."""
    frozen = settings.pop("frozen", False)
    with torch.device("meta"):
        model = BertModel(BertConfig())
    matrices, rest = [], []
    for name, shape in ((name, value.shape) for name, value in model.named_parameters()):
        parameter = torch.nn.Parameter(torch.randn(shape) * 0.04)
        parameter.grad = torch.randn(shape) * 1e-3
        (matrices if "encoder" in name and len(shape) == 2 else rest).append(parameter)
    if cls is torch.optim.AdamW:
        return cls([{"params": matrices}, {"params": rest}], lr=1e-5, **settings)
    groups = [{"params": matrices}, {"params": rest, "pattern": None}]
    optimizer = cls(groups, lr=1e-5, **settings)
    if frozen:
        freeze_zeros_(optimizer)
    return optimizer


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Bytes of the optimizer's state."""
    tensors = [value for state in optimizer.state.values() for value in state.values()]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def main(options: argparse.Namespace) -> None:
    """Print one table per kind of AdamW."""
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    print(
        f"torch {torch.__version__}, hf_sparse {hf_sparse.__version__}, {platform.machine()}, "
        f"{torch.get_num_threads()} threads, {options.turns} turns, seed 0"
    )
    for kind, setting in KINDS.items():
        dense = make(torch.optim.AdamW, **setting)
        dense.step()
        rows = []
        for name, variant in VARIANTS.items():
            sparse = make(hf_sparse.SparseAdamW, **setting, **variant)
            sparse.step()
            seconds: dict[torch.optim.Optimizer, list[float]] = {dense: [], sparse: []}
            for _ in range(options.turns):
                for optimizer, found in seconds.items():
                    start = time.perf_counter()
                    optimizer.step()
                    found.append(time.perf_counter() - start)
            base, found = (statistics.median(seconds[o]) for o in (dense, sparse))
            ratios = [b / a for a, b in zip(*seconds.values(), strict=True)]
            extra = state_bytes(sparse) - state_bytes(dense)
            rows.append(
                (
                    name,
                    f"{1000 * base:.0f}",
                    f"{1000 * found:.0f}",
                    f"{found / base:.2f}",
                    f"{min(ratios):.2f} - {max(ratios):.2f}",
                    f"{extra / 1e6:.0f}",
                )
            )
        head = (kind, "AdamW ms", "SparseAdamW ms", "ratio", "spread", "extra state, MB")
        print(f"\n{format_table(head, rows)}")


if __name__ == "__main__":
    main(options)
