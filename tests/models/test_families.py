"""Sparse classes: every head, the Auto classes, pipelines, generation, PEFT."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForMultipleChoice,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    PreTrainedModel,
    pipeline,
)

import hf_sparse
from hf_sparse import SparsityConfig
from hf_sparse.models.modeling import model_classes
from hf_sparse.structure.parts import PARTS as FAMILIES
from tests.support.tiny_models import CONFIGS, tiny_tokenizer

HEADS = [(family, name) for family in FAMILIES for name in model_classes(family)]


def sparse_model(name: str, family: str, seed: int = 0) -> PreTrainedModel:
    sparse_class = getattr(hf_sparse, name)
    torch.manual_seed(seed)
    model = sparse_class(sparse_class.config_class(**CONFIGS[family].to_dict()))
    hf_sparse.prune_(model, SparsityConfig("2:4"), "magnitude")
    return model.eval()


@pytest.mark.few(4)
@pytest.mark.parametrize(("family", "name"), HEADS)
def test_every_head_is_saved_and_loaded(tmp_path: Path, family: str, name: str) -> None:
    model = sparse_model(name, family)
    base = type(model).__mro__[2]
    assert base.__name__ == name.removeprefix("Sparse")
    assert base.__module__.startswith("transformers.")
    model.save_pretrained(tmp_path)
    loaded, info = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    for key, value in model.state_dict().items():
        assert torch.equal(value, loaded.state_dict()[key]), key


@pytest.mark.few(20)
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "auto_class",
    [
        AutoModel,
        AutoModelForCausalLM,
        AutoModelForMaskedLM,
        AutoModelForSequenceClassification,
        AutoModelForTokenClassification,
        AutoModelForQuestionAnswering,
        AutoModelForMultipleChoice,
    ],
)
def test_auto_classes_give_the_sparse_class_of_what_they_give_for_dense(
    family: str, auto_class: type
) -> None:
    config = CONFIGS[family]
    sparse_config = getattr(hf_sparse, f"Sparse{type(config).__name__}")(**config.to_dict())
    if type(config) not in auto_class._model_mapping:
        with pytest.raises(ValueError, match="Unrecognized configuration class"):
            auto_class.from_config(sparse_config)
        return
    dense = auto_class.from_config(config)
    sparse = auto_class.from_config(sparse_config)
    assert type(sparse).__name__ == f"Sparse{type(dense).__name__}"
    assert isinstance(sparse, type(dense))
    assert type(sparse).can_generate() == type(dense).can_generate()


@pytest.mark.parametrize(
    "name",
    [
        "SparseBertForPreTraining",
        "SparseBertForNextSentencePrediction",
        "SparseBertLMHeadModel",
        "SparseBertForMultipleChoice",
        "SparseAlbertForPreTraining",
        "SparseAlbertForMaskedLM",
        "SparseAlbertForMultipleChoice",
        "SparseGPT2DoubleHeadsModel",
        "SparseGPT2LMHeadModel",
        "SparseGPT2ForTokenClassification",
    ],
)
def test_named_families_have_all_their_heads(name: str) -> None:
    dense = getattr(transformers, name.removeprefix("Sparse"))
    assert issubclass(getattr(hf_sparse, name), dense)


def test_configs_resolve_and_keep_their_type(tmp_path: Path) -> None:
    for family, config in CONFIGS.items():
        sparse = getattr(hf_sparse, f"Sparse{type(config).__name__}")(**config.to_dict())
        assert sparse.model_type == f"sparse_{family}"
        sparse.save_pretrained(tmp_path)
        loaded = AutoConfig.from_pretrained(tmp_path)
        assert type(loaded) is type(sparse)
        assert loaded.model_type == f"sparse_{family}"
        assert loaded.to_dict()["model_type"] == family
        assert type(sparse).from_dict(sparse.to_dict()).model_type == f"sparse_{family}"


def test_classes_can_be_pickled() -> None:
    model = sparse_model("SparseBertModel", "bert")
    restored = pickle.loads(pickle.dumps(model))
    assert type(restored) is type(model)
    assert pickle.loads(pickle.dumps(model.config)).to_dict() == model.config.to_dict()


def test_unknown_names_say_what_there_is() -> None:
    with pytest.raises(
        AttributeError, match=r"no class 'SparseBertForNothing'.*SparseBertModel for BertModel"
    ):
        hf_sparse.SparseBertForNothing  # noqa: B018
    with pytest.raises(AttributeError, match="no attribute 'prune'"):
        hf_sparse.prune  # noqa: B018


def test_text_classification_pipeline(tmp_path: Path) -> None:
    model = sparse_model("SparseBertForSequenceClassification", "bert")
    hf_sparse.save_pretrained(model, tmp_path, tokenizer=tiny_tokenizer())
    classify = pipeline("text-classification", str(tmp_path), device="cpu")
    assert type(classify.model) is type(model)
    inputs = tiny_tokenizer()(
        "a class of objects", return_tensors="pt", return_token_type_ids=False
    )
    with torch.no_grad():
        expected = model(**inputs).logits.softmax(-1).max().item()
    assert classify("a class of objects")[0]["score"] == pytest.approx(expected, abs=1e-6)


@pytest.mark.few(1)
@pytest.mark.parametrize("family", ["gpt2", "llama", "opt", "mistral", "qwen3"])
def test_text_generation_pipeline_and_generate(tmp_path: Path, family: str) -> None:
    name = f"Sparse{AutoModelForCausalLM._model_mapping[type(CONFIGS[family])].__name__}"
    model = sparse_model(name, family)
    hf_sparse.save_pretrained(model, tmp_path, tokenizer=tiny_tokenizer())
    generate = pipeline("text-generation", str(tmp_path), device="cpu")
    assert type(generate.model) is type(model)
    out = generate("a class of", max_new_tokens=5, do_sample=False, return_tensors=True)
    ids = tiny_tokenizer()("a class of", return_tensors="pt", return_token_type_ids=False)
    expected = model.generate(**ids, max_new_tokens=5, do_sample=False)
    assert list(out[0]["generated_token_ids"]) == expected[0].tolist()
    # Without a cache the same tokens come out: the cache is the model's own.
    slow = model.generate(**ids, max_new_tokens=5, do_sample=False, use_cache=False)
    assert torch.equal(expected, slow)


@pytest.mark.parametrize("family", FAMILIES)
def test_peft_takes_the_default_targets_of_the_family(family: str) -> None:
    peft = pytest.importorskip("peft")
    defaults = peft.utils.TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
    sparse_class = AutoModel._model_mapping[CONFIGS[family].__class__]
    model = sparse_model(f"Sparse{sparse_class.__name__}", family)
    if family not in defaults:
        with pytest.raises(ValueError, match="target_modules"):
            peft.get_peft_model(model, peft.LoraConfig(r=2))
        return
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=2))
    targeted = {name.rpartition(".")[2] for name in adapted.targeted_module_names}
    assert targeted == {name.rpartition(".")[2] for name in defaults[family]}


def test_an_adapter_is_saved_without_the_base_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    peft = pytest.importorskip("peft")
    # transformers 5.24 asks for PEFT 0.22, which came after it; the call works with what is there.
    monkeypatch.setattr("transformers.integrations.peft.MIN_PEFT_VERSION", peft.__version__)
    model = sparse_model("SparseLlamaForCausalLM", "llama")
    model.add_adapter(peft.LoraConfig(r=2))
    model.save_pretrained(tmp_path)
    assert (tmp_path / "adapter_model.safetensors").exists()
    assert not (tmp_path / "model.safetensors").exists()


@pytest.mark.parametrize("given", [[1], 3, None])
def test_a_state_that_is_no_mapping_is_refused(given: Any) -> None:
    with pytest.raises(TypeError, match="wanted tensors by their names"):
        hf_sparse.SparseBertModel(CONFIGS["bert"]).load_state_dict(given)  # type: ignore[arg-type]
