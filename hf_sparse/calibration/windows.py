"""Calibration data: windows of text that show a method what the activations look like."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from hf_sparse.arguments import check_kinds
from hf_sparse.calibration.texts import check_tokenizer, documents_of
from hf_sparse.suggestions import shortened
from hf_sparse.upstream.torch import bytes_of
from hf_sparse.upstream.transformers.caches import cache_in


def token_windows(
    tokenizer: Any, documents: str | Iterable[str], window: int, limit: int | None = None
) -> Tensor:
    """Tokenise documents in order and cut them into windows of equal length.

    The documents are joined by one end-of-sequence token (the separator where a tokenizer has
    none), without other special tokens; what does not fill a window at the end is dropped.

    Args:
        tokenizer: of the model.
        documents: one text, or texts, read only as far as they are needed. Blank ones are left
            out. (The lines of a file are no documents: give its text.)
        window: tokens in a window.
        limit: windows to cut at most; None: as many as there are.

    Returns:
        Token ids `(windows, window)`.

    Raises:
        ValueError: the text is shorter than one window, or something else was given as texts.
    """
    check_tokenizer(tokenizer)
    if type(window) is not int or window < 2:
        raise ValueError(f"window is {window!r}; wanted a whole number, at least 2 tokens.")
    if limit is not None and (type(limit) is not int or limit < 1):
        raise ValueError(f"{limit!r} windows were asked for; wanted 1 or more.")
    joint = tokenizer.eos_token_id
    joint = tokenizer.sep_token_id if joint is None else joint
    ids: list[int] = []
    for number, document in enumerate(documents_of(documents)):
        if number and joint is not None:
            ids.append(joint)
        ids += tokenizer(document, add_special_tokens=False, verbose=False)["input_ids"]
        if limit is not None and len(ids) >= limit * window:
            break
    count = len(ids) // window if limit is None else min(limit, len(ids) // window)
    if count == 0:
        raise ValueError(
            f"the text has {len(ids)} tokens, less than one window of {window}. Give more text, or "
            "a smaller window."
        )
    return torch.tensor(ids[: count * window]).view(count, window)


def calibration_batches(
    tokenizer: Any,
    documents: str | Iterable[str],
    *,
    num_samples: int = 128,
    window: int = 512,
    batch_size: int = 1,
) -> list[dict[str, Tensor]]:
    """Make `batches` for `prune_` from documents: see `token_windows` for how they are cut.

    Args:
        tokenizer: of the model.
        documents: one text, or texts in the order in which they are used.
        num_samples: number of windows.
        window: tokens in a window; memory grows with it, so take the length that is used.
        batch_size: windows that go through a block together.

    Returns:
        Batches with `input_ids` `(batch_size, window)`; the last one may be smaller.

    Raises:
        ValueError: there is less text than `num_samples` windows, or something else was given as
            texts.
    """
    check_kinds(calibration_batches, locals())
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size!r}; wanted 1 or more.")
    windows = token_windows(tokenizer, documents, window, num_samples)
    if len(windows) < num_samples:
        raise ValueError(
            f"the text fills {len(windows)} windows of {window} tokens, but num_samples is "
            f"{num_samples}. Give more text, or ask for fewer samples."
        )
    return [{"input_ids": batch} for batch in windows.split(batch_size)]


def checked_batches(
    batches: Iterable[Mapping[str, Tensor] | Tensor] | None, model: nn.Module, method: str
) -> list[dict[str, Any]]:
    """The batches as dicts of inputs on the model's device.

    Raises:
        ValueError: there are none, one is no batch, or its sequences are too long for the model.
    """
    if isinstance(batches, Tensor | Mapping):
        raise ValueError(
            f"batches is one {type(batches).__name__}; wanted a list of them: batches=[batch]."
        )
    if isinstance(batches, str | bytes) or not isinstance(batches, Iterable | None):
        raise ValueError(
            f"batches is {shortened(batches)}; wanted batches of token ids, as "
            "hf_sparse.calibration_batches(tokenizer, texts) gives them."
        )
    checked = [_check_batch(batch) for batch in batches or ()]
    if not checked:
        raise ValueError(
            f"method '{method}' needs calibration data and got none. Give batches=, for example "
            "from hf_sparse.calibration_batches(tokenizer, texts)."
        )
    _check_lengths(checked, model)
    _check_ids(checked, model)
    _check_targets(checked, model)
    device = next(model.parameters()).device
    if device.type == "meta":  # weights are on the disk
        return checked
    return [
        {
            name: value.to(device) if isinstance(value, Tensor) else value
            for name, value in batch.items()
        }
        for batch in checked
    ]


def _check_targets(batches: list[dict[str, Any]], model: nn.Module) -> None:
    """Refuse labels that a decoder's inputs cannot be made of."""
    config: Any = getattr(model, "config", None)
    if not getattr(config, "is_encoder_decoder", False):
        return
    if getattr(config, "decoder_start_token_id", None) is not None:
        return
    for batch in batches:
        labels = batch.get("labels")
        given = {"decoder_input_ids", "decoder_inputs_embeds"} & batch.keys()
        if isinstance(labels, Tensor) and labels.ndim > 1 and not given:
            raise ValueError(
                f"the config of this {type(model).__name__} has no decoder_start_token_id, with which "
                "the decoder's inputs would begin that are made of labels. Set it (T5: model.config."
                "decoder_start_token_id = model.config.pad_token_id), or put decoder_input_ids into "
                "the batches."
            )


def _num_embeddings(model: nn.Module) -> int | None:
    """How many token ids a model has embeddings for; None if it does not tell."""
    try:
        embed = getattr(model, "get_input_embeddings", lambda: None)()
    except NotImplementedError:  # models of images, of sounds, and of several parts
        return None
    return getattr(embed, "num_embeddings", None)


def _check_ids(batches: list[dict[str, Any]], model: nn.Module) -> None:
    """Refuse ids that the model has no embedding for, and masks of another shape."""
    known = _num_embeddings(model)
    for batch in batches:
        ids, mask = batch.get("input_ids"), batch.get("attention_mask")
        if ids is None or known is None:
            continue
        if ids.is_floating_point() or not ids.numel():
            raise ValueError(
                f"input_ids are {ids.dtype} of shape {tuple(ids.shape)}; wanted token ids, at least "
                "one."
            )
        if not 0 <= int(ids.min()) <= int(ids.max()) < known:
            raise ValueError(
                f"input_ids are from {int(ids.min())} to {int(ids.max())}, but the model has {known} "
                "tokens. Use the model's own tokenizer."
            )
        if isinstance(mask, Tensor) and mask.ndim == 2 and mask.shape != ids.shape[:2]:
            raise ValueError(
                f"attention_mask has shape {tuple(mask.shape)}, input_ids {tuple(ids.shape)}; wanted "
                "equal ones."
            )
        if type(model).__name__.endswith(("ForCausalLM", "LMHeadModel")):
            _check_next_tokens(batch.get("labels"), ids, known)


def _check_next_tokens(labels: Any, ids: Tensor, known: int) -> None:
    """Refuse labels of a causal language model that are no tokens of its inputs' shape, or -100."""
    if labels is None:
        return
    if not isinstance(labels, Tensor) or labels.dtype != torch.long or labels.shape != ids.shape:
        found = (
            f"{labels.dtype} of shape {tuple(labels.shape)}"
            if isinstance(labels, Tensor)
            else f"a {type(labels).__name__}"
        )
        raise ValueError(
            f"labels are {found}; wanted torch.int64 of shape {tuple(ids.shape)}, as the input_ids, "
            "with -100 where nothing is predicted."
        )
    told = labels[labels != -100]
    if told.numel() and not 0 <= int(told.min()) <= int(told.max()) < known:
        raise ValueError(
            f"labels are from {int(told.min())} to {int(told.max())}, but the model has {known} "
            "tokens; wanted tokens, or -100 where nothing is predicted."
        )


def _check_lengths(batches: list[dict[str, Any]], model: nn.Module) -> None:
    """Refuse sequences that are longer than the model's learned positions."""
    length = max((b["input_ids"].shape[-1] for b in batches if "input_ids" in b), default=0)
    for name, module in model.named_modules():
        learned = name.endswith(("position_embeddings", "embed_positions", "wpe"))
        if not learned or not isinstance(module, nn.Embedding):
            continue
        known = getattr(getattr(model, "config", None), "max_position_embeddings", None)
        limit = min(module.num_embeddings, known or module.num_embeddings)
        if length > limit:
            raise ValueError(
                f"a batch has sequences of {length} tokens, but {type(model).__name__} has learned "
                f"{limit} positions. Take a smaller window."
            )


def _check_batch(batch: Any) -> dict[str, Any]:
    """One batch as a dict of inputs, without a cache: blocks are called more than once."""
    inputs = {"input_ids": batch} if isinstance(batch, Tensor) else batch
    values = list(inputs.values()) if isinstance(inputs, Mapping) else []
    dimensions = [value.ndim for value in values if isinstance(value, Tensor)]
    if max(dimensions, default=0) < 2 or getattr(inputs.get("input_ids"), "ndim", 2) < 2:
        raise ValueError(
            f"a batch is {type(batch).__name__} {str(batch)[:60]!r}; wanted a dict of tensors, or "
            "input_ids of shape (batch, tokens), as hf_sparse.calibration_batches(tokenizer, texts) "
            "gives them."
        )
    if cache_in(inputs) is not None:
        raise ValueError("a batch has past_key_values; wanted whole sequences without a cache.")
    return {k: v for k, v in inputs.items() if k not in ("use_cache", "return_dict")}


def fingerprint(batches: Iterable[Mapping[str, Any]]) -> str:
    """A hash of the tensors of batches, by which a resumed run knows its data."""
    digest = hashlib.sha256()
    for batch in batches:
        for name, value in sorted(batch.items()):
            digest.update(name.encode())
            if isinstance(value, Tensor):
                digest.update(str(tuple(value.shape)).encode())
                digest.update(bytes_of(value).numpy().data)
            else:
                digest.update(repr(value).encode())
    return digest.hexdigest()
