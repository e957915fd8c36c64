"""The zeros of a model's weights: which layers have them, and a hash of their places."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from hf_sparse.configuration_sparse import SparsityConfig, check_config
from hf_sparse.optim.sharding import local_part
from hf_sparse.structure.layers import TargetLayer, by_identity, promised_config
from hf_sparse.structure.targets import Targets
from hf_sparse.structure.weights import check_floats

# A layer with fewer zeros is dense: weights are zero by chance too.
SPARSE_FROM = 0.005
_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def sparse_layers(model: nn.Module, config: SparsityConfig | None = None) -> list[TargetLayer]:
    """The target layers that have zeros.

    Args:
        model: any model, also one with PEFT adapters.
        config: its targets are looked at. None: what the model was pruned or loaded with, and every
            other Linear and Conv1D in the blocks that is sparse (`SPARSE_FROM`), such as by an
            earlier pruning.

    Experts in one parameter count as one: all of them, or none.

    Raises:
        ValueError: a weight is no matrix of floats.
    """
    if config is not None:
        check_config(config)
    asked = promised_config(model) if config is None else config
    if asked is None:
        targets = Targets.in_blocks(model)
    else:  # by name, not by unit: where a unit is zero, so are the rows that feed it
        targets = Targets.of(
            model, SparsityConfig("unstructured", 0.0, asked.targets, asked.ignore)
        )
    found: list[TargetLayer] = []
    for layers in by_identity(targets.layers).values():
        if bool((_values(layers[0]) == 0).any()):
            found += layers
    if config is None:
        for layers in by_identity(targets.others).values():
            if is_sparse(_values(layers[0])):
                found += layers
    return found


def _values(layer: TargetLayer) -> Tensor:
    """What this process holds of the parameter of a layer, of all experts in it."""
    check_floats(layer.weight_name, layer.parameter)
    return local_part(layer.parameter.detach())


def is_sparse(weight: Tensor) -> bool:
    """Whether a weight has more zeros than chance makes."""
    return num_zeros(weight) >= SPARSE_FROM * max(weight.numel(), 1)


def num_zeros(weight: Tensor) -> int:
    """The zeros of a weight."""
    return int((weight == 0).sum())


def is_whole(weight: Tensor) -> bool:
    """Whether this process holds all of a matrix, and not a shard (FSDP, DeepSpeed ZeRO-3)."""
    return weight.ndim > 1 and not isinstance(weight, DTensor)


def unlike(weight: Tensor) -> Tensor:
    """1 where a weight is not zero, 0 where it is, in the weight's own type.

    A comparison into floats: several times faster on CPUs than one into booleans.
    """
    return torch.ne(weight, 0, out=torch.empty_like(weight))


def kept_bits(weight: Tensor) -> Tensor:
    """1 where a weight is not zero, 0 where it is, as integers of the weight's width.

    For `mask_`, which is three times faster with them than a product of half-precision floats on
    CPUs: nothing is rounded.
    """
    bits = weight.view(_INTEGERS[weight.element_size()]) << 1  # without the sign: -0.0 is a zero
    return torch.ne(bits, 0, out=bits)


def mask_(values: Tensor, kept: Tensor) -> None:
    """Make values zero where the integers of `kept_bits` are, in place; both of one width."""
    values.view(kept.dtype).mul_(kept)


def refill_(weight: Tensor, kept: Tensor) -> None:
    """Make the weight zero where `kept` is 0, and nowhere else.

    A kept weight that is zero becomes the least normal number of its type: so zeros of the weight
    stay the mask, to the weight.

    Args:
        weight: changed in place.
        kept: 1 or 0, of the weight's shape and type; it is overwritten.
    """
    weight.mul_(kept)
    weight.add_(kept.sub_(unlike(weight)), alpha=torch.finfo(weight.dtype).tiny)


def zeros_hash(weights: Iterable[Tensor]) -> str:
    """A hash of the places of the zeros in some weights."""
    digest = hashlib.sha256()
    for weight in weights:
        digest.update(str(tuple(weight.shape)).encode())
        for rows in weight.split(max(1, (1 << 20) // max(weight.shape[1:].numel(), 1))):
            digest.update((rows == 0).reshape(-1).cpu().numpy().tobytes())
    return digest.hexdigest()[:32]
