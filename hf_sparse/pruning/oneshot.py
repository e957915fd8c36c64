"""prune_: make a model sparse in one shot."""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from hf_sparse.configuration_sparse import SparsityConfig
from hf_sparse.pruning import magnitude, wanda
from hf_sparse.pruning.walk import Batch
from hf_sparse.report import SparsityReport, measure_sparsity
from hf_sparse.structure import (
    PRUNED_WITH,
    TargetLayer,
    check_divides,
    check_finite,
    find_stacks,
    stacked_weights,
    target_layers,
    with_head_size,
)


@dataclass(frozen=True)
class Method:
    """A pruning method: what it does, and the function that does it."""

    summary: str
    prune: Callable[..., tuple[str, ...] | None]
    needs_calibration: bool

    def options(self) -> dict[str, Any]:
        """The method's own options and their defaults."""
        given = {"model", "stacks", "batches", "accelerator"}
        return {
            name: parameter.default
            for name, parameter in inspect.signature(self.prune).parameters.items()
            if parameter.kind is parameter.KEYWORD_ONLY and name not in given
        }


METHODS = {
    "magnitude": Method("smallest weights", magnitude.prune, needs_calibration=False),
    "wanda": Method("smallest |weight| x input norm", wanda.prune, needs_calibration=True),
}


@torch.no_grad()
def prune_(
    model: nn.Module,
    config: SparsityConfig,
    method: str = "wanda",
    batches: Iterable[Mapping[str, Tensor] | Tensor] | None = None,
    accelerator: Any = None,
    **options: Any,
) -> SparsityReport:
    """Make a model sparse in place.

    Args:
        model: any transformers model. Shared weights (ALBERT's layers) are pruned once; tied
            weights stay tied.
        config: pattern, sparsity and targets.
        method: a key of `hf_sparse.pruning.oneshot.METHODS`.
        batches: calibration inputs of the model, dicts or `input_ids` `(batch, tokens)`: see
            `hf_sparse.calibration_batches`. Needed by every method but magnitude.
        accelerator: an `accelerate.Accelerator`: blocks run on its device. Its processes must be
            given the same batches, and share them.
        **options: the method's own, such as `scope="global"` for magnitude.

    Returns:
        Exact counts per tensor, with the method, its options and the time.

    Memory: beside the model, the hidden states of the calibration data (samples x window x
    hidden_size), one block's activations, and the scores of one layer.

    Raises:
        ValueError: unknown method or option, targets that match nothing, a weight that the
            pattern cannot divide, no calibration where it is needed, weights or activations that
            are not finite. All but the last are found before the model is changed.
    """
    if method not in METHODS:
        raise ValueError(f"unknown method {method!r}. Known methods: {', '.join(METHODS)}.")
    chosen = METHODS[method]
    known = chosen.options()
    if unknown := sorted(set(options) - set(known)):
        raise ValueError(
            f"method '{method}' has no option {', '.join(unknown)}. "
            f"Its options: {', '.join(known) or 'none'}."
        )
    config = with_head_size(config, model)
    if any(getattr(module, "_compiled_call_impl", None) for module in model.modules()) or hasattr(
        model, "_orig_mod"
    ):
        raise ValueError("the model is compiled by torch.compile. Prune it first, then compile it.")
    layers = target_layers(model, config)
    _check_layers(layers, config)
    start = time.perf_counter()
    if chosen.needs_calibration:
        inputs = _check_batches(method, batches, model)
        _check_lengths(inputs, model)
        with _quiet(model):
            notes = chosen.prune(
                layers,
                config,
                model=model,
                stacks=find_stacks(model),
                batches=inputs,
                accelerator=accelerator,
                **options,
            )
    else:
        notes = chosen.prune(layers, config, **options)
    seconds = time.perf_counter() - start
    if config.targets is None and (missed := stacked_weights(model)):
        notes = (
            *(notes or ()),
            f"{missed:,} weights in the blocks are no matrices of their own (the experts of a mixture, "
            "convolutions) and were not pruned.",
        )
    vars(model)[PRUNED_WITH] = config
    return replace(
        measure_sparsity(model, config),
        method=method,
        options={**known, **options},
        seconds=seconds,
        notes=notes or (),
    )


def _check_layers(layers: list[TargetLayer], config: SparsityConfig) -> None:
    for layer in layers:
        if layer.parameter.device.type == "meta":
            raise ValueError(
                f"{layer.weight_name} is on the meta device, it has no values. Load the model "
                "without offloading it to disk."
            )
        check_finite(layer.weight_name, layer.weight)
        check_divides(config.pattern, layer.weight_name, *layer.weight.shape)


def _check_batches(
    method: str, batches: Iterable[Mapping[str, Tensor] | Tensor] | None, model: nn.Module
) -> list[Batch]:
    if isinstance(batches, Tensor | Mapping):
        raise ValueError(
            f"batches is one {type(batches).__name__}; wanted a list of them: batches=[batch]."
        )
    checked = [_check_batch(batch) for batch in batches or ()]
    if not checked:
        raise ValueError(
            f"method '{method}' needs calibration data and got none. Give batches=, for example "
            "from hf_sparse.calibration_batches(tokenizer, texts)."
        )
    device = next(model.parameters()).device
    return [
        {
            name: value.to(device) if isinstance(value, Tensor) else value
            for name, value in batch.items()
        }
        for batch in checked
    ]


def _check_lengths(batches: list[Batch], model: nn.Module) -> None:
    """Refuse sequences that are longer than the model's learned positions."""
    length = max((b["input_ids"].shape[-1] for b in batches if "input_ids" in b), default=0)
    for name, module in model.named_modules():
        learned = name.endswith(("position_embeddings", "embed_positions", "wpe"))
        if not learned or not isinstance(module, nn.Embedding):
            continue
        known = getattr(getattr(model, "config", None), "max_position_embeddings", None)
        limit = min(module.num_embeddings, known or module.num_embeddings)
        if length > limit:
            raise ValueError(
                f"a batch has sequences of {length} tokens, but {type(model).__name__} has learned "
                f"{limit} positions. Take a smaller window."
            )


def _check_batch(batch: Any) -> dict[str, Any]:
    """One batch as a dict of inputs, without a cache: blocks are called more than once."""
    inputs = {"input_ids": batch} if isinstance(batch, Tensor) else batch
    values = list(inputs.values()) if isinstance(inputs, Mapping) else []
    dimensions = [value.ndim for value in values if isinstance(value, Tensor)]
    if max(dimensions, default=0) < 2 or getattr(inputs.get("input_ids"), "ndim", 2) < 2:
        raise ValueError(
            f"a batch is {type(batch).__name__} {str(batch)[:60]!r}; wanted a dict of tensors, or "
            "input_ids of shape (batch, tokens)."
        )
    if inputs.get("past_key_values") is not None:
        raise ValueError("a batch has past_key_values; wanted whole sequences without a cache.")
    return {name: value for name, value in inputs.items() if name != "use_cache"}


@contextmanager
def _quiet(model: nn.Module) -> Iterator[None]:
    """The model in eval mode and without a key-value cache, for a while."""
    training = [module for module in model.modules() if module.training]
    configs: list[Any] = [getattr(module, "config", None) for module in model.modules()]
    caching = [config for config in configs if getattr(config, "use_cache", False)]
    model.eval()
    for described in caching:
        described.use_cache = False
    try:
        yield
    finally:
        for described in caching:
            described.use_cache = True
        for module in training:
            module.training = True
