"""What is wrong in a stored provenance is told once, by the place where it stands."""

from __future__ import annotations

from typing import Any

import pytest

from hf_sparse.formats.error import FormatError
from hf_sparse.provenance.entry import VERSION, from_dict


@pytest.mark.parametrize(
    ("step", "told"),
    [
        ({}, "the entry: steps lacks the key 'method'"),
        ({"method": "wanda", "calibration": {}}, "the entry: steps: calibration lacks the key"),
        ({"method": 3}, "the entry: steps: method is '3'; wanted one line"),
    ],
)
def test_a_damaged_step_is_told_by_its_place(step: dict[str, Any], told: str) -> None:
    with pytest.raises(FormatError) as raised:
        from_dict({"version": VERSION, "steps": [step]})
    assert str(raised.value).startswith(told), raised.value
