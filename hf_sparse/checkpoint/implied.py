"""The config that a model is saved with when none is given: what it promised, as far as it holds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor
from transformers import PreTrainedModel

from hf_sparse.configuration_sparse import HIGHEST_SPARSITY, SparsityConfig
from hf_sparse.counts import TensorSparsity, count_zeros
from hf_sparse.formats import FORMATS
from hf_sparse.optim.zeros import SPARSE_FROM
from hf_sparse.patterns import Unstructured
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
) -> tuple[SparsityConfig, Filled | None]:
    """What the model was pruned or loaded with, as far as it still holds; else what is measured.

    A model without zeros is dense, whatever it was: it is to load with transformers alone.

    Args:
        model: the model that is saved.
        stored: its weights by name, without tied ones.

    Returns:
        The config, and what was lost of the promise.
    """
    promised = promised_config(model)
    targets, ignore = (None, None) if promised is None else (promised.targets, promised.ignore)
    meant = Targets.in_blocks(model) if promised is None else Targets.of(model, promised)
    asked = meant.config
    held, counts = _count(model, stored, meant)
    weights = sum(count.numel for count in counts)
    sparsity = min(sum(count.zeros for count in counts) / max(weights, 1), HIGHEST_SPARSITY)
    dense = not any(map(is_sparse, counts)) and not _others_are_sparse(model, stored, meant)
    broken = sum(count.violations for count in counts)
    lost = broken > 0 or held.lacks
    if dense and (lost or not asked.sparsity) and shrunk_sizes(model) is None:
        config = SparsityConfig("unstructured", 0.0, targets, ignore, "dense")
    elif promised is None:
        return SparsityConfig("unstructured", sparsity, targets, ignore), None
    elif not lost:
        return held.promise, None
    elif broken or not held.share:
        holds_any = FORMATS[asked.format].fits(Unstructured())
        format = asked.format if holds_any else "auto"
        config = SparsityConfig("unstructured", sparsity, targets, ignore, format)
    else:
        config = held.promise
    if not lost:
        return config, None
    warning = _of_lost_zeros(asked, config, broken, sparsity)
    return config, Filled(asked.sparsity, round(sparsity, 4), warning)


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
