"""Times of a call on this machine: torch, compiled, and ONNX Runtime where it is installed."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, PreTrainedModel

import hf_sparse.models
from hf_sparse.arguments import check_model
from hf_sparse.calibration.modes import switched
from hf_sparse.checkpoint.dense_models import dense_model_class
from hf_sparse.exporters.can_export import check_can_export
from hf_sparse.exporters.onnx_export import export_onnx
from hf_sparse.exporters.verification import runner
from hf_sparse.pages.sources import Source
from hf_sparse.runtime.llvm.target import host
from hf_sparse.runtime.model.compiled import compile as compile_model
from hf_sparse.timing import Benchmark, in_turns, processor_name


def loaded(source: Source) -> PreTrainedModel:
    """The model of a source, with the head that it was saved with.

    Raises:
        ValueError: it is no transformers model, or its class is not known.
    """
    if not isinstance(source, Path):
        check_model(source, "report with latency=True", PreTrainedModel)
        return source  # type: ignore[return-value]
    config = AutoConfig.from_pretrained(source)
    name = (config.architectures or [""])[0]
    if name.startswith("Sparse"):
        kind: Any = getattr(hf_sparse.models, name)
    else:
        kind = dense_model_class(str(source), config)
    model: PreTrainedModel = kind.from_pretrained(source)
    return model


def time_ways(source: Source, tokens: int, repeats: int) -> tuple[Benchmark, tuple[str, ...]]:
    """Time a call of a model with `1 x tokens` token ids, all ways in turns.

    Args:
        source: a model; one of a folder is loaded.
        tokens, repeats: length of the text; calls of each way.

    Returns:
        The times, and a sentence for each way that this model cannot go.

    Raises:
        ImportError: llvmlite is not installed.
        ValueError: the model takes no token ids, or not so many.
    """
    model = loaded(source)
    two = getattr(model.config, "is_encoder_decoder", False)
    if model.main_input_name != "input_ids" or two:
        takes = "texts for two parts" if two else model.main_input_name
        raise ValueError(
            f"a {type(model).__name__} takes {takes}; wanted a model of token ids alone to time. Leave "
            "latency out."
        )
    text = model.config.get_text_config()
    longest = getattr(text, "max_position_embeddings", None) or tokens
    if not 1 <= tokens <= longest or repeats < 1:
        raise ValueError(
            f"tokens is {tokens} and repeats {repeats}; wanted 1 or more, and tokens up to the "
            f"model's {longest} positions."
        )
    ids = torch.randint(0, text.vocab_size, (1, tokens), generator=torch.Generator().manual_seed(0))
    notes, ways = [], dict[str, Callable[[], Any]]()
    with (
        switched(model, training=False),
        torch.inference_mode(),
        tempfile.TemporaryDirectory() as t,
    ):
        ways["torch"] = lambda: model(input_ids=ids)
        try:
            compiled: Any = compile_model(model)
            ways["compiled"] = lambda: compiled(input_ids=ids)
        except ValueError as error:
            notes.append(f"It was not timed compiled: {error}")
        try:
            folder = Path(t) / "graph"
            head = check_can_export(model, folder)
            export_onnx(model, folder)
            ways["ONNX Runtime"] = runner(model, head, folder / "model.onnx", tokens)
        except (ImportError, ValueError) as error:
            notes.append(f"It was not timed in ONNX Runtime: {error}")
        found = in_turns(ways, repeats)
    threads = torch.get_num_threads()
    return Benchmark(1, tokens, threads, found, (), processor_name(), host().name), tuple(notes)
