"""Latency of a sparse model on this machine: torch, our dense kernels, and the compiled zeros."""

from __future__ import annotations

import copy
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import DynamicCache, PreTrainedModel
from transformers.utils.logging import tqdm

from hf_sparse.arguments import check_model
from hf_sparse.calibration.modes import switched
from hf_sparse.counts import format_table
from hf_sparse.runtime.llvm.target import host
from hf_sparse.runtime.model.compiled import compile as compile_model
from hf_sparse.runtime.model.configured import why_not_compiled
from hf_sparse.runtime.model.profile import Profile, profile_call
from hf_sparse.structure.layers import PRUNED_WITH, target_layers
from hf_sparse.tables import html_table
from hf_sparse.upstream.transformers.caches import cache_name

# What the zeros of the dense twin become; its results are never used.
_FILLING = 1e-3
_WARM_UP = 2


def processor_name() -> str:
    """What the processor calls itself, to stand beside every figure; else its architecture."""
    file = Path("/proc/cpuinfo")
    lines = file.read_text().splitlines() if file.exists() else []
    names = [line.partition(": ")[2] for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


@dataclass(frozen=True)
class Measurement:
    """One way to run the model.

    Attributes:
        name: `torch`, `compiled, dense` (the same kernels, zeros filled in) or `compiled`; with bits,
            `compiled, dense, int8` and `compiled, int8`, or int4.
        milliseconds: of each call.
    """

    name: str
    milliseconds: tuple[float, ...]

    @property
    def median(self) -> float:
        """The middle one."""
        return statistics.median(self.milliseconds)


@dataclass(frozen=True)
class Benchmark:
    """All ways, timed in turns. `str` gives a table.

    Attributes:
        batch, tokens, threads: what was run.
        forward: a call with `batch` x `tokens`.
        decode: a call with the last of `tokens`, the others in the cache; empty for encoders.
        processor: the name of the CPU.
        target: the instructions that code was made for.
    """

    batch: int
    tokens: int
    threads: int
    forward: tuple[Measurement, ...]
    decode: tuple[Measurement, ...]
    processor: str
    target: str

    def to_dict(self) -> dict[str, Any]:
        """For JSON: medians in milliseconds."""
        return {
            "batch": self.batch,
            "tokens": self.tokens,
            "threads": self.threads,
            "forward_ms": {one.name: one.median for one in self.forward},
            "decode_ms": {one.name: one.median for one in self.decode},
            "processor": self.processor,
            "target": self.target,
        }

    def __repr__(self) -> str:
        times = ", ".join(f"{one.name} {one.median:.2f} ms" for one in self.forward)
        return f"<Benchmark: {self.batch} x {self.tokens} tokens, {self.threads} threads: {times}>"

    def __str__(self) -> str:
        return f"{self._shape()}\n{format_table(*self._table())}"

    def _repr_html_(self) -> str:
        """For notebooks: the table, and what was run where."""
        return html_table(*self._table(), self._shape())

    def _shape(self) -> str:
        shape = f"batch {self.batch} x {self.tokens} tokens, {self.threads} threads"
        return f"{shape}; {self.processor}, compiled for {self.target}"

    def _table(self) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
        """Its head, and its rows."""
        rows: list[tuple[str, ...]] = []
        for kind, found in (("forward", self.forward), ("new token", self.decode)):
            if found:
                last = found[-1].median
                rows += [
                    (
                        f"{kind}: {one.name}",
                        f"{one.median:.2f}",
                        f"{min(one.milliseconds):.2f}",
                        f"{one.median / last:.2f}",
                    )
                    for one in found
                ]
        return ("", "median ms", "least ms", "over compiled"), rows


def benchmark(
    model: PreTrainedModel,
    batch: int = 1,
    tokens: int = 128,
    repeats: int = 10,
    bits: int | None = None,
) -> Benchmark:
    """Time a model with torch, with our dense kernels, and compiled, in turns.

    Args:
        model: a sparse model on the CPU that takes `input_ids`.
        batch, tokens: shape of the input.
        repeats: calls of each.
        bits: compile it with these, and a dense one with these, too.

    Memory: the model, a copy of its blocks with the zeros filled in, and both packed.

    Raises:
        ValueError: the model cannot be compiled, or a size is not positive or beyond the model's
            positions.
    """
    _check(model, batch, tokens, repeats)
    ids = torch.randint(0, model.config.vocab_size, (batch, tokens))
    with switched(model, training=False):
        ways = {"torch": model}
        if why_not_compiled(model.config) is None:  # single dense layers are left to torch
            filled = _filled(model)
            ways["compiled, dense"] = compile_model(filled)
            if bits is not None:
                ways[f"compiled, dense, int{bits}"] = compile_model(filled, bits=bits)
        ways["compiled" if bits is None else f"compiled, int{bits}"] = compile_model(
            model, bits=bits
        )
        with torch.inference_mode():
            forward = in_turns({name: _forward(one, ids) for name, one in ways.items()}, repeats)
            decode: tuple[Measurement, ...] = ()
            if model.can_generate() and tokens > 1:
                decode = in_turns({name: _decode(one, ids) for name, one in ways.items()}, repeats)
    return Benchmark(
        batch, tokens, torch.get_num_threads(), forward, decode, processor_name(), host().name
    )


def _check(model: PreTrainedModel, batch: int, tokens: int, repeats: int) -> None:
    """Raise a ValueError unless a model can be timed with such an input."""
    check_model(model, "benchmark", PreTrainedModel)
    for name, value in (("batch", batch), ("tokens", tokens), ("repeats", repeats)):
        if type(value) is not int or value < 1:
            raise ValueError(f"{name} is {value!r}; wanted a whole number, at least 1.")
    limit = getattr(model.config, "max_position_embeddings", None)
    if limit is not None and tokens > limit:
        raise ValueError(f"tokens is {tokens}, but the model has {limit} positions.")
    if getattr(model.config, "is_encoder_decoder", False):
        raise ValueError("models with an encoder and a decoder are not timed; wanted one stack.")


def profile(
    model: PreTrainedModel,
    batch: int = 1,
    tokens: int = 128,
    repeats: int = 10,
    bits: int | None = None,
) -> dict[str, Profile]:
    """Compile a model, and tell the time of each kernel inside real calls.

    Args:
        model: as `benchmark`'s.
        batch, tokens: shape of the input.
        repeats: calls, of which the means are told.
        bits: compile it with these.

    Returns:
        `forward`: of a call with all tokens; `new token`: of one with the last, the others in the
        cache, if the model generates.

    Raises:
        ValueError: as `benchmark`.
    """
    _check(model, batch, tokens, repeats)
    ids = torch.randint(0, model.config.vocab_size, (batch, tokens))
    with switched(model, training=False), torch.inference_mode():
        compiled = compile_model(model, bits=bits)
        count = batch * tokens
        profiles = {
            "forward": profile_call(compiled, _forward(compiled, ids), count, False, repeats)
        }
        if model.can_generate() and tokens > 1 and why_not_compiled(model.config) is None:
            step = _decode(compiled, ids)
            profiles["new token"] = profile_call(compiled, step, batch, True, repeats)
    return profiles


def _filled(model: PreTrainedModel) -> PreTrainedModel:
    """A copy without zeros, for speed alone: what the model promises of its weights does not hold."""
    twin = copy.deepcopy(model)
    vars(twin).pop(PRUNED_WITH, None)
    if getattr(twin.config, "sparsity_config", None) is not None:
        twin.config.sparsity_config = None
    for layer in target_layers(twin):
        weight = layer.weight
        weight[weight == 0] = _FILLING
    return twin


def _forward(model: nn.Module, ids: torch.Tensor) -> Callable[[], Any]:
    return lambda: model(input_ids=ids)


def _decode(model: Any, ids: torch.Tensor) -> Callable[[], Any]:
    cache = DynamicCache(config=model.config)
    cached = {cache_name(model.forward): cache, "use_cache": True}
    model(input_ids=ids[:, :-1], **cached)

    def step() -> None:
        model(input_ids=ids[:, :1], **cached)
        cache.crop(-1)

    return step


def in_turns(calls: dict[str, Callable[[], Any]], repeats: int) -> tuple[Measurement, ...]:
    """Time calls by name, one of each in every turn: what slows the machine slows them all."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for turn in tqdm(range(_WARM_UP + repeats), desc="Timing"):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            if turn >= _WARM_UP:
                times[name].append((time.perf_counter() - start) * 1e3)
    return tuple(Measurement(name, tuple(found)) for name, found in times.items())
