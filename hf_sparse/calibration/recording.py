"""Recording how a model calls its blocks, so that the calls can be repeated one block at a time.

For each batch the model's own forward runs once with its blocks replaced by recorders, which keep
the arguments of every call (masks, rotary embeddings, what differs from layer to layer) and pass the
hidden states on unchanged: this costs the embedding and no block. The first batch runs for real
once, to learn the order of the calls (ALBERT calls one block many times) and to check that the
output of each call is the input of the next.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext, suppress
from dataclasses import dataclass, replace
from typing import Any

import torch
from accelerate.utils import send_to_device
from torch import Tensor, nn

from hf_sparse.calibration.activations import Store, in_memory
from hf_sparse.calibration.calling import run_on
from hf_sparse.calibration.linalg import FastProducts
from hf_sparse.structure.layers import Stack
from hf_sparse.upstream.torch import tree_flatten, tree_unflatten

Batch = Mapping[str, Tensor]
Running = Callable[[nn.Module], AbstractContextManager[None]]


def _as_it_is(block: nn.Module) -> AbstractContextManager[None]:
    """Nothing holds while a block runs."""
    return nullcontext()


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

    def counted(self, inputs: Tensor) -> Tensor:
        """Those of a layer's inputs `(..., in_features)` that count: `(tokens, in_features)`."""
        mask = self.of(inputs)
        flat = inputs.reshape(-1, inputs.shape[-1])
        return flat if mask is None else flat[mask.to(flat.device)]

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


class _RecordedError(Exception):
    """All calls of the stack are recorded; the rest of the model need not run."""


def record(
    model: nn.Module,
    stack: Stack,
    batches: Sequence[Batch],
    store: Store,
    running: Running = _as_it_is,
) -> list[Sample]:
    """Record the calls of a stack for all batches.

    Args:
        model: a transformers model in eval mode.
        stack: its blocks.
        batches: model inputs.
        store: where hidden states wait.
        running: called with a block, what holds while it runs.

    Raises:
        ValueError: the blocks are not a chain, or not called in the same order for every batch.
    """
    first, beside = _record_real(model, stack, batches[0], store, running)
    if any(item is not None for item in beside or ()):
        # Blocks hand more than hidden states to each other: only real calls show it.
        return [
            first,
            *(_record_real(model, stack, batch, store, running)[0] for batch in batches[1:]),
        ]
    rest = [
        _record_passing(model, stack, batch, first.calls, beside, store) for batch in batches[1:]
    ]
    for sample in rest:
        if [call.block for call in sample.calls] != [call.block for call in first.calls]:
            raise ValueError(
                f"the blocks of {stack.name} are not called in the same order for every batch, so "
                "they cannot be pruned one after another."
            )
    return [first, *rest]


def _record_real(
    model: nn.Module, stack: Stack, batch: Batch, store: Store, running: Running
) -> tuple[Sample, tuple[Any, ...] | None]:
    """Run one batch for real and record the calls.

    Returns:
        The sample, and what blocks return beside the hidden states, of the last one that returned
        something there: None if they return a tensor.
    """
    calls: list[Call] = []
    entered: list[Tensor] = []
    left: list[Tensor] = []
    beside: tuple[Any, ...] | None = None

    def record(index: int, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        nonlocal beside
        hidden, call = _split_call(index, stack, args, kwargs)
        if left and hidden is not left[-1]:
            raise ValueError(
                f"the blocks of {stack.name} are not a chain: what enters block {index} is not what "
                "left the one before it. Use method='magnitude', which needs no calibration."
            )
        calls.append(call)
        entered.append(hidden)
        with running(stack.blocks[index]):
            output = forward(*args, **kwargs)
        left.append(_hidden_of(output))
        if isinstance(output, tuple | list) and all(item is None for item in beside or ()):
            beside = tuple(output[1:])
        return output

    _forward_recorded(model, stack, batch, record)
    if not calls:
        raise ValueError(
            f"the model's forward never calls the blocks of {stack.name} for these batches. Give "
            f"batches that reach them (such as images), or leave them out: ignore=['{stack.name}.*']."
        )
    return Sample(entered[0], calls, token_masks(batch, calls[0]), store), beside


def _record_passing(
    model: nn.Module, stack: Stack, batch: Batch, known: list[Call], beside: Any, store: Store
) -> Sample:
    """Record the calls of one batch without running a block.

    Arguments that equal those of the `known` calls of another batch (rotary embeddings, masks)
    are kept once. Blocks that return a tuple return what they did then `beside` the hidden states.
    """
    calls: list[Call] = []
    entered: list[Tensor] = []

    def record(index: int, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        hidden, call = _split_call(index, stack, args, kwargs)
        calls.append(_sharing(call, known[len(calls)]))
        entered.append(hidden)
        if len(calls) == len(known):
            raise _RecordedError
        return hidden if beside is None else (hidden, *beside)

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
        first = {id(block): index for index, block in reversed(list(enumerate(stack.blocks)))}
        for index in sorted(first.values()):  # a block that is listed twice is one block
            block = stack.blocks[index]
            patches.enter_context(_patched_forward(block, index, record))
        with suppress(_RecordedError), FastProducts():
            run_on(model, batch)


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
