"""Settings that hold for all tests."""

from __future__ import annotations

import os

import pytest
import torch

os.environ.setdefault("HF_HUB_OFFLINE", "1")


@pytest.fixture(autouse=True)
def _two_threads() -> None:
    """Test workers share two cores."""
    torch.set_num_threads(1)
