"""The targets of a config in a model: found once, where a call of the package begins, and handed down.

A config names layers by globs, or not at all, and pattern `head` has no size. `Targets.of` answers
for one model which layers these are, and how many features a head has.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from hf_sparse.configuration_sparse import SparsityConfig, check_config
from hf_sparse.patterns import Head, Pattern
from hf_sparse.structure.anatomy import FAMILIES, derived_parts, is_derived
from hf_sparse.structure.layers import (
    PRUNED_WITH,
    Stack,
    TargetLayer,
    by_identity,
    choose_layers,
    find_stacks,
    layers_of,
    matrices,
    promised_config,
)
from hf_sparse.structure.parts import PARTS, Parts, full_size, head_size, parts_of, sizes_in


@dataclass(frozen=True)
class Targets:
    """What a config makes sparse in a model.

    Attributes:
        config: as it was given; but its pattern has its size, and where the pattern means whole units
            its targets name their layers.
        layers: those that it makes sparse, each weight once, in the order of the model.
        stacks: the repeated blocks of the model.
        whole_units: whether the pattern means whole heads or neurons, that can be removed.
    """

    config: SparsityConfig
    layers: tuple[TargetLayer, ...]
    stacks: tuple[Stack, ...]
    whole_units: bool

    @classmethod
    def of(cls, model: nn.Module, config: SparsityConfig) -> Targets:
        """Find the targets of a config.

        Pattern `head` gets the size of the model's heads. Without targets, patterns mean units that
        can be removed whole (see `hf_sparse.shrink`): `head` an attention head, where it enters the
        projection behind attention (of grouped queries, a head of keys with all its queries);
        `column` and `row` a neuron of the feed-forward network, where it enters the layer `down` or
        leaves `up`; `expert` all matrices of an expert. The targets of a config that was found so are
        the same again.

        Args:
            model: any model. Weights shared by several names are listed under the first of them.
            config: its `targets` and `ignore` choose.

        Raises:
            ValueError: nothing matches the config's targets; it has none and the model has no
                repeated blocks; the model's config tells no head size; whole units are meant and the
                model's family is not known (`hf_sparse.structure.parts.PARTS`, `anatomy.FAMILIES`), or
                is one whose heads have to stay; the model is compiled.
        """
        check_config(config)
        if config.targets is None and config.pattern.whole_matrices:
            config = _with_experts(config, model)
        whole = config.targets is None and config.pattern.unit_layer is not None
        completed = _with_units(config, model) if whole else _with_size(config, model)
        stacks = find_stacks(model)
        return cls(completed, tuple(choose_layers(model, stacks, completed)), tuple(stacks), whole)

    @classmethod
    def in_blocks(cls, model: nn.Module) -> Targets:
        """Every layer in the repeated blocks, which nothing is asked of.

        Raises:
            ValueError: there are none, or the model is compiled.
        """
        return cls.of(model, SparsityConfig("unstructured", 0.0))

    @property
    def pattern(self) -> Pattern:
        """The pattern of the config, with its size."""
        return self.config.pattern

    @property
    def blocks(self) -> list[TargetLayer]:
        """Every layer in the repeated blocks, each weight once."""
        return layers_of(self.stacks)

    @property
    def others(self) -> list[TargetLayer]:
        """The layers in the repeated blocks that are no targets."""
        own = {(id(layer.parameter), layer.expert) for layer in self.layers}
        return [layer for layer in self.blocks if (id(layer.parameter), layer.expert) not in own]

    def by_parameter(self, model: nn.Module) -> dict[str, tuple[TargetLayer, ...]]:
        """The layers, under every name that their parameters have in the model's state dict."""
        return by_parameter(model, self.layers)


def by_parameter(
    model: nn.Module, layers: Iterable[TargetLayer]
) -> dict[str, tuple[TargetLayer, ...]]:
    """Layers, under every name that their parameters have in the model's state dict."""
    held = by_identity(layers)
    return {
        name: held[id(parameter)]
        for name, parameter in model.named_parameters(remove_duplicate=False)
        if id(parameter) in held
    }


def _with_units(config: SparsityConfig, model: nn.Module) -> SparsityConfig:
    """A config of whole heads or neurons with the layers that these enter or leave."""
    pattern, described = config.pattern, getattr(model, "config", None)
    if isinstance(pattern, Head) and pattern.head_dim is not None and not pattern.inputs:
        raise ValueError(
            f"pattern '{pattern}' needs targets: name the layers whose rows are heads, such as "
            "targets=['q_proj', 'k_proj', 'v_proj']. Or take 'head', for whole attention heads."
        )
    known = _known_parts(model)
    if not known:
        raise ValueError(
            f"pattern '{pattern}' needs targets for a {type(model).__name__}: where its heads and "
            f"neurons are is known of {', '.join((*PARTS, *FAMILIES))}. Name the layers, such as "
            "targets=['down_proj'] for 'column'."
        )
    unit_layer = str(pattern.unit_layer)
    if unit_layer == "out" and known[0].fixed:
        raise ValueError(
            f"no head of this {type(model).__name__} can go: {known[0].fixed}. Take neurons, pattern "
            "'column', or whole blocks: hf_sparse.drop_blocks_."
        )
    if unit_layer == "up" and known[0].joined:
        raise ValueError(
            f"a row of {known[0].up} is half of a neuron of {type(model).__name__}, whose gate is in "
            "the same layer. Take pattern 'column', for whole neurons."
        )
    if isinstance(pattern, Head):
        pattern = Head(pattern.head_dim or head_size(described) * _queries(described), True)
    # The number before the path keeps out what ends alike inside the block.
    targets = {f"*[0-9].{getattr(parts, unit_layer)}": None for parts in known}
    return replace(config, pattern=pattern, targets=tuple(targets))


def _with_experts(config: SparsityConfig, model: nn.Module) -> SparsityConfig:
    """A config of whole experts with the matrices of all of them."""
    stacked = [layer for layer in matrices(model) if layer.stack is not None]
    found = [one.parameter_name for one in stacked if one.stack is not None and one.stack.can_go]
    if not found:
        raise ValueError(
            f"pattern '{config.pattern}' means whole experts, and no experts were found in this "
            f"{type(model).__name__}; wanted a mixture whose experts are stacked in 3-D parameters, as "
            "transformers 5 holds them."
        )
    # The module's own name and that of the parameter, which are the same in all blocks.
    targets = {".".join(name.split(".")[-2:]): None for name in found}
    return replace(config, targets=tuple(targets))


def _known_parts(model: nn.Module) -> list[Parts]:
    """Where the parts of blocks are, an entry for each kind of block; none if that is not known."""
    listed = parts_of(getattr(model, "config", None))
    if listed is not None:
        return [listed]
    if not is_derived(getattr(model, "config", None)):
        return []
    return list(dict.fromkeys(parts for _, _, parts in derived_parts(model)))


def _with_size(config: SparsityConfig, model: nn.Module) -> SparsityConfig:
    """A config whose pattern has the size of the model's heads, if it has none and needs one."""
    pattern = config.pattern
    if pattern.unit_layer is None or pattern.is_sized:
        return config
    try:
        head_dim = head_size(getattr(model, "config", None))
    except (AttributeError, TypeError) as error:
        raise ValueError(
            f"the config of {type(model).__name__} tells no head size. Write the rows of one "
            "head into the pattern, as 'head:64'."
        ) from error
    return replace(config, pattern=pattern.with_size(head_dim))


def _queries(config: Any) -> int:
    """How many heads of queries share a head of keys, in every block."""
    sizes = sizes_in(config)
    groups = {size.heads // size.key_heads for size in sizes} if sizes else set()
    if len(groups) > 1:
        raise ValueError(
            f"heads of keys serve {sorted(groups)} heads of queries in different blocks, so that "
            "'head' is no unit of all of them. Name a size and targets: 'head_in:64' for one head of "
            "queries, targets=['o_proj']."
        )
    if groups:
        return groups.pop()
    size = full_size(config)
    return size.heads // size.key_heads


def promised_layers(model: nn.Module) -> set[int] | None:
    """The layers that a model's promise of zeros is about, by id; None: it has none."""
    promised = promised_config(model)
    if promised is None:
        return None
    try:
        return {id(layer.module) for layer in Targets.of(model, promised).layers}
    except ValueError:  # of layers that are gone
        return set()


def renew_promise_(model: nn.Module, before: set[int] | None) -> None:
    """Forget a model's promise of zeros where it names other layers since blocks were removed.

    Args:
        model: with fewer blocks.
        before: what `promised_layers` gave for all of them.
    """
    if before is None:
        return
    left = before & {id(module) for module in model.modules()}
    if not left or promised_layers(model) != left:
        vars(model).pop(PRUNED_WITH, None)
        if getattr(model.config, "sparsity_config", None) is not None:
            model.config.sparsity_config = None  # type: ignore[union-attr]
