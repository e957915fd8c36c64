"""How much each token's output error matters to the model's loss: weights for the sums over tokens.

A layer's solver minimises `sum_t |(W - W') x_t|²`. To second order, with the outer product of gradients
in the place of the Hessian, the loss changes by

    sum_t (g_t · (W - W') x_t)²,    g_t = dL/dy_t, the gradient of the loss in the layer's outputs

and with `|g_t|²` in the place of `g_t g_tᵀ` (the mean over directions) that is a sum over tokens of
weighted errors, `sum_t s_t |(W - W') x_t|²`: the Gram matrix becomes `Xᵀ diag(s) X`. A weight for each
row of a layer would change nothing, since each row has its own least error.

The idea of joining the layer's error and the loss is that of MOONSHOT, https://arxiv.org/abs/2604.13287,
which solves for both; here the two are mixed in the weights, whose mean is 1:

    s_t = (1 - share) + share * |g_t|² / mean_t |g_t|²
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from hf_sparse.calibration.attending import fast_attention
from hf_sparse.calibration.losses import loss_of
from hf_sparse.calibration.modes import switched
from hf_sparse.calibration.processes import summed
from hf_sparse.calibration.progress import steps
from hf_sparse.calibration.recording import Batch, TokenMasks, token_masks
from hf_sparse.structure.layers import TargetLayer

SHARE = 0.5
# What is known of one forward pass: names of layers that were given the same tensor, and their outputs.
_Given = dict[int, tuple[object, list[tuple[str, Tensor]]]]


def token_weights(
    model: nn.Module,
    layers: Sequence[TargetLayer],
    batches: Sequence[Batch],
    accelerator: Any = None,
    share: float = SHARE,
) -> dict[str, Tensor]:
    """The weight of each token in the errors of each layer, by one backward pass over the batches.

    Args:
        model: in eval mode, as it is before anything of it is pruned.
        layers: Linear or Conv1D modules.
        batches: with labels, or of a causal model.
        accelerator: its processes have other batches each, and one mean.
        share: of the gradients in the weights, from 0 to 1.

    Returns:
        For each layer's name the weights of its inputs that count, in the order in which they come,
        `(tokens,)`, fp32. Layers that are given the same tensor have the same weights, the
        mean of theirs.

    Memory: the activations of one batch, and the gradients of the layers' outputs; four bytes for each
    layer and token.

    Raises:
        ValueError: the loss is not finite.
    """
    found: dict[str, list[Tensor]] = {layer.name: [] for layer in layers}
    with switched(model, trained=[]), fast_attention(model, batches):
        for batch in steps(batches, "Measuring gradients"):
            for name, values in _of_batch(model, layers, batch).items():
                found[name].append(values)
    weights = {}
    for name, parts in found.items():
        squares = torch.cat(parts) if parts else torch.zeros(0)
        total = summed(squares.double().sum(), accelerator)
        count = summed(torch.tensor(float(len(squares)), dtype=torch.float64), accelerator)
        mean = (total / count.clamp_min(1)).clamp_min(torch.finfo(torch.float64).tiny)
        weights[name] = (1 - share) + share * (squares / mean).float()
    return weights


def _of_batch(model: nn.Module, layers: Sequence[TargetLayer], batch: Batch) -> dict[str, Tensor]:
    """The mean squares of the gradients of each layer's outputs, `(tokens,)` of those that count."""
    with _outputs(layers) as given:
        loss = loss_of(model, batch)
    outputs = [output for _, seen in given.values() for _, output in seen]
    grads = iter(torch.autograd.grad(loss, outputs, allow_unused=True))
    masks, found = token_masks(batch), {}
    with torch.no_grad():
        for _, seen in given.values():
            squares = [_squares(next(grads), output, masks) for _, output in seen]
            mean = torch.stack([one / one.mean().clamp_min(1e-38) for one in squares]).mean(dim=0)
            mean *= squares[0].mean()  # of one scale over the batches
            found.update({name: mean for name, _ in seen})
    return found


def _squares(grad: Tensor | None, output: Tensor, masks: TokenMasks) -> Tensor:
    """The mean square of a gradient over the features, of each token that counts, fp64."""
    grad = torch.zeros_like(output) if grad is None else grad
    return masks.counted(grad).double().square().mean(dim=-1)


@contextmanager
def _outputs(layers: Sequence[TargetLayer]) -> Iterator[_Given]:
    """The outputs of layers in a forward pass, with gradients; those with the same input together."""
    given: _Given = {}

    def hook(name: str) -> Callable[..., None]:
        def keep(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
            if not output.requires_grad:  # before any other layer, and no weight is trained
                output.requires_grad_()
            given.setdefault(id(args[0]), (args[0], []))[1].append((name, output))

        return keep

    handles = [layer.module.register_forward_hook(hook(layer.name)) for layer in layers]
    try:
        yield given
    finally:
        for handle in handles:
            handle.remove()


class WeightedTokens:
    """Hands out the weights of tokens in the order in which a layer's inputs come.

    Args:
        weights: of `token_weights`.
    """

    def __init__(self, weights: Mapping[str, Tensor]) -> None:
        self._weights = weights
        self._next: dict[str, int] = {}

    def restart(self) -> None:
        """The data come from the start again."""
        self._next = {}

    def weighted(self, name: str, inputs: Tensor) -> Tensor:
        """Inputs `(tokens, in_features)` times the roots of their tokens' weights.

        Raises:
            ValueError: there are more inputs than weights: a layer is called more often than it was.
        """
        if name not in self._weights:
            return inputs
        first = self._next.get(name, 0)
        self._next[name] = first + len(inputs)
        chosen = self._weights[name][first : first + len(inputs)]
        if len(chosen) != len(inputs):
            raise ValueError(
                f"{name} is given other tokens in its block than in the whole model. Leave "
                "token_weights out."
            )
        return inputs * chosen.sqrt().to(inputs)[:, None]
