"""SparsityReport: how sparse a model is, counted exactly, and how it became so."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from hf_sparse.arguments import check_has_values, check_model
from hf_sparse.configuration_sparse import SparsityConfig
from hf_sparse.patterns import Pattern
from hf_sparse.structure.layers import by_identity, num_parameters, promised_config
from hf_sparse.structure.targets import Targets

# The kinds of tensors that a printed report tells one by one.
_MOST_ROWS = 20


@dataclass(frozen=True)
class StepReport(ABC):
    """What a call that changes a model tells of it. `print` shows its table."""

    @abstractmethod
    def summary(self) -> str:
        """The totals in a few lines."""

    @abstractmethod
    def table(self) -> str:
        """The parts of the model in rows, and the totals."""

    def to_json(self) -> str:
        """All of it as JSON text."""
        return json.dumps(asdict(self), indent=2)

    def __repr__(self) -> str:
        return f"<{type(self).__name__}: {' '.join(self.summary().splitlines()[:2])}>"

    def __str__(self) -> str:
        return self.table()


@dataclass(frozen=True)
class TensorSparsity:
    """Exact counts of one weight `(out_features, in_features)`.

    Attributes:
        violations: groups that break what an N:M pattern promises of each of them: they have more
            than N nonzeros. Other patterns promise nothing of a single group.
        partial: groups (blocks, rows, columns, heads) of which some weights are zero and some are not.
            They keep the pattern: an earlier pruning, or chance, made those zeros. But as groups
            they cannot be removed.
    """

    name: str
    shape: tuple[int, int]
    zeros: int
    violations: int
    partial: int = 0

    @property
    def numel(self) -> int:
        """Weights in the tensor."""
        return self.shape[0] * self.shape[1]

    @property
    def sparsity(self) -> float:
        """Fraction of zeros."""
        return self.zeros / self.numel if self.numel else 0.0


@dataclass(frozen=True)
class SparsityReport:
    """The sparsity of the target tensors and of the whole model.

    `print` shows a row for each kind of tensor, `table()` one for each tensor.

    Attributes:
        tensors: one entry per target weight; shared weights count once.
        pattern: the notation that `violations` were counted against.
        parameters: weights in the whole model, targets and the rest, shared ones once.
        method: how the zeros were made; None for a report that only measures.
        options: the values of the method's own options.
        seconds: time that pruning took; None for a report that only measures.
        notes: what the method wants the reader to know.
        other_zeros: zeros in the weights that are no targets.
    """

    tensors: tuple[TensorSparsity, ...]
    pattern: str
    parameters: int
    method: str | None = None
    options: dict[str, Any] = field(default_factory=dict)
    seconds: float | None = None
    notes: tuple[str, ...] = ()
    other_zeros: int = 0

    @property
    def zeros(self) -> int:
        """Zeros in the targets."""
        return sum(tensor.zeros for tensor in self.tensors)

    @property
    def numel(self) -> int:
        """Weights in the targets."""
        return sum(tensor.numel for tensor in self.tensors)

    @property
    def violations(self) -> int:
        """Groups that break the promise of an N:M pattern, in all targets."""
        return sum(tensor.violations for tensor in self.tensors)

    @property
    def partial(self) -> int:
        """Groups that are zero in part, in all targets (see `TensorSparsity`)."""
        return sum(tensor.partial for tensor in self.tensors)

    @property
    def sparsity(self) -> float:
        """Fraction of zeros in the targets."""
        return self.zeros / self.numel if self.numel else 0.0

    @property
    def model_zeros(self) -> int:
        """Zeros in the whole model."""
        return self.zeros + self.other_zeros

    @property
    def model_sparsity(self) -> float:
        """Fraction of zeros in the whole model."""
        return self.model_zeros / self.parameters if self.parameters else 0.0

    def has_lost_zeros(self, promised: float) -> bool:
        """Whether the sparsity is below a promised one by more than a few zeros."""
        return self.sparsity < promised - 0.005

    def to_dict(self) -> dict[str, Any]:
        """All counts and totals as plain values."""
        totals = {
            "zeros": self.zeros,
            "numel": self.numel,
            "sparsity": self.sparsity,
            "violations": self.violations,
            "partial": self.partial,
            "model_zeros": self.model_zeros,
            "model_sparsity": self.model_sparsity,
        }
        return {**asdict(self), **totals}

    def to_json(self) -> str:
        """`to_dict` as JSON text."""
        return json.dumps(self.to_dict(), indent=2)

    def summary(self) -> str:
        """The totals in a few lines, without the table of tensors."""
        partial = f", {self.partial:,} groups zero in part" if self.partial else ""
        lines = [
            f"{len(self.tensors)} tensors, pattern {self.pattern}: {self.zeros:,} zeros in "
            f"{self.numel:,} weights ({self.sparsity:.4f}), {self.violations:,} violations"
            f"{partial}",
            f"whole model: {self.model_zeros:,} zeros in {self.parameters:,} weights "
            f"({self.model_sparsity:.4f})",
        ]
        if self.method is not None:
            options = "".join(f", {name}={value!r}" for name, value in self.options.items())
            seconds = "" if self.seconds is None else f": {self.seconds:.1f} s"
            lines.append(f"{self.method}{options}{seconds}")
        return "\n".join([*lines, *self.notes])

    def table(self) -> str:
        """A row for each tensor, and the totals."""
        rows = [
            (
                tensor.name,
                f"{tensor.shape[0]} x {tensor.shape[1]}",
                f"{tensor.zeros:,}",
                f"{tensor.sparsity:.4f}",
                f"{tensor.violations:,}",
            )
            for tensor in self.tensors
        ]
        head = ("tensor", "out x in", "zeros", "sparsity", "violations")
        return f"{format_table(head, rows)}\n{self.summary()}"

    def __str__(self) -> str:
        """A row for each kind of tensor, those of one name in all blocks, and the totals."""
        kinds: dict[str, list[TensorSparsity]] = {}
        for tensor in self.tensors:
            kinds.setdefault(_kind(tensor.name), []).append(tensor)
        rows = [
            (
                name,
                f"{len(tensors)}",
                f"{sum(tensor.zeros for tensor in tensors):,}",
                f"{min(tensor.sparsity for tensor in tensors):.4f}",
                f"{max(tensor.sparsity for tensor in tensors):.4f}",
                f"{sum(tensor.violations for tensor in tensors):,}",
            )
            for name, tensors in kinds.items()
        ]
        if len(rows) > _MOST_ROWS:
            rows[_MOST_ROWS:] = [(f"and {len(rows) - _MOST_ROWS} more", "", "", "", "", "")]
        head = ("tensors", "number", "zeros", "least sparsity", "most", "violations")
        return f"{format_table(head, rows)}\n{self.summary()}"

    def __repr__(self) -> str:
        made = "measured" if self.method is None else self.method
        return (
            f"<SparsityReport: {made}, pattern {self.pattern}, sparsity {self.sparsity:.4f} in "
            f"{len(self.tensors)} tensors, {self.model_sparsity:.4f} in the whole model; print it, or "
            "see .table()>"
        )


def measure_sparsity(model: nn.Module, config: SparsityConfig | None = None) -> SparsityReport:
    """Count the zeros of a model, exactly.

    Args:
        model: any model; its weights are only read, one at a time. Under FSDP2 all processes must
            call this.
        config: which layers to count, and the pattern to check them against. None: every Linear and
            Conv1D in the repeated blocks, and what the model was pruned or loaded with, which is
            checked against its pattern.

    Returns:
        The report; tied and shared weights count once.

    Raises:
        ValueError: nothing matches the config's targets, or the pattern cannot divide a weight
            (the message names it).
    """
    check_model(model, "measure_sparsity")
    check_has_values(model, "measure_sparsity")
    promised = promised_config(model) if config is None else config
    targets = Targets.in_blocks(model) if promised is None else Targets.of(model, promised)
    return count_targets(model, targets, whole_blocks=config is None)


def count_targets(
    model: nn.Module, targets: Targets, *, whole_blocks: bool = False
) -> SparsityReport:
    """`measure_sparsity` of a model whose targets are known.

    Args:
        model: any model.
        targets: what to count, and to check against their pattern.
        whole_blocks: count all other layers in the blocks, too.
    """
    anything = Pattern.parse("unstructured")
    counted = [(layer, targets.pattern) for layer in targets.layers]
    if whole_blocks:
        counted += [(layer, anything) for layer in targets.others]
    tensors = tuple(
        count_zeros(layer.weight_name, _whole(layer.weight), pattern) for layer, pattern in counted
    )
    other_zeros = 0
    own = by_identity(layer for layer, _ in counted)
    known = {layer: count.zeros for (layer, _), count in zip(counted, tensors, strict=True)}
    for parameter in model.parameters():
        layers = own.get(id(parameter), ())
        if sum(layer.weight.numel() for layer in layers) < parameter.numel():
            zeros = int(_whole((parameter.detach() == 0).sum()))
            other_zeros += zeros - sum(known[layer] for layer in layers)
    return SparsityReport(
        tensors, str(targets.pattern), num_parameters(model), other_zeros=other_zeros
    )


def _kind(name: str) -> str:
    """The name of a tensor without the numbers of blocks."""
    return ".".join("*" if part.isdecimal() else part for part in name.split("."))


def _whole(weight: Tensor) -> Tensor:
    """The tensor, gathered from the processes that hold its shards."""
    return weight.full_tensor() if isinstance(weight, DTensor) else weight


def count_zeros(name: str, weight: Tensor, pattern: Pattern) -> TensorSparsity:
    """Count one weight `(out_features, in_features)`.

    Raises:
        ValueError: the pattern cannot divide the weight; the message names it.
    """
    rows, columns = weight.shape
    zeros = int((weight == 0).count_nonzero())
    try:
        broken = pattern.violations(weight)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error
    # A pattern that fixes the sparsity promises it of each group; others, of the number of whole ones.
    each = pattern.implied_sparsity is not None
    counts = (broken, 0) if each else (0, broken)
    return TensorSparsity(name, (rows, columns), zeros, *counts)


def format_table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Plain text table, first column to the left and the others to the right."""
    rows = [head, *rows]
    widths = [max(len(row[column]) for row in rows) for column in range(len(head))]
    lines = [
        "  ".join(
            cell.ljust(width) if column == 0 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
    return "\n".join([lines[0], "  ".join("-" * width for width in widths), *lines[1:]])
