"""What is done for an effort: stages with all their settings, by what has measured best.

Each choice is a row of docs/results.md (one-shot pruning and recovery of SmolLM2-135M, pruning of
MiniLM). Where nothing was measured the nearest row stands, and the plan says so. The losses and the
rate of recovery by the dense model were not compared with others.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Any

import torch
from torch import nn

from hf_sparse.adapters.on_layers import adaptable
from hf_sparse.provenance.values import Calibration
from hf_sparse.structure.layers import TargetLayer
from hf_sparse.structure.targets import Targets

PRUNE, RECOVER = "prune", "recover"
# What each effort does, for help.
EFFORTS = {
    "seconds": "a solver in one pass",
    "minutes": "a better solver, and every block trained with its zeros fixed",
    "hours": "that, and the whole model trained with its zeros fixed on all the data",
}
# Tokens that a pruning looks at, at most: more have not helped.
_MOST_TOKENS = {"seconds": 32_768, "minutes": 131_072, "hours": 131_072}
# Tokens for each input feature of the widest layer, at least.
_LEAST_SHARE = {"seconds": 1, "minutes": 4, "hours": 16}
# Sparsity from which blocks differ in how much they take, and from which networks go as a whole.
_OWL_FROM, _WHOLE_FROM = 0.6, 0.8
_HELD_OUT = 16  # one batch in so many shows whether recovery has helped


@dataclass(frozen=True)
class Stage:
    """One stage of a run.

    Attributes:
        kind: `"prune"` or `"recover"`.
        method: of `prune_` or of `recover_`.
        options: theirs.
        batches: how many it looks at, from the first on.
        held_out: how many at the end of the data show whether it has helped; it looks at none of them.
    """

    kind: str
    method: str
    options: Mapping[str, Any] = field(default_factory=dict)
    batches: int = 1
    held_out: int = 0

    def __str__(self) -> str:
        name = self.method if self.kind == PRUNE else f"recovery by {self.method}"
        options = "".join(f", {key}={value}" for key, value in self.options.items())
        return f"{name}{options}"


def stages_for(
    model: nn.Module, targets: Targets, batches: Sequence[Mapping[str, Any]], effort: str
) -> tuple[list[Stage], list[str]]:
    """The stages of an effort, and notes on what was chosen without a measurement.

    Args:
        model: to be made sparse.
        targets: what of it.
        batches: the data.
        effort: a key of `EFFORTS`.

    Raises:
        ValueError: too few tokens.
    """
    _check_tokens(targets.layers, batches, effort)
    notes: list[str] = []
    learns = is_causal(model) or all("labels" in batch for batch in batches)
    held = 0
    if effort == "hours" and is_causal(model):
        held = max(1, len(batches) // _HELD_OUT)
        if len(batches) < 4:
            raise ValueError(
                f"effort='hours' got {len(batches)} batches; wanted at least 4, one of which is held "
                "out. Give smaller batches, or take effort='minutes'."
            )
    count = _within(batches[: len(batches) - held], _MOST_TOKENS[effort])
    if targets.whole_units:
        stages = [_of_units(targets, effort, learns, count)]
    else:
        stages = [_of_weights(targets, effort, count)]
    if effort == "hours" and not held:
        notes.append(
            "recovery was measured for causal language models alone, and is left out: train this one "
            "on its task with the zeros kept (hf_sparse.KeepZeros), or with SparseAdamW from the start."
        )
    if held:
        stages.append(_of_recovery(model, targets, len(batches) - held, held))
    return stages, notes


def _of_recovery(model: nn.Module, targets: Targets, count: int, held: int) -> Stage:
    """How the whole model is trained: by the dense one, or, in half precision, by adapters."""
    adapts = find_spec("peft") is not None and bool(adaptable(targets.layers))
    if adapts and any(parameter.dtype != torch.float32 for parameter in model.parameters()):
        return Stage(RECOVER, "lora", {"epochs": 1}, count, held)
    taught = {"logits": 1.0, "temperature": 1.0, "hidden": 1.0, "distilled": True}
    return Stage(RECOVER, "finetune", {"epochs": 1, **taught}, count, held)


def _of_weights(targets: Targets, effort: str, count: int) -> Stage:
    """How single weights, N:M groups and blocks of weights are pruned."""
    if effort == "seconds":
        return Stage(PRUNE, "sparsegpt", {}, count)
    pattern, sparsity = targets.pattern, targets.config.sparsity
    options: dict[str, Any] = {}
    method = "alps"
    if str(pattern) == "unstructured" and sparsity >= _WHOLE_FROM:
        method, options["solver"] = "sparsellm", "alps"
    if str(pattern) == "unstructured" and sparsity > _OWL_FROM:
        options["allocation"] = "owl"
    return Stage(PRUNE, method, {**options, "reconstruct": 2}, count)


def _of_units(targets: Targets, effort: str, learns: bool, count: int) -> Stage:
    """How whole heads and neurons are pruned."""
    options: dict[str, Any] = {}
    if learns and not targets.config.uniform:
        options["scope"] = "global"
    if str(targets.config.pattern).startswith(("head", "column")):
        options["refine"] = "refit"
    if effort != "seconds":
        options["reconstruct"] = 2
    return Stage(PRUNE, "taylor" if learns else "wanda", options, count)


def is_causal(model: nn.Module) -> bool:
    """Whether a model predicts the next token of its batches."""
    return type(model).__name__.endswith(("ForCausalLM", "LMHeadModel"))


def tokens_in(batches: Sequence[Mapping[str, Any]]) -> int:
    """Tokens of batches; of inputs that are no tokens, sequences."""
    described = Calibration.of(batches)
    return described.tokens or described.windows


def _check_tokens(
    layers: Sequence[TargetLayer], batches: Sequence[Mapping[str, Any]], effort: str
) -> None:
    tokens = tokens_in(batches)
    if Calibration.of(batches).tokens is None:
        return  # images and sounds: how many vectors come of one is the model's affair
    widest = max(layer.weight.shape[1] for layer in layers)
    wanted = _LEAST_SHARE[effort] * widest
    if tokens >= wanted:
        return
    enough = [name for name, share in _LEAST_SHARE.items() if tokens >= share * widest]
    instead = f", or take effort='{enough[-1]}'" if enough else ""
    raise ValueError(
        f"the data have {tokens:,} tokens; effort='{effort}' wants at least {wanted:,}, "
        f"{_LEAST_SHARE[effort]} for each of the {widest:,} inputs of the widest layer. Give more "
        f"text{instead}."
    )


def _within(batches: Sequence[Mapping[str, Any]], most: int) -> int:
    """How many batches from the first on hold so many tokens, at least one."""
    total = 0
    for number, batch in enumerate(batches):
        total += tokens_in([batch])
        if total > most:
            return max(number, 1)
    return len(batches)
