"""The tensors of a checkpoint: each weight compressed, and what was counted in it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from torch import Tensor
from transformers import PreTrainedModel

from hf_sparse.checkpoint.implied import load_offloaded
from hf_sparse.checkpoint.on_grids import OnGrid, named, on_grids
from hf_sparse.checkpoint.overview import count_other
from hf_sparse.checkpoint.source import MetricsWatch
from hf_sparse.configuration_sparse import SparsityConfig
from hf_sparse.formats import FORMATS, can_compress, compress, format_of
from hf_sparse.patterns import Pattern, Unstructured
from hf_sparse.report import TensorSparsity, count_zeros
from hf_sparse.structure.layers import TargetLayer
from hf_sparse.structure.promise import Held
from hf_sparse.structure.targets import Targets, by_parameter
from hf_sparse.upstream.transformers.saving import under_original_names


@dataclass(frozen=True)
class Stored:
    """One tensor of a checkpoint: its parts, and what was counted in it.

    Attributes:
        targets: of the targets in it: one, or several of a stack; else none.
        others: of the other matrices of the blocks in it.
        other_zeros: the zeros of what is no target.
    """

    name: str
    parts: dict[str, Tensor]
    targets: tuple[TensorSparsity, ...] = ()
    others: tuple[TensorSparsity, ...] = ()
    other_zeros: int = 0


def stored_parts(
    model: PreTrainedModel,
    chosen: Targets,
    tensors: dict[str, Tensor],
    patterns: Mapping[str, Pattern],
    held: Held,
    watch: MetricsWatch,
) -> Iterator[Stored]:
    """Every tensor with its parts and counts.

    Other matrices of the blocks, which an earlier pruning may have left zeros in, are compressed
    where that is smaller. Weights that the config promises few bits of are stored as codes.

    Args:
        model: the model that is saved.
        chosen: the targets of the config that it is saved with.
        tensors: its weights by name, without tied ones; each is taken out when its turn comes.
        patterns: what the weights were pruned to, by name.
        held: counts the zeros of the targets.
        watch: is shown every weight.

    Raises:
        OffGridError: weights that the config promises few bits of have others; the message names them.
        ValueError: a target breaks the pattern that the config promises; the message names it.
    """
    config = chosen.config
    grids = on_grids(model, chosen)
    targets = chosen.by_parameter(model)
    others = by_parameter(model, chosen.others)
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    dense = {}
    for name in list(tensors):
        tensor = load_offloaded(model, name, tensors.pop(name))
        watch.add(name, tensor)
        stored, own = Stored(name, {"": tensor}), targets.get(name, ())
        rest = tuple(
            count_other(layer.weight_name, layer.part(tensor), patterns)
            for layer in others.get(name, ())
        )
        if own:
            coded = grids.get(name)
            parts, counts = _compress(name, tensor, own, config, coded, whole=not rest)
            for layer in own:
                held.add(layer.weight_name, layer.part(tensor))
            zeros = sum(count.zeros for count in rest)
            stored = Stored(name, parts, counts, rest, zeros)
        elif name in parameters:
            zeros = int((tensor == 0).count_nonzero())
            stored = replace(stored, others=rest, other_zeros=zeros)
            if name in grids:
                with named(name):
                    stored = replace(stored, parts=compress(tensor, grid=grids[name].grid))
            elif rest and zeros and can_compress(tensor):
                stored = replace(stored, parts=compress(tensor))
        if config.format == "dense":
            dense[name] = tensor
            stored = replace(stored, parts={})
        yield stored
    # Other programs want the names of the original checkpoint.
    for name, tensor in under_original_names(model, dense).items() if dense else ():
        yield Stored(name, {"": tensor})


def _compress(
    name: str,
    tensor: Tensor,
    layers: Sequence[TargetLayer],
    config: SparsityConfig,
    coded: OnGrid | None,
    *,
    whole: bool,
) -> tuple[dict[str, Tensor], tuple[TensorSparsity, ...]]:
    """The parts of a tensor, and the counts of the targets in it.

    A stack some of whose matrices are no targets is stored by values, whatever their bits.

    Args:
        name: of the tensor.
        tensor: a matrix, or a stack of them.
        layers: the targets in it.
        config: what they were pruned to, and the format.
        coded: the grid of its weights; None: they may have any values.
        whole: whether it holds nothing else.
    """
    pattern, grid = config.pattern, None
    if coded is not None and coded.is_whole(tensor):
        grid = coded.grid
    elif coded is not None:
        coded.check(tensor)
    with named(name):
        transposed = layers[0].transposed
        parts = compress(tensor, config.format, pattern, transposed=transposed, grid=grid)
    if whole and (pattern.implied_sparsity is None or FORMATS[format_of(parts)].proves(pattern)):
        anything = Unstructured()
        return parts, tuple(
            count_zeros(layer.weight_name, layer.part(tensor), anything) for layer in layers
        )
    counts = tuple(count_zeros(layer.weight_name, layer.part(tensor), pattern) for layer in layers)
    for count in counts:
        if count.violations:
            raise ValueError(
                f"{count.name}: {count.violations} groups {pattern.violation}, but the config promises "
                f"pattern '{pattern}'. Prune the model to it again, or save with "
                f'config=SparsityConfig("unstructured", sparsity={count.sparsity:.2f}).'
            )
    return parts, counts
