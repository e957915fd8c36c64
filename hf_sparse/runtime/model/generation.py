"""Greedy search and sampling of compiled decoders, with little between two runs of the kernels.

transformers' own loop calls the whole model for each token: inputs are prepared, masks and rotations
computed, settings read. That costs about as much as a small model's kernels. Here all of it is done
once in a call of `generate`; what remains per token is the embedding, the blocks, the last norm, the
head, and transformers' own logits processors and stopping criteria.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from hf_sparse.runtime.model.description import Blocks
from hf_sparse.runtime.model.layers import CompiledBlocks
from hf_sparse.runtime.programs.cache import alone_with
from hf_sparse.runtime.programs.runner import Runner
from hf_sparse.upstream.torch import forward_hooks, has_global_forward_hooks
from hf_sparse.upstream.transformers.caches import cache_in
from hf_sparse.upstream.transformers.generation import (
    generates_as_usual,
    merged_config,
    padding_token,
    prefill,
    sample,
    takes_one_token_after_the_other,
)

# Positions whose rotations are computed together.
_AHEAD = 256
# Rotations of these kinds change with the length of the sequence: transformers' loop follows them.
_CHANGING = ("dynamic", "longrope")
# What `generate` may be asked for, and only transformers' loop gives.
_RECORDED = ("return_dict_in_generate", "output_hidden_states", "output_attentions")


@dataclass(frozen=True)
class Ends:
    """What stands around the blocks of a decoder: its embedding, rotations, last norm and head.

    Attributes:
        model: has them.
        family: describes its blocks.
        runner: runs its blocks.
    """

    model: PreTrainedModel
    family: Blocks
    runner: Runner

    @classmethod
    def of(cls, model: Any) -> Ends | None:
        """The ends of a compiled model, if calling them is calling the model.

        None: someone listens to the model or its blocks, has changed its call, or its blocks.
        """
        base: Any = model.base_model
        layers: Any = next(m for m in base.modules() if isinstance(m, CompiledBlocks))
        holder = base.get_submodule(layers[0].family.stack.rpartition(".")[0])
        around = {model, base, holder}
        hooks = [hook for module in around for _, hook in forward_hooks(module)]
        changed = any("forward" in vars(module) for module in around)
        if changed or not all(map(_is_own, hooks)) or not layers.is_whole or layers[0].is_watched:
            return None
        if has_global_forward_hooks() or not generates_as_usual(model):
            return None
        if getattr(base.rotary_emb, "rope_type", None) in _CHANGING:
            return None
        return cls(model, layers[0].family, layers[0].runner)

    def logits(
        self,
        tokens: Tensor,
        mask: Tensor | None,
        rotations: list[tuple[Tensor, Tensor]],
        cache: Any,
    ) -> Tensor:
        """Logits `(batch, vocabulary)` behind one more token `(batch,)` of each sequence."""
        base: Any = self.model.base_model
        embedded = self.model.get_input_embeddings()(tokens[:, None])
        with alone_with(cache):
            hidden = self.runner(embedded.float(), mask, rotations, cache)
        normed = base.get_submodule(self.family.last_norm)(hidden.to(embedded.dtype))
        head: Any = self.model.get_output_embeddings()
        logits: Tensor = head(normed)[:, -1]
        return logits

    def rotations(self, first: Tensor) -> Iterator[list[tuple[Tensor, Tensor]]]:
        """Cosines and sines of the positions from `first (batch, 1)` on, one step after the other."""
        base: Any = self.model.base_model
        like = next(self.model.get_input_embeddings().parameters())[:1]
        kinds = self.family.kinds(self.model.config)
        while True:
            positions = first + torch.arange(_AHEAD)
            tables = [
                base.rotary_emb(like, positions, *kind) for kind in [[k] for k in kinds] or [[]]
            ]
            for step in range(_AHEAD):
                yield [(cos[:, step : step + 1], sin[:, step : step + 1]) for cos, sin in tables]
            first = first + _AHEAD


def _is_own(hook: Any) -> bool:
    """Whether a hook is one that compiling puts on a model."""
    module: str = getattr(hook, "func", hook).__module__
    return module.startswith(__name__.rpartition(".")[0])


def generate(model: Any, *args: Any, **kwargs: Any) -> Any:
    """Transformers' own `generate`, with the loop of this file where it can serve."""
    theirs = type(model).generate
    ends = Ends.of(model)
    if "custom_generate" in kwargs or len(args) > 2 or ends is None:
        return theirs(model, *args, **kwargs)
    given = kwargs.get("generation_config", args[1] if len(args) > 1 else None)
    asked = merged_config(model, given, kwargs)
    recorded = any(getattr(asked, name, None) for name in _RECORDED)
    if recorded or not takes_one_token_after_the_other(asked, kwargs.get("assistant_model")):
        return theirs(model, *args, **kwargs)
    loop = functools.partial(_decode, ends=ends, streamer=kwargs.get("streamer"))
    return theirs(model, *args, **kwargs, custom_generate=loop)


def _decode(model: Any, input_ids: Tensor, *, ends: Ends, streamer: Any, **given: Any) -> Any:
    """The tokens of the prompts and of their continuations: what transformers' `_sample` gives."""
    assert takes_one_token_after_the_other(given["generation_config"], None)
    if cache_in(given) is None or given.get("inputs_embeds") is not None:
        return sample(model, input_ids, {**given, "streamer": streamer})
    config, process, stops = (
        given.pop(name) for name in ("generation_config", "logits_processor", "stopping_criteria")
    )
    outputs = prefill(model, input_ids, config, given)
    cache, logits = cache_in(outputs), outputs.logits[:, -1]
    del outputs
    steps = ends.rotations(_next_positions(input_ids, given))
    mask = given.get("attention_mask")
    ending = any(hasattr(criteria, "eos_token_id") for criteria in stops)
    padding = padding_token(config) if ending else None
    open_rows = torch.ones(len(input_ids), dtype=torch.long)
    while True:
        scores = process(input_ids, logits.to(torch.float32, copy=True))
        if config.do_sample:
            chances = torch.softmax(scores, dim=-1)
            tokens = torch.multinomial(chances, num_samples=1).squeeze(1)
        else:
            tokens = scores.argmax(dim=-1)
        if padding is not None:
            tokens = tokens * open_rows + padding * (1 - open_rows)
        input_ids = torch.cat([input_ids, tokens[:, None]], dim=-1)
        open_rows = open_rows & ~stops(input_ids, None)
        if streamer is not None:
            streamer.put(tokens)
        if not open_rows.any():
            break
        if mask is not None:
            mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=-1)
        logits = ends.logits(tokens, mask, next(steps), cache)
    if streamer is not None:
        streamer.end()
    return input_ids


def _next_positions(input_ids: Tensor, given: dict[str, Any]) -> Tensor:
    """The positions `(batch, 1)` of the first new tokens: those behind the prompts'."""
    positions: Tensor | None = given.get("position_ids")
    if positions is None:
        return torch.full((len(input_ids), 1), input_ids.shape[1])
    return positions[:, -1:] + 1
