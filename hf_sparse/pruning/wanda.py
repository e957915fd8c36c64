"""Wanda: weights that are small on small inputs go.

Source: Sun et al., "A Simple and Effective Pruning Approach for Large Language Models",
https://arxiv.org/abs/2306.11695.

    score_ij = |W_ij| * ||X_j||_2

compared within each output row (each group of N:M, each row of blocks); no weight is updated.
Departures: the norms are summed in fp64 over all tokens, and tokens that the attention mask leaves
out do not count; whole groups are scored by their sum of squared scores.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from hf_sparse.configuration_sparse import SparsityConfig
from hf_sparse.patterns import Pattern
from hf_sparse.pruning.walk import Batch, Run, TokenMasks, token_masks, walk
from hf_sparse.structure import Stack, TargetLayer


def wanda_mask(weight: Tensor, norms: Tensor, pattern: Pattern, sparsity: float) -> Tensor:
    """The weights to keep.

    Args:
        weight: `(out_features, in_features)`.
        norms: L2 norm of each input feature over the calibration tokens, `(in_features,)`.
        pattern: the pattern.
        sparsity: fraction of zeros.

    Returns:
        Boolean mask of the weight's shape.
    """
    return pattern.keep(weight.abs().float() * norms.float(), sparsity, per_row=True)


def prune(
    layers: Sequence[TargetLayer],
    config: SparsityConfig,
    *,
    model: nn.Module,
    stacks: Sequence[Stack],
    batches: Sequence[Batch],
    accelerator: Any = None,
) -> tuple[str, ...]:
    """Zero the weights of lowest score, block after block.

    Args:
        layers: what to prune; layers outside the blocks come last.
        config: pattern and sparsity.
        model: the model that the layers belong to.
        stacks: its repeated blocks.
        batches: calibration inputs.
        accelerator: blocks run on its device; its processes share the batches and add up their
            norms.

    Returns:
        Notes for the report.

    Memory: see `walk`, and the scores of one layer.

    Raises:
        ValueError: a layer's inputs are not finite (the message names it), or it has no inputs
            that count, as an embedding.
    """
    device = None if accelerator is None else accelerator.device
    if accelerator is not None and accelerator.num_processes > 1:
        if len(batches) < accelerator.num_processes:
            raise ValueError(
                f"{len(batches)} batches cannot be shared by {accelerator.num_processes} processes; "
                "give at least one for each."
            )
        batches = batches[accelerator.process_index :: accelerator.num_processes]
    norms = InputNorms(accelerator)
    inside = {
        id(module) for stack in stacks for block in stack.blocks for module in block.modules()
    }
    outside = [layer for layer in layers if id(layer.module) not in inside]
    if embeddings := [layer.name for layer in outside if isinstance(layer.module, nn.Embedding)]:
        raise ValueError(
            f"{embeddings[0]} is an embedding: it has no input activations to score by. Leave it "
            "out, or use method='magnitude'."
        )
    notes: list[str] = []

    def prune_block(block: nn.Module, run: Run) -> None:
        modules = {id(module) for module in block.modules()}
        notes.extend(
            _prune_on(
                run, [layer for layer in layers if id(layer.module) in modules], norms, config
            )
        )

    walk(model, stacks, batches, prune_block, norms.on_batch, device)
    if outside:
        notes.extend(_prune_on(partial(_run_model, model, batches, norms), outside, norms, config))
    return tuple(notes)


def _prune_on(
    run: Run, layers: Sequence[TargetLayer], norms: InputNorms, config: SparsityConfig
) -> Iterator[str]:
    with norms.collecting(layers):
        run()
    for layer in layers:
        norm = norms.of(layer)
        if norm is None:
            yield f"{layer.name} saw no calibration token and was pruned by magnitude."
            norm = torch.ones(layer.weight.shape[1], device=layer.weight.device)
        mask = wanda_mask(layer.weight, norm, config.pattern, config.sparsity)
        layer.weight.masked_fill_(~mask, 0.0)


def _run_model(model: nn.Module, batches: Sequence[Batch], norms: InputNorms) -> None:
    for batch in batches:
        norms.on_batch(token_masks(batch))
        model(**batch)


class InputNorms:
    """Sums the squared inputs of layers while data runs through them."""

    def __init__(self, accelerator: Any = None) -> None:
        self._accelerator = accelerator
        self._sums: dict[str, Tensor] = {}
        self._tokens: dict[str, int] = {}
        self._masks = TokenMasks()

    def on_batch(self, masks: TokenMasks) -> None:
        """Which tokens of the next inputs count."""
        self._masks = masks

    @contextmanager
    def collecting(self, layers: Sequence[TargetLayer]) -> Iterator[None]:
        """Collect the inputs of `layers`, and of no others, while the block runs."""
        self._sums = {
            layer.name: torch.zeros(
                layer.weight.shape[1], dtype=torch.float64, device=layer.weight.device
            )
            for layer in layers
        }
        self._tokens = dict.fromkeys(self._sums, 0)
        hooks = [
            layer.module.register_forward_pre_hook(partial(self._add, layer.name))
            for layer in layers
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def of(self, layer: TargetLayer) -> Tensor | None:
        """L2 norm of each input feature `(in_features,)`; None if no token reached the layer.

        Raises:
            ValueError: the inputs were not finite.
        """
        sums = self._sums.pop(layer.name)
        tokens = torch.tensor(self._tokens.pop(layer.name), device=sums.device)
        if self._accelerator is not None and self._accelerator.num_processes > 1:
            sums = self._accelerator.reduce(sums)
            tokens = self._accelerator.reduce(tokens)
        if tokens == 0:
            return None
        if not torch.isfinite(sums).all():
            raise ValueError(
                f"the inputs of {layer.name} are not finite on the calibration data. Load the model "
                "in float32 or bfloat16, and check the data."
            )
        return sums.sqrt()

    def _add(self, name: str, module: nn.Module, args: tuple[Tensor, ...]) -> None:
        inputs, mask = args[0].detach(), self._masks.of(args[0])
        inputs = inputs.reshape(-1, inputs.shape[-1])
        if mask is not None:
            inputs = inputs[mask.to(inputs.device)]
        self._sums[name] += torch.linalg.vector_norm(inputs.float(), dim=0).double().square()
        self._tokens[name] += inputs.shape[0]
