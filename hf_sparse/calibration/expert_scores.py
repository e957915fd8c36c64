"""How much a mixture uses each of its experts: tokens that they get, and what they add to them."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from transformers.utils.logging import tqdm

from hf_sparse.calibration.layer_inputs import expert_outputs, routed
from hf_sparse.calibration.recording import Batch, TokenMasks
from hf_sparse.calibration.walk import run_model
from hf_sparse.structure.experts import ExpertStack


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
