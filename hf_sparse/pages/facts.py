"""What a page tells of one model, as plain values; its matrices are looked at one after the other."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from hf_sparse.counts import SparsityReport, TensorSparsity
from hf_sparse.pages.names import Place
from hf_sparse.provenance.values import Provenance
from hf_sparse.timing import Benchmark

# Of each matrix at most so many weights are looked at for histograms, and of a kind of matrix so many.
MOST_OF_A_MATRIX, MOST_OF_A_KIND = 1 << 14, 1 << 17
# The weights that a picture of a mask shows one by one, and the tiles of the whole matrix, at most.
WINDOW, TILES = (32, 64), 128
# In a row of a matrix, the zeros of so many weights side by side are counted.
GROUP = 4


@dataclass(frozen=True)
class Mask:
    """The zeros of one matrix `(out_features, in_features)`, in pictures.

    Attributes:
        name: of the weight.
        shape: its own.
        window: True for each nonzero of the upper left corner.
        tiles: the fraction of nonzeros in each tile of the whole matrix.
        tile: rows and columns in a tile, about.
        groups: how many groups of `GROUP` weights in a row have 0, 1, ... nonzeros.
        empty_rows, empty_columns: those with no nonzero.
    """

    name: str
    shape: tuple[int, int]
    window: Tensor
    tiles: Tensor
    tile: tuple[float, float]
    groups: tuple[int, ...]
    empty_rows: int
    empty_columns: int

    @classmethod
    def of(cls, name: str, weight: Tensor) -> Mask:
        """Look at a weight."""
        kept = weight != 0
        rows, columns = kept.shape
        height, width = min(rows, TILES), min(columns, TILES)
        tiles = torch.nn.functional.adaptive_avg_pool2d(kept.float()[None], (height, width))[0]
        whole = kept[:, : columns - columns % GROUP].reshape(-1, GROUP).sum(1)
        groups = torch.bincount(whole, minlength=GROUP + 1).tolist()
        return cls(
            name,
            (rows, columns),
            kept[: WINDOW[0], : WINDOW[1]].clone(),
            tiles,
            (rows / height, columns / width),
            tuple(groups),
            int((~kept.any(1)).sum()),
            int((~kept.any(0)).sum()),
        )


@dataclass(frozen=True)
class Change:
    """How far a pruned matrix is from the dense one, `||W - W0|| / ||W0||` over all its weights."""

    name: str
    relative: float


@dataclass(frozen=True)
class Spread:
    """Nonzero weights of one kind of matrix.

    Attributes:
        after: of this model, a sample.
        before: of the dense model, a sample of the same matrices; empty without one.
        sampled: whether there are more weights than were looked at.
    """

    after: Tensor
    before: Tensor
    sampled: bool


@dataclass(frozen=True)
class Files:
    """Bytes on the disk.

    Attributes:
        parts: by what they are for.
        weights: of all weight files.
        dense: of the weight files if every weight were stored in place; None: not known.
    """

    parts: Mapping[str, int]
    weights: int
    dense: int | None


@dataclass(frozen=True)
class ModelFacts:
    """All that is known of one model.

    Attributes:
        title: what the page calls it.
        source: folder, Hub name, or the class of a model in memory.
        architecture: the class of the model; empty if it is not known.
        report: exact counts.
        promised: the pattern and sparsity that its config promises.
        provenance: what was done to it, and what was measured.
        mask: of the chosen matrix.
        spreads: by kind of matrix.
        changes: of each matrix from the dense one.
        base: the dense model that was given.
        files: None of a model in memory.
        latency: on this machine, if it was asked for.
        notes: what the reader should know.
        no_such_matrix: why the chosen matrix is not the one that was asked for; empty if it is.
    """

    title: str
    source: str
    architecture: str
    report: SparsityReport
    promised: str
    provenance: Provenance
    mask: Mask | None = None
    spreads: Mapping[str, Spread] = field(default_factory=dict)
    changes: tuple[Change, ...] = ()
    base: str | None = None
    files: Files | None = None
    latency: Benchmark | None = None
    notes: tuple[str, ...] = ()
    no_such_matrix: str = ""

    @property
    def places(self) -> list[tuple[Place, TensorSparsity]]:
        """The targets with their places."""
        return [(Place.of(tensor.name), tensor) for tensor in self.report.tensors]

    def with_notes(self, *notes: str) -> ModelFacts:
        """With more to know."""
        return replace(self, notes=(*self.notes, *notes))


class Looking:
    """Looks at the matrices of a model, one at a time, and remembers little of each.

    Args:
        chosen: the name of the matrix whose mask is to be seen; None: the first is.
        dense: gives the dense matrix of a name, or None where there is none.
    """

    def __init__(self, chosen: str | None, dense: Callable[[str], Tensor | None] | None) -> None:
        self._chosen, self._dense = chosen, dense
        self.mask: Mask | None = None
        self.changes: list[Change] = []
        self.without_base: list[str] = []
        self.dense_bytes: dict[str, int] = {}
        self._samples: dict[str, tuple[list[Tensor], list[Tensor]]] = {}
        self._sampled: set[str] = set()

    def __call__(self, name: str, weight: Tensor) -> None:
        """Look at a weight `(out_features, in_features)`."""
        weight = weight.detach()
        self.dense_bytes[name] = weight.numel() * weight.element_size()
        if self.mask is None or name == self._chosen:
            self.mask = Mask.of(name, weight)
        kind = Place.of(name).kind
        after, before = self._samples.setdefault(kind, ([], []))
        if sum(map(len, after)) < MOST_OF_A_KIND:
            after.append(self._sample(kind, weight))
        else:
            self._sampled.add(kind)
        if self._dense is None:
            return
        dense = self._dense(name)
        if dense is None or dense.shape != weight.shape:
            self.without_base.append(name)
            return
        if sum(map(len, before)) < MOST_OF_A_KIND:
            before.append(self._sample(kind, dense))
        norm = float(torch.linalg.vector_norm(dense.float()))
        gone = float(torch.linalg.vector_norm(weight.float() - dense.float()))
        self.changes.append(Change(name, gone / norm if norm else 0.0))

    def choose(self, name: str) -> None:
        """Let the mask be that of the matrix of this name, which comes next."""
        self._chosen = name

    def spreads(self) -> dict[str, Spread]:
        """The weights of each kind, as they were sampled."""
        empty = torch.zeros(0)
        return {
            kind: Spread(
                torch.cat(after) if after else empty,
                torch.cat(before) if before else empty,
                kind in self._sampled,
            )
            for kind, (after, before) in self._samples.items()
        }

    def _sample(self, kind: str, weight: Tensor) -> Tensor:
        """Finite nonzeros among weights at even distances."""
        step = -(-weight.numel() // MOST_OF_A_MATRIX)
        if step > 1:
            self._sampled.add(kind)
            while not step % 2 or weight.shape[-1] % step == 0:  # not the same columns in each row
                step += 1
        taken = weight.reshape(-1)[::step].float()
        return taken[(taken != 0) & taken.isfinite()]
