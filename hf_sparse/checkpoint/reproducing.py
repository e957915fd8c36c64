"""Sections of a model card: how to make the model again, what it is not known to do, whose methods."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence

from hf_sparse.provenance.values import OF_CONFIG, Provenance, Step, Value

# The methods of `prune_` (a test compares), and what can be combined with them: the papers to cite.
METHODS = {
    "magnitude": (
        "Learning both Weights and Connections for Efficient Neural Networks",
        "1506.02626",
    ),
    "wanda": ("A Simple and Effective Pruning Approach for Large Language Models", "2306.11695"),
    "taylor": ("Importance Estimation for Neural Network Pruning", "1906.10771"),
    "sparsegpt": (
        "SparseGPT: Massive Language Models Can Be Accurately Pruned in One-Shot",
        "2301.00774",
    ),
    "sparsellm": ("SparseLLM: Towards Global Pruning of Pre-trained Language Models", "2402.17946"),
    "alps": (
        "ALPS: Improved Optimization for Highly Sparse One-Shot Pruning for Large Language Models",
        "2406.07831",
    ),
    "prox_local": (
        "ProxSparse: Regularized Learning of Semi-Structured Sparsity Masks for Pretrained LLMs",
        "2502.00258",
    ),
    "proxsparse": (
        "ProxSparse: Regularized Learning of Semi-Structured Sparsity Masks for Pretrained LLMs",
        "2502.00258",
    ),
}
COMPOSED = {
    ("allocation", "owl"): ("Outlier Weighed Layerwise Sparsity (OWL)", "2310.05175"),
    ("allocation", "alpha"): ("AlphaPruning", "2410.10912"),
    ("refine", "swaps"): (
        "SparseSwaps: Tractable LLM Pruning Mask Refinement at Scale",
        "2512.10922",
    ),
    ("refine", "refit"): ("ZipLM", "2302.04089"),
}
_RECOVERY = "recovery by "
_WIDTH = 88


def reproduction(provenance: Provenance, auto: str, saved: str) -> str:
    """Python code that takes the steps of a model again, as far as they are calls.

    Args:
        provenance: what is known.
        auto: the Auto class of the model.
        saved: the call that writes it.
    """
    base = provenance.base_model or "DENSE_MODEL"
    lines = [
        "import hf_sparse",
        f"from transformers import {auto}",
        f"model = {auto}.from_pretrained({base!r})",
    ]
    left = []
    for number, step in enumerate(provenance.steps, 1):
        if step.method in METHODS and step.pattern is not None:
            lines += _pruned(step)
        elif step.method.startswith(_RECOVERY):
            method = step.method.removeprefix(_RECOVERY)
            lines += [*_data(step), f"hf_sparse.recover_(model, batches, {method!r})"]
        elif step.method == "shrink":
            lines.append("hf_sparse.shrink_(model)")
        elif step.method == "quantize":
            lines += _quantized(step)
        else:
            left.append((number, step.method))
            lines.append(f"...  # step {number}: {_unquoted(step.method)}")
    lines.append(saved)
    text = "The same again, with the versions above:\n\n```python\n" + "\n".join(lines) + "\n```"
    if left:
        text += (
            "\n\nWhere the code has `...`, training or another program comes in: the table of the step "
            "tells."
        )
    return text


def _pruned(step: Step) -> list[str]:
    """The call of `prune_` of a step."""
    told: list[str] = [repr(step.pattern if not _is_head(step) else "head")]
    if step.sparsity is not None and not re.fullmatch(r"\d+:\d+", str(step.pattern)):
        told.append(repr(step.sparsity))
    if step.targets is not None and not _is_head(step):
        told.append(f"targets={list(step.targets)!r}")
    if step.ignore:
        told.append(f"ignore={list(step.ignore)!r}")
    options = dict(step.options)
    told += [f"{name}={options.pop(name)!r}" for name in OF_CONFIG if name in options]
    given = [f"{name}={value!r}" for name, value in options.items() if value is not None]
    config = f"config = hf_sparse.SparsityConfig({', '.join(told)})"
    call = f"hf_sparse.prune_(model, config, {step.method!r}"
    data = _data(step)
    parts = ([", batches"] if data else []) + [f", {one}" for one in given]
    lines = [call]
    for part in parts:
        if len(lines[-1]) + len(part) > _WIDTH:
            lines[-1] += ","
            lines.append(f"    {part.removeprefix(', ')}")
        else:
            lines[-1] += part
    lines[-1] += ")"
    return [config, *data, *lines]


def _quantized(step: Step) -> list[str]:
    """The call of `quantize_` of a step, for the targets that it has by default."""
    options, data = dict(step.options), _data(step)
    told = [f"{name}={options[name]!r}" for name in OF_CONFIG if name in options]
    told += ["batches=batches"] if data else []
    return [*data, f"hf_sparse.quantize_(model, {', '.join([*told, _rounding(options)])})"]


def _rounding(options: Mapping[str, Value]) -> str:
    return f"method={options.get('rounding', 'nearest')!r}"


def _is_head(step: Step) -> bool:
    return str(step.pattern).startswith("head_in:")


def _data(step: Step) -> list[str]:
    """A line about the calibration data; none if there were none."""
    data = step.calibration
    if data is None:
        return []
    told = f"{data.windows} windows" + (f" of {data.length} tokens" if data.length else "")
    known = f", fingerprint {_unquoted(data.fingerprint)}" if data.fingerprint else ""
    return [f"batches = ...  # {told}{known}: hf_sparse.calibration_batches(tokenizer, texts)"]


def _unquoted(text: str) -> str:
    """Text that ends no code block."""
    return text.replace("`", "'")


def limits(provenance: Provenance, *, is_sparse: bool, compressed: bool) -> str:
    """What a reader should not take for granted, as far as it follows from what is known."""
    told = [
        "Quality was measured as the table of metrics tells, and on nothing else."
        if provenance.metrics
        else "No quality was measured. Measure it on your own task before you rely on it, and the "
        "dense model beside it.",
        "What the base model cannot do, its biases and the limits of its licence stay.",
    ]
    if is_sparse:
        told += [
            "Pruning loses more on what is rare in the data (small groups, rare words, other "
            "languages) than an average shows ([Hooker et al.](https://arxiv.org/abs/1911.05248)).",
            "Zeros alone make nothing faster: `hf_sparse.compile(model)` uses them on CPUs, and others "
            "load the model at its dense speed.",
        ]
    if compressed:
        told.append("In memory the weights take as much as dense ones, but for a compiled model's.")
    return "\n".join(f"- {one}" for one in told)


def citations(steps: Sequence[Step]) -> str | None:
    """The papers of the methods, a line each; None if no step has one."""
    papers = list(dict.fromkeys(_papers(steps)))
    if not papers:
        return None
    return "\n".join(f"- {title}, <https://arxiv.org/abs/{number}>" for title, number in papers)


def _papers(steps: Iterable[Step]) -> Iterable[tuple[str, str]]:
    for step in steps:
        if step.method in METHODS:
            yield METHODS[step.method]
            options: dict[str, Value] = dict(step.options)
            yield from (
                paper for (key, value), paper in COMPOSED.items() if options.get(key) == value
            )
