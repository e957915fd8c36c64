"""What can be done with a model of any family: streaming, shards, training, recovery, inspecting."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    Trainer,
    TrainingArguments,
)

import hf_sparse
from hf_sparse import FormatError, SparsityConfig
from hf_sparse.checkpoint.inspect import inspect_checkpoint
from tests.support.any_models import build, tiny_config
from tests.support.closeness import same
from tests.support.exporting import needs_export

torch.set_num_threads(1)
HALF = SparsityConfig("unstructured", 0.5)


def made(model_type: str, auto_class: Any = AutoModelForCausalLM) -> Any:
    config = tiny_config(model_type)
    return build(config, auto_class._model_mapping[type(config)])


def pruned(model_type: str, auto_class: Any = AutoModelForCausalLM) -> Any:
    model = made(model_type, auto_class)
    hf_sparse.prune_(model, HALF, "magnitude")
    return model


def batches(length: int = 8) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [
        {"input_ids": torch.randint(4, 200, (2, length), generator=generator)} for _ in range(2)
    ]


def assert_equal(model: Any, other: Any) -> None:
    for name, value in model.state_dict().items():
        assert torch.equal(value, other.state_dict()[name]), name


@pytest.mark.parametrize("model_type", ["phi3", "gpt_neox"])
def test_a_checkpoint_is_pruned_from_disk_to_disk(model_type: str, tmp_path: Path) -> None:
    dense = made(model_type)
    dense.save_pretrained(tmp_path / "dense")
    report = hf_sparse.prune_checkpoint(
        tmp_path / "dense", tmp_path / "sparse", HALF, "wanda", batches()
    )
    assert report.sparsity == pytest.approx(0.5, abs=0.01)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "sparse")
    hf_sparse.prune_(dense, HALF, "wanda", batches())
    weights = loaded.state_dict()
    for name, value in dense.state_dict().items():
        assert (value == 0).sum() == (weights[name] == 0).sum(), name


def test_dense_weights_of_experts_are_read_by_the_sparse_class(tmp_path: Path) -> None:
    dense = made("mixtral")
    dense.save_pretrained(tmp_path)  # each expert by itself, as the family's checkpoints have them
    loaded, info = hf_sparse.SparseMixtralForCausalLM.from_pretrained(
        tmp_path, output_loading_info=True
    )
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert_equal(dense, loaded)


def test_the_dense_format_has_the_names_of_the_family(tmp_path: Path) -> None:
    model = pruned("mixtral")
    hf_sparse.save_pretrained(model, tmp_path / "sparse")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "sparse")
    config = SparsityConfig("unstructured", 0.5, format="dense")
    hf_sparse.save_pretrained(loaded, tmp_path / "dense", config)
    assert json.loads((tmp_path / "dense" / "config.json").read_text())["model_type"] == "mixtral"
    model.save_pretrained(tmp_path / "reference")
    names = [
        {tensor.name for tensor in hf_sparse.checkpoint.reading.read_headers([file])}
        for file in (
            tmp_path / "dense" / "model.safetensors",
            tmp_path / "reference" / "model.safetensors",
        )
    ]
    assert names[0] == names[1]
    assert_equal(model, AutoModelForCausalLM.from_pretrained(tmp_path / "dense"))


def test_shards_types_and_device_maps(tmp_path: Path) -> None:
    model = pruned("t5", AutoModelForSeq2SeqLM)
    hf_sparse.save_pretrained(model, tmp_path, max_shard_size="40KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    loaded = AutoModelForSeq2SeqLM.from_pretrained(tmp_path, device_map="cpu")
    assert_equal(model, loaded)
    assert loaded.shared.weight is loaded.encoder.embed_tokens.weight
    half = AutoModelForSeq2SeqLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    weight = half.encoder.block[0].layer[0].SelfAttention.q.weight
    assert weight.dtype == torch.bfloat16
    assert torch.equal(weight, model.encoder.block[0].layer[0].SelfAttention.q.weight.bfloat16())
    on_disk = AutoModelForSeq2SeqLM.from_pretrained(
        tmp_path, device_map={"": "disk"}, offload_folder=str(tmp_path / "offload")
    )
    inputs = {"input_ids": torch.arange(4, 12)[None], "decoder_input_ids": torch.zeros(1, 1).long()}
    with torch.no_grad():
        same(on_disk(**inputs).logits, loaded(**inputs).logits)


@pytest.mark.slow
def test_a_trainer_goes_on_with_its_checkpoint(tmp_path: Path) -> None:
    hf_sparse.save_pretrained(pruned("roberta", AutoModelForMaskedLM), tmp_path / "sparse")
    rows = [{"input_ids": row, "labels": row} for row in batches()[0]["input_ids"]]

    def train(steps: int, resume: bool) -> Any:
        model = AutoModelForMaskedLM.from_pretrained(tmp_path / "sparse")
        arguments = TrainingArguments(
            str(tmp_path / "run"), max_steps=steps, save_steps=1, report_to=[], disable_tqdm=True
        )
        callbacks = [hf_sparse.KeepZeros()]
        trainer = Trainer(model, arguments, train_dataset=rows, callbacks=callbacks)
        trainer.train(resume_from_checkpoint=resume)
        return trainer.model

    train(1, False)
    trained = train(2, True)
    assert hf_sparse.measure_sparsity(trained).sparsity >= 0.5
    assert_equal(trained, AutoModelForMaskedLM.from_pretrained(tmp_path / "run" / "checkpoint-2"))


def test_recovery_keeps_the_zeros_of_another_family(tmp_path: Path) -> None:
    model = pruned("granite")
    rows = [{**batch, "labels": batch["input_ids"]} for batch in batches()]
    hf_sparse.recover_(model, rows, epochs=1)
    hf_sparse.save_pretrained(model, tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert hf_sparse.measure_sparsity(loaded).sparsity >= 0.5
    assert_equal(model, loaded)


def test_inspect_counts_the_targets_of_the_model_and_no_others(tmp_path: Path) -> None:
    model = pruned("t5", AutoModelForSeq2SeqLM)  # a table of positions lies in its blocks
    hf_sparse.save_pretrained(model, tmp_path)
    found = inspect_checkpoint(tmp_path)
    assert found.report.numel == hf_sparse.measure_sparsity(model).numel
    assert found.candidates is None


def test_inspect_tells_the_targets_of_a_dense_checkpoint(tmp_path: Path) -> None:
    model = made("clip", AutoModel)
    model.save_pretrained(tmp_path)
    found = inspect_checkpoint(tmp_path)
    candidates = found.candidates
    assert candidates is not None
    report = hf_sparse.prune_(model, HALF, "magnitude")
    assert candidates.target_weights == report.numel
    assert {tensor.name for tensor in report.tensors} == {*candidates.targets}
    left = sum(each.weights for each in candidates.left_out)
    assert candidates.target_weights + left == candidates.weights == model.num_parameters()
    for part in (
        "pruning CLIPModel would make",
        "embeddings",
        "convolutions",
        "vectors",
        "outside",
    ):
        assert part in str(found)


def test_a_config_that_does_not_describe_the_model_is_refused_and_nothing_is_lost(
    tmp_path: Path,
) -> None:
    model = pruned("phi3")
    hf_sparse.save_pretrained(model, tmp_path)
    before = (tmp_path / "model.safetensors").read_bytes()
    model.config.intermediate_size += 8
    with pytest.raises(ValueError, match=r"not the model that its config describes.*mlp.down_proj"):
        hf_sparse.save_pretrained(model, tmp_path)
    assert (tmp_path / "model.safetensors").read_bytes() == before


@needs_export
@pytest.mark.parametrize(
    ("model_type", "inputs"), [("vit", "pixel_values"), ("clip", "other parts")]
)
def test_graphs_of_other_inputs_than_tokens_are_refused(
    model_type: str, inputs: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=rf"{inputs}.*wanted a model of token ids alone"):
        hf_sparse.export_onnx(made(model_type, AutoModel), tmp_path / "graph")
    assert not (tmp_path / "graph").exists()


@pytest.mark.slow
def test_a_config_of_far_more_blocks_than_are_stored_is_refused(tmp_path: Path) -> None:
    hf_sparse.save_pretrained(pruned("phi3"), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["num_hidden_layers"] = 9_000
    config.pop("layer_types", None)
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(FormatError, match=r"parameters, and .* tensors are stored"):
        AutoModelForCausalLM.from_pretrained(tmp_path)
