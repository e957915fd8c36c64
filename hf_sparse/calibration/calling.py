"""Calling a model on a batch that it may not take."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

_OURS = str(Path(__file__).parent.parent)
# What models raise at inputs of another kind.
_RAISED = (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError)
# Arguments of a forward that are no data.
_SETTINGS = ("output_", "return_", "use_cache", "past_key_values", "cache", "labels", "kwargs")
# What a decoder beside an encoder can begin with.
_OF_DECODER = ("decoder_input_ids", "decoder_inputs_embeds", "labels")


def run_on(model: nn.Module, batch: Mapping[str, Any]) -> Any:
    """`model(**batch)`.

    Args:
        model: a transformers model.
        batch: its inputs by name.

    Raises:
        ValueError: the model raised an error: what it was given, what its error is, and what it takes.
    """
    try:
        return model(**batch)
    except torch.OutOfMemoryError:
        raise
    except _RAISED as error:
        if isinstance(error, ValueError) and _is_ours(error):
            raise
        raise ValueError(_told(model, batch, error)) from error


def _is_ours(error: BaseException) -> bool:
    """Whether an error was raised by hf_sparse, in a hook, and not by the model."""
    trace, file = error.__traceback__, ""
    while trace is not None:
        file, trace = trace.tb_frame.f_code.co_filename, trace.tb_next
    return file.startswith(_OURS)


def _told(model: nn.Module, batch: Mapping[str, Any], error: BaseException) -> str:
    """What to say of an error that a model raised."""
    given = ", ".join(
        f"{name} {tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__}"
        for name, value in batch.items()
    )
    takes = [
        name
        for name, parameter in inspect.signature(model.forward).parameters.items()
        if parameter.kind not in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL)
    ]
    data = [name for name in takes if not name.startswith(_SETTINGS)]
    main = getattr(model, "main_input_name", None)
    hints = []
    if unknown := [name for name in batch if name not in takes]:
        hints.append(f"it has no input {', '.join(unknown)}")
    if isinstance(main, str) and main not in batch:
        hints.append(f"it wants {main}")
    config: Any = getattr(model, "config", None)
    if getattr(config, "is_encoder_decoder", False) and not any(n in batch for n in _OF_DECODER):
        hints.append(
            "it has an encoder and a decoder, and wants the decoder's tokens, too: labels, or "
            "decoder_input_ids"
        )
    told = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    why = f" Perhaps: {'; '.join(hints)}." if hints else ""
    return (
        f"a {type(model).__name__} does not run on a batch with {given or 'no inputs'} ({told}).{why} "
        f"Its forward takes {', '.join(data[:8])}{', ...' if len(data) > 8 else ''}."
    )
