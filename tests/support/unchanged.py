"""A refused call leaves the model as it was."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


@contextmanager
def unchanged(model: nn.Module) -> Iterator[None]:
    """Fails if the model has other weights afterwards, or under other names."""
    before = {name: value.clone() for name, value in model.state_dict().items()}
    yield
    after = model.state_dict()
    assert after.keys() == before.keys()
    for name, value in after.items():
        same = value.is_meta or torch.equal(value.nan_to_num(), before[name].nan_to_num())
        assert same, name
