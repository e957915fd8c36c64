"""Fewer blocks: which of them a model's config can do without, and how model and config lose them.

No family is known here by name. What hangs on the place of a block (its number in the cache, its kind
of attention) transformers tells itself: models are built from the whole config and from the shortened
one, without values, and compared block by block.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from hf_sparse.structure.built import BUILD_ERRORS, Described, built, described
from hf_sparse.structure.layers import find_stacks

# Words in the names of a config's lists that have an entry for each block, or numbers of blocks.
_OF_BLOCKS = ("layer", "block")


@dataclass(frozen=True)
class Depth:
    """A model whose blocks can go.

    Attributes:
        model: the model.
        name: of its list of blocks.
        whole: what transformers builds from its config, without values.
    """

    model: PreTrainedModel
    name: str
    whole: nn.Module

    @classmethod
    def of(cls, model: PreTrainedModel) -> Depth:
        """Find the blocks of a model.

        Raises:
            ValueError: it has no list of blocks or several, they share weights, or the model is not
                the one that its config describes.
        """
        kind, config = type(model).__name__, model.config
        stacks = find_stacks(model)
        if getattr(config, "is_encoder_decoder", False) or len(stacks) != 1:
            found = ", ".join(stack.name for stack in stacks) or "none"
            raise ValueError(
                f"the lists of blocks in this {kind} are: {found}; wanted an encoder or a decoder with "
                "one list: of several, blocks would have to be chosen together."
            )
        [stack] = stacks
        count = getattr(config, "num_hidden_layers", None)
        if count != len(stack.blocks):
            raise ValueError(
                f"num_hidden_layers of this {kind} is {count}, and {stack.name} has "
                f"{len(stack.blocks)} blocks: they run several times with the same weights, or the "
                "config is of another model. Wanted blocks with weights of their own."
            )
        _check_own(stack.name, stack.blocks)
        if getattr(config, "is_heterogeneous", False):
            raise ValueError(
                f"the config of this {kind} gives blocks sizes of their own by number "
                "(per_layer_config); wanted one that tells them by lists, or blocks of one size."
            )
        try:
            whole = built(model, config)
            listed: Any = whole.get_submodule(stack.name)
        except BUILD_ERRORS as error:
            raise ValueError(
                f"transformers builds no {kind} with the blocks of this one from its config: {error}. "
                "Save and load the model anew, or put back what was changed in its config."
            ) from error
        if len(listed) != count:
            raise ValueError(
                f"the config of this {kind} makes {len(listed)} blocks, and it has {count}: it is not "
                "the model that its config describes."
            )
        return cls(model, stack.name, whole)

    @property
    def blocks(self) -> list[nn.Module]:
        """The model's blocks, in order."""
        listed: Any = self.model.get_submodule(self.name)
        return list(listed)

    @property
    def all_alike(self) -> bool:
        """Whether all blocks are of one kind, so that any of them can go if the last can."""
        blocks: Any = self.whole.get_submodule(self.name)
        first = dict(described(blocks[0]))
        return all(
            _places(dict(described(block)), number, first, 0) is not None
            for number, block in enumerate(blocks)
        )

    def allows(self, kept: Sequence[int]) -> bool:
        """Whether transformers builds the model that has these blocks alone."""
        return self._changes(kept) is not None

    def keep_(self, kept: Sequence[int]) -> None:
        """Remove all blocks but those of these numbers, in ascending order.

        Raises:
            ValueError: the config cannot tell the model that is left. Nothing has changed then.
        """
        changes = self._changes(kept)
        if changes is None:
            raise ValueError(
                f"transformers builds no {type(self.model).__name__} of blocks {list(kept)} from a "
                "config with fewer blocks: they would be of other kinds. Remove other blocks."
            )
        for module, name, value in changes:
            setattr(module, name, value)
        listed: Any = self.model.get_submodule(self.name)
        count = len(listed)
        for number in sorted(set(range(count)) - set(kept), reverse=True):
            del listed[number]
        configs = [getattr(module, "config", None) for module in self.model.modules()]
        for config in {id(config): config for config in configs}.values():
            if getattr(config, "num_hidden_layers", None) == count:
                _shorten_(config, kept)

    def _changes(self, kept: Sequence[int]) -> list[tuple[nn.Module, str, Any]] | None:
        """The attributes of the model's modules that tell places, and their new values.

        None: the config makes other blocks, or other modules beside them.
        """
        try:
            short = built(self.model, _shortened(self.model.config, kept))
            blocks: Any = short.get_submodule(self.name)
        except BUILD_ERRORS:
            return None
        if len(blocks) != len(kept):
            return None
        changes: list[tuple[nn.Module, str, Any]] = []
        whole: Any = self.whole.get_submodule(self.name)
        mine = self.blocks
        for place, number in enumerate(kept):
            found = _places(
                dict(described(whole[number])), number, dict(described(blocks[place])), place
            )
            if found is None:
                return None
            changes += [(mine[number].get_submodule(path), name, place) for path, name in found]
        around = self._around(short)
        return None if around is None else changes + around

    def _around(self, short: nn.Module) -> list[tuple[nn.Module, str, Any]] | None:
        """What tells the number of blocks in the modules around them; None: they have other tensors."""
        before = dict(described(self.whole, skip=self.name))
        after = dict(described(short, skip=self.name))
        if before.keys() != after.keys():
            return None
        changes: list[tuple[nn.Module, str, Any]] = []
        for path, (shapes, values) in before.items():
            other_shapes, others = after[path]
            if shapes != other_shapes or values.keys() != others.keys():
                return None
            module = self.model.get_submodule(path)
            changes += [
                (module, name, others[name])
                for name, value in values.items()
                if value != others[name] and vars(module).get(name) == value
            ]
        return changes


def _places(
    one: dict[str, Described], number: int, other: dict[str, Described], place: int
) -> list[tuple[str, str]] | None:
    """The attributes that tell the place of a block, by path and name.

    Args:
        one, other: the same block where it is, and where it is to be, described.
        number, place: of both.

    Returns:
        None if they differ in anything else.
    """
    if one.keys() != other.keys():
        return None
    found = []
    for path, (shapes, values) in one.items():
        other_shapes, others = other[path]
        if shapes != other_shapes or values.keys() != others.keys():
            return None
        for name, value in values.items():
            told = type(value) is int and (value, others[name]) == (number, place)
            if told and number != place:
                found.append((path, name))
            elif value != others[name]:
                return None
    return found


def _shortened(config: Any, kept: Sequence[int]) -> Any:
    """The config of a model with some of the blocks, as a file of it is read."""
    short = copy.deepcopy(config)
    _shorten_(short, kept)
    return type(config).from_dict(short.to_dict())


def _shorten_(config: Any, kept: Sequence[int]) -> None:
    """Let a config tell some of its blocks: their number, lists with an entry for each, indices."""
    count = config.num_hidden_layers
    for name, value in list(vars(config).items()):
        of_blocks = not name.startswith("_") and any(word in name for word in _OF_BLOCKS)
        if not of_blocks or not isinstance(value, list | tuple):
            continue
        if len(value) == count:
            setattr(config, name, type(value)(value[number] for number in kept))
        elif all(type(item) is int and 0 <= item < count for item in value):
            setattr(config, name, type(value)(kept.index(item) for item in value if item in kept))
    config.num_hidden_layers = len(kept)


def _check_own(name: str, blocks: Sequence[nn.Module]) -> None:
    """Refuse blocks that share weights: what is left of them would be missing."""
    owners: dict[int, int] = {}
    for number, block in enumerate(blocks):
        for parameter in block.parameters():
            other = owners.setdefault(id(parameter), number)
            if other != number:
                raise ValueError(
                    f"{name}.{number} shares a weight with {name}.{other}; wanted blocks with weights "
                    "of their own. Copy the shared modules first (copy.deepcopy)."
                )
