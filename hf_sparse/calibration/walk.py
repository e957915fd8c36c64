"""Taking calibration data through a model block by block, so that each block is pruned on the
outputs of the pruned blocks before it.

The blocks are called as the model itself calls them, see `hf_sparse.calibration.recording`.

Memory: the hidden states of all batches, `samples * window * hidden_size` once (twice if the dense
model is followed), in memory or on the disk; and the arguments of the calls, equal ones once.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from itertools import groupby
from typing import Protocol

import torch
from torch import Tensor, nn

from hf_sparse.calibration.activations import Store, in_memory
from hf_sparse.calibration.calling import run_on
from hf_sparse.calibration.progress import steps
from hf_sparse.calibration.recording import Batch, Sample, TokenMasks, record, token_masks
from hf_sparse.structure.layers import Stack


class Observer(Protocol):
    """Watches the calibration data go through a block, by hooks of its own."""

    def on_batch(self, masks: TokenMasks) -> None:
        """A batch is next; `masks` tells which of its tokens count."""

    def end_call(self) -> None:
        """A call of the block is over."""


def run_model(model: nn.Module, batches: Sequence[Batch], observer: Observer) -> None:
    """Show an observer all data on its way through the whole model."""
    for batch in batches:
        observer.on_batch(token_masks(batch))
        run_on(model, batch)
        observer.end_call()


class EnoughSeen(Exception):  # noqa: N818 - a signal, no error
    """Raised by an observer's hook: what follows in this call of the block is not needed."""


class BlockStep:
    """A block whose turn it is, and the data that reached it.

    Attributes:
        name: of the block in the model.
        block: the block.
        samples: the calibration data; `samples[i].dense` is the dense block's output if the walk
            follows the dense model.
        repeats: how often the model calls the block in a row.
    """

    def __init__(
        self,
        name: str,
        block: nn.Module,
        samples: Sequence[Sample],
        calls: slice,
        device: torch.device | None,
    ) -> None:
        self.name, self.block, self.samples = name, block, samples
        self._calls, self._device = calls, device
        self.repeats = calls.stop - calls.start

    def forward(self, sample: Sample, hidden: Tensor | None = None) -> Tensor:
        """The block's output for a sample, as its weights are now, on the device of the block."""
        hidden = self._here(sample.hidden if hidden is None else hidden)
        for call in sample.calls[self._calls]:
            hidden = call(self.block, hidden)
        return hidden

    def run(self, observer: Observer) -> None:
        """Show all data to an observer."""
        for sample in self.samples:
            observer.on_batch(sample.masks)
            hidden = self._here(sample.hidden)
            for call in sample.calls[self._calls]:
                with suppress(EnoughSeen):
                    hidden = call(self.block, hidden)
                observer.end_call()

    def advance(self) -> None:
        """Take all data through the block."""
        for sample in self.samples:
            hidden = sample.hidden
            sample.hidden = self.forward(sample, hidden).to(hidden.device)

    def advance_dense(self) -> None:
        """Take the data of the dense model through the block."""
        for sample in self.samples:
            dense = sample.dense
            hidden = sample.hidden if dense is None else dense
            sample.dense = self.forward(sample, hidden).to(hidden.device)

    def _here(self, hidden: Tensor) -> Tensor:
        return hidden if self._device is None else hidden.to(self._device)

    def forget_calls(self) -> None:
        """Free the arguments of the calls."""
        for sample in self.samples:
            sample.calls[self._calls] = [
                replace(call, args=(), kwargs={}) for call in sample.calls[self._calls]
            ]


class Residence:
    """Where blocks live between their turns: in memory, on the devices where they are.

    Args:
        device: where a block goes for its turn; None: it stays where it is.
    """

    def __init__(self, device: torch.device | None = None) -> None:
        self.device = device

    @contextmanager
    def placed(self, block: nn.Module) -> Iterator[None]:
        """The block with its weights where it can run, for its turn."""
        home = next(block.parameters()).device
        if self.device is None or self.device == home:
            yield
            return
        block.to(self.device)
        try:
            yield
        finally:
            block.to(home)

    @contextmanager
    def entered(self, model: nn.Module) -> Iterator[None]:
        """The model while data enters it, on its way to the blocks."""
        yield

    @contextmanager
    def running(self, block: nn.Module) -> Iterator[None]:
        """A block while the whole model runs, before the turns."""
        yield

    def restore(self, step: BlockStep) -> bool:
        """Give a block the weights that an earlier run pruned; False if it has not."""
        return False

    def finish(self, step: BlockStep) -> None:
        """A block has its final weights; its turn is not over yet."""


@torch.no_grad()
def walk(
    model: nn.Module,
    stacks: Sequence[Stack],
    batches: Sequence[Batch],
    residence: Residence,
    *,
    follow_dense: bool = False,
    store: Store = in_memory,
    description: str = "Pruning blocks",
) -> Iterator[BlockStep]:
    """Go through the blocks in order, each on the outputs of those before it as they are now.

    Args:
        model: a transformers model in eval mode.
        stacks: its blocks, from `find_stacks`.
        batches: model inputs.
        residence: where blocks live.
        follow_dense: also take the data through the blocks before they are changed.
        store: where hidden states wait.
        description: of the progress bar.

    Yields:
        The step of each block. When the loop goes on, the data is taken through the block with
        its new weights.

    Raises:
        ValueError: the model's blocks are not a chain.
    """
    for stack in stacks:
        with residence.entered(model):
            samples = record(model, stack, batches, store, residence.running)
        order = [call.block for call in samples[0].calls]
        position = 0
        turns = [(index, len(list(same))) for index, same in groupby(order)]
        for block_index, repeats in steps(turns, description):
            block, calls = stack.blocks[block_index], slice(position, position + repeats)
            position += repeats
            name = f"{stack.name}.{block_index}"
            step = BlockStep(name, block, samples, calls, residence.device)
            with residence.placed(block):
                if follow_dense:
                    step.advance_dense()
                yield step
                if position < len(order):
                    step.advance()
                step.forget_calls()
