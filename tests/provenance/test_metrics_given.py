"""`metrics=None` is no list of metrics: every call that takes metrics says so before it writes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import hf_sparse
from tests.support.exporting import skip_unless_exports
from tests.support.tiny_models import tiny_model

CALLS: dict[str, Callable[..., Any]] = {
    "save_pretrained": hf_sparse.save_pretrained,
    "export_onnx": hf_sparse.export_onnx,
    "push_to_hub": hf_sparse.push_to_hub,
}


@pytest.mark.parametrize("metrics", [None, [None], "perplexity", {}])
@pytest.mark.parametrize("call", CALLS)
def test_what_is_no_list_of_metrics_is_refused(call: str, metrics: Any, tmp_path: Path) -> None:
    skip_unless_exports(call)
    folder = tmp_path / "user" / "model"
    place = "user/model" if call == "push_to_hub" else folder
    with pytest.raises(ValueError, match=rf"{call}: metrics is .*; wanted a list of hf_sparse\.M"):
        CALLS[call](tiny_model("llama"), place, metrics=metrics)
    assert not folder.exists()
