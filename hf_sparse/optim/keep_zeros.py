"""The frozen mask: any torch optimizer trains a sparse model, and its zeros stay zero.

What happens at each step stands in `step_mask.py`. The number of zeros is the same to the weight.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from hf_sparse.arguments import check_model, check_optimizer
from hf_sparse.configuration_sparse import SparsityConfig
from hf_sparse.optim.deepspeed import KEEPING, check_whole_parameters
from hf_sparse.optim.notes import note_fine_tuning_
from hf_sparse.optim.sharding import local_part
from hf_sparse.optim.step_mask import StepMask
from hf_sparse.optim.zeros import sparse_layers, zeros_hash
from hf_sparse.structure.layers import parameters_of, promised_config
from hf_sparse.suggestions import deprecated_name

_ATTACHED = "_hf_sparse_frozen_mask"


def keep_zeros_(
    optimizer: Optimizer, model: nn.Module, config: SparsityConfig | None = None
) -> FrozenMask:
    """From now on the zeros of a sparse model stay zero, whatever steps the optimizer takes.

    >>> optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)   # doctest: +SKIP
    >>> hf_sparse.keep_zeros_(optimizer, model)                       # doctest: +SKIP

    In Trainer: `Trainer(..., callbacks=[hf_sparse.KeepZeros()])`.

    A kept weight that lands on exactly 0 becomes the least normal number, and may move away from 0
    again: no zeros are added.

    Args:
        optimizer: any torch optimizer that trains the model, also as Accelerate wraps it. With
            DDP, FSDP2 or Accelerate call this after they have prepared model and optimizer.
        model: the sparse model.
        config: which layers. None: those that it was pruned or loaded with, and all others in the
            blocks that are sparse: at least 0.5 % zeros; fewer are taken for chance and not kept.

    Returns:
        The mask, whose `check()` tells whether the zeros are still those of now. It is not part of
        the optimizer's state: after loading one, call this again.

    Memory: one byte for each weight of the sparse layers.

    Raises:
        ValueError: the layers have no zeros, are quantized, or are not in the optimizer.
    """
    optimizer = getattr(optimizer, "optimizer", optimizer)
    mask = FrozenMask(optimizer, model, config)
    promised = promised_config(model)
    if promised is not None and (promised.bits or promised.embedding_bits):
        warnings.warn(
            "the model is quantised, and an optimizer moves its weights off their grid: their zeros "
            "are kept, their bits are not. Train it by hf_sparse.recover_, which keeps both, or "
            "quantise it again at the end: hf_sparse.quantize_(model, ..., batches=...).",
            stacklevel=2,
        )
    note_fine_tuning_(optimizer, model)
    return mask


keep_zeros = deprecated_name("keep_zeros", keep_zeros_)


class FrozenMask:
    """What `keep_zeros_` returns: the zeros of a model, kept while an optimizer steps.

    Attributes:
        names: the weights whose zeros are kept.
    """

    def __init__(
        self, optimizer: Optimizer, model: nn.Module, config: SparsityConfig | None = None
    ) -> None:
        if not isinstance(optimizer, Optimizer):
            raise ValueError(f"optimizer is {optimizer!r}; wanted one of torch.optim.")
        check_optimizer(optimizer, "keep_zeros_")
        check_model(model, "keep_zeros_")
        layers = sparse_layers(model, config)
        if not layers:
            raise ValueError(
                f"{type(model).__name__} has no zeros to keep in its layers. Prune it first "
                "(hf_sparse.prune_), or load the sparse checkpoint."
            )
        trained = _trained(optimizer)
        stepped = [layer for layer in layers if id(layer.parameter) in trained]
        if not any(layer.parameter.requires_grad for layer in stepped):
            raise ValueError(
                "the optimizer trains none of the model's sparse weights. Make it from this model's "
                "parameters, after DDP, FSDP or Accelerate have prepared the model."
            )
        named = ((layer.weight_name, layer.parameter) for layer in layers)
        check_whole_parameters(KEEPING, named)
        if previous := vars(optimizer).get(_ATTACHED):
            previous.remove()
        vars(optimizer)[_ATTACHED] = self
        self.names = [layer.weight_name for layer in layers]
        self._optimizer = optimizer
        self._parameters = parameters_of(layers)
        self._stepped = {id(layer.parameter) for layer in stepped}
        self._mask = StepMask()
        self._start = self._fingerprint()
        self._handles = [
            optimizer.register_step_pre_hook(self._remember),
            optimizer.register_step_post_hook(self._restore),
        ]

    def __repr__(self) -> str:
        state = "" if self._handles else ", removed"
        optimizer = type(self._optimizer).__name__
        return f"<FrozenMask of {optimizer}: zeros of {len(self.names)} weights{state}>"

    def remove(self) -> None:
        """Let the optimizer fill the zeros again."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        vars(self._optimizer).pop(_ATTACHED, None)

    def check(self) -> None:
        """Raise a ValueError unless exactly the weights are zero that were at the start."""
        if self._fingerprint() != self._start:
            raise ValueError(
                "the model's zeros are not those that it had when keep_zeros_ was called: something "
                "else wrote into its weights (another optimizer, a callback, a checkpoint that was "
                "loaded). Start again from the sparse model."
            )

    def _fingerprint(self) -> str:
        return zeros_hash(local_part(parameter.detach()) for parameter in self._parameters)

    def _remember(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        """Before a step: note what is not zero."""
        trained = _trained(optimizer)
        if not trained >= self._stepped:
            raise ValueError(
                "the optimizer's parameters were replaced after keep_zeros_ was called. Call it after "
                "DDP, FSDP or accelerator.prepare."
            )
        for parameter in self._changing(trained):
            self._mask.remember(id(parameter), parameter)

    def _restore(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        """After a step: make the same weights zero."""
        for parameter in self._changing(_trained(optimizer)):
            self._mask.restore_(id(parameter), parameter)

    def _changing(self, trained: set[int]) -> Iterator[Tensor]:
        """The sparse weights that the optimizer can change now: also those that it got later."""
        for parameter in self._parameters:
            if parameter.requires_grad and id(parameter) in trained:
                yield parameter


def _trained(optimizer: Optimizer) -> set[int]:
    """The identities of the optimizer's parameters."""
    return {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
