"""The parts of a model that sparsity is about: its repeated blocks and its weight matrices.

Blocks are the items of the outermost ModuleLists; no model's family needs to be known.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from hf_sparse.configuration_sparse import SparsityConfig, matches
from hf_sparse.patterns import Pattern
from hf_sparse.upstream.transformers.models import tied_names

# The attribute of a model that remembers the SparsityConfig of the last `prune_`.
PRUNED_WITH = "_hf_sparse_pruned_with"
# The attribute that models have which `hf_sparse.compile` made.
PACKED = "_hf_sparse_packed"


@dataclass(frozen=True)
class TargetLayer:
    """A layer whose weight is to be sparse."""

    name: str
    module: nn.Module

    @property
    def weight_name(self) -> str:
        """The name of the weight in the model's state dict."""
        return f"{self.name}.weight" if self.name else "weight"

    @property
    def transposed(self) -> bool:
        """Whether the weight is stored `(in_features, out_features)`, as GPT-2's Conv1D does."""
        return is_conv1d(self.module)

    @property
    def parameter(self) -> nn.Parameter:
        """The weight as the module stores it."""
        weight = self.module.weight
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
        weight = self.parameter
        # Behind the transposition: torch refuses writes to views of weights of inference mode.
        return (weight.T if self.transposed else weight).data


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

    def layers(self) -> Iterator[tuple[str, nn.Module]]:
        """The Linear and Conv1D layers inside the blocks, with their full names."""
        for index, block in enumerate(self.blocks):
            yield from matrices(block, f"{self.name}.{index}")


def matrices(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    """The Linear and Conv1D layers inside a module; of layers with a PEFT adapter, the base layer."""
    adapted = [
        name for name, child in module.named_modules(prefix=prefix) if hasattr(child, "base_layer")
    ]
    for name, child in module.named_modules(prefix=prefix):
        owner = next((owner for owner in adapted if name.startswith(f"{owner}.")), None)
        if is_matrix(child) and (owner is None or name == f"{owner}.base_layer"):
            yield name, child


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
        if all(not is_matrix(item) and next(matrices(item), None) for item in items):
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
        embeddings = (item for item in model.named_modules() if isinstance(item[1], nn.Embedding))
        candidates = [*embeddings, *matrices(model)]
        for glob in targets:
            if not any(matches(_own_name(name), glob) for name, _ in candidates):
                known = ", ".join(name for name, _ in candidates[:8])
                raise ValueError(
                    f"targets: {glob!r} matches no layer of {type(model).__name__}. Its layers are "
                    f"{known}{', ...' if len(candidates) > 8 else ''}."
                )
        named = [
            (name, module)
            for name, module in candidates
            if any(matches(_own_name(name), glob) for glob in targets)
        ]
    chosen = _each_once(
        (name, module)
        for name, module in named
        if config is None or not config.ignores(_own_name(name))
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


def _each_once(named: Iterable[tuple[str, nn.Module]]) -> list[TargetLayer]:
    """Modules as layers; of those that share a weight, the first."""
    chosen: dict[int, TargetLayer] = {}
    for name, module in named:
        chosen.setdefault(id(module.weight), TargetLayer(name, module))
    return list(chosen.values())


def _own_name(layer: str) -> str:
    """The name that a layer has without a PEFT adapter."""
    return layer.removesuffix(".base_layer")


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


def stacked_weights(stacks: Sequence[Stack]) -> int:
    """Weights in the blocks that are stacks of matrices, such as the experts of a mixture."""
    blocks = [block for stack in stacks for block in stack.blocks]
    stacked = {id(p): p.numel() for block in blocks for p in block.parameters() if p.ndim > 2}
    return sum(stacked.values())


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
