"""The pruning methods, and what can be composed with them."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from hf_sparse.arguments import check_not_inference
from hf_sparse.calibration import expert_scores
from hf_sparse.calibration.input_statistics import Grams, Norms
from hf_sparse.calibration.losses import check_labels
from hf_sparse.calibration.token_weights import WeightedTokens, token_weights
from hf_sparse.optim.sharding import check_shardable, local_part
from hf_sparse.patterns import Pattern
from hf_sparse.pruning import (
    alps,
    experts,
    layerwise,
    magnitude,
    prox_local,
    proxsparse,
    refit,
    sparsegpt,
    sparsellm,
    swaps,
    taylor,
    wanda,
)
from hf_sparse.pruning.allocation import layer_sparsities
from hf_sparse.pruning.composition import Composition
from hf_sparse.pruning.few_bits import round_nearest_
from hf_sparse.pruning.layerwise import LayerPruner, PruneBlock, Refinement, prune_layers
from hf_sparse.pruning.options import check_bounds, check_types
from hf_sparse.pruning.problem import Problem, Solver
from hf_sparse.pruning.prox_local import check_learnable
from hf_sparse.pruning.task import Task
from hf_sparse.structure.layers import TargetLayer
from hf_sparse.suggestions import check_name, did_you_mean

# Layers, and which of their weights stay.
Masks = Iterator[tuple[TargetLayer, Tensor]]


@dataclass(frozen=True)
class Method:
    """A pruning method: what it does, and the functions that do it.

    Attributes:
        summary: for the help of the command line.
        solver: prunes a layer, in a walk through the blocks.
        masks: chooses the zeros of all layers at once, instead of a solver.
        needs_calibration: whether it looks at data.
        prune_block: prunes the layers of one block.
        nm_only: whether it learns N:M masks and nothing else.
        sharded: whether it works on weights that FSDP2 has cut into shards.
        trains: whether it needs gradients through the whole model.
    """

    summary: str
    solver: Solver | None = None
    masks: Callable[..., Masks] | None = None
    needs_calibration: bool = True
    prune_block: PruneBlock = prune_layers
    nm_only: bool = False
    sharded: bool = False
    trains: bool = False

    def options(self) -> dict[str, Any]:
        """The method's own options and their defaults: those of the functions that it consists of."""
        chooses = self.masks if self.solver is None else self.solver.solve
        assert chooses is not None
        return options_of(chooses) | options_of(self.prune_block)

    @property
    def updates(self) -> bool:
        """Whether it changes the weights that it keeps."""
        return self.solver is not None and self.solver.updates


def options_of(function: Callable[..., Any]) -> dict[str, Any]:
    """The options of a function and their defaults: its keyword-only parameters."""
    return {
        name: parameter.default
        for name, parameter in inspect.signature(function).parameters.items()
        if parameter.kind is parameter.KEYWORD_ONLY
    }


_SPARSEGPT = Solver(sparsegpt.solve, Grams, updates=True, rounds=True)

METHODS = {
    "magnitude": Method("smallest weights", masks=magnitude.masks, needs_calibration=False),
    "wanda": Method("smallest |weight| x input norm", Solver(wanda.solve, Norms, updates=False)),
    "taylor": Method(
        "smallest effect on the model's loss, to first order", masks=taylor.masks, trains=True
    ),
    "sparsegpt": Method("least output error, column after column", _SPARSEGPT),
    "sparsellm": Method(
        "SparseGPT with feed-forward networks pruned as a whole",
        _SPARSEGPT,
        prune_block=sparsellm.prune_block,
    ),
    "alps": Method("least output error, by ADMM", Solver(alps.solve, Grams, updates=True)),
    "prox_local": Method(
        "N:M masks learned from each layer's output error",
        Solver(prox_local.solve, Grams, updates=False),
        nm_only=True,
    ),
    "proxsparse": Method(
        "N:M masks of the whole model, learned from its loss",
        masks=proxsparse.masks,
        nm_only=True,
        sharded=True,
        trains=True,
    ),
}

# The methods of pattern `expert`.
EXPERT_METHODS = {
    name: Method(summary, masks=getattr(experts, name), needs_calibration=looks)
    for (name, looks), summary in zip(
        expert_scores.METHODS.items(), experts.SUMMARIES.values(), strict=True
    )
}


@dataclass(frozen=True)
class Recipe:
    """A method, its options, and what is composed with it.

    Attributes:
        name: of the method.
        method: it.
        composition: see there.
        options: of the method, those that were given.
    """

    name: str
    method: Method
    composition: Composition
    options: Mapping[str, Any]

    @classmethod
    def of(cls, name: str, pattern: Pattern, options: Mapping[str, Any]) -> Recipe:
        """The recipe for `prune_`'s arguments.

        Raises:
            ValueError: unknown method or option, a value out of range, or a composition that the
                pattern does not allow.
        """
        method = _method_named(name, pattern)
        own, composed = method.options(), asdict(Composition())
        if unknown := sorted(set(options) - set(own) - set(composed)):
            raise ValueError(
                f"method '{name}' has no option {', '.join(unknown)}. "
                f"Its options: {', '.join([*own, *composed])}."
                f"{did_you_mean(unknown[0], [*own, *composed])}"
            )
        check_types(options, {**own, **composed})
        composition = Composition(**{k: v for k, v in options.items() if k in composed})
        composition.check(pattern)
        mine = {name: value for name, value in options.items() if name in own}
        check_bounds(mine, pattern, composition.allocation)
        composition.check_method(name, solves=method.solver is not None)
        if method.nm_only:
            check_learnable(name, pattern)
        return cls(name, method, composition, mine)

    @property
    def needs_calibration(self) -> bool:
        """Whether it looks at data."""
        return self.method.needs_calibration or self.composition.needs_calibration

    @property
    def needs_gradients(self) -> bool:
        """Whether gradients are computed, of the model or of parts of it."""
        composed = self.composition.reconstruct > 0 or self.composition.token_weights is not None
        return self.method.trains or composed or self.method.prune_block is sparsellm.prune_block

    @property
    def all_options(self) -> dict[str, Any]:
        """The method's options with their defaults, and what was composed."""
        default = asdict(Composition())
        composed = {k: v for k, v in asdict(self.composition).items() if v != default[k]}
        return {**self.method.options(), **self.options, **composed}

    def check_sharding(self, layers: Sequence[TargetLayer], pattern: Pattern) -> None:
        """Raise a ValueError if weights are cut into shards and that cannot be worked with."""
        for layer in layers:
            if not isinstance(layer.parameter, DTensor):
                continue
            if not self.method.sharded or self.composition.walks or not layer.is_plain:
                raise ValueError(
                    f"{layer.weight_name} is cut into shards by FSDP, and this works on whole weights. "
                    "Prune the model before it is sharded, or use method='proxsparse'."
                )
            check_shardable(layer.weight_name, layer.parameter, pattern)

    def prune(self, task: Task) -> None:
        """Prune the task's model in place.

        Raises:
            ValueError: see `prune_`.
        """
        if self.needs_calibration or task.batches:
            _check_inputs(task.layers)
            if torch.is_inference_mode_enabled() and self.needs_gradients:
                raise ValueError(
                    "there are no gradients inside torch.inference_mode(). Call prune_ outside it."
                )
            if self.method.trains or self.composition.reconstruct or self.composition.token_weights:
                check_not_inference(task.model, self.name)
        if self.composition.token_weights:
            self._weigh(task)
        if not task.sparsities:
            task.sparsities = layer_sparsities(self.composition.allocation, task)
        if self.method.masks is None:
            self._prune_by_solver(task)
        else:
            self._prune_by_masks(task, self.method.masks(task, **self.options))

    def _weigh(self, task: Task) -> None:
        """Measure how much each token counts, for the walk through the blocks."""
        check_labels(self.name, "token_weights=None", task.model, task.batches)
        weights = token_weights(task.model, task.layers, task.batches, task.accelerator)
        task.token_weights = WeightedTokens(weights)

    def _prune_by_solver(self, task: Task) -> None:
        """Prune block after block; each option goes to the function that has it."""
        solver = self.method.solver
        assert solver is not None
        names = options_of(solver.solve)
        of_solver = {name: value for name, value in self.options.items() if name in names}
        of_block = {name: value for name, value in self.options.items() if name not in names}
        self._walk(task, solver, of_solver, partial(self.method.prune_block, **of_block))

    def _prune_by_masks(self, task: Task, masks: Masks) -> None:
        """Set the zeros that are chosen; then walk through the blocks if something is composed.

        Weights of few bits are rounded in the walk; without data to the nearest codes.
        """
        grid = task.config.grid
        if not self.composition.walks and (grid is None or not task.batches):
            for layer, mask in masks:
                local_part(layer.weight).masked_fill_(~mask, 0.0)
            if grid is not None:
                round_nearest_([(layer, grid) for layer in task.layers], task.notes)
            return
        by_name = {layer.name: mask for layer, mask in masks}
        decided = Solver(partial(_apply, by_name), Norms, updates=False, is_decided=True)
        self._walk(task, decided, {}, prune_layers)

    def _walk(
        self, task: Task, solver: Solver, options: Mapping[str, Any], prune_block: PruneBlock
    ) -> None:
        """Prune each layer on the data that reach it, with what is composed."""
        refine: dict[str | None, Refinement] = {
            "swaps": partial(swaps.refine, updates=solver.updates),
            "refit": refit.refine,
        }
        chosen = self.composition.refine
        refinements = [refine[chosen]] if chosen else []
        layerwise.prune(
            LayerPruner(task, solver, options, refinements, task.config.grid),
            prune_block=prune_block,
            reconstruct=self.composition.reconstruct,
        )


def _method_named(name: str, pattern: Pattern) -> Method:
    """The method of a name, for a pattern.

    Raises:
        ValueError: there is none of that name, or it is not for the pattern.
    """
    known = EXPERT_METHODS if pattern.whole_matrices else METHODS
    others = {**METHODS, **EXPERT_METHODS}.keys() - known.keys()
    if isinstance(name, str) and name in others:
        way = "chooses whole experts, as pattern 'expert' does"
        way = "prunes inside of matrices" if pattern.whole_matrices else way
        raise ValueError(
            f"method '{name}' {way}, and the pattern is '{pattern}'. Use another pattern, or method "
            f"{', '.join(map(repr, known))}."
        )
    what = f"method of pattern '{pattern}'" if pattern.whole_matrices else "method"
    check_name(name, known, what, "methods")
    return known[name]


def _check_inputs(layers: Sequence[TargetLayer]) -> None:
    """Refuse embeddings, which have no input activations."""
    if embeddings := [layer.name for layer in layers if isinstance(layer.module, nn.Embedding)]:
        raise ValueError(
            f"{embeddings[0]} is an embedding: it has no input activations to score by. Leave it "
            "out, or use method='magnitude'."
        )


def _apply(masks: Mapping[str, Tensor], problem: Problem) -> list[Tensor]:
    """The weights of a problem with masks that are known."""
    pairs = zip(problem.names, problem.weights, strict=True)
    return [weight * masks[name] for name, weight in pairs]
