"""Fewer experts: what a mixture holds for each of them, and how model and config lose some.

No family is known here by name. Which tensors have an entry for each expert (the stacked matrices,
rows and biases of routers, corrections of their scores) transformers tells itself: models are built
from the config with all experts and with fewer, without values, and compared tensor by tensor.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_sparse.structure.built import BUILD_ERRORS, built, configs_in, own_configs
from hf_sparse.structure.experts import ExpertStack
from hf_sparse.structure.layers import find_stacks
from hf_sparse.structure.mixture_config import Routing, routing_of, told_counts
from hf_sparse.structure.modules_described import described

# The change of a tensor: the path of its module, its name, and the dimension that experts are in.
Place = tuple[str, str, int]


@dataclass(frozen=True)
class Mixture:
    """The experts of one block.

    Attributes:
        name: of the module that holds them.
        stack: their matrices.
    """

    name: str
    stack: ExpertStack

    @property
    def around(self) -> str:
        """The name of the module that routes to them."""
        return self.name.rpartition(".")[0]

    @property
    def zero(self) -> Tensor:
        """Which experts give nothing, all their weights and biases being zero, `(experts,)`."""
        zero = torch.ones(self.stack.number, dtype=torch.bool)
        for name in self.stack.parameters:
            for held in (name, f"{name}_bias"):
                tensor = getattr(self.stack.module, held, None)
                if tensor is not None:
                    own = tensor.detach()[: self.stack.number]
                    zero &= (own == 0).flatten(1).all(dim=1).cpu()
        return zero


@dataclass(frozen=True)
class Mixtures:
    """A model whose experts can go.

    Attributes:
        model: the model.
        mixtures: its mixtures, in order.
        number: of experts in each.
        routing: how many of them a token gets, and from how many groups.
    """

    model: PreTrainedModel
    mixtures: tuple[Mixture, ...]
    number: int
    routing: Routing

    @classmethod
    def of(cls, model: PreTrainedModel) -> Mixtures:
        """Find the experts of a model.

        Raises:
            ValueError: it has none that are stacked, different numbers of them, or some that are not
                where its config tells them; routers choose in a way that is not known.
        """
        kind = type(model).__name__
        stacks = [(name, ExpertStack.of(module)) for name, module in model.named_modules()]
        known = [(name, stack) for name, stack in stacks if stack is not None]
        if any(stack.below for _, stack in known):
            raise ValueError(
                f"the experts of this {kind} lie one below the other in 2-D parameters, from which "
                "whole ones cannot be taken out; wanted experts stacked in 3-D parameters. Other "
                "zeros can be had: hf_sparse.prune_ with SparsityConfig('2:4')."
            )
        mixtures = tuple(Mixture(name, stack) for name, stack in known if stack.can_go)
        if not mixtures:
            raise ValueError(
                f"no experts were found in this {kind}; wanted a mixture of experts whose matrices are "
                "stacked in 3-D parameters, as transformers 5 holds them. Of a dense model heads, "
                "neurons and blocks can go: hf_sparse.shrink_, hf_sparse.drop_blocks_."
            )
        numbers = sorted({mixture.stack.number for mixture in mixtures})
        if len(numbers) > 1:
            raise ValueError(
                f"the mixtures of this {kind} have {numbers} experts; wanted as many in each, which is "
                "what the config of a family tells."
            )
        _check_own(mixtures)
        found = cls(model, mixtures, numbers[0], routing_of(model, mixtures[0].around))
        found._check_fixed()
        return found

    def check(self, count: int) -> None:
        """Refuse a number of experts that a model cannot be left with, before any work.

        Args:
            count: of experts that each mixture keeps.

        Raises:
            ValueError: why, and the nearest number that it can be left with.
        """
        reason = self.routing.refusal(count)
        problem = self._places(count) if reason is None else reason
        if not isinstance(problem, str):
            return
        able = [
            other
            for other in sorted(range(1, self.number), key=lambda n: (abs(n - count), -n))
            if self.routing.refusal(other) is None
        ]
        nearest = next((other for other in able if not isinstance(self._places(other), str)), None)
        told = (
            "no smaller number of experts is possible"
            if nearest is None
            else f"the nearest that is possible is {nearest} (remove {self.number - nearest})"
        )
        raise ValueError(
            f"{count} of {self.number} experts cannot be what this {type(self.model).__name__} keeps: "
            f"{problem}; {told}."
        )

    def keep_(self, kept: Sequence[Sequence[int]]) -> None:
        """Remove all experts but those of these numbers, in ascending order.

        Args:
            kept: for each mixture, as many as for the others.

        Raises:
            ValueError: as `check`. Nothing has changed then.
        """
        count = len(kept[0])
        self.check(count)
        places, values = self._found(count)
        chosen = {
            mixture.name: torch.tensor(own)
            for mixture, own in zip(self.mixtures, kept, strict=True)
        }
        for path, name, dim in places:
            own = chosen[self._owner(path).name]
            _select_(self.model.get_submodule(path), name, own, dim)
        for path, name, value in values:
            setattr(self.model.get_submodule(path), name, value)
        names = told_counts(self.model.config, self.number)
        for config in own_configs(self.model):
            for name in names & vars(config).keys():
                if getattr(config, name) == self.number:
                    setattr(config, name, count)

    def holders(self, count: int) -> list[tuple[nn.Module, str]]:
        """The tensors with an entry for each expert: their modules and names.

        Args:
            count: of experts, a smaller number that `check` allows.
        """
        return [(self.model.get_submodule(path), name) for path, name, _ in self._found(count)[0]]

    @contextmanager
    def kept(self, kept: Sequence[Sequence[int]]) -> Iterator[None]:
        """As `keep_`, for a while: afterwards the model has all its experts again."""
        self.check(len(kept[0]))
        holders = self.holders(len(kept[0]))
        holders += [
            (self.model.get_submodule(p), name) for p, name, _ in self._found(len(kept[0]))[1]
        ]
        before = [(module, name, getattr(module, name)) for module, name in holders]
        names = told_counts(self.model.config, self.number)
        configs = own_configs(self.model)
        told = [(c, n, getattr(c, n)) for c in configs for n in names & vars(c).keys()]
        try:
            self.keep_(kept)
            yield
        finally:
            for holder, name, value in [*before, *told]:
                setattr(holder, name, value)

    def router(self, mixture: Mixture) -> Tensor | None:
        """A router's rows for its experts, `(experts, hidden)`; None if it is not one matrix."""
        places, _ = self._found(self._other)
        rows = [
            getattr(self.model.get_submodule(path), name)
            for path, name, dim in places
            if self._owner(path) == mixture and path != mixture.name and dim == 0
        ]
        matrices = [tensor for tensor in rows if tensor.ndim == 2 and tensor.shape[1] > 1]
        return matrices[0] if len(matrices) == 1 else None

    @property
    def _other(self) -> int:
        """A smaller number of experts that can be built."""
        able = range(self.number - 1, 0, -1)
        return next(
            count
            for count in able
            if self.routing.refusal(count) is None and not isinstance(self._places(count), str)
        )

    @cached_property
    def _whole(self) -> dict[str, Any]:
        return dict(described(built(self.model, self.config(self.number))))

    @cached_property
    def _known(self) -> dict[int, Any]:
        return {}

    def config(self, count: int) -> Any:
        """The model's config with another number of experts, as a file of it is read."""
        config = copy.deepcopy(self.model.config)
        names = told_counts(config, self.number)
        for part in configs_in(config):
            for name in names & vars(part).keys():
                if getattr(part, name) == self.number:
                    setattr(part, name, count)
        return type(config).from_dict(config.to_dict())

    def _places(self, count: int) -> Any:
        """What `_found` gives; a text if transformers builds no such model."""
        if count not in self._known:
            try:
                self._known[count] = self._compared(count)
            except BUILD_ERRORS as error:
                self._known[count] = f"transformers builds no such model ({error})"
        return self._known[count]

    def _found(self, count: int) -> tuple[list[Place], list[tuple[str, str, Any]]]:
        """The tensors with an entry for each expert; attributes of modules and their new values."""
        found: tuple[list[Place], list[tuple[str, str, Any]]] = self._places(count)
        return found

    def _compared(self, count: int) -> tuple[list[Place], list[tuple[str, str, Any]]] | str:
        fewer = dict(described(built(self.model, self.config(count))))
        if fewer.keys() != self._whole.keys():
            return "transformers builds other modules then"
        places: list[Place] = []
        values: list[tuple[str, str, Any]] = []
        for path, (shapes, told) in self._whole.items():
            other_shapes, others = fewer[path]
            if shapes.keys() != other_shapes.keys() or told.keys() != others.keys():
                return f"transformers builds another {path or 'model'} then"
            for name, shape in shapes.items():
                if shape == other_shapes[name]:
                    continue
                dim = _changed(shape, other_shapes[name], self.number, count)
                if dim is None or self._owner(path) is None:
                    return f"it is not known which part of {path}.{name} belongs to which expert"
                places.append((path, name, dim))
            module = self.model.get_submodule(path)
            values += [
                (path, name, others[name])
                for name, value in told.items()
                if value != others[name] and vars(module).get(name) == value
            ]
        return self._missing(places) or (places, values)

    def _missing(self, places: Iterable[Place]) -> str | None:
        """What is wrong if the stacks are not among the tensors, or have other shapes in the model."""
        found = {f"{path}.{name}": (path, name, dim) for path, name, dim in places}
        for mixture in self.mixtures:
            for name in mixture.stack.parameters:
                if f"{mixture.name}.{name}" not in found:
                    return f"no setting of its config tells how many experts {mixture.name} has"
        for path, name, dim in found.values():
            tensor = getattr(self.model.get_submodule(path), name)
            if tensor.ndim <= dim or tensor.shape[dim] != self.number:
                return f"{path}.{name} is not as its config tells"
        return None

    def _owner(self, path: str) -> Mixture:
        """The mixture that a module belongs to, which routes to it; None if none or several do."""
        own = [m for m in self.mixtures if f"{path}.".startswith(f"{m.around}.")]
        if not own:
            blocks = [
                f"{stack.name}.{n}."
                for stack in find_stacks(self.model)
                for n in range(len(stack.blocks))
            ]
            prefix = next((block for block in blocks if f"{path}.".startswith(block)), None)
            own = [m for m in self.mixtures if prefix is not None and m.name.startswith(prefix)]
        return own[0] if len(own) == 1 else None  # type: ignore[return-value]

    def _check_fixed(self) -> None:
        """Refuse tables that send tokens to experts by number: they would point to others."""
        for mixture in self.mixtures:
            around = self.model.get_submodule(mixture.around)
            for name, tensor in [*around.named_parameters(), *around.named_buffers()]:
                if not tensor.is_floating_point() and tensor.numel() > 1:
                    raise ValueError(
                        f"{mixture.around}.{name} is a table of whole numbers, by which tokens are "
                        "sent to experts: it would name experts that are gone. Wanted routers that "
                        "choose by scores."
                    )


def _changed(shape: Sequence[int], other: Sequence[int], number: int, count: int) -> int | None:
    """The one dimension in which two shapes differ, by the numbers of experts; None if it is none."""
    dims = [
        dim for dim, sizes in enumerate(zip(shape, other, strict=False)) if sizes[0] != sizes[1]
    ]
    if len(shape) != len(other) or len(dims) != 1:
        return None
    return dims[0] if (shape[dims[0]], other[dims[0]]) == (number, count) else None


def _select_(module: nn.Module, name: str, chosen: Tensor, dim: int) -> None:
    """Give a module some of the entries of a parameter or a buffer."""
    tensor = getattr(module, name)
    value = tensor.data.index_select(dim, chosen.to(tensor.device))
    if isinstance(tensor, nn.Parameter):
        value = nn.Parameter(value, requires_grad=tensor.requires_grad)
    setattr(module, name, value)


def _check_own(mixtures: Sequence[Mixture]) -> None:
    """Refuse mixtures that share weights: what is removed from one would be missing in the other."""
    owners: dict[int, str] = {}
    for mixture in mixtures:
        for parameter in mixture.stack.module.parameters():
            other = owners.setdefault(id(parameter), mixture.name)
            if other != mixture.name:
                raise ValueError(
                    f"{mixture.name} shares a weight with {other}; wanted experts of their own in each "
                    "block. Copy the shared modules first (copy.deepcopy)."
                )
