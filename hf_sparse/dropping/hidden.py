"""`hf_sparse.drop_hidden_`: features of the residual stream are removed from the whole model.

A hidden feature's score is the mean absolute value that the model's norms give it, summed over the
norms. Embeddings, heads of language models, norms, biases, and the rows and columns of all layers that
write and read the feature lose it together.

Norms divide by the mean square of all features (RMSNorm), or by their variance (LayerNorm): of fewer
features these are others. So that what enters the layers keeps its scale, the gain of each norm is
multiplied by the root of the mean, over the calibration tokens, of the mean square of the features that
stay by that of all. If the features that go are zero everywhere, an RMSNorm's factor is
sqrt(all / kept), and the model's outputs stay the same.

Source: Muralidharan et al., "Compact Language Models via Pruning and Knowledge Distillation",
https://arxiv.org/abs/2407.14679 (Minitron), section 2.2. Departures: the gains of norms are corrected;
padding does not count; where a family takes the size of its heads from the hidden size, whole heads go
along, those that give least.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_sparse.arguments import check_finite, check_kinds, check_model
from hf_sparse.calibration.block_scores import hidden_in
from hf_sparse.calibration.calling import run_on
from hf_sparse.calibration.hidden_scores import HiddenUse
from hf_sparse.calibration.modes import switched
from hf_sparse.calibration.windows import checked_batches, fingerprint
from hf_sparse.counts import StepReport, format_table
from hf_sparse.dropping.counts import number_of_some
from hf_sparse.provenance.record import record_
from hf_sparse.provenance.values import Calibration, Step
from hf_sparse.structure.changeable import check_changeable
from hf_sparse.structure.hidden import HiddenPlan, hidden_size_of
from hf_sparse.structure.layers import find_stacks, num_parameters, promised_config
from hf_sparse.structure.norms import norms_of
from hf_sparse.structure.parts import head_size
from hf_sparse.structure.units import find_units


@dataclass(frozen=True, repr=False)
class HiddenReport(StepReport):
    """What `drop_hidden_` removed.

    Attributes:
        size: the hidden size, before and after.
        heads: of each block, before and after: fewer where a head's size follows from the hidden size.
        parameters: weights in the whole model, before and after.
        removed: the numbers of the features that went, as they were.
        scores: of all features.
        gains: for each norm by its name, what its gain was multiplied by; norms without a weight of
            their own are left out.
    """

    # The name of the step on the model card.
    method = "drop_hidden"

    size: tuple[int, int]
    heads: tuple[int, int]
    parameters: tuple[int, int]
    removed: tuple[int, ...]
    scores: tuple[float, ...]
    gains: dict[str, float]

    @property
    def options(self) -> dict[str, Any]:
        """What the card tells of it."""
        return {"hidden size": f"{self.size[1]} of {self.size[0]}"}

    def summary(self) -> str:
        """The totals in a few lines."""
        lines = [
            f"hidden size {self.size[1]} of {self.size[0]}",
            f"whole model: {self.parameters[1]:,} of {self.parameters[0]:,} weights",
        ]
        if self.heads[0] != self.heads[1]:
            lines[0] += f"; each block keeps {self.heads[1]} of {self.heads[0]} heads"
        return "\n".join(lines)

    def table(self) -> str:
        """What each norm's gain was multiplied by, and the totals."""
        rows = [(name, f"{factor:.4f}") for name, factor in self.gains.items()]
        return f"{format_table(('norm', 'gain multiplied by'), rows)}\n{self.summary()}"


@torch.no_grad()
def drop_hidden_(
    model: PreTrainedModel,
    count: int | float,
    batches: Iterable[Mapping[str, Tensor] | Tensor],
) -> HiddenReport:
    """Remove the features of the residual stream that are smallest behind the norms, in place.

    What is left is a plain model of its family with a smaller hidden size: its config is changed with
    it, so that transformers loads it alone. It is worse until it is trained, best with the whole model
    as teacher (`hf_sparse.Distillation`). Make optimizers after this.

    Args:
        model: with one residual stream, whose width is the config's hidden size.
        count: how many features go: a number, or a fraction of them, in `(0, 1)`, which is rounded.
            Multiples of 64 or 128 run best. Where a family takes the size of heads from the hidden
            size, what is left has to be a multiple of it.
        batches: calibration inputs, as for `hf_sparse.prune_`.

    Returns:
        Which features went, and the scores of all.

    Memory: the model, the activations of one batch, and one weight.

    Raises:
        ValueError: another count; the config cannot tell the size; the model is compiled, quantized or
            sharded, has adapters, weights without values, or zeros that are promised; there is no
            calibration data; values are not finite. Nothing has changed then.
    """
    check_model(model, "drop_hidden_", PreTrainedModel)
    check_kinds(drop_hidden_, locals())
    check_changeable(model, "drop_hidden_", "drop hidden features")
    _check_promise(model)
    size = hidden_size_of(model)
    left = size - number_of_some(count, size, "hidden feature")
    plan = HiddenPlan.of(model, left)
    inputs = checked_batches(batches, model, "drop_hidden_")
    for name, parameter in model.named_parameters():
        check_finite(name, parameter.detach())
    heads_before = model.config.num_attention_heads
    with switched(model, training=False, use_cache=False):
        use = _use(plan, inputs)
        entered = _entered(model, inputs[0])
    scores = _scores(use)
    features = scores.argsort(descending=True, stable=True)[:left].sort().values
    heads = None if plan.heads is None else [_most(own, plan.heads) for own in use.heads]
    factors = {
        norm.name: math.sqrt(float(own[features].sum()) / left)
        for norm, own in zip(use.norms, use.shares, strict=True)
        if norm.offset is not None
    }
    before = num_parameters(model)
    plan.apply_(features, heads)
    for norm in use.norms:
        norm.multiply_(factors.get(norm.name, 1.0))
    with switched(model, training=False, use_cache=False):
        _restore_embeddings_(model, entered, _entered(model, inputs[0]), features, use)
    gone = sorted(set(range(size)) - set(features.tolist()))
    report = HiddenReport(
        (size, left),
        (heads_before, plan.heads or heads_before),
        (before, num_parameters(model)),
        tuple(gone),
        tuple(scores.tolist()),
        factors,
    )
    data = Calibration.of(inputs, fingerprint(inputs))
    record_(model, Step.of(report.method, report.options, calibration=data))
    return report


def _check_promise(model: nn.Module) -> None:
    promised = promised_config(model)
    if promised is not None and promised.bits:
        raise ValueError(
            f"this {type(model).__name__} lies on a grid of {promised.bits} bits, whose groups "
            "would be others. Remove hidden features first, then quantize."
        )
    if promised is not None:
        raise ValueError(
            f"this {type(model).__name__} promises zeros of pattern '{promised.pattern}', and columns "
            "would go from between them. Remove hidden features first, then prune."
        )


def _use(plan: HiddenPlan, batches: Sequence[Mapping[str, Any]]) -> HiddenUse:
    """What the norms give hidden features, and the heads, if some go."""
    model: Any = plan.model
    norms = [norm for norm in norms_of(model, plan.size) if plan.cuts(norm.name)]
    if not norms:
        raise ValueError(
            f"no norm over the {plan.size} hidden features of this {type(model).__name__} was found, "
            "and what they give is the score of a feature."
        )
    outs = [] if plan.heads is None else [units.out for units in find_units(model)]
    use = HiddenUse(norms, outs, head_size(model.config), plan.size)
    use.watch(model, batches)
    return use


def _scores(use: HiddenUse) -> Tensor:
    """Of each feature, fp64 `(hidden,)`."""
    scores = torch.stack(use.activation).sum(dim=0)
    if not scores.isfinite().all():
        raise ValueError(
            "hidden states are not finite on the calibration data. Load the model in float32, or look "
            "at the data."
        )
    return scores


def _most(scores: Tensor, count: int) -> Tensor:
    return scores.argsort(descending=True, stable=True)[:count].sort().values


class _EnteredError(Exception):
    """Ends a forward pass when the first block is called."""


def _entered(model: nn.Module, batch: Mapping[str, Any]) -> Tensor | None:
    """What enters the first block, `(..., hidden)`; None if there are no blocks."""
    stacks = find_stacks(model)
    if not stacks:
        return None
    found: list[Tensor] = []

    def look(module: nn.Module, args: Any, kwargs: Any) -> None:
        found.append(hidden_in(module, args, kwargs).detach().clone())
        raise _EnteredError

    hook = stacks[0].blocks[0].register_forward_pre_hook(look, with_kwargs=True)
    try:
        run_on(model, {name: value for name, value in batch.items() if name != "labels"})
    except _EnteredError:
        return found[0]
    finally:
        hook.remove()
    return None


def _restore_embeddings_(
    model: Any, before: Tensor | None, after: Tensor | None, features: Tensor, use: HiddenUse
) -> None:
    """Undo a factor that a family multiplies embeddings by and takes from the hidden size (Gemma).

    The embeddings are divided by it; where they are the head's weights, too, the last norm before the
    head is multiplied by it.
    """
    if before is None or after is None:
        return
    wanted = before[..., features.to(before.device)].double()
    factor = math.sqrt(after.shape[-1] / before.shape[-1])
    same = (after.double() - factor * wanted).abs().max() < 1e-2 * after.double().abs().max()
    if not same or (after.double() - wanted).abs().max() < 1e-2 * wanted.abs().max():
        return
    embeddings, head = model.get_input_embeddings(), model.get_output_embeddings()
    embeddings.weight.div_(factor)
    if head is not None and head.weight is embeddings.weight:
        inside = {id(m) for stack in find_stacks(model) for b in stack.blocks for m in b.modules()}
        last = [norm for norm in use.norms if id(norm.module) not in inside]
        last[-1].multiply_(factor)
