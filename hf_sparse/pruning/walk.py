"""Taking calibration data through a model block by block, so that each block is pruned on the
outputs of the pruned blocks before it.

The blocks are called as the model itself calls them. For each batch the model's own forward runs
once with its blocks replaced by recorders, which keep the arguments of every call (masks, rotary
embeddings, what differs from layer to layer) and pass the hidden states on unchanged: this costs
the embedding and no block. Then every call is repeated with the recorded arguments and the real
hidden states. The first batch runs for real once, to learn the order of the calls (ALBERT calls
one block many times) and to check that the output of each call is the input of the next.

Memory: the hidden states of all batches, `samples * window * hidden_size` once, and the arguments.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from itertools import groupby
from typing import Any

import torch
from accelerate.utils import send_to_device
from torch import Tensor, nn
from transformers.utils.logging import tqdm

from hf_sparse.structure import Stack

Batch = Mapping[str, Tensor]


@dataclass(frozen=True)
class Call:
    """One call of a block: everything but the hidden states."""

    block: int
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def __call__(self, module: nn.Module, hidden: Tensor) -> Tensor:
        """Repeat the call on other hidden states and return the new hidden states."""
        args, kwargs = send_to_device((self.args, self.kwargs), hidden.device)
        if "hidden_states" in kwargs:
            return _hidden_of(module(*args, **{**kwargs, "hidden_states": hidden}))
        return _hidden_of(module(hidden, *args, **kwargs))


@dataclass(frozen=True)
class TokenMasks:
    """Which tokens of a batch count, `(batch, tokens)`; None: all.

    Attributes:
        tokens: of the tokens that go through the blocks.
        encoder: of the encoder's tokens that a decoder attends to.
        encoder_states: the encoder's hidden states, `(batch, tokens, hidden_size)`.
    """

    tokens: Tensor | None = None
    encoder: Tensor | None = None
    encoder_states: Tensor | None = None

    def of(self, inputs: Tensor) -> Tensor | None:
        """The mask of a layer's inputs `(..., in_features)`, flat over tokens; None if all count."""
        mask = self.encoder if self._are_encoder_states(inputs) else self.tokens
        if mask is None or mask.all():
            return None
        mask = mask.bool().reshape(-1, mask.shape[-1])  # several choices are folded into the batch
        fits = inputs.ndim == 2 and inputs.shape[0] == mask.numel()
        return mask.reshape(-1) if fits or inputs.shape[:-1] == mask.shape else None

    def _are_encoder_states(self, inputs: Tensor) -> bool:
        states = self.encoder_states
        if states is None or states.shape != inputs.shape:
            return False
        return torch.equal(states.to(inputs.device), inputs)


@dataclass
class Sample:
    """A batch on its way through the blocks."""

    hidden: Tensor
    calls: list[Call]
    masks: TokenMasks


Run = Callable[[], None]
PruneBlock = Callable[[nn.Module, Run], None]


def walk(
    model: nn.Module,
    stacks: Sequence[Stack],
    batches: Sequence[Batch],
    prune_block: PruneBlock,
    on_batch: Callable[[TokenMasks], None],
    device: torch.device | None = None,
) -> None:
    """Prune the blocks in order, each on the outputs of the pruned blocks before it.

    Args:
        model: a transformers model in eval mode.
        stacks: its blocks, from `find_stacks`.
        batches: model inputs.
        prune_block: called with a block and a function that runs the calibration data
            through it; hooks on the block's layers see the inputs, and weights may be changed
            afterwards.
        on_batch: called before each batch of such a run with the batch's token masks.
        device: where blocks run; None: where they are.

    Raises:
        ValueError: the model's blocks are not a chain.
    """
    for stack in stacks:
        samples = _record(model, stack, batches)
        order = [call.block for call in samples[0].calls]
        position = 0
        for block_index, repeats in tqdm(
            [(index, len(list(same))) for index, same in groupby(order)], desc="Pruning blocks"
        ):
            block, calls = stack.blocks[block_index], slice(position, position + repeats)
            position += repeats
            run = partial(_run, block, samples, calls, on_batch, device)
            with _placed(block, device):
                prune_block(block, partial(run, advance=False))
                if position < len(order):
                    run(advance=True)


def _run(
    block: nn.Module,
    samples: list[Sample],
    calls: slice,
    on_batch: Callable[[TokenMasks], None],
    device: torch.device | None,
    *,
    advance: bool,
) -> None:
    """Run every sample through some calls of a block; keep the outputs if `advance`."""
    for sample in samples:
        on_batch(sample.masks)
        hidden = sample.hidden if device is None else sample.hidden.to(device)
        for call in sample.calls[calls]:
            hidden = call(block, hidden)
        if advance:
            sample.hidden = hidden.to(sample.hidden.device)
            sample.calls[calls] = [
                replace(call, args=(), kwargs={}) for call in sample.calls[calls]
            ]


class _RecordedError(Exception):
    """All calls of the stack are recorded; the rest of the model need not run."""


def _record(model: nn.Module, stack: Stack, batches: Sequence[Batch]) -> list[Sample]:
    first, extras = _record_real(model, stack, batches[0])
    if extras:  # blocks hand more than hidden states to each other: only real calls show it
        return [first, *(_record_real(model, stack, batch)[0] for batch in batches[1:])]
    tuples = extras is not None
    rest = [_record_passing(model, stack, batch, len(first.calls), tuples) for batch in batches[1:]]
    for sample in rest:
        if [call.block for call in sample.calls] != [call.block for call in first.calls]:
            raise ValueError(
                f"the blocks of {stack.name} are not called in the same order for every batch, so "
                "they cannot be pruned one after another."
            )
    return [first, *rest]


def _record_real(model: nn.Module, stack: Stack, batch: Batch) -> tuple[Sample, list[Any] | None]:
    """Run one batch for real and record the calls.

    Returns:
        The sample, and what blocks return beside the hidden states: None if they return a tensor.
    """
    calls: list[Call] = []
    entered: list[Tensor] = []
    left: list[Tensor] = []
    extras: list[Any] | None = None

    def record(index: int, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        nonlocal extras
        hidden, call = _split_call(index, stack, args, kwargs)
        if left and hidden is not left[-1]:
            raise ValueError(
                f"the blocks of {stack.name} are not a chain: what enters block {index} is not what "
                "left the one before it. Use method='magnitude', which needs no calibration."
            )
        calls.append(call)
        entered.append(hidden)
        output = forward(*args, **kwargs)
        left.append(_hidden_of(output))
        if isinstance(output, tuple | list):
            extras = [*(extras or []), *(item for item in output[1:] if item is not None)]
        return output

    _forward_recorded(model, stack, batch, record)
    if not calls:
        raise ValueError(f"the model's forward never calls the blocks of {stack.name}.")
    return Sample(entered[0], calls, token_masks(batch, calls[0])), extras


def _record_passing(
    model: nn.Module, stack: Stack, batch: Batch, num_calls: int, tuples: bool
) -> Sample:
    """Record the calls of one batch without running a block."""
    calls: list[Call] = []
    entered: list[Tensor] = []

    def record(index: int, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        hidden, call = _split_call(index, stack, args, kwargs)
        calls.append(call)
        entered.append(hidden)
        if len(calls) == num_calls:
            raise _RecordedError
        return (hidden,) if tuples else hidden

    _forward_recorded(model, stack, batch, record)
    return Sample(entered[0], calls, token_masks(batch, calls[0]))


def _forward_recorded(
    model: nn.Module, stack: Stack, batch: Batch, record: Callable[..., Any]
) -> None:
    """Run the model with `record(index, forward, args, kwargs)` in the place of its blocks."""
    with ExitStack() as patches:
        for index, block in enumerate(stack.blocks):
            patches.enter_context(_patched_forward(block, index, record))
        with suppress(_RecordedError):
            model(**batch)


@contextmanager
def _patched_forward(block: nn.Module, index: int, record: Callable[..., Any]) -> Iterator[None]:
    forward, own = block.forward, vars(block).get("forward")
    block.forward = lambda *args, **kwargs: record(index, forward, args, kwargs)
    try:
        yield
    finally:
        del block.forward
        if own is not None:  # a hook of accelerate's, which lives on the module
            block.forward = own


def _split_call(
    index: int, stack: Stack, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Tensor, Call]:
    hidden = args[0] if args else kwargs.get("hidden_states")
    if not isinstance(hidden, Tensor):
        raise ValueError(
            f"block {index} of {stack.name} is not called with hidden states as its first argument, "
            f"but with {type(hidden).__name__}. Use method='magnitude', which needs no calibration."
        )
    if "hidden_states" in kwargs:
        kwargs = {**kwargs, "hidden_states": None}
    return hidden, Call(index, args[1:], dict(kwargs))


def _hidden_of(output: Any) -> Tensor:
    hidden: Tensor = output[0] if isinstance(output, tuple | list) else output
    return hidden


def token_masks(batch: Batch, call: Call | None = None) -> TokenMasks:
    """The masks of a batch for the blocks that are called like `call`; None: for the output."""
    states = None
    if call is not None:
        others = [call.kwargs.get("encoder_hidden_states"), *call.args]
        states = next((x for x in others if isinstance(x, Tensor) and _are_states(x)), None)
    if "encoder_hidden_states" in batch:  # a decoder alone: the masks have other names
        states = batch["encoder_hidden_states"]
        return TokenMasks(batch.get("attention_mask"), batch.get("encoder_attention_mask"), states)
    encoder = batch.get("attention_mask")
    if states is None and (call is not None or "decoder_input_ids" not in batch):
        return TokenMasks(encoder)
    return TokenMasks(batch.get("decoder_attention_mask"), encoder, states)


def _are_states(tensor: Tensor) -> bool:
    return tensor.ndim == 3 and tensor.is_floating_point()


@contextmanager
def _placed(block: nn.Module, device: torch.device | None) -> Iterator[None]:
    """The block on `device` for a while."""
    home = next(block.parameters()).device
    if device is None or device == home:
        yield
        return
    block.to(device)
    try:
        yield
    finally:
        block.to(home)
