"""The heads that can be exported: what their graphs take and give, and inputs to try them on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from hf_sparse.structure.families import base_type
from hf_sparse.upstream.transformers.caches import cache_in, cache_name

_CHOICES = 3


@dataclass(frozen=True)
class Head:
    """A kind of head.

    Attributes:
        task: its name on the Hub.
        reader: the classes of transformers and Optimum that read it: `AutoModel...`, `ORTModel...`.
        axes: of the token ids.
        caches: whether it takes and gives keys and values.
    """

    task: str
    reader: str
    axes: tuple[str, ...] = ("batch_size", "sequence_length")
    caches: bool = False


_CAUSAL = Head("text-generation", "ForCausalLM", caches=True)
# By the ending of the class's name.
HEADS = {
    "ForSequenceClassification": Head("text-classification", "ForSequenceClassification"),
    "ForTokenClassification": Head("token-classification", "ForTokenClassification"),
    "ForQuestionAnswering": Head("question-answering", "ForQuestionAnswering"),
    "ForMaskedLM": Head("fill-mask", "ForMaskedLM"),
    "ForMultipleChoice": Head(
        "multiple-choice", "ForMultipleChoice", ("batch_size", "num_choices", "sequence_length")
    ),
    "ForCausalLM": _CAUSAL,
    "GPT2LMHeadModel": _CAUSAL,
    "Model": Head("feature-extraction", "ForFeatureExtraction"),
}
# Classes whose names end like one of these, but that are something else.
_OTHERS = ("LMHeadModel", "DoubleHeadsModel", "PreTrainedModel", "EncoderModel")


def head_of(model: PreTrainedModel) -> Head:
    """The head of a model.

    Raises:
        ValueError: it cannot be exported; the message lists those that can.
    """
    name = type(model).__name__
    for ending, head in HEADS.items():
        if name.endswith(ending) and (ending != "Model" or not name.endswith(_OTHERS)):
            return head
    raise ValueError(
        f"a {name} cannot be exported. Wanted a model whose class ends in {', '.join(HEADS)}: load "
        "the checkpoint with such a class."
    )


@dataclass(frozen=True)
class Case:
    """Sizes of inputs to trace a graph with, or to try it on."""

    batch: int
    tokens: int
    past: int = 0


@dataclass(frozen=True)
class Example:
    """Inputs of one size.

    Attributes:
        inputs: of the model's forward.
        arrays: the same by the names of the graph's inputs.
    """

    inputs: dict[str, Any]
    arrays: dict[str, Tensor]


@torch.no_grad()
def example(model: PreTrainedModel, head: Head, case: Case) -> Example:
    """Random inputs; of a batch the last sequence is padded, on the left if the head caches."""
    generator = torch.Generator().manual_seed(case.batch + 10 * case.tokens)
    text = model.config.get_text_config()
    shape = [case.batch, case.tokens]
    if len(head.axes) == 3:
        shape.insert(1, _CHOICES)
    ids = torch.randint(0, text.vocab_size, shape, generator=generator)
    mask = torch.ones(*shape[:-1], case.past + case.tokens, dtype=torch.int64)
    if case.batch > 1 and case.tokens > 2:
        padding = slice(0, 2) if head.caches else slice(case.tokens - 2, None)
        mask[-1, ..., padding] = 0
    inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": mask}
    if getattr(text, "type_vocab_size", 0) and not head.caches:
        inputs["token_type_ids"] = torch.zeros_like(ids)
    if not head.caches:
        return Example(inputs, dict(inputs))
    if base_type(model.config.model_type) != "opt":  # OPT counts the mask itself
        inputs["position_ids"] = (mask.cumsum(1) - 1).clamp_min(0)[:, case.past :]
    cache = DynamicCache()  # whole, for sliding windows too: the masks keep to the window
    cached = {cache_name(model.forward): cache, "use_cache": True}
    if case.past:
        past = torch.randint(0, text.vocab_size, (case.batch, case.past), generator=generator)
        model(
            input_ids=past,
            attention_mask=mask[:, : case.past],
            **cached,
        )
    arrays = {**inputs, **_cached(cache, "past_key_values")}
    return Example({**inputs, **cached}, arrays)


def named_outputs(outputs: Mapping[str, Any]) -> dict[str, Tensor]:
    """What a model returned, by the names of the graph's outputs."""
    named = {name: value for name, value in outputs.items() if isinstance(value, Tensor)}
    cache = cache_in(outputs)
    return named if cache is None else {**named, **_cached(cache, "present")}


def _cached(cache: DynamicCache, prefix: str) -> dict[str, Tensor]:
    """The keys and values of a cache, `(batch, heads, tokens, head_size)`, as Optimum names them."""
    named = {}
    for index, layer in enumerate(cache.layers):
        keys, values = getattr(layer, "keys", None), getattr(layer, "values", None)
        if keys is not None and values is not None:
            named[f"{prefix}.{index}.key"] = keys.clone()
            named[f"{prefix}.{index}.value"] = values.clone()
    return named
