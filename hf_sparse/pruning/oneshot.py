"""prune_: make a model sparse in one shot."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from hf_sparse.arguments import check_finite, check_has_value, check_model
from hf_sparse.calibration.modes import switched
from hf_sparse.calibration.processes import own_batches
from hf_sparse.calibration.walk import Residence
from hf_sparse.calibration.windows import checked_batches, fingerprint
from hf_sparse.checkpoint.can_save import check_not_quantized
from hf_sparse.configuration_sparse import SparsityConfig, check_config
from hf_sparse.counts import SparsityReport, count_targets
from hf_sparse.provenance.record import record_
from hf_sparse.provenance.values import Calibration, Step
from hf_sparse.pruning.bit_counts import bits_notes
from hf_sparse.pruning.experts import check_experts, clear_biases_, notes_on_experts
from hf_sparse.pruning.grid_rounding import check_can_round, round_embeddings_
from hf_sparse.pruning.methods import Recipe
from hf_sparse.pruning.task import Task
from hf_sparse.pruning.uniform import check_uniform
from hf_sparse.structure.grids import with_kept_grid
from hf_sparse.structure.layers import (
    PRUNED_WITH,
    check_divides,
    left_out,
)
from hf_sparse.structure.promise import Held
from hf_sparse.structure.targets import Targets
from hf_sparse.structure.units import check_whole, clear_unused_, find_units
from hf_sparse.structure.weights import check_matrices
from hf_sparse.suggestions import shortened
from hf_sparse.upstream.torch import is_compiled


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
        config: pattern, sparsity and targets. With `head` or `column` and no targets whole heads or
            neurons go: the columns that they enter, and also the rows and biases that feed those. With
            `expert` whole experts of a mixture go.
            With `bits` what is kept is rounded to a grid, as `quantize_` does it: by `sparsegpt` while
            it prunes, else behind the method, with batches so that the layer's outputs change little.
        method: one of the table below.
        batches: calibration inputs of the model, dicts or `input_ids` `(batch, tokens)`: see
            `hf_sparse.calibration_batches`. Needed by every method but magnitude; of that, rounding
            alone looks at them.
        accelerator: an `accelerate.Accelerator`: blocks run on its device. Its processes must be
            given the same batches, and share them.
        **options: the method's own, and for every method how the sparsity is shared by the blocks,
            `allocation="uniform"` (or `"owl"`, `"alpha"`); what follows the choice of zeros,
            `refine=None` (or `"swaps"`, `"refit"`); passes over the data in which each block is
            trained with its zeros fixed, `reconstruct=0`; and whether tokens count more in a layer's
            error where the loss notices it more, `token_weights=None` (or `"loss"`: needs labels).

    | method | what goes, or what is done | its options and their defaults |
    |---|---|---|
    | `magnitude` | smallest weights | `scope="layer"` (or `"global"`) |
    | `wanda` | smallest weight x input norm | |
    | `taylor` | smallest effect on the loss; needs labels | `scope="layer"` (or `"global"`) |
    | `sparsegpt` | column by column, the others make up | `damping=0.01`, `block_size=128` |
    | `sparsellm` | that, feed-forward networks as a whole | those, `rounds=2`, `penalty=1.0`, \
`solver="sparsegpt"` (or `"alps"`) |
    | `alps` | ADMM on the layer's error | `damping=0.01`, `iterations=300`, `refit_steps=10` |
    | `prox_local` | N:M masks from each layer's error | `lam=0.0001`, `growth=1.15`, \
`iterations=60`, `damping=0.01` |
    | `proxsparse` | N:M masks learned from the loss | `lam=0.01`, `relative_lr=0.01`, \
`preserve=0.0`, `epochs=1`, `accumulate=2`, `gradient_checkpointing=False`, `state=None` |
    | `reap`, `frequency`, `magnitude` | of pattern `expert` alone: the experts that add least, that \
get the fewest tokens, of the smallest weights | `scope="layer"` (or `"global"`) |

    docs/pruning.md tells which to take when.

    Returns:
        Exact counts per tensor, with the method, its options and the time.

    Memory: beside the model, the hidden states of the calibration data (samples x window x
    hidden_size; twice that with `reconstruct`), one block's activations and Gram matrices, and what
    the method needs for the layers that share one input. For models larger than memory see
    `hf_sparse.prune_checkpoint`.

    Raises:
        ValueError: unknown method or option, targets that match nothing, a weight that the
            pattern cannot divide, weights that are no matrices of floats or that share memory without
            being tied, no calibration where it is needed, weights or activations that are not
            finite. All but the last are found before the model is changed.
    """
    return prune_kept(model, config, method, batches, accelerator, options)


@torch.no_grad()
def prune_kept(
    model: nn.Module,
    config: SparsityConfig,
    method: str,
    batches: Iterable[Mapping[str, Tensor] | Tensor] | None,
    accelerator: Any,
    options: Mapping[str, Any],
    residence: Residence | None = None,
) -> SparsityReport:
    """`prune_`, with a residence that may keep finished blocks and give them back."""
    _check_given(model, config, accelerator)
    targets = Targets.of(model, config)
    recipe = Recipe.of(method, targets.pattern, options)
    recipe.check_sharding(targets.layers, targets.pattern)
    _check_layers(model, targets)
    blocks = find_units(model) if targets.whole_units else []
    for units in blocks:  # refuse what could not be cleared below
        check_whole(units.layers)
    if targets.whole_units and options.get("scope") != "global":
        _check_units(targets)
    if whole_experts := targets.pattern.whole_matrices:
        check_experts(model, targets, recipe.all_options["scope"])
    check_uniform(model, targets, recipe)
    start = time.perf_counter()
    looks = recipe.needs_calibration or (config.bits and batches is not None)
    inputs = checked_batches(batches, model, method) if looks else []
    task = Task(
        model,
        targets,
        own_batches(inputs, accelerator),
        accelerator,
        residence=residence or Residence(None if accelerator is None else accelerator.device),
    )
    with switched(model, training=False, use_cache=False):
        recipe.prune(task)
    clear_unused_(blocks)  # what fed the heads or neurons that went goes too
    if whole_experts:
        clear_biases_(targets.layers)
    round_embeddings_(model, targets)
    held = Held.by(targets.config, targets.layers)
    vars(model)[PRUNED_WITH] = with_kept_grid(model, held.promise)
    data = Calibration.of(inputs, fingerprint(inputs)) if inputs else None
    record_(model, Step.of(method, recipe.all_options, config, data))
    return replace(
        count_targets(model, targets),
        method=method,
        options=recipe.all_options,
        seconds=time.perf_counter() - start,
        notes=(
            *task.notes.lines(),
            *notes_on(targets),
            *(notes_on_experts(targets) if whole_experts else held.notes()),
            *bits_notes(model, targets),
        ),
    )


def notes_on(targets: Targets) -> tuple[str, ...]:
    """What the default targets leave out of the blocks, for the report."""
    if targets.config.targets is not None or not (missed := left_out(targets.stacks)):
        return ()
    return (
        f"{missed:,} weights in the blocks are in stacks of no known kind (convolutions, experts that "
        "transformers does not run by its ExpertsInterface) and were not pruned.",
    )


def check_not_compiled(model: nn.Module) -> None:
    """Refuse a model that torch.compile wrapped."""
    if is_compiled(model):
        raise ValueError("the model is compiled by torch.compile. Prune it first, then compile it.")


def _check_given(model: Any, config: Any, accelerator: Any) -> None:
    """Refuse what is no model that can be pruned, no config, and no accelerator."""
    check_model(model, "prune_")
    if accelerator is not None and not hasattr(accelerator, "num_processes"):
        raise ValueError(
            f"accelerator is {shortened(accelerator)}; wanted an accelerate.Accelerator, or None."
        )
    check_config(config)
    check_not_compiled(model)
    check_not_quantized(model)


def _check_layers(model: nn.Module, targets: Targets) -> None:
    for layer in targets.layers:
        instead = " Or prune it from disk to disk: hf_sparse.prune_checkpoint."
        check_has_value(layer.weight_name, layer.parameter, "prune_", instead)
    check_matrices(targets.layers)
    for layer in targets.layers:
        check_finite(layer.weight_name, layer.weight)
        check_divides(targets.pattern, layer.weight_name, *layer.weight.shape)
    check_can_round(model, targets)


def _check_units(targets: Targets) -> None:
    """Refuse a sparsity that leaves a block no head, or no neuron."""
    config = targets.config
    for layer in targets.layers:
        count = config.pattern.num_units(*layer.weight.shape)
        if round(config.sparsity * count) >= count:
            raise ValueError(
                f"sparsity={config.sparsity} would take all {count} units of pattern "
                f"'{config.pattern}' from {layer.name}; at least one must stay. Wanted at most "
                f"{1 - 1 / count:.4g}."
            )
