"""Every model type of transformers: pruned, saved compressed, and loaded by its Auto class."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoBackbone

import hf_sparse
from hf_sparse import SparsityConfig
from hf_sparse.checkpoint.model_classes import classes_of
from hf_sparse.upstream.transformers.auto import auto_classes
from tests.support.any_models import (
    build,
    dummy_inputs,
    has_blocks,
    model_types,
    outputs_of,
    state_of,
    tiny_config,
)
from tests.support.any_models import classes_of as heads_of
from tests.support.unchanged import unchanged

torch.set_num_threads(1)
# Kinds that are unlike each other: encoders, decoders, both, mixtures, state spaces, towers, sounds.
REPRESENTATIVE = (
    *("roberta", "xlm-roberta", "distilbert", "electra", "deberta", "deberta-v2", "modernbert"),
    *("mpnet", "gpt_neox", "codegen", "gpt_bigcode", "gemma3", "gemma3_text", "phi3", "smollm3"),
    *("olmo2", "granite", "mixtral", "qwen3_moe", "gpt_oss", "t5", "bart", "vit", "whisper"),
    *("wav2vec2", "clip", "qwen2_vl", "albert", "xlnet", "bloom", "falcon", "mamba", "swin"),
    *("beit", "convnext", "blip-2", "llava", "funnel", "deepseek_v3", "bark"),
)
# What transformers itself cannot do with a type.
_OWN_FAULTS = {"jev": "its from_pretrained cannot tell what was missing"}
# Heads that want sizes which no tiny config of the type has.
_OTHER_SIZES = {("beit", "BeitForSemanticSegmentation"), ("convnext", "ConvNextBackbone")}
_WRONG = ("missing_keys", "unexpected_keys", "mismatched_keys")


def built(config: Any, model_class: Any) -> Any:
    """A model, if transformers itself can make and initialise it."""
    try:
        return build(config, model_class)
    except AttributeError as error:
        pytest.skip(f"transformers does not initialise it: {error}")


def round_trip(model_type: str, model_class: Any, folder: Path) -> None:
    """Prune a model, save it, load it by the Auto class, and compare."""
    config = tiny_config(model_type)
    model = built(config, model_class)
    hf_sparse.prune_(model, SparsityConfig("unstructured", 0.5), "magnitude")
    hf_sparse.save_pretrained(model, folder)
    loader: Any = next(
        (
            each
            for each in auto_classes()
            if model_class in classes_of(each, type(config))
            and each is not AutoBackbone  # it asks the Hub about folders
        ),
        getattr(hf_sparse, f"Sparse{model_class.__name__}"),  # of a part of larger models
    )
    loaded, info = loader.from_pretrained(
        folder, output_loading_info=True, attn_implementation="eager"
    )
    assert not any(info[key] for key in _WRONG), info
    assert isinstance(loaded, model_class)
    assert type(loaded).__name__ == f"Sparse{model_class.__name__}"
    expected, found = model.state_dict(), loaded.state_dict()
    assert expected.keys() == found.keys()
    for name, value in expected.items():
        assert torch.equal(value.nan_to_num(), found[name].nan_to_num()), name
    for inputs in dummy_inputs(model):
        try:
            outputs = outputs_of(model, inputs)
        except Exception:
            continue
        again = outputs_of(loaded.eval(), inputs)
        for one, other in zip(outputs, again, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4, equal_nan=True)
        break


@pytest.mark.parametrize("model_type", REPRESENTATIVE)
def test_a_representative_type_comes_back_bit_equal(model_type: str, tmp_path: Path) -> None:
    round_trip(model_type, heads_of(tiny_config(model_type))[0], tmp_path / "sparse")


@pytest.mark.slow
@pytest.mark.parametrize("model_type", model_types())
def test_every_type_comes_back_bit_equal(model_type: str, tmp_path: Path) -> None:
    if model_type in _OWN_FAULTS:
        pytest.skip(_OWN_FAULTS[model_type])
    try:
        config = tiny_config(model_type)
    except ValueError as error:
        pytest.skip(str(error))
    head = heads_of(config)[0]
    if has_blocks(config, head):
        round_trip(model_type, head, tmp_path / "sparse")
        return
    model = built(config, head)
    with (
        unchanged(model),
        pytest.raises(ValueError, match=r"has no ModuleList of blocks.*targets="),
    ):
        hf_sparse.prune_(model, SparsityConfig("unstructured", 0.5), "magnitude")


@pytest.mark.slow
@pytest.mark.parametrize("model_type", REPRESENTATIVE)
def test_every_head_of_a_representative_type_comes_back_bit_equal(
    model_type: str, tmp_path: Path
) -> None:
    for number, head in enumerate(heads_of(tiny_config(model_type))[1:]):
        if (model_type, head.__name__) not in _OTHER_SIZES:
            round_trip(model_type, head, tmp_path / str(number))


@pytest.mark.slow
def test_most_types_have_a_tiny_model_and_blocks() -> None:
    table = {model_type: state_of(model_type) for model_type in model_types()}
    print(*(f"{name}: {state}" for name, state in table.items()), sep="\n")
    counts = Counter(state.partition(":")[0] for state in table.values())
    print(counts)
    assert counts["tried"] >= 450
