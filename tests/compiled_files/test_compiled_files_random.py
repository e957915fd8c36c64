"""Compiled models that are changed at random, with all memory between pages without access."""

from __future__ import annotations

import copy
import json
import random
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

import hf_sparse
from hf_sparse.formats import FormatError
from tests.support.compiled_folders import MODELS, Tensors, as_old, in_a_child, logits, saved, write
from tests.support.guarded_memory import guard_the_runtime

# What numbers, texts and lists of a description are replaced by.
VALUES: list[Any] = [0, -1, 1, 3, 2**31, 2**31 - 1, 2**32, 2**62, 2**63, -(2**62), 10**30, 0.5]
VALUES += [1e300, float("nan"), float("inf"), True, None, "", "x", "torch.int8"]
VALUES += [[], {}, [0], [[]], {"a": 1}]


def change_description(described: Any, chance: random.Random) -> str:
    """Change one thing in a description; tells what."""
    path: list[Any] = []
    owner: Any = described
    while True:
        keys = list(owner) if isinstance(owner, dict) else list(range(len(owner)))
        if not path:
            keys = ["stack", "blocks", "order", "config", "class", "tied", "types", "generation"]
        path.append(chance.choice(keys))
        inner = owner[path[-1]]
        if not isinstance(inner, (dict, list)) or not inner or chance.random() < 0.1:
            break
        owner = inner
    key, old = path[-1], owner[path[-1]]
    if chance.random() < 0.2:
        del owner[key]
    elif type(old) is int and chance.random() < 0.6:
        owner[key] = old + chance.choice([-1, 1, 4, -4, 16, 64])
    elif isinstance(old, list) and old and chance.random() < 0.5:
        old.append(old[0]) if chance.random() < 0.5 else chance.shuffle(old)
    else:
        owner[key] = copy.deepcopy(chance.choice(VALUES))
    return f"{path}: {str(old)[:40]}"


def change_tensor(tensors: Tensors, chance: random.Random) -> str:
    """Change one tensor, most often one that kernels follow; tells which, and how."""
    names = [name for name in sorted(tensors) if name != "id"]
    followed = [name for name in names if name.startswith("stack.")]
    name = chance.choice(followed if chance.random() < 0.9 else names)
    tensor = tensors[name]
    flat = tensor.view(-1)
    bits = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.itemsize]
    how = chance.choice(
        ["set", "add", "swap", "roll", "cut", "grow", "type", "take", "bit", "drop"]
    )
    if not flat.numel():
        return name
    one, other = (chance.randrange(len(flat)) for _ in range(2))
    numbers = flat.view(bits)
    if how == "set":
        size = 8 * tensor.itemsize
        numbers[one] = chance.choice(
            [0, 1, 255 if size == 8 else -1, 2 ** (size - 2), len(flat)]
        ) % (256 if size == 8 else 2 ** (size - 1))
    elif how == "add":
        numbers[one] += chance.choice([1, -1, 2, -2, 4, 16])
    elif how == "bit":
        numbers[one] ^= 1 << chance.randrange(7)
    elif how == "swap":
        numbers[one], numbers[other] = numbers[other].clone(), numbers[one].clone()
    elif how == "roll":
        numbers.copy_(numbers.roll(chance.choice([1, -1, 3])))
    elif how == "cut":
        tensors[name] = tensor[: chance.randrange(len(tensor))] if tensor.ndim else tensor
    elif how == "grow":
        tensors[name] = torch.cat([tensor, tensor]) if tensor.ndim else tensor
    elif how == "type":
        tensors[name] = tensor.view(bits)
    elif how == "take":
        tensors[name] = tensors[chance.choice(followed)].clone()
    else:
        del tensors[name]
    return f"{name}: {how} at {one}"


def attack(folder: Path, seed: int, count: int, old: bool) -> Counter[str]:
    """Load and run changed files, whose memory ends at pages without access; tells what came of it."""
    found: Counter[str] = Counter()
    chance = random.Random(seed)
    for _ in range(count):
        described, tensors = saved(chance.choice(sorted(MODELS)))
        if old:
            as_old(described, tensors)
        in_description = chance.random() < 0.4
        if in_description:
            told = change_description(described, chance)
        else:
            told = change_tensor(tensors, chance)
        (folder / "told").write_text(told)
        write(folder / "model", described, tensors, described_too=not in_description)
        try:
            model = hf_sparse.load_compiled(folder / "model")
        except FormatError:
            found["refused"] += 1
            continue
        try:
            logits(model)
            found["ran"] += 1
        except Exception as error:
            found[f"{told}: {error!r}"] += 1
    return found


@pytest.mark.slow
@pytest.mark.parametrize(
    ("seed", "count", "old"),
    [
        (0, 80, False),
        (0, 30, True),
        pytest.param(1, 3000, False, marks=pytest.mark.slow),
        pytest.param(1, 3000, True, marks=pytest.mark.slow),
    ],
)
@pytest.mark.filterwarnings("ignore:.*without an id:UserWarning")
def test_random_changes_are_found_or_harmless(
    tmp_path: Path, seed: int, count: int, old: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in MODELS:
        saved(name)

    def run() -> None:
        guard_the_runtime(monkeypatch)
        found = attack(tmp_path, seed, count, old)
        (tmp_path / "found").write_text(json.dumps(found))

    status = in_a_child(run)
    assert status == 0, (tmp_path / "told").read_text()
    found = json.loads((tmp_path / "found").read_text())
    assert found.pop("refused") > 0.5 * count
    assert found.pop("ran") > 0.05 * count
    # transformers reads settings from the config at each call, and tells what it cannot use.
    assert all(told.startswith("['config', ") for told in found), found
