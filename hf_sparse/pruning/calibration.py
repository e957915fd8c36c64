"""Calibration data: windows of text that show a method what the activations look like."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor


def token_windows(
    tokenizer: Any, documents: Iterable[str], window: int, limit: int | None = None
) -> Tensor:
    """Tokenise documents in order and cut them into windows of equal length.

    The documents are joined by one end-of-sequence token (the separator where a tokenizer has
    none), without other special tokens; what does not fill a window at the end is dropped.

    Args:
        tokenizer: of the model.
        documents: texts; read only as far as they are needed.
        window: tokens in a window.
        limit: windows to cut at most; None: as many as there are.

    Returns:
        Token ids `(windows, window)`.

    Raises:
        ValueError: the text is shorter than one window.
    """
    if window < 2:
        raise ValueError(f"window is {window}; wanted at least 2 tokens.")
    if limit is not None and limit < 1:
        raise ValueError(f"{limit} windows were asked for; wanted 1 or more.")
    joint = tokenizer.eos_token_id
    joint = tokenizer.sep_token_id if joint is None else joint
    ids: list[int] = []
    for number, document in enumerate(documents):
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
    documents: Iterable[str],
    *,
    num_samples: int = 128,
    window: int = 512,
    batch_size: int = 1,
) -> list[dict[str, Tensor]]:
    """Make `batches` for `prune_` from documents: see `token_windows` for how they are cut.

    Args:
        tokenizer: of the model.
        documents: texts, in the order in which they are used.
        num_samples: number of windows.
        window: tokens in a window; memory grows with it, so take the length that is used.
        batch_size: windows that go through a block together.

    Returns:
        Batches with `input_ids` `(batch_size, window)`; the last one may be smaller.

    Raises:
        ValueError: there is less text than `num_samples` windows.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}; wanted 1 or more.")
    windows = token_windows(tokenizer, documents, window, num_samples)
    if len(windows) < num_samples:
        raise ValueError(
            f"the text fills {len(windows)} windows of {window} tokens, but num_samples is "
            f"{num_samples}. Give more text, or ask for fewer samples."
        )
    return [{"input_ids": batch} for batch in windows.split(batch_size)]
