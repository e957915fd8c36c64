"""A block is described once, by what its steps read and write; both programs follow it."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from itertools import pairwise
from types import MethodType
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

import hf_sparse
from hf_sparse.runtime.kernels.worker import PHASES
from hf_sparse.runtime.model.compiled import CompiledLayer
from hf_sparse.runtime.programs import block, row_steps, tile_steps
from hf_sparse.runtime.programs.dependences import Use, apart, needed_behind, sections
from hf_sparse.runtime.programs.shape import Shape
from hf_sparse.runtime.programs.step import Buffer, FeedForward, Multiply, Normalise, Uses
from hf_sparse.runtime.programs.step import Step as AnyStep
from hf_sparse.runtime.weights.stack import Block, Stack
from tests.support.tiny_models import tiny_model

SEEDS = range(20)


@dataclass(frozen=True)
class Step(Uses):
    """A step that reads and writes what it is told."""

    read: tuple[Buffer, ...] = field(default=())
    written: tuple[Buffer, ...] = field(default=())

    @property
    def reads(self) -> tuple[Buffer, ...]:
        return self.read

    @property
    def writes(self) -> tuple[Buffer, ...]:
        return self.written


def random_steps(seed: int) -> list[Step]:
    """Each reads some of what was written before it, and writes one buffer of six."""
    chance, known, found = random.Random(seed), [Buffer("0", 1)], []
    for _ in range(12):
        read = tuple(chance.sample(known, min(len(known), chance.randint(1, 2))))
        written = Buffer(str(chance.randrange(6)), 1)
        found.append(Step(read, (written,)))
        known = list(dict.fromkeys([*known, written]))
    return found


@pytest.mark.parametrize("seed", SEEDS)
def test_buffers_that_share_memory_keep_what_is_still_read(seed: int) -> None:
    steps = random_steps(seed)
    pairs = apart(steps)
    names = sorted({buffer.name for step in steps for buffer in (*step.reads, *step.writes)})
    for one in names:
        for other in names:
            if one == other or (one, other) in pairs:
                continue
            holder = one  # of the memory that both have
            for number, step in enumerate(steps):
                for buffer in step.reads:
                    began = all(buffer not in earlier.writes for earlier in steps[:number])
                    assert buffer.name not in (one, other) or began or holder == buffer.name
                holder = next((b.name for b in step.writes if b.name in (one, other)), holder)


def test_what_is_read_behind_a_step_is_needed_until_it_is_written_anew() -> None:
    a, b, c = (Buffer(name, 1) for name in "abc")
    steps = [Step((a,), (b,)), Step((b,), (c,)), Step((a,), (b,)), Step((b, c), (a,))]
    assert list(map(set, needed_behind(steps))) == [{"a", "b"}, {"a", "c"}, {"b", "c"}, set()]


@pytest.mark.parametrize("seed", SEEDS)
def test_threads_wait_where_they_need_others_and_nowhere_else(seed: int) -> None:
    chance = random.Random(seed)
    items = [
        [
            Use(
                chance.choice("xyz"), chance.choice(["rows", "heads", "all"]), chance.random() < 0.4
            )
            for _ in range(2)
        ]
        for _ in range(30)
    ]

    def collide(one: list[Use], other: list[Use]) -> bool:
        return any(
            a.memory == b.memory and a.part != b.part and (a.writes or b.writes)
            for a in one
            for b in other
        )

    found = sections(items, lambda item: item)
    assert [item for section in found for item in section] == items
    for section in found:
        for number, item in enumerate(section):
            assert not any(collide(item, earlier) for earlier in section[:number])
    for before, section in pairwise(found):
        assert any(collide(section[0], earlier) for earlier in before)


def parallel_steps(stack: Stack, one: Block, *, crossing: bool = False) -> list[AnyStep]:
    """Attention and perceptron of the same hidden states, side by side."""
    found = block.steps(stack, one, crossing=crossing)
    norms = [step for step in found if isinstance(step, Normalise)]
    (feed_forward,) = (step for step in found if isinstance(step, FeedForward))
    rest = [step for step in found if step not in (*norms, feed_forward)]
    (out,) = (step for step in rest if isinstance(step, Multiply) and step.add)
    rest.remove(out)
    return [norms[0], *rest, norms[1], feed_forward, out]


def parallel_forward(layer: Any, hidden_states: Tensor, **kwargs: Any) -> Tensor:
    attended, _ = layer.self_attn(hidden_states=layer.input_layernorm(hidden_states), **kwargs)
    added: Tensor = layer.mlp(layer.post_attention_layernorm(hidden_states))
    return hidden_states + attended + added


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_another_order_of_steps_is_all_that_a_parallel_block_needs(
    family: str, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tile_steps, "steps", parallel_steps)
    monkeypatch.setattr(row_steps, "steps", parallel_steps)
    model = tiny_model(family)
    compiled = hf_sparse.compile(model)
    for layer in model.model.layers:
        layer.forward = MethodType(parallel_forward, layer)
    ids = torch.randint(2, 256, (2, 75), generator=torch.Generator().manual_seed(0))
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with torch.no_grad():
            wanted = model(input_ids=ids).logits
            cache = DynamicCache()
            parts = [compiled(input_ids=ids[:, :73], past_key_values=cache).logits]
            for token in (73, 74):
                given = ids[:, token : token + 1]
                parts.append(compiled(input_ids=given, past_key_values=cache).logits)
            whole = compiled(input_ids=ids, use_cache=False).logits
    finally:
        torch.set_num_threads(before)
    for found in (torch.cat(parts, dim=1), whole):
        torch.testing.assert_close(found, wanted, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize(("order", "waits"), [(block.steps, 5), (parallel_steps, 3)])
def test_the_waits_of_a_block_follow_from_its_steps(
    order: Any, waits: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(row_steps, "steps", order)
    monkeypatch.setattr(tile_steps, "steps", order)
    compiled = hf_sparse.compile(tiny_model("llama"))
    runner = next(m.runner for m in compiled.modules() if isinstance(m, CompiledLayer))
    blocks = len(runner.stack.blocks)
    rows = runner._make(Shape(2, 1, 2, True, 512, False))
    tiles = runner._make(Shape(2, 70, 2, True, 512, False))
    assert rows.program._words[PHASES] == waits * blocks
    assert tiles.program._words[PHASES] == 1 + blocks
