"""What enters each layer while a model runs: hooks that hand it to a function.

Experts that are stacked in one module are given tokens by their router, inside one call. What enters
an expert is found from what enters the module, before it runs: its rows of the hidden states, and
behind its activation what they become. So it does not matter which of transformers' implementations
runs the experts (`eager`, `batched_mm`, `grouped_mm`), nor that a kernel shows nothing of its inside.

Memory: beside the module's inputs, the inputs and inner activations of one expert. The first products
of the experts that are watched are computed once more.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from hf_sparse.calibration.recording import TokenMasks
from hf_sparse.structure.experts import ExpertStack
from hf_sparse.structure.layers import TargetLayer
from hf_sparse.upstream.transformers.experts import gated, is_spread

# Called for each layer with its name, what tells its inputs from those of others, and its inputs
# `(tokens, in_features)` of tokens that count.
See = Callable[[str, object, Callable[[], Tensor]], None]


@contextmanager
def watching(
    layers: Sequence[TargetLayer], masks: Callable[[], TokenMasks], see: See
) -> Iterator[None]:
    """Call `see` whenever one of the layers is given inputs; of experts also if no token reaches them.

    Args:
        layers: to be watched.
        masks: which tokens count now.
        see: told of the inputs. Layers that are given the same tensor are told of the same object.

    Raises:
        ValueError: experts are called in a way that is not known, or are spread over processes.
    """
    stacks: dict[int, _Experts] = {}
    hooks = []
    for layer in layers:
        if layer.stack is None:
            hooks.append(layer.module.register_forward_pre_hook(_Plain(layer, masks, see)))
        elif id(layer.module) in stacks:
            stacks[id(layer.module)].layers.append(layer)
        else:
            stacks[id(layer.module)] = hook = _Experts(layer.stack, [layer], masks, see)
            caller = layer.stack.caller
            hooks.append(caller.register_forward_pre_hook(hook, with_kwargs=True))
    try:
        yield
    finally:
        for handle in hooks:
            handle.remove()


class _Plain:
    """The hook of a Linear or Conv1D."""

    def __init__(self, layer: TargetLayer, masks: Callable[[], TokenMasks], see: See) -> None:
        self._layer, self._masks, self._see = layer, masks, see

    def __call__(self, module: nn.Module, args: tuple[Tensor, ...]) -> None:
        given = args[0]
        self._see(self._layer.name, given, lambda: self._masks().counted(given.detach()))


class _Experts:
    """The hook of a module with a stack of experts."""

    def __init__(
        self,
        stack: ExpertStack,
        layers: list[TargetLayer],
        masks: Callable[[], TokenMasks],
        see: See,
    ) -> None:
        self._stack, self.layers, self._masks, self._see = stack, layers, masks, see

    @torch.no_grad()
    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        stack = self._stack
        of_expert = routed(stack, args, kwargs, self._masks())
        wanted: dict[int, dict[str, TargetLayer]] = {}
        for layer in self.layers:
            wanted.setdefault(layer.expert, {})[layer.attribute] = layer
        given = object()
        for expert, layers in wanted.items():
            tokens, factors = of_expert(expert)
            given = given if stack.shared else object()
            for entry in stack.entries:
                if entry in layers:
                    self._see(layers[entry].name, given, partial(_itself, tokens))
            for inner in stack.exits:
                if inner in layers:
                    activations = partial(inner_activations, stack, expert, tokens)
                    if stack.shared and factors is not None:
                        activations = partial(_multiplied, activations, factors)
                    self._see(layers[inner].name, object(), activations)


def _multiplied(activations: Callable[[], Tensor], factors: Tensor) -> Tensor:
    return activations() * factors[:, None]


def _itself(tokens: Tensor) -> Tensor:
    return tokens


def routed(
    stack: ExpertStack, args: tuple[Any, ...], kwargs: dict[str, Any], masks: TokenMasks
) -> Callable[[int], tuple[Tensor, Tensor | None]]:
    """The inputs of each expert, `(tokens, hidden)`, for the arguments of the module that is called.

    Modules are called with hidden states and the experts' numbers, `(tokens, top_k)`; or, as Llama 4
    does, with the hidden states of each expert below those of the one before it, where tokens that it
    does not get are zero.

    Modules of one product alone are called with the tokens of each expert below those of the one before
    it, and how many each gets. Modules of shared experts are called with the hidden states and the
    weights of the experts for each token, `(tokens, experts)`.

    Returns:
        For the number of an expert its inputs, and what its outputs are multiplied by, `(tokens,)`
        (of shared experts, the inputs of the last product); None in its place: they are not multiplied,
        as the inputs are.

    Raises:
        ValueError: they are called otherwise, or the experts are spread over processes; or a batch has
            padding that is among the tokens of a module of one product.
    """
    module = stack.caller
    if is_spread(module):
        raise ValueError(
            f"the experts of {type(module).__name__} are spread over processes, and their inputs are "
            "collected in one. Load the model without expert parallelism."
        )
    given = list(inspect.signature(module.forward).bind(*args, **kwargs).arguments.values())
    hidden: Tensor = given[0].detach()
    if not stack.exits:
        return _in_order(stack, hidden, given[1], masks)
    if stack.shared:
        return _by_all(hidden, given[1], masks)
    if len(given) == 1 and len(hidden) % stack.number == 0:
        own = hidden.view(stack.number, -1, hidden.shape[-1])

        def nonzero(expert: int) -> tuple[Tensor, None]:
            tokens = masks.counted(own[expert])
            return tokens[(tokens != 0).any(dim=1)], None

        return nonzero
    chosen = given[1] if len(given) > 1 else None
    hidden = hidden.reshape(-1, hidden.shape[-1])
    if not isinstance(chosen, Tensor) or chosen.shape[:1] != hidden.shape[:1]:
        raise ValueError(
            f"{type(module).__name__} is not called with hidden states (tokens, hidden) and the "
            "numbers of the experts (tokens, top_k): which tokens an expert gets is not known. Use "
            "'magnitude', which needs no data, or leave the experts out: ignore=['experts.*']."
        )
    weights = given[2] if len(given) > 2 else None
    multiplied = isinstance(weights, Tensor) and weights.shape == chosen.shape
    counts = masks.of(hidden)

    def chosen_by(expert: int) -> tuple[Tensor, Tensor | None]:
        own = chosen == expert
        gets = own.any(dim=1)
        gets = gets if counts is None else gets & counts.to(gets.device)
        if not multiplied:
            return hidden[gets], None
        return hidden[gets], (weights.detach() * own).sum(dim=1)[gets]  # type: ignore[union-attr]

    return chosen_by


def _by_all(
    hidden: Tensor, weights: Tensor, masks: TokenMasks
) -> Callable[[int], tuple[Tensor, Tensor]]:
    """The inputs of experts that get all tokens, and the weight of each token for an expert."""
    tokens = masks.counted(hidden)
    factors = masks.counted(weights.detach())
    return lambda expert: (tokens, factors[:, expert])


def _in_order(
    stack: ExpertStack, hidden: Tensor, counts: list[int], masks: TokenMasks
) -> Callable[[int], tuple[Tensor, None]]:
    """The inputs of each expert, from those of all of them and how many each has."""
    if masks.tokens is not None and not masks.tokens.all():
        raise ValueError(
            f"{type(stack.module).__name__} is called with tokens in another order, so that padding "
            "cannot be told from them. Give batches without padding."
        )
    own = hidden.split(counts)
    return lambda expert: (own[expert], None)


def inner_activations(stack: ExpertStack, expert: int, tokens: Tensor) -> Tensor:
    """What enters an expert's last matrix, `(tokens, intermediate)`, for `(tokens, hidden)`."""
    module: Any = stack.module
    first = [
        nn.functional.linear(tokens, stack.matrix(name, expert), stack.bias(name, expert))
        for name in stack.entries
    ]
    if len(first) == 2:
        gate, up = first
        entered: Tensor = (module.activation_fn if stack.below else module.act_fn)(gate) * up
        return entered
    if not stack.gated:
        inner: Tensor = module.act_fn(first[0])
        return inner
    return gated(module, first[0])


def expert_outputs(stack: ExpertStack, expert: int, tokens: Tensor) -> Tensor:
    """What an expert makes of its tokens `(tokens, hidden)`, before it is multiplied, of that shape."""
    (name,) = stack.exits
    return nn.functional.linear(
        inner_activations(stack, expert, tokens),
        stack.matrix(name, expert),
        stack.bias(name, expert),
    )
