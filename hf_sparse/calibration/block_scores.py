"""What a model would miss without a block: how blocks are skipped, and their influence."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

Batches = Sequence[Mapping[str, Any]]


@contextmanager
def skipping(blocks: Iterable[nn.Module]) -> Iterator[None]:
    """Let blocks hand on the hidden states that they are given; all else that they return stays."""
    with ExitStack() as undo:
        for block in blocks:
            hook = block.register_forward_hook(_hand_on, with_kwargs=True)
            undo.callback(hook.remove)
        yield


class Influence:
    """1 - mean cosine of the hidden states before and after each block, over all tokens but padding.

    Attributes:
        blocks: of a model, in order.
        masks: for each block, which tokens of the batch that runs count, `(sequences, tokens)`; None:
            all do.
    """

    def __init__(self, blocks: Sequence[nn.Module]) -> None:
        self.blocks = blocks
        self.masks: Sequence[Tensor | None] = [None] * len(blocks)
        self._sums = [0.0] * len(blocks)
        self._tokens = [0] * len(blocks)

    @contextmanager
    def measuring(self) -> Iterator[None]:
        """Look at all calls of the blocks."""
        with ExitStack() as undo:
            for number, block in enumerate(self.blocks):

                def look(
                    module: nn.Module, args: Any, kwargs: Any, output: Any, number: int = number
                ) -> None:
                    self._add(number, hidden_in(module, args, kwargs), hidden_out(module, output))

                hook = block.register_forward_hook(look, with_kwargs=True)
                undo.callback(hook.remove)
            yield

    def values(self) -> list[float]:
        """The influence of each block."""
        pairs = zip(self._sums, self._tokens, strict=True)
        return [1 - total / max(tokens, 1) for total, tokens in pairs]

    def _add(self, number: int, before: Tensor, after: Tensor) -> None:
        cosine = torch.nn.functional.cosine_similarity(before.float(), after.float(), dim=-1)
        mask = self.masks[number]
        if mask is not None and mask.shape == cosine.shape:
            cosine = cosine[mask.to(cosine.device).bool()]
        self._sums[number] += float(cosine.double().sum())
        self._tokens[number] += cosine.numel()


def hidden_in(block: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Tensor:
    """The hidden states that a block is called with."""
    hidden = args[0] if args else kwargs.get("hidden_states")
    if not isinstance(hidden, Tensor):
        raise ValueError(
            f"a {type(block).__name__} is called without hidden states in the first place: given were "
            f"{len(args)} arguments and {', '.join(kwargs)}. Wanted blocks that get them first."
        )
    return hidden


def hidden_out(block: nn.Module, output: Any) -> Tensor:
    """The hidden states that a block returns: its output, or the first of several."""
    hidden = output[0] if isinstance(output, tuple | list) and output else output
    if not isinstance(hidden, Tensor):
        raise ValueError(
            f"a {type(block).__name__} returns a {type(output).__name__}; wanted hidden states, or a "
            "tuple that begins with them."
        )
    return hidden


def _hand_on(block: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
    before, after = hidden_in(block, args, kwargs), hidden_out(block, output)
    if before.shape != after.shape:
        raise ValueError(
            f"a {type(block).__name__} makes hidden states of shape {tuple(after.shape)} of "
            f"{tuple(before.shape)}: it cannot be left out."
        )
    return before if isinstance(output, Tensor) else type(output)((before, *output[1:]))
