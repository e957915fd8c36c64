"""Models that transformers loads alone, in a process that has no hf_sparse."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tests.support.processes import run


def check_plain(folder: Path, models: Mapping[str, Any], generated: Mapping[str, Any]) -> None:
    """Fails unless the models in `folder/FAMILY` are and do there what they are and do here.

    Args:
        folder: with `FAMILY.safetensors`, too: `input_ids` and `output`.
        models: by family.
        generated: what some of them generate, by family.
    """
    done = run("load_plain_models", *(folder / family for family in models))
    assert done.returncode == 0, done.stderr
    for family, line in zip(models, done.stdout.splitlines(), strict=True):
        answer = json.loads(line)
        assert (answer["type"], answer["errors"]) == (family, 0)
        assert answer["class"] == type(models[family]).__name__
        assert answer["difference"] < 1e-4
        assert family not in generated or answer["generated"] == generated[family], family
