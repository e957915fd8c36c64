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
from itertools import groupby
from typing import Any, Protocol

import torch
from accelerate.utils import send_to_device
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten
from transformers.utils.logging import tqdm

from hf_sparse.pruning.activations import Store, in_memory
from hf_sparse.pruning.linalg import FastProducts
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
        with FastProducts():
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


class Sample:
    """A batch on its way through the blocks.

    Attributes:
        hidden: what enters the next block, `(batch, tokens, hidden_size)`.
        dense: what would enter it if nothing had been pruned; None if that is not followed.
        calls: the calls of the blocks.
        masks: which tokens count.
    """

    def __init__(
        self, hidden: Tensor, calls: list[Call], masks: TokenMasks, store: Store = in_memory
    ) -> None:
        self.calls, self.masks = calls, masks
        self._store, self._hidden = store, store(hidden)
        self._dense: Callable[[], Tensor] | None = None

    @property
    def hidden(self) -> Tensor:
        return self._hidden()

    @hidden.setter
    def hidden(self, hidden: Tensor) -> None:
        self._hidden = self._store(hidden)

    @property
    def dense(self) -> Tensor | None:
        return None if self._dense is None else self._dense()

    @dense.setter
    def dense(self, dense: Tensor) -> None:
        self._dense = self._store(dense)


class Observer(Protocol):
    """Watches the calibration data go through a block, by hooks of its own."""

    def on_batch(self, masks: TokenMasks) -> None:
        """A batch is next; `masks` tells which of its tokens count."""

    def end_call(self) -> None:
        """A call of the block is over."""


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
        hidden = sample.hidden if hidden is None else hidden
        hidden = hidden if self._device is None else hidden.to(self._device)
        for call in sample.calls[self._calls]:
            hidden = call(self.block, hidden)
        return hidden

    def run(self, observer: Observer) -> None:
        """Show all data to an observer."""
        for sample in self.samples:
            observer.on_batch(sample.masks)
            hidden = sample.hidden if self._device is None else sample.hidden.to(self._device)
            for call in sample.calls[self._calls]:
                with suppress(EnoughSeen):
                    hidden = call(self.block, hidden)
                observer.end_call()

    def advance(self) -> None:
        """Take all data through the block."""
        for sample in self.samples:
            home = sample.hidden.device
            sample.hidden = self.forward(sample).to(home)

    def advance_dense(self) -> None:
        """Take the data of the dense model through the block."""
        for sample in self.samples:
            hidden = sample.hidden if sample.dense is None else sample.dense
            sample.dense = self.forward(sample, hidden).to(hidden.device)

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
        samples = _record(model, stack, batches, store)
        order = [call.block for call in samples[0].calls]
        position = 0
        for block_index, repeats in tqdm(
            [(index, len(list(same))) for index, same in groupby(order)], desc=description
        ):
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


class _RecordedError(Exception):
    """All calls of the stack are recorded; the rest of the model need not run."""


def _record(model: nn.Module, stack: Stack, batches: Sequence[Batch], store: Store) -> list[Sample]:
    first, extras = _record_real(model, stack, batches[0], store)
    if extras:  # blocks hand more than hidden states to each other: only real calls show it
        return [first, *(_record_real(model, stack, batch, store)[0] for batch in batches[1:])]
    tuples = extras is not None
    rest = [
        _record_passing(model, stack, batch, first.calls, tuples, store) for batch in batches[1:]
    ]
    for sample in rest:
        if [call.block for call in sample.calls] != [call.block for call in first.calls]:
            raise ValueError(
                f"the blocks of {stack.name} are not called in the same order for every batch, so "
                "they cannot be pruned one after another."
            )
    return [first, *rest]


def _record_real(
    model: nn.Module, stack: Stack, batch: Batch, store: Store
) -> tuple[Sample, list[Any] | None]:
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
    return Sample(entered[0], calls, token_masks(batch, calls[0]), store), extras


def _record_passing(
    model: nn.Module, stack: Stack, batch: Batch, known: list[Call], tuples: bool, store: Store
) -> Sample:
    """Record the calls of one batch without running a block.

    Arguments that equal those of the `known` calls of another batch (rotary embeddings, masks)
    are kept once.
    """
    calls: list[Call] = []
    entered: list[Tensor] = []

    def record(index: int, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        hidden, call = _split_call(index, stack, args, kwargs)
        calls.append(_sharing(call, known[len(calls)]))
        entered.append(hidden)
        if len(calls) == len(known):
            raise _RecordedError
        return (hidden,) if tuples else hidden

    _forward_recorded(model, stack, batch, record)
    return Sample(entered[0], calls, token_masks(batch, calls[0]), store)


def _sharing(call: Call, known: Call) -> Call:
    """The call with the tensors of a known one where they are equal."""
    leaves, structure = tree_flatten((call.args, call.kwargs))
    others, other_structure = tree_flatten((known.args, known.kwargs))
    if structure != other_structure:
        return call
    shared = [
        other if isinstance(leaf, Tensor) and _is_same(leaf, other) else leaf
        for leaf, other in zip(leaves, others, strict=True)
    ]
    args, kwargs = tree_unflatten(shared, structure)
    return replace(call, args=args, kwargs=kwargs)


def _is_same(tensor: Tensor, other: Any) -> bool:
    if not isinstance(other, Tensor) or tensor.dtype != other.dtype:
        return False
    return tensor.device == other.device and torch.equal(tensor, other)


def _forward_recorded(
    model: nn.Module, stack: Stack, batch: Batch, record: Callable[..., Any]
) -> None:
    """Run the model with `record(index, forward, args, kwargs)` in the place of its blocks."""
    with ExitStack() as patches:
        for index, block in enumerate(stack.blocks):
            patches.enter_context(_patched_forward(block, index, record))
        with suppress(_RecordedError), FastProducts():
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
