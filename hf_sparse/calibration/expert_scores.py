"""How much a mixture uses each of its experts, and which of them are to stay.

| by          | an expert's score                                                          |
|-------------|----------------------------------------------------------------------------|
| `reap`      | mean over its tokens of the router's weight times the norm of its output   |
| `frequency` | how many tokens it gets                                                    |
| `magnitude` | the norm of its weights: needs no data                                     |

Counted over the whole model, scores are taken as multiples of the mean of their block: what blocks add
grows with the size of the hidden states.

Source: Lasby et al., "REAP the Experts: Why Pruning Prevails for One-Shot MoE compression",
https://arxiv.org/abs/2510.13999. As in the authors' code (github.com/CerebrasResearch/reap at 1970473)
the mean is over an expert's own tokens, padding left out, with the weights that its outputs are
multiplied by: those of the chosen experts sum to 1 where the family has it so. Departures: an expert
that gets no token has score 0; a router whose families put experts into groups loses as many of each.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from transformers.utils.logging import tqdm

from hf_sparse.arguments import check_finite
from hf_sparse.calibration.layer_inputs import expert_outputs, routed
from hf_sparse.calibration.modes import switched
from hf_sparse.calibration.processes import summed
from hf_sparse.calibration.recording import Batch, TokenMasks
from hf_sparse.calibration.walk import run_model
from hf_sparse.structure.experts import ExpertStack
from hf_sparse.structure.mixtures import Mixture, Mixtures

# Whether a way to choose looks at data.
METHODS = {"reap": True, "frequency": True, "magnitude": False}


class ExpertUse:
    """What the experts of one block do on calibration data.

    Attributes:
        stack: the experts.
        tokens: how many each of them got, padding left out, int64 `(experts,)`.
        added: the sum over these tokens of the router's weight times the norm of the expert's output,
            fp64 `(experts,)`; zero if it was not asked for.
    """

    def __init__(self, stack: ExpertStack) -> None:
        self.stack = stack
        self.tokens = torch.zeros(stack.number, dtype=torch.long)
        self.added = torch.zeros(stack.number, dtype=torch.float64)

    @property
    def mean_added(self) -> Tensor:
        """What an expert adds to one of its tokens on average, fp64 `(experts,)`; 0 without tokens."""
        return self.added / self.tokens.clamp(min=1)

    @torch.no_grad()
    def add(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], masks: TokenMasks, outputs: bool
    ) -> None:
        """Count one call of the experts' module."""
        of_expert = routed(self.stack, args, kwargs, masks)
        for expert in range(self.stack.number):
            tokens, weights = of_expert(expert)
            self.tokens[expert] += len(tokens)
            if outputs and len(tokens):
                norms = expert_outputs(self.stack, expert, tokens).float().norm(dim=1)
                added = norms if weights is None else norms * weights.float().abs()
                self.added[expert] += float(added.double().sum())


class _Masks:
    """The observer that keeps which tokens of a batch count."""

    def __init__(self) -> None:
        self.current = TokenMasks()

    def on_batch(self, masks: TokenMasks) -> None:
        self.current = masks

    def end_call(self) -> None:
        return None


@torch.no_grad()
def expert_use(
    model: nn.Module, stacks: Sequence[ExpertStack], batches: Sequence[Batch], *, outputs: bool
) -> list[ExpertUse]:
    """Run a model over data, and look at its experts.

    Args:
        model: in eval mode.
        stacks: the experts of its blocks.
        batches: model inputs.
        outputs: whether the norms of what they add are taken, too: their products are computed once
            more for it.

    Raises:
        ValueError: experts are called in a way that is not known, or are spread over processes.
    """
    found, masks = [ExpertUse(stack) for stack in stacks], _Masks()
    with ExitStack() as undo:
        for use in found:

            def look(module: nn.Module, args: Any, kwargs: Any, use: ExpertUse = use) -> None:
                use.add(args, kwargs, masks.current, outputs)

            hook = use.stack.module.register_forward_pre_hook(look, with_kwargs=True)
            undo.callback(hook.remove)
        for batch in tqdm(batches, desc="Watching experts"):
            inputs = {name: value for name, value in batch.items() if name != "labels"}
            run_model(model, [inputs], masks)
    return found


def scores_of(
    mixtures: Mixtures, batches: Sequence[Batch], by: str, accelerator: Any = None
) -> tuple[list[Tensor], list[ExpertUse] | None]:
    """The scores of each mixture's experts.

    Args:
        mixtures: of a model.
        batches: calibration inputs; none where none are looked at.
        by: a key of `METHODS`.
        accelerator: its processes have other batches.

    Returns:
        Scores, fp64 `(experts,)` each, and what experts do on the data, if there is any.

    Raises:
        ValueError: weights or outputs are not finite; no token reaches a mixture.
    """
    model, stacks = mixtures.model, [mixture.stack for mixture in mixtures.mixtures]
    use = None
    if batches:
        with switched(model, training=False, use_cache=False):
            use = expert_use(model, stacks, batches, outputs=by == "reap")
        for seen in use:
            seen.tokens = summed(seen.tokens, accelerator)
            seen.added = summed(seen.added, accelerator)
    if by == "magnitude":
        return [_magnitudes(mixture) for mixture in mixtures.mixtures], use
    assert use is not None
    found = [seen.mean_added if by == "reap" else seen.tokens.double() for seen in use]
    for mixture, scores, seen in zip(mixtures.mixtures, found, use, strict=True):
        if not all(map(math.isfinite, scores.tolist())):
            raise ValueError(
                f"outputs of {mixture.name} are not finite on the calibration data. Load the model in "
                "float32, or look at the data."
            )
        if not seen.tokens.any():
            raise ValueError(
                f"no token of the calibration data reaches {mixture.name}: give longer texts."
            )
    return found, use


def _magnitudes(mixture: Mixture) -> Tensor:
    """The norm of all matrices of each expert, fp64."""
    squares = torch.zeros(mixture.stack.number, dtype=torch.float64)
    for name in mixture.stack.parameters:
        held = getattr(mixture.stack.module, name).detach()[: mixture.stack.number]
        check_finite(f"{mixture.name}.{name}", held)
        squares += torch.stack([matrix.double().square().sum() for matrix in held]).cpu()
    return squares.sqrt()


def kept_in_block(scores: Tensor, count: int, groups: int) -> list[int]:
    """The experts of highest score, as many of each group; of equal ones the first. Ascending."""
    size = len(scores) // groups
    kept: list[int] = []
    for group in range(groups):
        own = scores[group * size : (group + 1) * size]
        best = own.argsort(descending=True, stable=True)[: count // groups]
        kept += sorted(group * size + int(number) for number in best)
    return kept


def kept_over_all(scores: Sequence[Tensor], removed: int, least: int) -> list[list[int]]:
    """The experts that stay where those of all blocks compete.

    Args:
        scores: of each block's experts, `(experts,)`, compared as multiples of their block's mean.
        removed: how many go in all; of equal ones the last.
        least: how many each block keeps, whatever their scores.

    Returns:
        For each block their numbers, ascending.
    """
    ranked = sorted(
        (float(score / own.clamp(min=0).mean().clamp(min=1e-30)), -block, -number)
        for block, own in enumerate(scores)
        for number, score in enumerate(own)
    )
    kept = [set(range(len(own))) for own in scores]
    for _, block, number in ranked:
        if removed and len(kept[-block]) > least:
            kept[-block].remove(-number)
            removed -= 1
    return [sorted(own) for own in kept]
