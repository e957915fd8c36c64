"""Trying a graph: what ONNX Runtime computes with it against what the model computes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedModel

from hf_sparse.exporters.heads import Case, Head, example, named_outputs

# One sequence, a padded batch, many; for heads with a cache the first call, and later ones.
CASES = (Case(1, 8), Case(2, 5), Case(3, 17))
CACHED_CASES = (Case(1, 8), Case(2, 5), Case(1, 1, past=7), Case(3, 2, past=4))


@dataclass(frozen=True)
class Difference:
    """The largest difference of any output.

    Attributes:
        absolute: as it is.
        relative: to the largest value of that output, or to 1 if that is larger.
        output: which output differs most.
    """

    absolute: float
    relative: float
    output: str


@torch.no_grad()
def compare(
    model: PreTrainedModel, head: Head, file: Path, settings: Mapping[str, str] | None = None
) -> Difference:
    """Run a graph in ONNX Runtime on the CPU and the model in torch, on inputs of several sizes.

    Args:
        model: in eval mode, on the CPU.
        head: of the model.
        file: the graph.
        settings: of ONNX Runtime's session.

    Raises:
        ValueError: the outputs have other names or shapes, or are not finite.
    """
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.log_severity_level = 3
    for key, setting in (settings or {}).items():
        options.add_session_config_entry(key, setting)
    session = ort.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    worst = Difference(0.0, 0.0, names[0])
    for case in _cases(model, head):
        given = example(model, head, case)
        feed = {
            spec.name: _array(given.arrays, spec, case).numpy() for spec in session.get_inputs()
        }
        found = session.run(None, feed)
        wanted = named_outputs(model(**given.inputs))
        if set(wanted) != set(names):
            raise ValueError(
                f"the graph gives {', '.join(names)}; the model gives {', '.join(wanted)}."
            )
        for name, array in zip(names, found, strict=True):
            worst = max(
                worst, _difference(name, torch.from_numpy(array), wanted[name]), key=_relative
            )
    return worst


def _cases(model: PreTrainedModel, head: Head) -> Sequence[Case]:
    longest = getattr(model.config.get_text_config(), "max_position_embeddings", None) or 1 << 20
    cases = CACHED_CASES if head.caches else CASES
    return [case for case in cases if case.past + case.tokens <= longest]


def _array(arrays: dict[str, torch.Tensor], spec: object, case: Case) -> torch.Tensor:
    """The input of a name; keys and values of no tokens where the cache is empty."""
    name, shape = spec.name, spec.shape  # type: ignore[attr-defined]
    if name in arrays:
        return arrays[name]
    dtype = torch.float16 if "float16" in spec.type else torch.float32  # type: ignore[attr-defined]
    return torch.zeros(case.batch, shape[1], 0, shape[3], dtype=dtype)


def _difference(name: str, found: torch.Tensor, wanted: torch.Tensor) -> Difference:
    if found.shape != wanted.shape:
        raise ValueError(
            f"output {name} of the graph is {tuple(found.shape)}, the model's {tuple(wanted.shape)}."
        )
    found, wanted = found.double(), wanted.double()
    if not bool(found.isfinite().all()):
        raise ValueError(f"output {name} of the graph is not finite.")
    absolute = float((found - wanted).abs().max()) if found.numel() else 0.0
    size = float(wanted.abs().max()) if wanted.numel() else 1.0
    return Difference(absolute, absolute / max(size, 1.0), name)


def _relative(difference: Difference) -> float:
    return difference.relative
