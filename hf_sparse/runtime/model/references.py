"""Blocks as transformers builds them from a config, without values, to compare a model's with."""

from __future__ import annotations

import copy
from functools import cached_property
from typing import Any

import torch
from torch import nn

from hf_sparse.runtime.model.description import Blocks
from hf_sparse.structure.families import base_type
from hf_sparse.upstream.torch import is_layer_of_torch
from hf_sparse.upstream.transformers.models import modeling_name, set_attention_

# What configs call the number of blocks.
LAYERS = {"num_hidden_layers", "decoder_layers", "num_decoder_layers"}


class References:
    """Base models of a config on the meta device: one block for each kind of attention.

    Where blocks differ by their place, too, it is one model with all blocks.

    Args:
        own: the class of transformers.
        config: of the model.
        family: tells where the blocks are.
    """

    def __init__(self, own: Any, config: Any, family: Blocks) -> None:
        self._own, self._config, self._family = own, config, family
        self._of_kind: dict[str, Any] = {}
        kinds: list[str] | None = getattr(config, "layer_types", None)
        # One for all where the family has one kind.
        self._kinds = kinds or [""]

    def model(self, index: int) -> Any:
        """A model that has a block like the one at a place."""
        if self._family.varied:
            return self._whole
        # Config and list may differ in length, which is told elsewhere.
        kind = self._kinds[min(index, len(self._kinds) - 1)]
        if kind not in self._of_kind:
            self._of_kind[kind] = self._small(kind)
        return self._of_kind[kind]

    def block(self, index: int) -> Any:
        """The item of the list of blocks that belongs to a place."""
        listed = self.model(index).get_submodule(self._family.stack)
        return listed[min(index, len(listed) - 1)]

    @cached_property
    def _whole(self) -> Any:
        return self._build(copy.deepcopy(self._config))

    def _small(self, kind: str) -> Any:
        """A model with a single block, or group of blocks."""
        small = copy.deepcopy(self._config)
        for name in {"num_hidden_layers", *self._family.names.values()} & LAYERS:
            setattr(small, name, 1)
        if kind:
            small.layer_types = [kind]
        if hasattr(small, "num_hidden_groups"):
            small.num_hidden_groups = 1
        return self._build(small)

    def _build(self, config: Any) -> Any:
        config.block_sizes = None
        set_attention_(config, "eager")
        with torch.device("meta"):
            return self._own(config)


def own_class(base: nn.Module) -> type[nn.Module]:
    """The class of transformers that a base model's class is, or is made from.

    Raises:
        ValueError: there is none.
    """
    family = base_type(base.config.model_type)  # type: ignore[union-attr, arg-type]
    module = modeling_name(family)
    for one in type(base).__mro__:
        if one.__module__ == module:
            return one
    raise ValueError(
        f"{named(type(base))} is not transformers' own model of family '{family}', nor a subclass of "
        "it: what its blocks compute is not known."
    )


def named(kind: type) -> str:
    """A class's name, with its module where that is not torch's."""
    return kind.__name__ if is_layer_of_torch(kind) else f"{kind.__module__}.{kind.__qualname__}"
