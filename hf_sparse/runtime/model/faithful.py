"""Whether the blocks are what their family's own code makes of the config: only those are compiled.

The compiler reads weights and the config; what the modules do with them it knows from the family.
So each block is compared with one that transformers builds from the same config on the meta device:
the same classes at the same places, the same attributes, parameters of the same shapes, no hooks.
Nothing is known here of any family: what a new version of transformers adds is compared, too.
"""

from __future__ import annotations

import copy
import functools
import numbers
from collections.abc import Iterator
from types import MethodType
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from hf_sparse.runtime.kernels.activation import activation_ref
from hf_sparse.runtime.model.description import ACTIVATION_NAMES, Blocks
from hf_sparse.runtime.model.exchanged import is_known, why_not_own, why_not_own_function
from hf_sparse.runtime.model.families import seen_by
from hf_sparse.runtime.model.plain import foreign_forward, why_instance_not_plain, why_not_plain
from hf_sparse.runtime.model.references import References, named, own_class
from hf_sparse.structure.parts import head_size, parts_of
from hf_sparse.structure.units import BlockUnits
from hf_sparse.upstream.torch import buffers_of, children_of, parameters_of
from hf_sparse.upstream.transformers.attention import (
    attention_function,
    experts_function,
    mask_function,
)
from hf_sparse.upstream.transformers.configs import NAME_OR_PATH
from hf_sparse.upstream.transformers.models import (
    EXPERTS_SETTING,
    KEPT_ON_MODULES,
    attention_of,
)

# Attributes that change no output of a model in eval mode, whatever they are.
_NO_MATTER = {
    "p",  # of dropout
    "dropout",
    "attention_dropout",
    "inplace",
    "gradient_checkpointing",
    *KEPT_ON_MODULES,
    "forward",  # `why_not_plain` looks at it
    "layer_idx",  # `_check_places`
    "config",  # `_check_part`
    *vars(nn.Module()),  # parameters, children, hooks, training
}
# Layers that do without a bias what they do with one; so do kernels.
_BIAS_OR_NONE = (nn.Linear, nn.LayerNorm)
_MERGE = (
    "Put back what transformers makes of the config; merge adapters, and remove parametrizations, "
    "before compiling."
)
_RESTORE = "Put back what was there, or undo the patch, before compiling."
# What may differ between a model's config and the copy that one of its stacks has.
_NO_MATTER_IN_COPIES = {
    "block_sizes",
    "use_cache",
    "dtype",
    "transformers_version",
    NAME_OR_PATH,
}
_GIVE_BACK = "Give it back what transformers made, or change the config and load the model anew."


def check_blocks(model: PreTrainedModel, family: Blocks) -> None:
    """Compare a model's blocks, and what runs them, with what transformers builds.

    Raises:
        ValueError: something differs; the message names the module, what it is, and what was wanted.
    """
    base: Any = model.base_model
    path, name = family.holder, family.list_name
    own = own_class(base)
    owner = _submodule(base, path)
    blocks = getattr(owner, name, None)
    references = References(own, model.config, family)
    wanted = references.model(0)
    config = _config_of(model, owner, wanted, wanted.get_submodule(path))
    prefix = "".join(f"{n}." for n, m in model.named_modules() if m is owner and n)
    _check_owner(owner, own if owner is base else type(wanted.get_submodule(path)), prefix)
    if type(blocks) is not nn.ModuleList or not len(blocks):
        raise ValueError(
            f"{prefix}{name} is a {named(type(blocks))}; wanted a ModuleList of blocks."
        )
    first = _blocks_in(references.block(0))[0]
    seen = seen_by(config, family)
    _check_activation(BlockUnits("", first, family, head_size(seen)).activation, family, config)
    classes = dict[type, str | None]()
    for index, block in enumerate(blocks):
        sized = _sized(references.block(index), block, family, config)
        _check_part(block, sized, f"{prefix}{name}.{index}", config, classes)
    if family.causal:
        _check_places(list(blocks), f"{prefix}{name}")


def _config_of(model: PreTrainedModel, owner: Any, reference: Any, wanted: Any) -> Any:
    """The config that the blocks have: the model's, or, where the family makes one, an equal copy."""
    config, base = model.config, model.base_model
    copied = reference.config is not getattr(wanted, "config", reference.config)
    for part in (base,) if copied else (base, owner):
        if vars(part).get("config", config) is not config:
            raise ValueError(
                f"{type(part).__name__}.config is not the config of the {type(model).__name__} around "
                "it, which the blocks are compiled by: make them the same object."
            )
    if not copied:
        return config
    found, expected = owner.config.to_dict(), wanted.config.to_dict()
    for name in sorted(found.keys() & expected.keys() - _NO_MATTER_IN_COPIES):
        if found[name] != expected[name]:
            raise ValueError(
                f"{type(owner).__name__}.config.{name} is {_short(found[name])}; the config of the "
                f"{type(model).__name__} around it makes it {_short(expected[name])}. {_GIVE_BACK}"
            )
    return owner.config


def why_other_attention(config: Any) -> str | None:
    """Why attention or experts are not the usual ones, if the user's own function computes them."""
    attention, experts = attention_of(config), getattr(config, EXPERTS_SETTING, None)
    for what, name, function in (
        ("attention", attention, attention_function(attention)),
        ("mask of attention", attention, mask_function(attention)),
        ("function of experts", experts, experts_function(experts)),
    ):
        found = None if function is None else why_not_own_function(function)
        if found is not None:
            return f"its {what} is '{name}', the function {found}"
    if attention == "sdpa" and getattr(config, "attn_logit_softcapping", None):
        # transformers 5.20 does so in silence; 5.24 runs such models by 'eager'.
        return (
            "its attention is 'sdpa', which leaves out the cap of the scores that its config tells"
        )
    return None


def check_parents(model: nn.Module, replaced: list[nn.Module]) -> None:
    """Raise a ValueError if a module around replaced ones has a `forward` of its own.

    Such a function mostly calls what was there before: the model that was given, not the compiled one.
    """
    parts = {id(part) for part in replaced}

    def visit(module: nn.Module, name: str) -> bool:
        inside = [
            visit(child, f"{name}.{key}" if name else key) for key, child in module.named_children()
        ]
        if id(module) in parts:
            return True
        if any(inside) and foreign_forward(module):
            raise ValueError(
                f"{name or type(module).__name__} has a forward of its own, which was put on the "
                "instance and would run the model that was given. Use a forward hook or a subclass."
            )
        return any(inside)

    visit(model, "")


def _submodule(base: nn.Module, path: str) -> nn.Module:
    try:
        return base.get_submodule(path)
    except AttributeError as error:
        raise ValueError(f"this {type(base).__name__} has no {path}: it was replaced.") from error


def _check_owner(owner: nn.Module, own: type[nn.Module], prefix: str) -> None:
    """What runs the blocks one after the other does it as the family does."""
    kind = type(owner)
    if kind.forward is not own.forward or not issubclass(kind, own):
        raise ValueError(
            f"{prefix.rstrip('.') or kind.__name__} is a {named(kind)} whose forward is not that of "
            f"{own.__name__}: it may run the blocks in another way. Compile a model of transformers' "
            "own class."
        )
    if (found := why_not_own_function(own.forward)) is not None:
        raise ValueError(
            f"{prefix.rstrip('.') or kind.__name__} is a {named(kind)}, whose forward was exchanged: "
            f"{found}. It may run the blocks in another way. {_RESTORE}"
        )


def _check_activation(activation: Any, family: Blocks, config: Any) -> None:
    """What transformers calls by this name may have been registered anew."""
    name = getattr(config, family.activation)
    x = torch.linspace(-6, 6, 49, dtype=torch.float32, device="cpu")
    with torch.no_grad():
        result = activation(x).double()
    wanted = torch.from_numpy(activation_ref(ACTIVATION_NAMES[name], x.numpy()))
    if not torch.allclose(result, wanted, atol=1e-5):
        raise ValueError(
            f"transformers' activation '{name}' is a {named(type(activation))} here, which computes "
            "something else: it was registered anew."
        )


def _sized(reference: Any, block: Any, family: Blocks, config: Any) -> Any:
    """The reference, as small as a block from which `hf_sparse.shrink_` removed heads or neurons."""
    smaller = None
    if parts_of(config) is None:  # of this family nothing is removed whole
        return reference
    for number, one in enumerate(_blocks_in(block)):
        try:
            units = BlockUnits("", one, family, head_size(config))
            whole = BlockUnits("", _blocks_in(reference)[number], family, head_size(config))
            pairs = zip(units.layers, whole.layers, strict=True)
            if any(type(a.module) is not type(b.module) for a, b in pairs):
                return reference  # the comparison tells why
            found, full = units.size, whole.size
        except (AttributeError, TypeError, ValueError, IndexError, ZeroDivisionError):
            return reference
        counts = list(zip(vars(found).values(), vars(full).values(), strict=True))
        removed = all(1 <= some <= every for some, every in counts) and found != full
        if removed and not found.heads % found.key_heads:
            smaller = smaller or copy.deepcopy(reference)
            kept = (torch.arange(some) for some, _ in counts)
            BlockUnits("", _blocks_in(smaller)[number], family, head_size(config)).keep_(*kept)
    return smaller or reference


def _blocks_in(item: Any) -> list[nn.Module]:
    """An item of the list of blocks is one, or ALBERT's group of several."""
    return list(getattr(item, "albert_layers", [item]))


def _check_part(
    found: nn.Module, wanted: nn.Module, place: str, config: Any, classes: dict[type, str | None]
) -> None:
    """Compare a module and what is in it with the reference's.

    `classes` tells what was exchanged in each class that was looked at.
    """
    kind, own = type(found), type(wanted)
    if own is nn.Dropout and kind is nn.Identity and why_not_plain(found) is None:
        return
    if kind is not own:
        plain = "a plain Linear" if own in (nn.Linear, Conv1D) else named(own)
        raise ValueError(f"{place} is a {named(kind)}; wanted {plain}. {_MERGE}")
    if not is_known(kind):
        raise ValueError(
            f"{place} is a {named(kind)}, which was put in place of transformers' own class: what it "
            "computes is not known."
        )
    if kind not in classes:
        classes[kind] = why_not_own(kind)
    reason = why_instance_not_plain(found)
    if reason is None and classes[kind] is not None:
        reason = f"is a {kind.__name__}, whose {classes[kind]}"
    if reason is not None:
        raise ValueError(
            f"{place} {reason}, which compiled blocks do not run. Remove it before compiling."
        )
    for what, names, own_names in (
        ("modules", children_of(found).keys(), children_of(wanted).keys()),
        ("parameters", _tensors(found), _tensors(wanted)),
    ):
        if names != own_names:
            differing = ", ".join(sorted(names ^ own_names))
            raise ValueError(
                f"{place} has other {what} than transformers' {own.__name__}: {differing}. {_MERGE}"
            )
    if "config" in vars(found) and vars(found)["config"] is not config:
        raise ValueError(
            f"{place}.config is not the config of the model, which the blocks are compiled by: make "
            "them the same object."
        )
    for name, value, expected in _differences(found, wanted):
        raise ValueError(f"{place}.{name} is {value}; its config makes it {expected}. {_GIVE_BACK}")
    for name, child in children_of(found).items():
        other = children_of(wanted)[name]
        if child is not None and other is not None:
            _check_part(child, other, f"{place}.{name}", config, classes)
        elif child is not other:
            raise ValueError(f"{place}.{name} is {child}; wanted {other}. {_GIVE_BACK}")


def _tensors(module: nn.Module) -> set[str]:
    """Names of the parameters and buffers that a module has itself."""
    tensors = {**parameters_of(module), **buffers_of(module)}
    free = {"bias"} if type(module) in _BIAS_OR_NONE else set()
    return {name for name, tensor in tensors.items() if tensor is not None} - free


def _differences(found: nn.Module, wanted: nn.Module) -> Iterator[tuple[str, str, str]]:
    """Attributes, and shapes of tensors, that differ: name, what it is, what was wanted."""
    mine, theirs = vars(found), vars(wanted)
    for name in sorted((mine.keys() | theirs.keys()) - _NO_MATTER):
        if name not in theirs:
            if hasattr(type(found), name):  # it hides what the class has
                yield name, _short(mine[name]), "that of its class"
        elif name not in mine:
            yield name, "not there", _short(theirs[name])
        elif not _same(mine[name], theirs[name]):
            yield name, _short(mine[name]), _short(theirs[name])
    shapes = {name: getattr(wanted, name).shape for name in _tensors(wanted)}
    bias: Any = parameters_of(found).get("bias")
    if bias is not None and "bias" not in shapes:  # of a layer that may have one
        shapes["bias"] = shapes["weight"][:1]
    for name, shape in shapes.items():
        if getattr(found, name).shape != shape:
            yield name, f"of the shape {tuple(getattr(found, name).shape)}", f"{tuple(shape)}"


def _same(one: Any, other: Any) -> bool:
    """Whether two attributes are equal; methods, of whichever object."""
    if isinstance(one, numbers.Number) and isinstance(other, numbers.Number):
        return one == other
    if type(one) is not type(other):
        return False
    if isinstance(one, MethodType):
        return one.__func__ is other.__func__
    if isinstance(one, functools.partial):
        return _same((one.func, one.args, one.keywords), (other.func, other.args, other.keywords))
    equal = one == other
    return equal if isinstance(equal, bool) else False


def _check_places(blocks: list[nn.Module], name: str) -> None:
    """Blocks that share a place in the cache would see each other's keys."""
    seen: dict[int, int] = {}
    for index, block in enumerate(blocks):
        for module in block.modules():
            place = vars(module).get("layer_idx")
            if place is not None and seen.setdefault(place, index) != index:
                raise ValueError(
                    f"{name}.{index} and {name}.{seen[place]} have the same layer_idx, {place}: they "
                    "share a place in the cache. Give each block a module and a number of its own."
                )


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) < 80 else f"{text[:77]}..."
