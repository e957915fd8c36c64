"""The likelihood of continuations: what a causal language model thinks of texts after others.

    log p(continuation | context) = sum over its tokens t_i of log p(t_i | context, t_1 ... t_i-1)

Tokens are those of lm-evaluation-harness: context and continuation are read as one text, and the
continuation is what follows as many tokens as the context alone has; spaces at the end of a context
belong to the continuation; an empty context is the beginning-of-sequence token (or else that of the
end). A context that is too long loses its beginning.

Several continuations of one context share its forward pass where the model's cache is the plain one,
of full attention; elsewhere each goes with its context. Both are the same sum in another order.
"""

from __future__ import annotations

import inspect
import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers.utils.logging import tqdm

from hf_sparse.calibration.linalg import FastProducts
from hf_sparse.evaluation import check_causal, input_device, logits_of
from hf_sparse.upstream.transformers.caches import Cache, DynamicLayer, cache_in, cache_name

# Contexts of fewer tokens than this go with each of their continuations.
_LEAST_SHARED = 4
_NO_LIMIT = 1 << 62


class Likelihood(NamedTuple):
    """Of a continuation: `log p` in nats, and whether each of its tokens is the most likely one."""

    log: float
    greedy: bool


@dataclass(frozen=True)
class Request:
    """A continuation whose likelihood is asked for.

    Attributes:
        context: token ids, at least one.
        target: token ids of the continuation, at least one.
        cut: whether the context has lost its beginning.
    """

    context: tuple[int, ...]
    target: tuple[int, ...]
    cut: bool


class Reader:
    """Turns pairs of texts into requests.

    Args:
        model: its config tells the longest sequence.
        tokenizer: of the model.

    Raises:
        ValueError: the tokenizer has neither a beginning nor an end of sequence.
    """

    def __init__(self, model: nn.Module, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        first = getattr(tokenizer, "bos_token_id", None)
        first = tokenizer.eos_token_id if first is None else first
        if first is None:
            raise ValueError(
                "the tokenizer has neither a beginning-of-sequence nor an end-of-sequence token, with "
                "which texts begin; set tokenizer.bos_token."
            )
        self._first: int = first
        self._start = self._added()
        self.longest = _longest(model, tokenizer)
        embeddings = getattr(model, "get_input_embeddings", lambda: None)()
        self._known = getattr(embeddings, "num_embeddings", _NO_LIMIT)

    def request(self, context: str, continuation: str, place: str) -> Request:
        """The request of a pair of texts.

        Args:
            context: may be empty.
            continuation: what follows, with the space before it.
            place: of the example, for errors.

        Raises:
            ValueError: the continuation is longer than the model can take, or has no token.
        """
        stripped = context.rstrip()
        continuation = context[len(stripped) :] + continuation
        if stripped:
            before = self._ids(stripped)
            target = self._ids(stripped + continuation)[len(before) :]
        else:
            target = self._plain(continuation)
            before = [self._first]
            if target[:1] == before:
                target = target[1:]
        if not target:
            raise ValueError(
                f"{place}: {continuation!r:.60} has no token of its own after its context. Wanted "
                "texts that the tokenizer tells apart."
            )
        if len(target) > self.longest:
            raise ValueError(
                f"{place}: a choice has {len(target)} tokens, and the model takes sequences of "
                f"{self.longest} at most. Leave the example out, or take another model."
            )
        if max(*before, *target) >= self._known:
            raise ValueError(
                f"{place}: token {max(*before, *target)} is unknown to the model, which has "
                f"{self._known}. Use the model's own tokenizer."
            )
        room = self.longest + 1 - len(target)  # the last token is predicted, and not read
        return Request(tuple(before[-room:]), tuple(target), len(before) > room)

    def _ids(self, text: str) -> list[int]:
        first = self._tokenizer.decode([self._first])
        start = [] if first and text.startswith(first) else self._start
        return [*start, *self._plain(text)]

    def _plain(self, text: str) -> list[int]:
        return list(self._tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    def _added(self) -> list[int]:
        """The special tokens that the tokenizer puts before a text."""
        plain = self._plain("a")
        whole = list(self._tokenizer("a", verbose=False)["input_ids"])
        places = [i for i in range(len(whole)) if whole[i : i + len(plain)] == plain]
        return whole[: places[0]] if places else []


def _longest(model: Any, tokenizer: Any) -> int:
    """The tokens of the longest sequence that a model takes."""
    config: Any = getattr(model, "config", None)
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    for name in ("n_positions", "max_position_embeddings", "n_ctx"):
        if isinstance(known := getattr(config, name, None), int) and known > 0:
            return known
    known = getattr(tokenizer, "model_max_length", None)
    return int(known) if known is not None and known < _NO_LIMIT else _NO_LIMIT


@torch.inference_mode()
def likelihoods(
    model: nn.Module, requests: Sequence[Request], batch_size: int, description: str
) -> list[Likelihood]:
    """The likelihood of each request, in their order.

    Args:
        model: a causal language model in eval mode.
        requests: what is asked.
        batch_size: sequences in one forward pass; those of like length share one.
        description: of the progress bar.

    Memory: mostly the logits, `batch_size * tokens * vocabulary`.

    Raises:
        ValueError: the model is no causal language model, or its outputs are not finite.
    """
    scorer = _Scorer(model)
    longest = max(requests, key=_size)
    row = [*longest.context, *longest.target]
    check_causal(model, torch.tensor([row[:16]], device=scorer.device))
    by_context: dict[tuple[int, ...], list[int]] = defaultdict(list)
    for index, request in enumerate(requests):
        by_context[request.context].append(index)
    shared = {
        context: indices
        for context, indices in by_context.items()
        if len(indices) > 1 and len(context) >= _LEAST_SHARED
    }
    alone = [index for key, indices in by_context.items() if key not in shared for index in indices]
    found: dict[int, Likelihood] = {}
    with tqdm(total=len(requests), desc=description) as bar:
        for contexts in _equal_lengths(list(shared), batch_size):
            indices = [index for context in contexts for index in shared[context]]
            scored = scorer.after_contexts(contexts, [requests[index] for index in indices])
            if scored is None:  # the cache is of another kind
                alone += indices
                continue
            found.update(zip(indices, scored, strict=True))
            bar.update(len(indices))
        alone.sort(key=lambda index: -_size(requests[index]))
        for start in range(0, len(alone), batch_size):
            indices = alone[start : start + batch_size]
            scored = scorer.whole([requests[index] for index in indices])
            found.update(zip(indices, scored, strict=True))
            bar.update(len(indices))
    return [found[index] for index in range(len(requests))]


def _size(request: Request) -> int:
    return len(request.context) + len(request.target)


def _equal_lengths(
    contexts: list[tuple[int, ...]], batch_size: int
) -> Iterator[list[tuple[int, ...]]]:
    """The contexts in batches of one length each, the longest first."""
    contexts = sorted(contexts, key=len, reverse=True)
    for _, same in groupby(contexts, key=len):
        equal = list(same)
        for start in range(0, len(equal), batch_size):
            yield equal[start : start + batch_size]


class _Scorer:
    """Runs a model on requests, with their contexts once where its cache allows it."""

    def __init__(self, model: nn.Module) -> None:
        self.device = input_device(model)
        self._model = model
        self._shares = True
        forward: Any = model.forward
        arguments = inspect.signature(forward).parameters
        self._cache = cache_name(forward)
        self._last_alone = {"logits_to_keep": 1} if "logits_to_keep" in arguments else {}

    def whole(self, requests: Sequence[Request]) -> list[Likelihood]:
        """Each request with its context, padded at the end, which no token before it sees."""
        logits = logits_of(
            self._model, self._padded([(*one.context, *one.target[:-1]) for one in requests])
        )
        return [
            _likelihood(part[len(one.context) - 1 : len(one.context) - 1 + len(one.target)], one)
            for part, one in zip(logits, requests, strict=True)
        ]

    def after_contexts(
        self, contexts: list[tuple[int, ...]], requests: Sequence[Request]
    ) -> list[Likelihood] | None:
        """Requests of contexts of one length, which go through the model once.

        Returns:
            None if the cache of the model cannot be shared.
        """
        if not self._shares:
            return None
        with FastProducts():
            outputs = self._model(
                input_ids=self._padded(contexts), use_cache=True, **self._last_alone
            )
        cache = cache_in(outputs)
        layers = cache.layers if isinstance(cache, Cache) else []
        if not layers or any(type(layer) is not DynamicLayer for layer in layers):
            self._shares = False
            return None
        first = outputs.logits[:, -1]
        places = [contexts.index(one.context) for one in requests]
        longer = [index for index, one in enumerate(requests) if len(one.target) > 1]
        later: dict[int, Tensor] = {}
        if longer:
            chosen = torch.tensor([places[index] for index in longer], device=self.device)
            cache.batch_select_indices(chosen)
            rows = self._padded([requests[index].target[:-1] for index in longer])
            with FastProducts():
                logits = self._model(input_ids=rows, use_cache=True, **{self._cache: cache}).logits
            later = dict(zip(longer, logits, strict=True))
        scored = []
        for index, (place, one) in enumerate(zip(places, requests, strict=True)):
            parts = [first[place][None]]
            if index in later:
                parts.append(later[index][: len(one.target) - 1])
            scored.append(_likelihood(torch.cat(parts), one))
        return scored

    def _padded(self, rows: Sequence[tuple[int, ...]]) -> Tensor:
        length = max(map(len, rows))
        return torch.tensor([[*row, *[row[-1]] * (length - len(row))] for row in rows]).to(
            self.device
        )


def _likelihood(logits: Tensor, request: Request) -> Likelihood:
    """Of a target, from the logits `(tokens of the target, vocabulary)` that predict its tokens."""
    target = torch.tensor(request.target, device=logits.device)
    logs = logits.float().log_softmax(dim=-1)
    log = float(logs.gather(1, target[:, None]).sum())
    if not math.isfinite(log):
        raise ValueError(
            "the model gives outputs that are not finite. Load it in float32 or bfloat16; a damaged or "
            "float16 model does this."
        )
    return Likelihood(log, bool((logs.argmax(dim=-1) == target).all()))
