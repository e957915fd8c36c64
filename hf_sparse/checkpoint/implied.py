"""The config that a model is saved with when none is given: what it promised, as far as it holds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from torch import Tensor
from transformers import PreTrainedModel

from hf_sparse.checkpoint.on_grids import bits_in_words, on_grids
from hf_sparse.configuration_sparse import HIGHEST_SPARSITY, SparsityConfig
from hf_sparse.formats import FORMATS
from hf_sparse.optim.zeros import SPARSE_FROM
from hf_sparse.patterns import Unstructured
from hf_sparse.quantization import OffGridError
from hf_sparse.report import TensorSparsity, count_zeros
from hf_sparse.structure.layers import promised_config
from hf_sparse.structure.promise import Held, with_sparsity
from hf_sparse.structure.targets import Targets, by_parameter
from hf_sparse.structure.units import shrunk_sizes
from hf_sparse.upstream.transformers.saving import fetched

_FILLED = "training without a mask fills zeros"


@dataclass(frozen=True)
class Filled:
    """Promised zeros that are gone: the promised sparsity, the measured one, and a warning."""

    promised: float
    found: float
    warning: str


def implied_config(
    model: PreTrainedModel, stored: Mapping[str, Tensor]
) -> tuple[SparsityConfig, Filled | None, str | None]:
    """What the model was pruned or loaded with, as far as it still holds; else what is measured.

    A model without zeros, whose weights may be any numbers, is dense, whatever it was: it is to load
    with transformers alone.

    Args:
        model: the model that is saved.
        stored: its weights by name, without tied ones.

    Returns:
        The config; what was lost of the promised zeros; and a warning if weights left their grid.
    """
    promised = promised_config(model)
    if promised is None:
        return (*_implied_zeros(model, stored, None), None)
    promised, warning = _with_held_bits(model, stored, promised)
    return (*_implied_zeros(model, stored, promised), warning)


def _implied_zeros(
    model: PreTrainedModel, stored: Mapping[str, Tensor], promised: SparsityConfig | None
) -> tuple[SparsityConfig, Filled | None]:
    """The config with the zeros that are held, and what was lost of them."""
    targets, ignore = (None, None) if promised is None else (promised.targets, promised.ignore)
    meant = Targets.in_blocks(model) if promised is None else Targets.of(model, promised)
    asked = meant.config
    held, counts = _count(model, stored, meant)
    weights = sum(count.numel for count in counts)
    sparsity = min(sum(count.zeros for count in counts) / max(weights, 1), HIGHEST_SPARSITY)
    dense = not any(map(is_sparse, counts)) and not _others_are_sparse(model, stored, meant)
    broken = sum(count.violations for count in counts)
    lost = broken > 0 or held.lacks
    has_bits = promised is not None and bool(bits_in_words(promised))
    whole = shrunk_sizes(model) is None and not has_bits
    if dense and (lost or not asked.sparsity) and whole:
        config = SparsityConfig("unstructured", 0.0, targets, ignore, "dense")
    elif promised is None:
        return SparsityConfig("unstructured", sparsity, targets, ignore), None
    elif not lost:
        return held.promise, None
    elif broken or not held.share:
        holds_any = FORMATS[asked.format].fits(Unstructured())
        format = asked.format if holds_any else "auto"
        anything = SparsityConfig("unstructured", sparsity, targets, ignore, format)
        config = replace(
            anything,
            bits=asked.bits,
            group_size=asked.group_size,
            symmetric=asked.symmetric,
            embedding_bits=asked.embedding_bits,
        )
    else:
        config = held.promise
    if not lost:
        return config, None
    warning = _of_lost_zeros(asked, config, broken, sparsity)
    return config, Filled(asked.sparsity, round(sparsity, 4), warning)


def _with_held_bits(
    model: PreTrainedModel, stored: Mapping[str, Tensor], promised: SparsityConfig
) -> tuple[SparsityConfig, str | None]:
    """The promised config; without bits, and with a warning, if weights are not on its grids."""
    try:
        for name, on_grid in on_grids(model, promised).items():
            if name in stored:
                on_grid.check(load_offloaded(model, name, stored[name]))
    except OffGridError as error:
        warning = (
            f"the model was {bits_in_words(promised)}, and its weights are not "
            f"any more: {error} It is saved with the values that it has, without codes."
        )
        plain = replace(promised, bits=None, group_size=None, symmetric=True, embedding_bits=None)
        return plain, warning
    return promised, None


def _of_lost_zeros(asked: SparsityConfig, config: SparsityConfig, broken: int, found: float) -> str:
    """The warning that a model does not hold what it promised."""
    how = (
        "as a dense model"
        if config.format == "dense" and not config.sparsity
        else f"as '{config.pattern}', with sparsity {config.sparsity:.4f}"
    )
    groups = f"{broken} groups have more nonzeros now" if broken else f"{found:.4f} is left"
    return (
        f"the model was {asked.pattern} with sparsity {asked.sparsity:.4f}, but {groups}: {_FILLED}. "
        f"It is saved {how}, and its card tells. Prune it again to restore the zeros; recover_, "
        "KeepZeros and get_peft_model train without losing them."
    )


def of_less(asked: SparsityConfig, held: Held) -> str:
    """The warning that a given config asks for more zeros than the model has."""
    return (
        f"the given config promises {asked.sparsity:.4f}, but the model is saved with sparsity "
        f"{held.share:.4f}, which is what config.json promises: the model was not pruned to it, or "
        f"{_FILLED}. Prune it to the config, again, before it is saved."
    )


def filled_since(model: PreTrainedModel, held: Held) -> Filled | None:
    """What a model has lost of the config that it was pruned or loaded with, if it is saved with it."""
    promised = promised_config(model)
    if promised is None or with_sparsity(held.config, 0.0) != with_sparsity(promised, 0.0):
        return None
    lost = held.is_less_than(promised.sparsity)
    return Filled(promised.sparsity, held.share, of_less(held.config, held)) if lost else None


def _count(
    model: PreTrainedModel, stored: Mapping[str, Tensor], targets: Targets
) -> tuple[Held, list[TensorSparsity]]:
    """Count the targets."""
    layers = targets.by_parameter(model)
    held, counts = Held(targets.config), []
    for name in layers.keys() & stored.keys():
        tensor = load_offloaded(model, name, stored[name])
        for layer in layers[name]:
            weight = layer.part(tensor)
            counts.append(count_zeros(layer.weight_name, weight, targets.pattern))
            held.add(layer.weight_name, weight)
    return held, counts


def _others_are_sparse(
    model: PreTrainedModel, stored: Mapping[str, Tensor], targets: Targets
) -> bool:
    """Whether layers of the blocks have zeros that are no targets."""
    for name, layers in by_parameter(model, targets.others).items():
        if name not in stored:
            continue
        tensor = load_offloaded(model, name, stored[name])
        for layer in layers:
            weight = layer.part(tensor)
            if int((weight == 0).sum()) >= SPARSE_FROM * max(weight.numel(), 1):
                return True
    return False


def is_sparse(count: TensorSparsity) -> bool:
    """Whether a weight has more zeros than chance makes."""
    return count.sparsity >= SPARSE_FROM


def load_offloaded(model: PreTrainedModel, name: str, tensor: Tensor) -> Tensor:
    """Read a weight that `device_map` left on the disk."""
    return fetched(model, name) if tensor.device.type == "meta" else tensor
