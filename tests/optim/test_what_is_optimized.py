"""An optimizer is given parameters, not a model."""

from __future__ import annotations

from typing import Any

import pytest

from hf_sparse import SparseAdamW, SparseSGD
from tests.support.tiny_models import tiny_model


@pytest.mark.parametrize("optimizer", [SparseAdamW, SparseSGD])
def test_a_model_and_a_mapping_are_refused(optimizer: Any) -> None:
    model = tiny_model("llama")
    for given, kind in ((model, "LlamaForCausalLM"), (dict(model.named_parameters()), "dict")):
        with pytest.raises(TypeError, match=f"got a {kind}; wanted its parameters"):
            optimizer(given, lr=1e-3)
    optimizer(model.named_parameters(), lr=1e-3, lam=1e-3)  # as torch's take them
