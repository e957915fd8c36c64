"""What the flags accept, as plain text, so that help and errors need neither torch nor transformers.

The package's own tables decide; tests/cli/test_cli_start.py compares every entry with them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Method:
    """A row of `hf_sparse.pruning.methods.METHODS`.

    Attributes:
        summary: what it does.
        options: its own options and their defaults.
        needs_calibration: whether it looks at data.
        streams: whether it goes through the blocks one by one, as `--stream` does.
        nm_only: whether it prunes to N:M patterns alone.
    """

    summary: str
    options: Mapping[str, Any] = field(default_factory=dict)
    needs_calibration: bool = True
    streams: bool = True
    nm_only: bool = False


METHODS = {
    "magnitude": Method(
        "smallest weights", {"scope": "layer"}, needs_calibration=False, streams=False
    ),
    "wanda": Method("smallest |weight| x input norm"),
    "taylor": Method(
        "smallest effect on the model's loss, to first order", {"scope": "layer"}, streams=False
    ),
    "sparsegpt": Method(
        "least output error, column after column", {"damping": 0.01, "block_size": 128}
    ),
    "sparsellm": Method(
        "SparseGPT with feed-forward networks pruned as a whole",
        {
            "damping": 0.01,
            "block_size": 128,
            "rounds": 2,
            "penalty": 1.0,
            "solver": "sparsegpt",
        },
    ),
    "alps": Method(
        "least output error, by ADMM", {"damping": 0.01, "iterations": 300, "refit_steps": 10}
    ),
    "prox_local": Method(
        "N:M masks learned from each layer's output error",
        {"lam": 1e-4, "growth": 1.15, "iterations": 60, "damping": 0.01},
        nm_only=True,
    ),
    "proxsparse": Method(
        "N:M masks of the whole model, learned from its loss",
        {
            "lam": 0.01,
            "relative_lr": 0.01,
            "preserve": 0.0,
            "epochs": 1,
            "accumulate": 2,
            "gradient_checkpointing": False,
            "state": None,
        },
        streams=False,
        nm_only=True,
    ),
}
# Those of pattern `expert`, rows of `hf_sparse.pruning.methods.EXPERT_METHODS`.
EXPERT_METHODS = {
    "reap": Method(
        "experts of least router's weight x norm of the output", {"scope": "layer"}, streams=False
    ),
    "frequency": Method("experts that get the fewest tokens", {"scope": "layer"}, streams=False),
    "magnitude": Method(
        "experts of the smallest weights",
        {"scope": "layer"},
        needs_calibration=False,
        streams=False,
    ),
}
# What can be composed with every method, and its defaults.
COMPOSITION = {"allocation": "uniform", "refine": None, "reconstruct": 0, "token_weights": None}
SCOPES = ("layer", "global")
ALLOCATIONS = ("uniform", "owl", "alpha")
REFINEMENTS = ("swaps", "refit")
TOKEN_WEIGHTS = ("loss",)
RECOVERIES = {
    "finetune": "all weights, the zeros frozen",
    "lora": "masked LoRA, merged at the end",
    "shira": "single kept weights (ShiRA), merged at the end",
}
# How `hf_sparse.drop_blocks_` chooses.
BLOCK_CHOICES = {
    "loss": "the block without which the loss rises least, one after another",
    "similarity": "the blocks that change their input least, in one pass",
}
# How `hf_sparse.drop_experts_` chooses.
EXPERT_CHOICES = {
    "reap": "least router's weight x norm of the output, mean over an expert's tokens",
    "frequency": "fewest tokens",
    "magnitude": "smallest weights: looks at no data",
}
# What `hf_sparse.slim_` may cut.
SLIM_AXES = {
    "depth": "whole blocks",
    "width": "heads and neurons, as many in each block",
    "experts": "experts of a mixture, as many in each block",
}
# The efforts of `hf_sparse.sparsify_`.
EFFORTS = {
    "seconds": "a solver in one pass",
    "minutes": "a better solver, and every block trained with its zeros fixed",
    "hours": "that, and the whole model trained with its zeros fixed on all the data",
}
# The tasks of `hf_sparse.evaluate_choices`: how their examples are asked.
TASKS = {
    "arc_easy": "questions of school science, easy ones",
    "arc_challenge": "questions of school science, hard ones",
    "piqa": "which of two ways of doing something works",
    "openbookqa": "questions of elementary science",
    "boolq": "yes or no, about a passage",
    "hellaswag": "how a description goes on",
    "winogrande": "whom a pronoun means",
    "lambada_openai": "the last word of a passage",
    "blimp": "which of two sentences is grammatical",
}
# Other names of them.
TASK_ALIASES = {"openbook_qa": "openbookqa", "obqa": "openbookqa", "lambada": "lambada_openai"}
FORMATS = {
    "auto": "the smallest of the others",
    "dense": "the weight as it is, zeros included",
    "bitmask": "one bit per weight",
    "gap4": "the zeros before each nonzero, in 4-bit codes",
    "gap8": "the zeros before each nonzero, in 8-bit codes",
    "nm": "the positions in each group of an N:M weight",
    "block": "one bit per block of a block, row, column or head pattern",
    "rice": "the zeros before each nonzero, in Rice codes",
}
# The grids of few bits, and how `hf_sparse.quantize_` rounds to them.
BITS = (8, 4)
GROUP_SIZES = (128, 64, 32)
ROUNDINGS = {
    "nearest": "nearest codes; scales searched for the least error",
    "gptq": "codes and scales of least output error on calibration data",
}
QUANTIZATIONS = ("dynamic", "static")
DTYPES = ("auto", "float32", "bfloat16", "float16", "float64")
# The notations of `hf_sparse.patterns.Pattern.parse`, and what becomes zero.
PATTERNS = {
    "unstructured": "single weights",
    "N:M": "all but N of every M consecutive weights, as 2:4 (fixes the sparsity)",
    "block:RxC": "whole blocks of R rows (out) x C columns (in), as block:4x1",
    "row": "whole rows: output features, or neurons",
    "column": "whole columns: input features, or neurons",
    "head": "whole attention heads; head:D, head_in:D give the size of a head",
    "expert": "whole experts of a mixture, by the methods reap, frequency, magnitude",
}
