"""Files that commit 408389f wrote load as they did then (`golden/make_old_files.py` made them)."""

from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file

import hf_sparse
from hf_sparse import Metric
from hf_sparse.checkpoint.source import known_metrics, stored_in
from hf_sparse.compiled_files.skeleton import plain_state
from hf_sparse.provenance.record import provenance_of
from tests.golden.make_old_files import METRIC, digest, inputs, outputs
from tests.support.closeness import same

FOLDER = Path(__file__).parents[1] / "golden" / "old"
EXPECTED = load_file(FOLDER / "expected.safetensors")
WEIGHTS = json.loads((FOLDER / "expected.json").read_text())
CAUSAL = "AutoModelForCausalLM"
CHECKPOINTS = {
    "albert-dense": "AutoModel",
    "bert-nm": "AutoModelForSequenceClassification",
    "gpt2-gap8": CAUSAL,
    "llama-sharded": CAUSAL,
    "llama-trained": CAUSAL,
    "mistral-shrunk": CAUSAL,
    "opt-block": CAUSAL,
    "qwen2-streamed": CAUSAL,
    "qwen3-bitmask": CAUSAL,
}
ADAPTERS = ["adapter-lora", "adapter-shira"]
COMPILED = ["albert", "bert", "gpt2", "llama", "opt"]
SCOPE = ("scope", "layer")
STEPS: dict[str, list[tuple[str, tuple[tuple[str, str], ...]]]] = {
    "bert-nm": [("magnitude", (SCOPE,))],
    "gpt2-gap8": [("magnitude", (SCOPE,))],
    "llama-sharded": [("wanda", ())],
    "llama-trained": [
        ("sparsegpt", (("block_size", "128"), ("damping", "0.01"))),
        ("recovery by finetune", (("distilled", "False"), ("epochs", "1"), ("lr", "0.0003"))),
    ],
    "mistral-shrunk": [("magnitude", (SCOPE,)), ("shrink", ())],
    "opt-block": [("magnitude", (SCOPE,))],
    "qwen2-streamed": [("wanda", ())],
    "qwen3-bitmask": [("magnitude", (SCOPE,))],
}


def checkpoint(name: str, folder: Path = FOLDER) -> Any:
    auto = getattr(transformers, CHECKPOINTS[name])
    return auto.from_pretrained(folder / name, dtype="auto").eval()


def test_every_folder_has_a_test() -> None:
    there = {path.name for path in FOLDER.iterdir() if path.is_dir()}
    compiled = {f"compiled-{name}" for name in COMPILED}
    assert there == {*CHECKPOINTS, *ADAPTERS, *compiled, "onnx-bert"}


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_an_old_checkpoint_gives_the_same_bytes_and_outputs(name: str) -> None:
    model = checkpoint(name)
    assert digest(model.state_dict()) == WEIGHTS[name]
    assert same(outputs(model.float()), EXPECTED[name])


@pytest.mark.parametrize("name", STEPS)
def test_an_old_card_tells_what_was_done(name: str) -> None:
    steps = provenance_of(checkpoint(name)).steps
    assert [(step.method, step.options) for step in steps] == STEPS[name]


@pytest.mark.parametrize("name", ["llama-sharded", "llama-trained"])
def test_what_an_old_card_tells_stays_when_it_is_saved_again(name: str, tmp_path: Path) -> None:
    shutil.copytree(FOLDER / name, tmp_path / name)
    model = checkpoint(name, tmp_path)
    steps = provenance_of(model).steps
    assert known_metrics(model, dict(model.named_parameters())) == (METRIC,)
    hf_sparse.save_pretrained(model, tmp_path / name)
    again = stored_in(tmp_path / name)
    assert again.steps == steps
    assert again.metrics == (Metric(METRIC.name, METRIC.sparse, METRIC.dense),)
    assert digest(checkpoint(name, tmp_path).state_dict()) == WEIGHTS[name]
    assert stored_in(FOLDER / name).steps == ()


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_an_old_checkpoint_is_inspected(name: str) -> None:
    found = hf_sparse.inspect_checkpoint(FOLDER / name).report
    card = (FOLDER / name / "README.md").read_text()
    assert f"| zeros | {found.zeros:,} of {found.numel:,} target weights |" in card


@pytest.mark.parametrize("name", ADAPTERS)
def test_an_old_adapter_gives_the_same_bytes_and_outputs(name: str, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    model = hf_sparse.load_adapter(checkpoint("llama-trained"), FOLDER / name)
    tensors = peft.get_peft_model_state_dict(model, save_embedding_layers=False)
    assert digest(tensors) == WEIGHTS[name]
    assert same(outputs(model), EXPECTED[name])
    zeros = checkpoint("llama-trained").model.layers[0].self_attn.q_proj.weight == 0
    merged = hf_sparse.merge_adapters_(model)
    assert same(outputs(merged), EXPECTED[name])
    assert torch.equal(merged.model.layers[0].self_attn.q_proj.weight == 0, zeros)


def test_an_old_export_runs() -> None:
    runtime = pytest.importorskip("onnxruntime")
    session = runtime.InferenceSession(FOLDER / "onnx-bert" / "model.onnx")
    ids = inputs()
    given = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "token_type_ids": torch.zeros_like(ids),
    }
    feed = {spec.name: given[spec.name].numpy() for spec in session.get_inputs()}
    (logits,) = session.run(["logits"], feed)
    assert same(torch.from_numpy(logits), EXPECTED["onnx-bert"])


def compiled(name: str, folder: Path = FOLDER) -> Any:
    pytest.importorskip("llvmlite")
    with pytest.warns(UserWarning, match="without an id.*Save the model again"):
        return hf_sparse.load_compiled(folder / f"compiled-{name}")


@pytest.mark.few(2)
@pytest.mark.parametrize("name", COMPILED)
def test_an_old_compiled_model_gives_the_same_bytes_and_outputs(name: str, tmp_path: Path) -> None:
    model = compiled(name)
    assert digest(plain_state(model)) == WEIGHTS[f"compiled-{name}"]
    # Torch rounds what its own layers give to the type of the model.
    bound = 1e-4 if model.dtype == torch.float32 else 2e-2
    assert same(outputs(model), EXPECTED[f"compiled-{name}"], rtol=bound, atol=bound)
    if f"compiled-{name} generated" in EXPECTED:
        ids = inputs()[:1]
        settings = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 1}
        tokens = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **settings)
        assert torch.equal(tokens, EXPECTED[f"compiled-{name} generated"])
    hf_sparse.save_compiled(model, tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        again = hf_sparse.load_compiled(tmp_path)
    assert same(outputs(again), EXPECTED[f"compiled-{name}"], rtol=bound, atol=bound)
    new, old = (
        load_file(folder / "compiled.safetensors")
        for folder in (tmp_path, FOLDER / f"compiled-{name}")
    )
    assert new.keys() - old.keys() == {"id"}
    assert all(torch.equal(new[key], tensor) for key, tensor in old.items())
