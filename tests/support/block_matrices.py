"""How much of the matrices in a model's blocks a config without targets means."""

from __future__ import annotations

import re
from collections.abc import Iterator

from torch import nn
from transformers import CONFIG_MAPPING, PreTrainedConfig

from hf_sparse.structure.experts import ExpertStack, routes
from hf_sparse.structure.layers import find_stacks, layers_of

# Modules whose weights are no matrices that hidden states are multiplied by.
_OTHERS = (nn.Embedding, nn.Conv1d, nn.Conv2d, nn.Conv3d)
# Parameters of two dimensions and more that are none: decays, positions, biases, scales of norms.
_NO_MATRIX = re.compile(r"bias|A_log|rel_pos|position|norm")


def is_mixture(model_type: str) -> bool:
    """Whether the config of a type has a number of experts."""
    try:
        config = CONFIG_MAPPING[model_type]()
    except Exception:  # a config that wants arguments: its model tells
        return True
    return any(
        re.search(r"experts?(_|$)|moe", name) and name != "experts_implementation"
        for name in _names(config)
    )


def _names(config: PreTrainedConfig) -> Iterator[str]:
    for name, value in vars(config).items():
        if not name.startswith("_"):
            yield name
        if isinstance(value, PreTrainedConfig):
            yield from _names(value)


def share_of_targets(model: nn.Module) -> tuple[float, list[str]]:
    """The share of the weights of matrices in blocks that are default targets, and what is left out."""
    stacks = find_stacks(model)
    targets: dict[int, int] = {}
    for layer in layers_of(stacks):
        key = id(layer.parameter)
        targets[key] = targets.get(key, 0) + layer.weight.numel()
    seen: set[int] = set()
    whole, missing = 0, []
    for block in (block for stack in stacks for block in stack.blocks):
        for path, module in block.named_modules():
            known = ExpertStack.of(module)
            for name, parameter in module.named_parameters(path, recurse=False):
                if isinstance(module, _OTHERS) or parameter.ndim < 2 or id(parameter) in seen:
                    continue
                if _NO_MATRIX.search(name) or routes(name, block):
                    continue
                seen.add(id(parameter))
                # Experts that only hand on what they get have rows that nothing is multiplied by.
                used = 1 if known is None or known.below else known.number / len(parameter)
                whole += round(parameter.numel() * used)
                if id(parameter) not in targets:
                    missing.append(name)
    return sum(count for key, count in targets.items() if key in seen) / max(whole, 1), missing
