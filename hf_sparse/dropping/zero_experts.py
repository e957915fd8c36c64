"""Experts that zeros have made useless are removed: what `hf_sparse.shrink_` does to a mixture.

They give nothing to the tokens that routers send to them. Removed with their rows of the router, they
cannot be chosen: these tokens go to experts that stay, as if `hf_sparse.drop_experts_` had taken the
same experts. So the model computes something else than the one with zeros, unless no token was sent to
them.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_sparse.calibration.expert_scores import scores_of
from hf_sparse.dropping.expert_report import ZEROS, ExpertReport
from hf_sparse.dropping.experts import promised_experts, renew_promise_of_experts_
from hf_sparse.provenance.record import record_
from hf_sparse.provenance.values import Step
from hf_sparse.structure.changeable import check_changeable
from hf_sparse.structure.experts import ExpertStack
from hf_sparse.structure.layers import PRUNED_WITH, num_parameters, promised_config
from hf_sparse.structure.mixtures import Mixture, Mixtures

_ROUTED = (
    "Tokens that routers sent to experts which were zero go to others now: the outputs are those of "
    "drop_experts_, not of the model with zeros."
)


def has_zero_experts(model: nn.Module) -> bool:
    """Whether a model is a mixture, and some expert of it is zero as a whole."""
    stacks = ((name, ExpertStack.of(module)) for name, module in model.named_modules())
    known = ((name, stack) for name, stack in stacks if stack is not None and stack.can_go)
    return any(bool(Mixture(name, stack).zero.any()) for name, stack in known)


@torch.no_grad()
def drop_zero_experts_(model: PreTrainedModel, *, uniform: bool) -> ExpertReport:
    """Remove the experts of a mixture that are zero, in place.

    Args:
        model: a mixture, some of whose experts are zero.
        uniform: remove of every block as many as the one can lose that can lose the fewest, though
            others keep zero ones.

    Raises:
        ValueError: blocks would be left with different numbers of experts, which transformers does not
            build; fewer than a token is given would be left; the model is compiled, quantized or
            sharded, or has adapters. Nothing has changed then.
    """
    check_changeable(model, "shrink_", "shrink")
    mixtures = Mixtures.of(model)
    zeros = [mixture.zero for mixture in mixtures.mixtures]
    gone = _removable(mixtures, zeros, uniform)
    size = mixtures.number // mixtures.routing.groups
    kept = []
    for zero in zeros:
        own = zero.view(-1, size)
        removed = (own & (own.cumsum(dim=1) <= gone)).flatten()
        kept.append((~removed).nonzero()[:, 0].tolist())
    left = mixtures.number - gone * mixtures.routing.groups
    scores, _ = scores_of(mixtures, [], "magnitude")
    promised, before = promised_experts(model), num_parameters(model)
    mixtures.keep_(kept)
    config = promised_config(model)
    if config is not None and config.pattern.whole_matrices:  # of experts that are gone
        vars(model).pop(PRUNED_WITH, None)
        if getattr(model.config, "sparsity_config", None) is not None:
            model.config.sparsity_config = None
    else:
        renew_promise_of_experts_(mixtures, promised, kept)
    record_(model, Step.of("shrink", {"uniform": True} if uniform else {}))
    staying = sum(int(zero.sum()) for zero in zeros) - len(zeros) * (mixtures.number - left)
    notes = [_ROUTED]
    if staying:
        notes.append(f"{staying} experts are zero and stay, so that all blocks have as many.")
    every = range(mixtures.number)
    return ExpertReport(
        tuple(mixture.name for mixture in mixtures.mixtures),
        ZEROS,
        False,
        tuple(tuple(number for number in every if number not in own) for own in kept),
        tuple(tuple(own.tolist()) for own in scores),
        None,
        (mixtures.number, left),
        (before, num_parameters(model)),
        tuple(notes),
    )


def _removable(mixtures: Mixtures, zeros: Sequence[Tensor], uniform: bool) -> int:
    """How many zero experts go of each group of each block.

    Raises:
        ValueError: they differ, and are not to be made alike; or none can go.
    """
    number, routing = mixtures.number, mixtures.routing
    counts = [int(n) for zero in zeros for n in zero.view(routing.groups, -1).sum(dim=1)]
    if len(set(counts)) > 1 and not uniform:
        per_block = sorted({number - int(zero.sum()) for zero in zeros})
        places = "blocks" if len(per_block) > 1 else "groups of a router"
        raise ValueError(
            f"{places} of this {type(mixtures.model).__name__} would keep "
            f"{' or '.join(map(str, per_block))} of {number} experts, and transformers builds them "
            "with one number. Remove as many of each: hf_sparse.shrink_(model, uniform=True); or "
            "prune with scope='layer'."
        )
    most = min(counts)
    if uniform:
        possible = (
            n for n in range(most, 0, -1) if routing.refusal(number - n * routing.groups) is None
        )
        most = next(possible, 0)
        if not most:
            raise ValueError(
                f"no expert of this {type(mixtures.model).__name__} can go: some block has too few "
                f"that are zero, or each token is given {routing.per_token} of {number}."
            )
    mixtures.check(number - most * routing.groups)
    return most
