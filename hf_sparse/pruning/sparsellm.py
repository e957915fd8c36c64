"""SparseLLM: the layers of a feed-forward network are pruned together, through auxiliary variables.

Source: Bai et al., "SparseLLM: Towards Global Pruning of Pre-trained Language Models",
https://arxiv.org/abs/2402.17946.

In a network `Y = W₂ act(W₁ X)` (gated: `W₂ (act(S X) * W₁ X)`) the pre-activations `z` (and `s`) and
the activations `p` become free variables, which penalties tie to the layers:

    |W₂ p - Y|² + g |p - act(z)|² + |z - W₁ X|²        gated: act(s) * z, and |s - S X|²

Round 0 prunes every layer by SparseGPT. Each further round updates `p`, then `z` and `s`, in closed
form or by Gauss-Newton steps; fits the layers to them by ridge regression; and prunes these fits.

Departures, all of which lower the network's error: its inputs are taken after attention has been
pruned; regressions are solved in fp32 from Gram matrices, towards the dense weights, with a damping
that is not accumulated; the last layer is fitted to the activations that the pruned layers before it
really give; after each round the true error of the network is measured, and the best round is kept.
So the result is never worse than that of round 0. What a round needs is computed again batch after
batch instead of being kept: memory does not grow with the tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from hf_sparse.calibration.input_statistics import Grams, Seen
from hf_sparse.calibration.linalg import FastProducts, add_gram_, cholesky, matmul, mirror_
from hf_sparse.calibration.processes import summed
from hf_sparse.calibration.walk import BlockStep
from hf_sparse.pruning import alps
from hf_sparse.pruning.feed_forward import Activation, FeedForward, Recorder, find_feed_forward
from hf_sparse.pruning.layerwise import LayerPruner
from hf_sparse.pruning.problem import Solver
from hf_sparse.structure.layers import TargetLayer

_NEWTON_STEPS = 2
_DAMPING = 0.01
_UNKNOWN = "has no feed-forward network of a known kind: its layers were pruned one by one."


def prune_block(
    pruner: LayerPruner,
    step: BlockStep,
    layers: Sequence[TargetLayer],
    *,
    rounds: int = 2,
    penalty: float = 1.0,
    solver: str = "sparsegpt",
) -> None:
    """Prune a block: attention layer by layer, then the feed-forward network as a whole.

    A block without a network of a known kind is pruned layer by layer, and the report says so.

    Args:
        pruner: with SparseGPT as its solver.
        step: the block.
        layers: of the block.
        rounds: after round 0.
        penalty: `g` above: how strictly activations follow from pre-activations, relative to the
            mean square of the rows of `W₂`.
        solver: prunes each layer: `"sparsegpt"` as published, or `"alps"`, which is slower and
            better.

    Memory: three copies of the network's weights, its inputs and outputs for all tokens (in the
    task's store), its Gram matrices, and the activations of one batch.
    """
    pruner = _SOLVED_BY[solver](pruner)
    network = find_feed_forward(step.block, layers) if step.repeats == 1 else None
    if network is None:
        pruner.task.notes.add([step.name], _UNKNOWN)
        pruner.prune(step.run, layers, stop=step.repeats == 1)
        return
    inside = {layer.name for layer in network.layers}
    pruner.prune(step.run, [layer for layer in layers if layer.name not in inside], stop=True)
    statistics = pruner.statistics()
    recorder = Recorder(network, statistics, pruner.task.store)
    with recorder.recording(), statistics.collecting(network.layers, stop=True):
        step.run(recorder)
    groups = statistics.groups()
    into = next((seen for seen in groups if seen.is_of(network.entries)), None)
    inner = next((seen for seen in groups if seen.is_of([network.down])), None)
    if into and inner and into.tokens and inner.tokens and recorder.fits:
        _Network(pruner, network, recorder.inputs, into, penalty).prune(inner, rounds)
    else:
        pruner.task.notes.add([step.name], _UNKNOWN)
        pruner.solve(groups)


def _by_alps(pruner: LayerPruner) -> LayerPruner:
    """The same pruner with ALPS as its solver; of SparseGPT's options `damping` is one of ALPS's."""
    options = {name: value for name, value in pruner.options.items() if name == "damping"}
    return replace(pruner, solver=Solver(alps.solve, Grams, updates=True), options=options)


# What prunes each layer, by the value of the option `solver`.
_SOLVED_BY: dict[str, Callable[[LayerPruner], LayerPruner]] = {
    "sparsegpt": lambda pruner: pruner,
    "alps": _by_alps,
}


@dataclass(frozen=True)
class _Weights:
    """The weights of a network, `(out_features, in_features)` each."""

    gate: Tensor | None
    up: Tensor
    down: Tensor


class _Network:
    """A feed-forward network that is being pruned."""

    def __init__(
        self,
        pruner: LayerPruner,
        network: FeedForward,
        inputs: Sequence[Callable[[], Tensor]],
        into: Seen,
        penalty: float,
    ) -> None:
        self._pruner, self._network, self._inputs, self._into = pruner, network, inputs, into
        self._accelerator = pruner.task.accelerator
        self._dense = self._weights()
        store = pruner.task.store
        with FastProducts():
            self._outputs = [
                store(matmul(network.inner(x()).float(), self._dense.down)) for x in inputs
            ]
        down = self._dense.down
        self._penalty = penalty * float(down.square().sum(dim=0).mean()) or penalty
        self._history: list[tuple[_Weights, Tensor]] = []
        self._factor = cholesky(into.statistic, _DAMPING)

    def prune(self, inner: Seen, rounds: int) -> None:
        """Round 0 and `rounds` more; the best one stays in the model."""
        self._pruner.solve([self._into, inner])
        best, lowest = self._weights(), self._error()
        improved = False
        self._history.append((best, self._pull(best.down)))
        for _ in range(rounds):
            self._fit_entries()
            self._pruner.solve([self._into])
            self._fit_down(inner.tokens)
            error, found = self._error(), self._weights()
            self._history.append((found, self._pull(found.down)))
            if error < lowest:
                best, lowest, improved = found, error, True
        for layer, weight in zip(self._network.layers, _listed(best), strict=True):
            layer.weight.copy_(weight)
        self._pruner.task.notes.add(
            [self._network.down.name],
            "and the layers before it were pruned as one network."
            if improved
            else "and the layers before it stay as round 0 left them: no other was better.",
        )

    def _weights(self) -> _Weights:
        gate, up, down = (
            None if layer is None else layer.weight.float().clone()
            for layer in (self._network.gate, self._network.up, self._network.down)
        )
        assert up is not None
        assert down is not None
        return _Weights(gate, up, down)

    def _batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Inputs and dense outputs without the bias, fp32."""
        for inputs, outputs in zip(self._inputs, self._outputs, strict=True):
            yield inputs().float(), outputs()

    def _error(self) -> float:
        """The squared error of the network's outputs over all tokens."""
        total = torch.zeros((), dtype=torch.float64, device=self._dense.up.device)
        down = self._network.down.weight.float()
        with FastProducts():
            for inputs, outputs in self._batches():
                inner = self._network.inner(inputs.to(self._network.up.weight.dtype)).float()
                total += (matmul(inner, down) - outputs).square().sum(dtype=torch.float64)
        return float(summed(total, self._accelerator))

    def _fit_entries(self) -> None:
        """Set the first layers to the ridge fits of the pre-activations that were updated last."""
        entries = self._network.entries
        products = [torch.zeros_like(layer.weight, dtype=torch.float64) for layer in entries]
        for inputs, outputs in self._batches():
            columns = inputs.T.contiguous()
            wanted = self._pre_activations(inputs, outputs)
            for layer, product, target in zip(entries, products, wanted, strict=True):
                bias = layer.bias
                target = target if bias is None else target - bias.float()
                product += matmul(target.T, columns)
        dense = [weight for weight in (self._dense.gate, self._dense.up) if weight is not None]
        for layer, product, given in zip(entries, products, dense, strict=True):
            product = summed(product, self._accelerator).float()
            layer.weight.copy_(_ridge(product, given, self._into.statistic, self._factor))

    def _fit_down(self, tokens: int) -> None:
        """Fit the last layer to the activations that are there now, and prune it."""
        down, dense = self._network.down, self._dense.down
        columns = dense.shape[1]
        gram = torch.zeros(columns, columns, dtype=torch.float64, device=dense.device)
        product = torch.zeros_like(dense, dtype=torch.float64)
        with FastProducts():
            for inputs, outputs in self._batches():
                inner = self._network.inner(inputs.to(down.weight.dtype)).float()
                add_gram_(gram, inner)
                product += matmul(outputs.T, inner.T)
        gram = mirror_(summed(gram, self._accelerator).float())
        product = summed(product, self._accelerator).float()
        down.weight.copy_(_ridge(product, dense, gram, cholesky(gram, _DAMPING)))
        self._pruner.solve([Seen((down,), gram, tokens)])

    def _pre_activations(self, inputs: Tensor, outputs: Tensor) -> list[Tensor]:
        """The auxiliary variables after as many updates as there were rounds, for one batch."""
        act, dense = self._network.activation, self._dense
        up_bias, gate_bias = (
            None if layer is None else layer.bias
            for layer in (self._network.up, self._network.gate)
        )

        def applied(weight: Tensor, bias: Tensor | None) -> Tensor:
            found = matmul(inputs, weight)
            return found if bias is None else found + bias.float()

        z = applied(dense.up, up_bias)
        s = None if dense.gate is None else applied(dense.gate, gate_bias)
        for weights, pull in self._history:
            z_layer = applied(weights.up, up_bias)
            inner = act(z) if s is None else act(s) * z
            lost = outputs - matmul(inner, weights.down)
            p = inner + matmul(lost, pull.T)
            if s is None or weights.gate is None:
                z = _fitted(act, z_layer, p)
                continue
            gated = act(s)
            z = (z_layer + gated * p) / (gated.square() + 1)
            s = _fitted(act, applied(weights.gate, gate_bias), p, factor=z, start=s)
        return [z] if s is None else [s, z]

    def _pull(self, down: Tensor) -> Tensor:
        """What turns the error of the outputs into the best change of the activations.

        `p` of least `|W₂ p - Y|² + g |p - a|²` is `a + W₂ᵀ (W₂ W₂ᵀ + g I)⁻¹ (Y - W₂ a)`; this is
        `(W₂ W₂ᵀ + g I)⁻¹ W₂`, `(hidden, intermediate)`.
        """
        gram = matmul(down, down)
        gram.diagonal().add_(self._penalty)
        return torch.cholesky_solve(down, torch.linalg.cholesky(gram))


def _ridge(product: Tensor, dense: Tensor, gram: Tensor, factor: tuple[Tensor, float]) -> Tensor:
    """Ridge regression: the weights of least squared error to targets, drawn to the dense weights.

    Args:
        product: `Tᵀ X` of targets `T` and inputs `X`, `(out_features, in_features)`.
        dense: the weights that the damping draws to, of that shape.
        gram: `Xᵀ X`.
        factor: of `gram`, and the damping that it has, from `cholesky`.
    """
    lower, damping = factor
    right = product + damping * gram.diagonal().mean() * dense
    return torch.cholesky_solve(right.T, lower).T


def _fitted(
    act: Activation,
    layer: Tensor,
    p: Tensor,
    *,
    factor: Tensor | None = None,
    start: Tensor | None = None,
) -> Tensor:
    """Minimise `(x - layer)² + (p - act(x) factor)²` for each element.

    ReLU without a factor exactly: the better of the minimisers on its two branches. Others by
    Gauss-Newton steps from `start`.
    """
    if factor is None and isinstance(act, nn.ReLU):
        active, idle = ((layer + p) / 2).clamp_min(0), layer.clamp_max(0)
        lost = [(x - layer).square() + (p - x.clamp_min(0)).square() for x in (active, idle)]
        return torch.where(lost[0] <= lost[1], active, idle)
    x = layer if start is None else start
    for _ in range(_NEWTON_STEPS):
        with torch.enable_grad():
            x = x.detach().requires_grad_(True)
            value = act(x)
            (slope,) = torch.autograd.grad(value.sum(), x)
        x, value = x.detach(), value.detach()
        if factor is not None:
            value, slope = value * factor, slope * factor
        x = x - (x - layer + (value - p) * slope) / (1 + slope.square())
    return x


def _listed(weights: _Weights) -> list[Tensor]:
    return [w for w in (weights.gate, weights.up, weights.down) if w is not None]
