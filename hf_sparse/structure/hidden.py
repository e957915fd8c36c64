"""A smaller hidden size: which entries of which tensors are features of the residual stream.

No family is known here by name. Which dimensions are hidden ones transformers tells itself: models are
built from the config and from one with a smaller hidden size, without values, and compared tensor by
tensor. Heads keep their size. Where the family's config takes it from the hidden size (GPT-2, OPT,
BERT), heads go along: as many as make the hidden size that is left.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_sparse.structure.built import BUILD_ERRORS, built, own_configs
from hf_sparse.structure.layers import find_stacks
from hf_sparse.structure.modules_described import described
from hf_sparse.structure.parts import NEURONS, full_size, head_size
from hf_sparse.structure.units import find_units

# How many sizes are tried for one that a config can tell.
_TRIED = 6
# Settings that are the hidden size by another name where they have its value.
_SAME = ("word_embed_proj_dim", "embedding_size")


@dataclass(frozen=True)
class HiddenPlan:
    """How a model gets a smaller hidden size.

    Attributes:
        model: the model.
        size: its hidden size.
        left: that of what is left.
        settings: of the config, with their new values.
        heads: how many heads each block keeps; None: all of them.
        shapes: of every tensor then, by module and name.
        values: of modules then, likewise.
    """

    model: PreTrainedModel
    size: int
    left: int
    settings: Mapping[str, Any]
    heads: int | None
    shapes: Mapping[str, Mapping[str, Any]]
    values: Mapping[str, Mapping[str, Any]]

    @classmethod
    def of(cls, model: PreTrainedModel, left: int) -> HiddenPlan:
        """Find out how a model can be left with some of its hidden features, before any work.

        Raises:
            ValueError: as `hidden_size_of`; or the config cannot tell this size: the message tells the
                nearest that it can.
        """
        size = hidden_size_of(model)
        reason = cls._possible(model, size, left)
        if isinstance(reason, HiddenPlan):
            return reason
        sizes = _sizes(model.config, size, left)
        nearest = next(
            (n for n in sizes if isinstance(cls._possible(model, size, n), HiddenPlan)), None
        )
        told = (
            "Heads, neurons and blocks can go from it: hf_sparse.shrink_, hf_sparse.drop_blocks_"
            if nearest is None
            else f"The nearest hidden size that it can tell is {nearest} (remove {size - nearest})"
        )
        raise ValueError(
            f"a hidden size of {left} instead of {size} cannot be told by a config of type "
            f"'{model.config.model_type}': {reason}. {told}."
        )

    @classmethod
    def _possible(cls, model: PreTrainedModel, size: int, left: int) -> HiddenPlan | str:
        """The plan; a text if there is none."""
        free = cls._tried(model, size, left, None)
        if isinstance(free, HiddenPlan):
            return free
        head = head_size(model.config)
        if left % head:
            return f"{free}, and it is no multiple of {head}, the size of a head"
        return cls._tried(model, size, left, left // head)

    @classmethod
    def _tried(
        cls, model: PreTrainedModel, size: int, left: int, heads: int | None
    ) -> HiddenPlan | str:
        """The plan with all heads, or some, if what is cut has the shapes that transformers builds."""
        settings = _settings(model.config, left, heads)
        try:
            small = dict(described(built(model, _with(model.config, settings))))
        except BUILD_ERRORS as error:
            told = " ".join(str(error).split()).rstrip(".")
            return f"transformers builds no such model ({told})"
        plan = cls(
            model,
            size,
            left,
            settings,
            heads,
            {path: shapes for path, (shapes, _) in small.items()},
            {path: values for path, (_, values) in small.items()},
        )
        try:
            trial: Any = built(model, model.config)
            plan._check_values(trial)
            ran = _runs(trial)
            if heads is not None:
                numbers = [torch.arange(heads)] * len(find_units(trial))
                plan._keep_heads_(trial, numbers)
            plan._cut_(trial, torch.arange(left))
        except BUILD_ERRORS as error:
            return str(error).rstrip(".")
        if ran and not _runs(trial):
            return "what its layers give and take would have different sizes"
        return plan

    def apply_(self, features: Tensor, heads: Sequence[Tensor] | None) -> None:
        """Keep some hidden features, and of each block some heads, by their numbers in order."""
        if heads is not None:
            self._keep_heads_(self.model, heads)
        self._cut_(self.model, features)
        for config in own_configs(self.model):
            if type(config) is type(self.model.config):
                for name, value in self.settings.items():
                    setattr(config, name, value)

    def cuts(self, path: str) -> bool:
        """Whether a module's tensors of one dimension lose hidden features, if it has any."""
        vectors = [shape for shape in self.shapes[path].values() if isinstance(shape, tuple)]
        return all(shape == (self.left,) for shape in vectors if len(shape) == 1)

    def _keep_heads_(self, model: Any, heads: Sequence[Tensor]) -> None:
        for units, numbers in zip(find_units(model), heads, strict=True):
            size = units.size
            if size.heads != size.key_heads:
                raise ValueError(
                    "several heads of queries share one of keys, and heads would go along"
                )
            units.keep_(numbers, numbers, torch.arange(size.neurons))

    def _cut_(self, model: nn.Module, features: Tensor) -> None:
        """Keep features in all hidden dimensions.

        Raises:
            ValueError: another dimension would change, too. Nothing has changed then.
        """
        modules = dict(model.named_modules())
        if modules.keys() != self.shapes.keys():
            raise ValueError("transformers builds other modules then")
        plans = []
        inside = tuple(f"{stack.name}." for stack in find_stacks(model))
        for path, module in modules.items():
            tensors = [
                *module.named_parameters(recurse=False),
                *module.named_buffers(recurse=False),
            ]
            for name, tensor in tensors:
                wanted = self.shapes[path].get(name)
                if wanted is None or len(wanted) != tensor.ndim:
                    raise ValueError(f"{path}.{name} would be another tensor")
                dims = [d for d in range(tensor.ndim) if tensor.shape[d] != wanted[d]]
                if any((tensor.shape[d], wanted[d]) != (self.size, self.left) for d in dims):
                    raise ValueError(
                        f"{path}.{name} would be {wanted} instead of {tuple(tensor.shape)}"
                    )
                of_heads = len(dims) > 1 or (bool(dims) and _is_beside_projections(modules, path))
                if of_heads and self.heads is None and path.startswith(inside):
                    raise ValueError(f"{path}.{name} would lose heads, or parts of them")
                plans.append((module, name, tensor, dims))
        made: dict[int, Any] = {}
        for module, name, tensor, dims in plans:
            if dims:  # tied weights stay tied
                made[id(tensor)] = made.get(id(tensor)) or (tensor, _cut(tensor, dims, features))
                setattr(module, name, made[id(tensor)][1])
        for path, module in modules.items():
            self._set_values_(path, module)

    def _set_values_(self, path: str, module: nn.Module) -> None:
        """Give a module the numbers that transformers gives it then."""
        own = vars(module)
        for name, value in self.values[path].items():
            if type(own.get(name)) not in (int, float) or own[name] == value:
                continue
            for buffer in module.buffers(recurse=False):
                if (
                    buffer.ndim == 0
                    and not buffer.is_meta
                    and torch.isclose(
                        buffer.double(),
                        torch.tensor(float(own[name]), dtype=torch.float64),
                        rtol=1e-2,
                    )
                ):
                    buffer.fill_(value)  # the same number, once more
            setattr(module, name, value)
        if getattr(module, "normalized_shape", None) == (self.size,):
            module.normalized_shape = (self.left,)  # type: ignore[assignment]

    def _check_values(self, model: nn.Module) -> None:
        """Refuse numbers of modules that would change beside the hidden size: heads keep theirs.

        Raises:
            ValueError: the first of them.
        """
        moved = {(self.size, self.left)}
        for path, module in model.named_modules():
            for name, value in self.values.get(path, {}).items():
                old = vars(module).get(name)
                if type(old) not in (int, float) or old == value or (old, value) in moved:
                    continue
                in_heads = "head_dim" in name or ("head_size" in name and name != "all_head_size")
                if type(old) is int and self.heads is not None and not in_heads:
                    continue
                if not isinstance(module, nn.Embedding):
                    raise ValueError(f"{path}.{name} would be {value} instead of {old}")


def hidden_size_of(model: PreTrainedModel) -> int:
    """The hidden size of a model that can have a smaller one.

    Raises:
        ValueError: its config tells none, or its blocks have sizes of their own.
    """
    kind = type(model).__name__
    if getattr(model.config, "is_heterogeneous", False):
        raise ValueError(
            f"the config of this {kind} gives blocks sizes of their own by number "
            "(per_layer_config); wanted one that tells the same of all blocks."
        )
    size = getattr(model.config, "hidden_size", None)
    heads = getattr(model.config, "num_attention_heads", None)
    if not isinstance(size, int) or not isinstance(heads, int):
        raise ValueError(
            f"the config of this {kind} tells hidden_size={size!r} and "
            f"num_attention_heads={heads!r}; wanted numbers: a model with one residual stream, "
            "whose width the config tells, and blocks with as many heads each."
        )
    if getattr(model.config, "block_sizes", None) is not None:
        raise ValueError(
            f"the blocks of this {kind} have sizes of their own. Shrink the hidden size first."
        )
    return size


@torch.no_grad()
def _runs(model: nn.Module) -> bool:
    """Whether a model without values takes token ids: its layers fit together."""
    try:
        with torch.device("meta"):
            model.eval()(input_ids=torch.zeros(1, 4, dtype=torch.long), use_cache=False)
    except BUILD_ERRORS:
        return False
    return True


def _is_beside_projections(modules: Mapping[str, nn.Module], path: str) -> bool:
    """Whether a module is a norm inside attention, between its projections: what it takes is heads."""
    if "Norm" not in type(modules[path]).__name__:
        return False
    beside = modules[path.rpartition(".")[0]].children()
    return sum(isinstance(module, nn.Linear) for module in beside) > 2


def _cut(tensor: Tensor, dims: Sequence[int], features: Tensor) -> Tensor:
    value = tensor.data
    for dim in dims:
        value = value.index_select(dim, features.to(value.device))
    if isinstance(tensor, nn.Parameter):
        return nn.Parameter(value, requires_grad=tensor.requires_grad)
    return value


def _sizes(config: Any, size: int, left: int) -> list[int]:
    """The hidden sizes nearest to one that heads, or their number, divide."""
    steps = (head_size(config), config.num_attention_heads)
    able = {other for step in steps for other in range(step, size, step)}
    return sorted(able, key=lambda other: (abs(other - left), -other))[:_TRIED]


def _settings(config: Any, left: int, heads: int | None) -> dict[str, Any]:
    """The settings of a config that change; sizes that follow from the hidden size are told."""
    size, head = config.hidden_size, head_size(config)
    found: dict[str, Any] = {"hidden_size": left}
    found |= {name: left for name in _SAME if getattr(config, name, None) == size}
    for name in NEURONS:
        if hasattr(config, name) and getattr(config, name) is None:
            found[name] = full_size(config).neurons
    if heads is not None:
        found["num_attention_heads"] = heads
        if getattr(config, "num_key_value_heads", None) is not None:
            found["num_key_value_heads"] = heads
    elif left // config.num_attention_heads != head or getattr(config, "head_dim", None):
        found["head_dim"] = head
    return found


def _with(config: Any, settings: Mapping[str, Any]) -> Any:
    """A config with other settings, as a file of it is read."""
    changed = copy.deepcopy(config)
    for name, value in settings.items():
        setattr(changed, name, value)
    return type(config).from_dict(changed.to_dict())
