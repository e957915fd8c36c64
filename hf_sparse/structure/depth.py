"""Fewer blocks: which of them a model's config can do without, and how model and config lose them.

No family is known here by name. What hangs on the place of a block (its number in the cache, its kind
of attention) transformers tells itself: models are built from the whole config and from the shortened
one, without values, and compared block by block.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from hf_sparse.structure.built import BUILD_ERRORS, built
from hf_sparse.structure.layers import find_stacks
from hf_sparse.structure.modules_described import described, places_told

# Words in the names of a config's lists that have an entry for each block, or numbers of blocks.
_OF_BLOCKS = ("layer", "block")


@dataclass(frozen=True)
class Depth:
    """A model whose blocks can go.

    Blocks are numbered over all lists: an encoder's first, then a decoder's.

    Attributes:
        model: the model.
        lists: the names of its lists of blocks, and what its config calls the number of blocks in each.
        whole: what transformers builds from its config, without values.
    """

    model: PreTrainedModel
    lists: Mapping[str, str]
    whole: nn.Module

    @classmethod
    def of(cls, model: PreTrainedModel) -> Depth:
        """Find the blocks of a model.

        Raises:
            ValueError: it has no list of blocks, or several but is no encoder-decoder; they share
                weights, or the model is not the one that its config describes.
        """
        kind, config = type(model).__name__, model.config
        stacks = find_stacks(model)
        both = bool(getattr(config, "is_encoder_decoder", False))
        if len(stacks) != 1 + both:
            found = ", ".join(stack.name for stack in stacks) or "none"
            raise ValueError(
                f"the lists of blocks in this {kind} are: {found}; wanted an encoder or a decoder with "
                "one list, or an encoder-decoder with one each: of others, blocks would have to be "
                "chosen together."
            )
        counts = {stack.name: len(stack.blocks) for stack in stacks}
        count = getattr(config, "num_hidden_layers", None)
        if not both and count != len(stacks[0].blocks):
            raise ValueError(
                f"num_hidden_layers of this {kind} is {count}, and "
                f"{stacks[0].name} has {len(stacks[0].blocks)} blocks: they run several times with the "
                "same weights, or the config is of another model. Wanted blocks with weights of their "
                "own."
            )
        for stack in stacks:
            _check_own(stack.name, stack.blocks)
        if getattr(config, "is_heterogeneous", False):
            raise ValueError(
                f"the config of this {kind} gives blocks sizes of their own by number "
                "(per_layer_config); wanted one that tells them by lists, or blocks of one size."
            )
        try:
            whole = built(model, config)
            made = {name: len(list(_list(whole, name))) for name in counts}
        except BUILD_ERRORS as error:
            raise ValueError(
                f"transformers builds no {kind} with the blocks of this one from its config: {error}. "
                "Save and load the model anew, or put back what was changed in its config."
            ) from error
        if made != counts:
            raise ValueError(
                f"the config of this {kind} makes {_told(made)} blocks, and it has {_told(counts)}: it "
                "is not the model that its config describes."
            )
        names = _names_of_counts(model, counts) if both else {stacks[0].name: "num_hidden_layers"}
        return cls(model, names, whole)

    @property
    def name(self) -> str:
        """Of the list of blocks, or of both lists."""
        return " and ".join(self.lists)

    @property
    def blocks(self) -> list[nn.Module]:
        """The model's blocks, in order."""
        return [block for name in self.lists for block in _list(self.model, name)]

    @property
    def places(self) -> list[tuple[str, int]]:
        """For each block its list, and its number there."""
        counted = ((name, len(_list(self.model, name))) for name in self.lists)
        return [(name, number) for name, count in counted for number in range(count)]

    def is_alike(self, name: str) -> bool:
        """Whether all blocks of a list are of one kind, so that any of them can go if the last can."""
        blocks = _list(self.whole, name)
        first = dict(described(blocks[0]))
        return all(
            places_told(dict(described(block)), number, first, 0) is not None
            for number, block in enumerate(blocks)
        )

    def allows(self, kept: Sequence[int]) -> bool:
        """Whether transformers builds the model that has these blocks alone."""
        return self._changes(self._by_list(kept)) is not None

    def keep_(self, kept: Sequence[int]) -> None:
        """Remove all blocks but those of these numbers, in ascending order.

        Raises:
            ValueError: the config cannot tell the model that is left. Nothing has changed then.
        """
        by_list = self._by_list(kept)
        changes = self._changes(by_list)
        if changes is None:
            raise ValueError(
                f"transformers builds no {type(self.model).__name__} of blocks {list(kept)} from a "
                "config with fewer blocks: they would be of other kinds. Remove other blocks."
            )
        if len(by_list) > 1:
            self._tell_parts_(by_list)
        for module, name, value in changes:
            setattr(module, name, value)
        for name, numbers in by_list.items():
            listed, count = _list(self.model, name), len(_list(self.model, name))
            for number in sorted(set(range(count)) - set(numbers), reverse=True):
                del listed[number]
            if len(by_list) == 1:
                configs = [getattr(module, "config", None) for module in self.model.modules()]
                for config in {id(config): config for config in configs}.values():
                    if getattr(config, "num_hidden_layers", None) == count:
                        shorten_(config, {"num_hidden_layers": numbers})

    def _by_list(self, kept: Sequence[int]) -> dict[str, list[int]]:
        """The numbers of blocks in each list, of their numbers over all."""
        found: dict[str, list[int]] = {name: [] for name in self.lists}
        places = self.places
        for number in kept:
            name, place = places[number]
            found[name].append(place)
        return found

    def _short(self, by_list: Mapping[str, Sequence[int]]) -> nn.Module:
        """What transformers builds from the config that tells some of the blocks."""
        counts = {self.lists[name]: numbers for name, numbers in by_list.items()}
        return built(self.model, _shortened(self.model.config, counts))

    def _tell_parts_(self, by_list: Mapping[str, Sequence[int]]) -> None:
        """Let the configs of an encoder-decoder and of its halves tell the blocks that are left."""
        short = self._short(by_list)
        done: set[int] = set()
        for path, module in short.named_modules():
            if any(path.startswith(f"{name}.") for name in self.lists):
                continue
            mine, theirs = self.model.get_submodule(path), getattr(module, "config", None)
            config: Any = getattr(mine, "config", None)
            if config is None or theirs is None or id(config) in done:
                continue
            done.add(id(config))
            for name in self.lists.values():
                setattr(config, name, getattr(theirs, name))

    def _changes(
        self, by_list: Mapping[str, Sequence[int]]
    ) -> list[tuple[nn.Module, str, Any]] | None:
        """The attributes of the model's modules that tell places, and their new values.

        None: the config makes other blocks, or other modules beside them.
        """
        try:
            short = self._short(by_list)
            blocks = {name: list(_list(short, name)) for name in by_list}
        except BUILD_ERRORS:
            return None
        changes: list[tuple[nn.Module, str, Any]] = []
        for list_name, kept in by_list.items():
            whole, mine = _list(self.whole, list_name), _list(self.model, list_name)
            if not kept or len(blocks[list_name]) != len(kept):
                return None
            for place, number in enumerate(kept):
                block = blocks[list_name][place]
                places = places_told(
                    dict(described(whole[number])), number, dict(described(block)), place
                )
                if places is None:
                    return None
                changes += [
                    (mine[number].get_submodule(path), name, place) for path, name in places
                ]
        around = self._around(short)
        return None if around is None else changes + around

    def _around(self, short: nn.Module) -> list[tuple[nn.Module, str, Any]] | None:
        """What tells the number of blocks in the modules around them; None: they have other tensors."""
        before = dict(described(self.whole, skip=tuple(self.lists)))
        after = dict(described(short, skip=tuple(self.lists)))
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


def _list(model: nn.Module, name: str) -> Any:
    return model.get_submodule(name)


def _told(counts: Mapping[str, int]) -> str:
    return " and ".join(map(str, counts.values()))


def _names_of_counts(model: PreTrainedModel, counts: Mapping[str, int]) -> dict[str, str]:
    """What the config of an encoder-decoder calls the number of blocks of each list: it is tried.

    Raises:
        ValueError: no number of the config changes one list alone.
    """
    found: dict[str, str] = {}
    for name, value in vars(model.config).items():
        if type(value) is not int or not any(word in name for word in _OF_BLOCKS):
            continue
        try:
            longer = copy.deepcopy(model.config)
            setattr(longer, name, value + 1)
            long = built(model, type(model.config).from_dict(longer.to_dict()))
            made = {each: len(_list(long, each)) for each in counts}
        except BUILD_ERRORS:
            continue
        changed = [each for each in counts if made[each] != counts[each]]
        if len(changed) == 1 and made[changed[0]] == counts[changed[0]] + 1:
            found.setdefault(changed[0], name)
    if found.keys() != counts.keys():
        missing = ", ".join(name for name in counts if name not in found)
        raise ValueError(
            f"which number in the config of this {type(model).__name__} tells the blocks of {missing} "
            "is not known: none changes that list alone. Heads and neurons can go from it: "
            "hf_sparse.shrink_."
        )
    return {name: found[name] for name in counts}


def _shortened(config: Any, kept: Mapping[str, Sequence[int]]) -> Any:
    """The config of a model with some of the blocks, as a file of it is read."""
    short = copy.deepcopy(config)
    shorten_(short, kept)
    return type(config).from_dict(short.to_dict())


def shorten_(config: Any, kept: Mapping[str, Sequence[int]]) -> None:
    """Let a config tell some of its blocks: their number, lists with an entry for each, indices.

    Args:
        config: of the model.
        kept: the blocks of each list, by what the config calls their number. Lists of entries are cut
            where there is one list of blocks; of several it is not known which one they are about.
    """
    if len(kept) == 1:
        [(count_name, numbers)] = kept.items()
        _cut_lists_(config, getattr(config, count_name), numbers)
    for count_name, numbers in kept.items():
        setattr(config, count_name, len(numbers))


def _cut_lists_(config: Any, count: int, kept: Sequence[int]) -> None:
    for name, value in list(vars(config).items()):
        of_blocks = not name.startswith("_") and any(word in name for word in _OF_BLOCKS)
        if not of_blocks or not isinstance(value, list | tuple):
            continue
        if len(value) == count:
            setattr(config, name, type(value)(value[number] for number in kept))
        elif all(type(item) is int and 0 <= item < count for item in value):
            setattr(config, name, type(value)(kept.index(item) for item in value if item in kept))


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
