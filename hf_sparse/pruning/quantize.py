"""quantize_: round the weights of a dense or sparse model to a grid of few bits."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from hf_sparse.arguments import check_has_values, check_kinds, check_model
from hf_sparse.calibration.modes import switched
from hf_sparse.calibration.windows import checked_batches, fingerprint
from hf_sparse.checkpoint.can_save import check_not_quantized
from hf_sparse.configuration_sparse import SparsityConfig, check_config
from hf_sparse.counts import format_table
from hf_sparse.patterns import Pattern
from hf_sparse.provenance.record import record_
from hf_sparse.provenance.values import Calibration, Step
from hf_sparse.pruning import layerwise
from hf_sparse.pruning.bit_counts import TensorBits, mean_bits, tensors_of
from hf_sparse.pruning.few_bits import round_nearest_
from hf_sparse.pruning.grid_rounding import check_can_round, round_embeddings_
from hf_sparse.pruning.oneshot import check_not_compiled
from hf_sparse.pruning.problem import Notes
from hf_sparse.pruning.task import Task
from hf_sparse.structure.grids import is_on_grid
from hf_sparse.structure.layers import PRUNED_WITH, TargetLayer, promised_config
from hf_sparse.structure.promise import Held
from hf_sparse.structure.targets import Targets
from hf_sparse.suggestions import check_name

ROUNDINGS = {
    "nearest": "nearest codes; scales searched for the least error",
    "gptq": "codes and scales of least output error on calibration data",
}


@dataclass(frozen=True)
class QuantizationReport:
    """What `quantize_` did: the error and the bits of each weight.

    Attributes:
        tensors: one entry for each weight; shared and tied ones count once.
        method: of rounding.
        options: the grid's.
        seconds: that it took.
        notes: what the reader should know.
    """

    tensors: tuple[TensorBits, ...]
    method: str
    options: dict[str, Any] = field(default_factory=dict)
    seconds: float = 0.0
    notes: tuple[str, ...] = ()

    @property
    def bits(self) -> float:
        """Bits a weight of all tensors together."""
        return mean_bits(self.tensors)

    @property
    def error(self) -> float:
        """The mean error of the tensors."""
        return sum(one.error for one in self.tensors) / max(len(self.tensors), 1)

    def to_dict(self) -> dict[str, Any]:
        """All entries and the means as plain values."""
        return {**asdict(self), "bits": self.bits, "error": self.error}

    def to_json(self) -> str:
        """`to_dict` as JSON text."""
        return json.dumps(self.to_dict(), indent=2)

    def summary(self) -> str:
        """The means in a few lines."""
        grids = " and ".join(dict.fromkeys(one.grid for one in self.tensors))
        return "\n".join(
            [
                f"{len(self.tensors)} tensors on {grids}: {self.bits:.3f} bits a weight, mean "
                f"relative error {self.error:.2e}",
                f"{self.method}: {self.seconds:.1f} s",
                *self.notes,
            ]
        )

    def table(self) -> str:
        """A row for each tensor, and the means."""
        rows = [
            (
                one.name,
                f"{one.shape[0]} x {one.shape[1]}",
                one.grid,
                f"{one.error:.2e}",
                f"{one.bits:.3f}",
            )
            for one in self.tensors
        ]
        head = ("tensor", "out x in", "grid", "error", "bits a weight")
        return f"{format_table(head, rows)}\n{self.summary()}"

    def __str__(self) -> str:
        return self.table()

    def __repr__(self) -> str:
        return (
            f"<QuantizationReport: {self.method}, {len(self.tensors)} tensors, {self.bits:.3f} bits a "
            f"weight, mean error {self.error:.2e}; print it>"
        )


@torch.no_grad()
def quantize_(
    model: nn.Module,
    config: SparsityConfig | None = None,
    *,
    bits: int | None = None,
    group_size: int | None = None,
    symmetric: bool = True,
    embedding_bits: int | None = None,
    batches: Iterable[Mapping[str, Tensor] | Tensor] | None = None,
    method: str | None = None,
) -> QuantizationReport:
    """Round the weights of a dense or sparse model to a grid of few bits, in place; zeros stay zeros.

    The model stays a plain model of its type: its weights hold `scale * code`. To prune and quantise
    together give `prune_` a config with bits, which is better than one after the other.

    Args:
        model: any transformers model. Shared weights (ALBERT's layers) are rounded once; tied weights
            stay tied.
        config: the grid, the zeros that the model has, and its targets. None: what the model was
            pruned or loaded with, or every Linear and Conv1D in the blocks, with the four below.
        bits: 8 or 4, of the targets. None: they stay as they are.
        group_size: consecutive inputs of a row that share a scale: 128, 64 or 32; None: the whole row.
        symmetric: codes lie around zero; False: each group has a zero point.
        embedding_bits: 8 or 4, of the input embeddings and the output head. None: they stay.
        batches: calibration inputs of the model: see `hf_sparse.calibration_batches`.
        method: `"nearest"`: each weight becomes the nearest value, and scales are searched for the
            least error, with batches weighted by the mean squares of the inputs. `"gptq"`: block after
            block, codes and scales of the least error of each layer's outputs; needs batches. None:
            `"gptq"` with batches, `"nearest"` without. Embeddings are rounded by `"nearest"`.

    Weights that lie on the grid already stay as they are, so that a second call changes nothing.

    Returns:
        The error and the bits of each weight.

    Memory: `"nearest"` without batches: some copies of the largest weight. Else as `prune_`.

    Raises:
        ValueError: no bits, or another value outside what is allowed; groups that do not divide a
            weight's inputs; zeros that `config` asks for and the model lacks; weights on another grid;
            weights without values, of quantized models, cut into shards, or not finite. All of it is
            found before the model is changed.
    """
    check_model(model, "quantize_")
    check_kinds(quantize_, locals())
    check_not_compiled(model)
    check_not_quantized(model)
    check_has_values(model, "quantize_")
    grid = {"bits": bits, "group_size": group_size, "symmetric": symmetric}
    targets = _targets(model, config, {**grid, "embedding_bits": embedding_bits})
    method = _checked_method(method, batches is not None)
    layers = check_can_round(model, targets)
    inputs = checked_batches(batches, model, method) if batches is not None else []
    start = time.perf_counter()
    notes = round_(model, targets, inputs, method)
    vars(model)[PRUNED_WITH] = targets.config
    data = Calibration.of(inputs, fingerprint(inputs)) if inputs else None
    record_(model, Step.of("quantize", {"rounding": method}, targets.config, data))
    return QuantizationReport(
        tensors_of(layers, targets, notes),
        method,
        targets.config.grid_values(),
        time.perf_counter() - start,
        (*notes.lines(), *_left_out(model, targets)),
    )


def _left_out(model: nn.Module, targets: Targets) -> tuple[str, ...]:
    """What a report tells of the layers that `ignore` keeps out of the grid."""
    config = targets.config
    if config.grid is None or not config.ignore:
        return ()
    own = {layer.name for layer in targets.layers}
    whole = Targets.of(model, replace(config, ignore=())).layers
    left = [layer.name for layer in whole if layer.name not in own]
    if not left:
        return ()
    more = f" and {len(left) - 3} more" if len(left) > 3 else ""
    return (f"{len(left)} layers stay as they are, by ignore: {', '.join(left[:3])}{more}.",)


@torch.no_grad()
def round_(
    model: nn.Module, targets: Targets, inputs: Sequence[dict[str, Any]], method: str
) -> Notes:
    """Round a model that was checked; what is on its grid stays as it is.

    Args:
        model: any model.
        targets: of the config that tells the grids.
        inputs: batches; none: to the nearest codes.
        method: a key of `ROUNDINGS`.

    Returns:
        The errors of the layers, and remarks.
    """
    task = Task(model, _pending(targets), inputs)
    task.sparsities = {layer.name: 0.0 for layer in task.layers}
    if inputs and task.layers:
        _check_inputs(task.layers)
        pruner = layerwise.rounder(task, feedback=method == "gptq")
        with switched(model, training=False, use_cache=False):
            layerwise.prune(pruner)
    elif targets.config.grid is not None:
        round_nearest_([(layer, targets.config.grid) for layer in task.layers], task.notes)
    round_embeddings_(model, targets, task.notes)
    return task.notes


def _targets(
    model: nn.Module,
    config: SparsityConfig | None,
    grid: Mapping[str, Any],
) -> Targets:
    """What is to be rounded, with the zeros that the model has.

    Raises:
        ValueError: no bits; bits that are told twice; or zeros that are not there.
    """
    given = {name: value for name, value in grid.items() if value not in (None, True)}
    if config is not None:
        check_config(config)
        if given:
            raise ValueError(
                f"{', '.join(given)} and a config are given, which tells the grid itself. Write them "
                "into the config: dataclasses.replace(config, bits=4)."
            )
    elif not given.get("bits") and not given.get("embedding_bits"):
        SparsityConfig("2:4", **grid)  # tells what else is wrong
        raise ValueError(
            "no bits are given; wanted bits=8 or bits=4, or embedding_bits, or a config with them."
        )
    before = promised_config(model)
    asked = config if config is not None else _with_grid(_zeros_of(model, before), before, grid)
    if asked.bits is None and asked.embedding_bits is None:
        raise ValueError(
            f"{asked!r} tells no bits; wanted bits=8 or bits=4, or embedding_bits, beside it."
        )
    targets = Targets.of(model, asked)
    _check_zeros(targets)
    return targets


def _with_grid(
    zeros: SparsityConfig, before: SparsityConfig | None, grid: Mapping[str, Any]
) -> SparsityConfig:
    """The zeros of a model with a grid; bits that it has already stay where none are given."""
    if before is None or (before.bits is None and before.embedding_bits is None):
        return replace(zeros, **grid)
    kept = {
        name: getattr(before, name)
        for name in ("bits", "embedding_bits")
        if grid[name] is None and getattr(before, name) is not None
    }
    groups = ("group_size", "symmetric")
    if kept and all(grid[name] in (None, True) for name in groups):
        kept |= {name: getattr(before, name) for name in groups}
    return replace(zeros, **{**grid, **kept})


def _zeros_of(model: nn.Module, before: SparsityConfig | None) -> SparsityConfig:
    """The zeros that a model was promised, or those that are counted in its blocks."""
    if before is not None:
        return before
    whole = SparsityConfig(Pattern.parse("unstructured"), 0.0)
    return Held.by(whole, Targets.of(model, whole).layers).promise


def _check_zeros(targets: Targets) -> None:
    """Refuse a config that asks for zeros that are not there."""
    config = targets.config
    broken = sum(config.pattern.violations(layer.weight) for layer in targets.layers)
    fixed = config.pattern.implied_sparsity is not None
    held = Held.by(config, targets.layers)
    if (fixed and broken) or held.lacks:
        found = f"{broken:,} groups have more nonzeros" if fixed else f"{held.share:.4f} are there"
        raise ValueError(
            f"the config asks for zeros of pattern '{config.pattern}' at sparsity "
            f"{config.sparsity:.4g}, but {found}. quantize_ makes no zeros: prune the model to it, "
            "prune_(model, config, method, batches)."
        )


def _checked_method(method: str | None, has_batches: bool) -> str:
    if method is None:
        return "gptq" if has_batches else "nearest"
    check_name(method, ROUNDINGS, "method", "methods")
    if method == "gptq" and not has_batches:
        raise ValueError(
            "method 'gptq' needs batches: inputs of the model, as hf_sparse.calibration_batches gives "
            "them. Without any take method='nearest'."
        )
    return method


def _pending(targets: Targets) -> Targets:
    """The targets that are still to be rounded; none without bits."""
    grid = targets.config.grid
    if grid is None:
        return replace(targets, layers=())
    left = tuple(layer for layer in targets.layers if not is_on_grid(layer, grid))
    return replace(targets, layers=left)


def _check_inputs(layers: Sequence[TargetLayer]) -> None:
    """Refuse embeddings, which have no input activations."""
    if embeddings := [layer.name for layer in layers if isinstance(layer.module, nn.Embedding)]:
        raise ValueError(
            f"{embeddings[0]} is an embedding: it has no input activations to round by. Leave it out "
            "of the targets, and give embedding_bits; or give no batches."
        )
