"""The parts of a model that sparsity is about: its repeated blocks and its weight matrices.

Blocks are the items of the outermost ModuleLists; no model's family needs to be known.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from hf_sparse.configuration_sparse import SparsityConfig, matches
from hf_sparse.patterns import Pattern
from hf_sparse.structure.experts import ExpertStack, routes
from hf_sparse.upstream.transformers.models import tied_names

# The attribute of a model that remembers the SparsityConfig of the last `prune_`.
PRUNED_WITH = "_hf_sparse_pruned_with"
# The attribute that models have which `hf_sparse.compile` made.
PACKED = "_hf_sparse_packed"
# What PEFT puts into the names of layers that it adapts.
_ADAPTED = ".base_layer"


@dataclass(frozen=True)
class TargetLayer:
    """A matrix of weights that is to be sparse: that of a layer, or of one expert in a stack.

    Attributes:
        name: of the layer, `model.layers.0.mlp.up_proj`; of an expert's matrix the name of its
            parameter and the expert's number, `model.layers.0.mlp.experts.down_proj.3`.
        module: that holds the weight; of an expert, that of all of them.
        stack: the experts that it is one of; None: the weight is the module's own.
        attribute: the name of the weight in the module.
        expert: its number.
    """

    name: str
    module: nn.Module
    stack: ExpertStack | None = None
    attribute: str = "weight"
    expert: int = 0

    @property
    def weight_name(self) -> str:
        """The name of the weight in reports."""
        return self.parameter_name if self.stack is None else self.name

    @property
    def parameter_name(self) -> str:
        """The name in the model's state dict of the parameter that holds the weight."""
        if self.stack is not None:
            return self.name.rpartition(".")[0]
        return f"{self.name}.{self.attribute}" if self.name else self.attribute

    @property
    def own_names(self) -> tuple[str, ...]:
        """The names that globs may match: without PEFT adapters; of an expert also without number."""
        name = self.name.replace(_ADAPTED, "")
        return (name,) if self.stack is None else (name, name.rpartition(".")[0])

    @property
    def transposed(self) -> bool:
        """Whether the weight is stored `(in_features, out_features)`, as GPT-2's Conv1D does."""
        if self.stack is None:
            return is_conv1d(self.module)
        return self.attribute in self.stack.turned

    @property
    def is_plain(self) -> bool:
        """Whether the weight is a parameter of its own, `(out_features, in_features)`."""
        return self.stack is None and not self.transposed

    @property
    def parameter(self) -> nn.Parameter:
        """What the module stores: the weight, or those of all experts."""
        weight = getattr(self.module, self.attribute)
        if not isinstance(weight, nn.Parameter):
            raise ValueError(
                f"{self.weight_name} is no parameter, it is computed from others (a mask of "
                "torch.nn.utils.prune, or a parametrization). Make it permanent first: "
                "torch.nn.utils.prune.remove, or torch.nn.utils.parametrize.remove_parametrizations."
            )
        return weight

    @property
    def weight(self) -> Tensor:
        """The weight as `(out_features, in_features)`: a view, so that writes reach the model."""
        # `data` comes last: torch refuses writes to views of weights of inference mode.
        return self.part(self.parameter).data

    @property
    def bias(self) -> Tensor | None:
        """What is added to the outputs, `(out_features,)`."""
        if self.stack is None:
            return getattr(self.module, "bias", None)
        return self.stack.bias(self.attribute, self.expert)

    def part(self, tensor: Tensor) -> Tensor:
        """What belongs to this weight in a tensor like the parameter, `(out_features, in_features)`."""
        own = self.stored(tensor)
        return own.T if self.transposed else own

    def stored(self, tensor: Tensor) -> Tensor:
        """What belongs to this weight in a tensor like the parameter, as it is stored."""
        return tensor if self.stack is None else self.stack.own(tensor, self.expert)


def is_conv1d(module: nn.Module) -> bool:
    """Whether the module is transformers' Conv1D, a Linear with its weight transposed."""
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf")


def is_matrix(module: nn.Module) -> bool:
    """Whether the module multiplies by a weight matrix: Linear or Conv1D."""
    return isinstance(module, nn.Linear) or is_conv1d(module)


@dataclass(frozen=True)
class Stack:
    """The repeated blocks of one part of a model, in order: an encoder's, or a decoder's."""

    name: str
    blocks: tuple[nn.Module, ...]

    def layers(self) -> Iterator[TargetLayer]:
        """The matrices inside the blocks, with their full names; what routes to experts is none."""
        for index, block in enumerate(self.blocks):
            prefix = f"{self.name}.{index}"
            for layer in matrices(block, prefix):
                if not routes(layer.name.removeprefix(f"{prefix}."), block):
                    yield layer


def matrices(module: nn.Module, prefix: str = "") -> Iterator[TargetLayer]:
    """The matrices inside a module: of Linear and Conv1D layers, and of experts that are stacked.

    Of layers with a PEFT adapter it is the base layer's.
    """
    adapted = [
        name for name, child in module.named_modules(prefix=prefix) if hasattr(child, "base_layer")
    ]
    held: set[int] = set()
    for name, child in module.named_modules(prefix=prefix):
        owner = next((owner for owner in adapted if name.startswith(f"{owner}.")), None)
        if owner is not None and name.removeprefix(owner).replace(_ADAPTED, ""):
            continue  # of the adapter itself
        if is_matrix(child):
            yield TargetLayer(name, child)
        elif (stack := ExpertStack.called(child)) is not None and id(stack.module) not in held:
            held.add(id(stack.module))
            yield from expert_matrices(stack, ".".join(filter(None, (name, stack.path))))


def expert_matrices(stack: ExpertStack, name: str) -> Iterator[TargetLayer]:
    """The matrices of all experts that the module of that name holds."""
    for attribute in stack.parameters:
        path = f"{name}.{attribute}" if name else attribute
        for expert in range(stack.number):
            yield TargetLayer(f"{path}.{expert}", stack.module, stack, attribute, expert)


def find_stacks(model: nn.Module) -> list[Stack]:
    """Find the repeated blocks: the outermost lists of modules whose items contain weight matrices.

    A list is a ModuleList, or a Sequential of two blocks or more of one class.

    Returns:
        One stack per such list, in the order of the model's modules. Empty when there is none.
    """
    stacks: list[Stack] = []
    for name, module in model.named_modules():
        if not _is_list_of_blocks(module):
            continue
        if any(name.startswith(f"{stack.name}.") for stack in stacks):
            continue
        items = tuple(module)
        if all(not is_matrix(item) and any(matrices(item)) for item in items):
            stacks.append(Stack(name, items))
    return stacks


def _is_list_of_blocks(module: nn.Module) -> bool:
    if isinstance(module, nn.Sequential):
        return len(module) > 1 and len({type(item) for item in module}) == 1
    return isinstance(module, nn.ModuleList) and len(module) > 0


def target_layers(model: nn.Module, config: SparsityConfig | None = None) -> list[TargetLayer]:
    """The layers that a config makes sparse, each weight once, in the order of the model.

    Args:
        model: any model. Weights shared by several names are listed under the first of them.
        config: its `targets` and `ignore` choose. None: every layer in the blocks.

    Raises:
        ValueError: nothing matches `targets`, the model has no repeated blocks to default to, or it
            is compiled.
    """
    return choose_layers(model, find_stacks(model), config)


def choose_layers(
    model: nn.Module, stacks: Sequence[Stack], config: SparsityConfig | None
) -> list[TargetLayer]:
    """`target_layers` of a model whose stacks are known."""
    check_has_weights(model)
    targets = None if config is None else config.targets
    if targets is None:
        if not stacks:
            raise ValueError(
                f"{type(model).__name__} has no ModuleList of blocks to find weights in: none whose "
                "items have Linear or Conv1D layers inside. Name the layers: SparsityConfig(..., "
                "targets=[...])."
            )
        named = [layer for stack in stacks for layer in stack.layers()]
    else:
        candidates = [*_embeddings(model), *matrices(model)]
        for glob in targets:
            if not any(_is_named(layer, glob) for layer in candidates):
                known = ", ".join(layer.name for layer in candidates[:8])
                raise ValueError(
                    f"targets: {glob!r} matches no layer of {type(model).__name__}. Its layers are "
                    f"{known}{', ...' if len(candidates) > 8 else ''}."
                )
        named = [layer for layer in candidates if any(_is_named(layer, glob) for glob in targets)]
    ignored = () if config is None else config.ignore
    chosen = _each_once(
        layer for layer in named if not any(_is_named(layer, glob) for glob in ignored)
    )
    if not chosen:
        raise ValueError(
            f"no layer of {type(model).__name__} is left to be sparse: ignore="
            f"{list(config.ignore) if config else []} leaves out every target."
        )
    return chosen


def block_layers(model: nn.Module) -> list[TargetLayer]:
    """Every layer in the repeated blocks, each weight once; none if there are no blocks."""
    return layers_of(find_stacks(model))


def layers_of(stacks: Sequence[Stack]) -> list[TargetLayer]:
    """Every layer in some stacks, each weight once."""
    return _each_once(layer for stack in stacks for layer in stack.layers())


def _embeddings(model: nn.Module) -> Iterator[TargetLayer]:
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding):
            yield TargetLayer(name, module)


def _is_named(layer: TargetLayer, glob: str) -> bool:
    return any(matches(name, glob) for name in layer.own_names)


def _each_once(layers: Iterable[TargetLayer]) -> list[TargetLayer]:
    """The layers; of those that share a weight, the first."""
    chosen: dict[tuple[int, int], TargetLayer] = {}
    for layer in layers:
        chosen.setdefault((id(getattr(layer.module, layer.attribute)), layer.expert), layer)
    return list(chosen.values())


def by_identity(layers: Iterable[TargetLayer]) -> dict[int, tuple[TargetLayer, ...]]:
    """The layers that each parameter holds, by its identity."""
    held: dict[int, list[TargetLayer]] = {}
    for layer in layers:
        held.setdefault(id(layer.parameter), []).append(layer)
    return {key: tuple(found) for key, found in held.items()}


def parameters_of(layers: Iterable[TargetLayer]) -> list[nn.Parameter]:
    """The parameters that hold the weights of layers, each once, in their order."""
    return list({id(layer.parameter): layer.parameter for layer in layers}.values())


def promised_config(model: nn.Module) -> SparsityConfig | None:
    """The config that a model was pruned with, or loaded with; None: neither is known."""
    promised: SparsityConfig | None = vars(model).get(PRUNED_WITH)
    recorded = getattr(getattr(model, "config", None), "sparsity_config", None)
    if promised is None and recorded is not None:
        promised = SparsityConfig.from_dict(recorded)
    return promised


def check_has_weights(model: nn.Module) -> None:
    """Raise a ValueError if `hf_sparse.compile` has packed the model's weights."""
    if vars(model).get(PACKED):
        raise ValueError(
            f"this {type(model).__name__} is what hf_sparse.compile made: its weights are packed for "
            "this CPU. Take the model that was compiled."
        )


def layers_in(block: nn.Module, layers: Sequence[TargetLayer]) -> list[TargetLayer]:
    """Those of the layers that are inside a block, in their order."""
    modules = {id(module) for module in block.modules()}
    return [layer for layer in layers if id(layer.module) in modules]


def layers_outside(stacks: Sequence[Stack], layers: Sequence[TargetLayer]) -> list[TargetLayer]:
    """Those of the layers that are in no block, in their order."""
    inside = {id(m) for stack in stacks for block in stack.blocks for m in block.modules()}
    return [layer for layer in layers if id(layer.module) not in inside]


def left_out(stacks: Sequence[Stack]) -> int:
    """Weights in the blocks that are stacks of matrices of no known kind, such as convolutions."""
    known = {id(getattr(layer.module, layer.attribute)) for layer in layers_of(stacks)}
    blocks = [block for stack in stacks for block in stack.blocks]
    sizes = {id(p): p.numel() for block in blocks for p in block.parameters() if p.ndim > 2}
    return sum(size for key, size in sizes.items() if key not in known)


def num_parameters(model: nn.Module) -> int:
    """The number of weights in the model, shared ones once.

    Tied weights that `device_map` left on the disk share no memory: their names tell.
    """
    tied = tied_names(model)
    parameters = dict(model.named_parameters())
    return sum(
        parameter.numel()
        for name, parameter in parameters.items()
        if parameter.device.type != "meta" or tied.get(name) not in parameters
    )


def check_divides(pattern: Pattern, name: str, rows: int, columns: int) -> None:
    """Raise a ValueError that names the weight if the pattern cannot divide it."""
    try:
        pattern.check_shape(rows, columns)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error
