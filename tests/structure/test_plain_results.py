"""What loses experts or hidden features is what transformers builds from its config, or is refused."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from hf_sparse import drop_experts_, drop_hidden_
from tests.support.any_models import model_types, tiny_config

TYPES = [name for name in model_types() if name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES]
IDS = torch.arange(5, 21)[None]
CALLS: dict[str, Callable[[Any], Any]] = {
    "experts": lambda model: drop_experts_(model, 1, by="magnitude"),
    "hidden": lambda model: drop_hidden_(model, 0.25, [IDS]),
}


def runs(model: PreTrainedModel) -> torch.Tensor | None:
    """The logits of a model; None if it does not run on token ids alone."""
    try:
        with torch.no_grad():
            found: torch.Tensor = model(input_ids=IDS, use_cache=False).logits
    except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError):
        return None
    return found if bool(found.isfinite().all()) else None


@pytest.mark.slow
@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("model_type", TYPES)
def test_it_is_the_model_of_its_config_or_refused(model_type: str, call: str) -> None:
    try:
        config = copy.deepcopy(tiny_config(model_type))
        torch.manual_seed(0)
        model: Any = AutoModelForCausalLM.from_config(config).eval()
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        pytest.skip(f"no small model: {error}")
    if runs(model) is None:
        pytest.skip("the small model does not run on token ids alone")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    try:
        CALLS[call](model)
    except ValueError:
        after = model.state_dict()
        assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
        assert runs(model) is not None
        return
    fresh: Any = AutoModelForCausalLM.from_config(type(config).from_dict(model.config.to_dict()))
    fresh.eval().load_state_dict(model.state_dict())
    found, wanted = runs(model), runs(fresh)
    assert found is not None
    assert wanted is not None
    scale = max(float(wanted.abs().max()), 1e-3)
    torch.testing.assert_close(found, wanted, atol=1e-4 * scale, rtol=1e-4)
