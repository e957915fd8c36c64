"""ONNX graphs: every family and head against torch, packing, folding, files, and bad input."""

from __future__ import annotations

import copy
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch import nn
from transformers import DynamicCache, PreTrainedModel

import hf_sparse
from hf_sparse import SparsityConfig
from hf_sparse.calibration.modes import switched
from hf_sparse.cli import main
from hf_sparse.exporters.heads import HEADS, Case, example, head_of, named_outputs
from hf_sparse.exporters.packing import pack_
from hf_sparse.upstream.transformers.caches import cache_in
from tests.support.crosses import cross, pairwise
from tests.support.exporting import needs_export
from tests.support.tiny_models import CONFIGS, prose, tiny_classifier, tiny_model, tiny_tokenizer
from tests.support.unchanged import unchanged

pytestmark = needs_export
try:
    import onnx_ir as ir
    import onnxruntime as ort
    from transformers.exporters.base import ExportedModel
except ImportError:  # then all is skipped, see `needs_export`
    pass

SLOW = [
    *(
        (f, "ForSequenceClassification")
        for f in ("albert", "gpt2", "opt", "mistral", "qwen2", "qwen3")
    ),
    *((f, "ForTokenClassification") for f in ("albert", "bert", "gpt2", "qwen2")),
    *((f, "ForQuestionAnswering") for f in ("albert", "bert", "opt", "mistral", "qwen3")),
    ("bert", "ForMaskedLM"),
    *((f, "ForMultipleChoice") for f in ("albert", "bert")),
    *((f, "Model") for f in ("bert", "llama")),
    *((f, "ForCausalLM") for f in ("gpt2", "opt", "llama", "qwen2", "mistral")),
    ("albert", "ForMaskedLM"),
    ("gpt2", "Model"),
]
FAST = [
    ("bert", "ForSequenceClassification"),
]  # tests/project/test_readme.py exports a causal model
HEADED = [*FAST, *(pytest.param(*pair, marks=pytest.mark.slow) for pair in SLOW)]
# An export that an earlier version wrote.
OLD_EXPORT = Path(__file__).parents[1] / "golden/old/onnx-bert"
CLASSES = {"bert": "Bert", "albert": "Albert", "gpt2": "GPT2", "opt": "OPT"}


def headed_model(family: str, ending: str, **changes: Any) -> PreTrainedModel:
    """A tiny random model with a head, 80 % of whose weights are zero."""
    name = CLASSES.get(family, family.capitalize()) + ending
    name = name.replace("GPT2ForCausalLM", "GPT2LMHeadModel")
    given = CONFIGS[family]
    smaller = {"num_hidden_layers": 2, "n_layer": 2, "layer_types": None}
    known = {key: value for key, value in smaller.items() if key in given.to_dict()}
    config = type(given)(**{**given.to_dict(), **known, **changes})
    torch.manual_seed(0)
    model = getattr(transformers, name)(config).eval()
    for parameter in model.parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=0.1)
    hf_sparse.prune_(model, SparsityConfig("unstructured", 0.8), "magnitude")
    return model


@pytest.mark.slow
@pytest.mark.parametrize(("family", "ending"), HEADED)
def test_every_head_gives_what_torch_gives(family: str, ending: str, tmp_path: Path) -> None:
    model = headed_model(family, ending)
    report = hf_sparse.export_onnx(model, tmp_path / "graph")
    assert report.difference.absolute < 1e-4
    assert sum(report.packing.formats.values()) >= 3
    config = json.loads((tmp_path / "graph/config.json").read_text())
    assert config["model_type"] == family
    assert config["architectures"] == [type(model).__name__]
    assert "quantization_config" not in config
    # By hand, on sizes that the export has not tried.
    session = ort.InferenceSession(tmp_path / "graph/model.onnx")
    head = head_of(model)
    given = example(model, head, Case(4, 6, past=5 if head.caches else 0))
    feed = {spec.name: given.arrays[spec.name].numpy() for spec in session.get_inputs()}
    with torch.no_grad(), switched(model, training=False, use_cache=False):
        wanted = named_outputs(model(**given.inputs))
    names = [output.name for output in session.get_outputs()]
    assert set(names) == set(wanted)
    for name, array in zip(names, session.run(None, feed), strict=True):
        torch.testing.assert_close(torch.from_numpy(array), wanted[name], rtol=1e-4, atol=1e-4)


@pairwise(
    "shape, dtype, sparsity",
    [((64, 33),), ((129, 257),)],
    [np.float32, np.float16, np.int8],
    [0.3, 0.8, 0.97, 0.999],
)
def test_packed_weights_fold_to_the_same_bits(
    sparsity: float, dtype: Any, shape: tuple[int, int], tmp_path: Path
) -> None:
    rng = np.random.default_rng(0)
    weight = (100 * rng.standard_normal(shape)).astype(dtype)
    weight[rng.random(shape) < sparsity] = 0
    weight[weight == -128] = 1
    weight.flat[-1] = 1  # the last place counts
    model = graph_of(weight)
    packing = pack_(model)
    ir.save(model, tmp_path / "packed.onnx")
    options = ort.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "folded.onnx")
    session = ort.InferenceSession(tmp_path / "packed.onnx", options)
    (found,) = session.run(None, {"start": np.array(0)})
    np.testing.assert_array_equal(found, weight)
    folded = ir.load(tmp_path / "folded.onnx")
    assert {node.op_type for node in folded.graph} <= {"Slice", "Unsqueeze"}  # all else was folded
    if dtype == np.float32:
        assert sum(packing.formats.values()) == 1
        assert packing.packed_bytes <= 1.001 * packing.bound_bytes
        assert packing.packed_bytes < packing.dense_bytes
        assert packing.packed_bytes >= 0.99 * packing.entropy_bytes


@pytest.mark.parametrize("nonzeros", [0, 1, 2])
def test_hardly_any_nonzeros(nonzeros: int, tmp_path: Path) -> None:
    weight = np.zeros((64, 64), np.float32)
    weight.flat[[2000, 7][:nonzeros]] = -3
    model = graph_of(weight)
    packing = pack_(model)
    ir.save(model, tmp_path / "packed.onnx")
    (found,) = ort.InferenceSession(tmp_path / "packed.onnx").run(None, {"start": np.array(0)})
    np.testing.assert_array_equal(found, weight)
    assert packing.packed_bytes < 100


def graph_of(weight: np.ndarray) -> ir.Model:
    """A graph that gives a weight back, whatever `start`, 0, its input is."""
    tensor = ir.tensor(weight, name="weight")
    value = ir.Value(
        name="weight", shape=tensor.shape, type=ir.TensorType(tensor.dtype), const_value=tensor
    )
    start = ir.val("start", dtype=ir.DataType.INT64, shape=ir.Shape([]))
    axis = ir.tensor(np.array([0]), name="axis")
    axis_value = ir.Value(
        name="axis", shape=axis.shape, type=ir.TensorType(axis.dtype), const_value=axis
    )
    end = ir.tensor(np.array([weight.shape[0]]), name="end")
    end_value = ir.Value(
        name="end", shape=end.shape, type=ir.TensorType(end.dtype), const_value=end
    )
    first = ir.node("Unsqueeze", [start, axis_value])
    cut = ir.node("Slice", [value, first.outputs[0], end_value, axis_value])
    output = cut.outputs[0]
    output.name, output.dtype, output.shape = "output", tensor.dtype, tensor.shape
    graph = ir.Graph(
        [start], [output], nodes=[first, cut], initializers=[value, axis_value, end_value],
        opset_imports={"": 20}, name="graph",
    )  # fmt: skip
    return ir.Model(graph, ir_version=10)


@pytest.mark.slow
def test_a_graph_runs_one_token_at_a_time(tmp_path: Path) -> None:
    model = headed_model("llama", "ForCausalLM")
    hf_sparse.export_onnx(model, tmp_path / "graph")
    session = ort.InferenceSession(tmp_path / "graph/model.onnx")
    ids = torch.tensor([[5, 9, 77]])
    wanted = model.generate(ids, max_new_tokens=8, do_sample=False, eos_token_id=None)[0].tolist()
    cache = {
        spec.name: np.zeros((1, spec.shape[1], 0, spec.shape[3]), np.float32)
        for spec in session.get_inputs()
        if spec.name.startswith("past_key_values")
    }
    tokens, step = ids[0].tolist(), ids.numpy()
    for _ in range(8):
        positions = np.arange(len(tokens) - step.shape[1], len(tokens))[None]
        mask = np.ones((1, len(tokens)), np.int64)
        logits, *present = session.run(
            None, {"input_ids": step, "attention_mask": mask, "position_ids": positions, **cache}
        )
        names = [output.name for output in session.get_outputs()][1:]
        cache = {
            name.replace("present", "past_key_values"): value
            for name, value in zip(names, present, strict=True)
        }
        tokens.append(int(logits[0, -1].argmax()))
        step = np.array([[tokens[-1]]])
    assert tokens == wanted


@pytest.mark.slow
def test_transformers_opens_the_export(tmp_path: Path) -> None:
    model = tiny_classifier()
    hf_sparse.prune_(model, SparsityConfig("2:4"), "magnitude")
    hf_sparse.export_onnx(model, tmp_path / "graph", tokenizer=tiny_tokenizer())
    opened = ExportedModel.from_pretrained(tmp_path / "graph")
    inputs = tiny_tokenizer()(["some words", "other words here"], return_tensors="pt", padding=True)
    inputs["token_type_ids"] = torch.zeros_like(inputs["input_ids"])
    with torch.no_grad():
        wanted = model(**inputs).logits
    torch.testing.assert_close(opened(**inputs).logits, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_transformers_opens_the_export_of_a_causal_model(tmp_path: Path) -> None:
    causal = headed_model("gpt2", "ForCausalLM")
    hf_sparse.export_onnx(causal, tmp_path / "causal")
    opened = ExportedModel.from_pretrained(tmp_path / "causal")
    given = example(causal, head_of(causal), Case(2, 3, past=4))
    cache: DynamicCache = cache_in(given.inputs)
    layers = {
        str(index): {"key": layer.keys, "value": layer.values}
        for index, layer in enumerate(cache.layers)
    }
    arguments = {k: given.inputs[k] for k in ("input_ids", "attention_mask", "position_ids")}
    found = opened(**arguments, past_key_values=layers).logits  # by the names of the graph
    with torch.no_grad():
        wanted = causal(**given.inputs).logits
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_sparse_classes_are_exported_as_their_family(tmp_path: Path) -> None:
    model = headed_model("opt", "ForCausalLM")
    hf_sparse.save_pretrained(model, tmp_path / "sparse", SparsityConfig("unstructured", 0.8))
    sparse = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "sparse")
    hf_sparse.export_onnx(sparse, tmp_path / "graph")
    config = json.loads((tmp_path / "graph/config.json").read_text())
    assert (config["model_type"], config["architectures"]) == ("opt", ["OPTForCausalLM"])
    manifest = (tmp_path / "graph/export.json").read_text()
    assert "Sparse" not in manifest
    assert b"site-packages" not in (tmp_path / "graph/model.onnx").read_bytes()


@cross("family, quantize", ["bert", "albert", "gpt2"], [None, "dynamic"])
@pytest.mark.slow
def test_additions_stay_apart_from_norms(family: str, quantize: str | None, tmp_path: Path) -> None:
    """ONNX Runtime's fused operator is several times slower than the two."""
    model = headed_model(family, "ForSequenceClassification", pad_token_id=0)
    hf_sparse.export_onnx(model, tmp_path / "graph", quantize=quantize)
    options = ort.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    options.log_severity_level = 3
    ort.InferenceSession(tmp_path / "graph/model.onnx", options)
    found = [node.op_type for node in ir.load(tmp_path / "optimized.onnx").graph]
    assert "SkipLayerNormalization" not in found
    assert found.count("Sum") >= 2 * model.config.num_hidden_layers
    assert found.count("LayerNormalization") >= 2 * model.config.num_hidden_layers


@pytest.mark.slow
def test_half_precision(tmp_path: Path) -> None:
    model = headed_model("bert", "ForSequenceClassification").half()
    report = hf_sparse.export_onnx(model, tmp_path / "graph")
    assert report.difference.relative < 2e-2
    graph = ir.load(tmp_path / "graph/model.onnx").graph
    assert all(v.dtype != ir.DataType.FLOAT for v in graph.initializers.values() if v.shape.rank())


@pytest.mark.slow
@pytest.mark.parametrize("quantize", ["dynamic", pytest.param("static", marks=pytest.mark.slow)])
def test_quantized_weights_keep_their_zeros(quantize: str, tmp_path: Path) -> None:
    model = headed_model("bert", "ForSequenceClassification")
    batches = None
    if quantize == "static":
        batches = [example(model, head_of(model), Case(2, 8)).inputs for _ in range(4)]
    report = hf_sparse.export_onnx(
        model, tmp_path / "graph", quantize=quantize, batches=batches, pack=False
    )
    assert not report.packing.formats
    zeros = [
        float((value.const_value.numpy() == 0).mean())
        for value in ir.load(tmp_path / "graph/model.onnx").graph.initializers.values()
        if value.dtype == ir.DataType.INT8 and value.const_value.size >= 1024
    ]
    layers = 6 * model.config.num_hidden_layers
    assert sum(share >= 0.5 for share in zeros) == layers
    assert np.mean(sorted(zeros)[-layers:]) >= 0.799


@pytest.mark.slow
def test_packing_quantized_weights_changes_nothing(tmp_path: Path) -> None:
    model = headed_model("bert", "ForSequenceClassification")
    report = hf_sparse.export_onnx(model, tmp_path / "graph", quantize="dynamic", pack=False)
    packed = hf_sparse.export_onnx(model, tmp_path / "packed", quantize="dynamic")
    assert packed.difference.absolute == pytest.approx(report.difference.absolute, abs=1e-5)
    assert packed.packing.formats


@pytest.mark.slow
def test_an_export_replaces_an_export_and_nothing_else(tmp_path: Path) -> None:
    model = tiny_classifier()
    folder = tmp_path / "graph"
    first = hf_sparse.export_onnx(model, folder)
    hf_sparse.prune_(model, SparsityConfig("unstructured", 0.9), "magnitude")
    second = hf_sparse.export_onnx(model, folder)
    assert second.bytes < first.bytes
    (tmp_path / "other").mkdir()
    (tmp_path / "other/notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="it is no export"):
        hf_sparse.export_onnx(model, tmp_path / "other")
    assert [path.name for path in (tmp_path / "other").iterdir()] == ["notes.txt"]
    before = (folder / "model.onnx.data").read_bytes()
    with pytest.raises(ValueError, match="differs from the model"):
        hf_sparse.export_onnx(model, folder, tolerance=0.0)
    assert (folder / "model.onnx.data").read_bytes() == before
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


@pytest.mark.slow
def test_what_is_beside_an_export_stays_and_checkpoints_are_safe(tmp_path: Path) -> None:
    model, folder = headed_model("bert", "ForSequenceClassification", num_hidden_layers=1), tmp_path
    shutil.copytree(OLD_EXPORT, folder, dirs_exist_ok=True)
    for name in ("mine.onnx", "tokenizer.json"):
        (folder / name).write_text("{}")
    hf_sparse.export_onnx(model, folder)
    assert (folder / "mine.onnx").read_text() == "{}"
    assert not (folder / "tokenizer.json").exists()  # of the export before
    config = (folder / "config.json").read_text()
    with pytest.raises(ValueError, match="an ONNX export, whose config"):
        hf_sparse.save_pretrained(model, folder, SparsityConfig("unstructured", 0.0))
    assert (folder / "config.json").read_text() == config
    # Transformers opens it.
    given = example(model, head_of(model), Case(3, 7)).inputs
    with torch.no_grad():
        wanted = model(**given).logits
    found = ExportedModel.from_pretrained(folder)(**given).logits
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


def test_a_checkpoint_is_no_folder_for_an_export(tmp_path: Path) -> None:
    model = tiny_classifier()
    checkpoint = hf_sparse.save_pretrained(
        model, tmp_path / "model", SparsityConfig("unstructured", 0.0)
    )
    config = (checkpoint / "config.json").read_text()
    with pytest.raises(ValueError, match="a checkpoint"):
        hf_sparse.export_onnx(model, checkpoint)
    assert (checkpoint / "config.json").read_text() == config


@pytest.mark.slow
def test_other_outputs_that_the_config_asks_for_are_left_out(tmp_path: Path) -> None:
    model = tiny_classifier()
    model.config.output_hidden_states = True
    model.config.return_dict = False
    hf_sparse.export_onnx(model, tmp_path / "graph")
    session = ort.InferenceSession(tmp_path / "graph/model.onnx")
    assert [output.name for output in session.get_outputs()] == ["logits"]
    assert model.config.output_hidden_states
    assert not model.config.return_dict


@pytest.mark.slow
def test_long_rope_changes_with_the_length(tmp_path: Path) -> None:
    rope = {"rope_type": "longrope", "rope_theta": 10000.0, "factor": 2.0}
    rope |= {"short_factor": [1.0] * 4, "long_factor": [2.0, 3.0, 4.0, 5.0]}
    rope["original_max_position_embeddings"] = 32
    model = tiny_model("llama", rope_parameters=rope, num_hidden_layers=1)
    hf_sparse.export_onnx(model, tmp_path / "graph")
    session = ort.InferenceSession(tmp_path / "graph/model.onnx")
    past = {f"past_key_values.0.{part}": np.zeros((1, 2, 0, 8), "f4") for part in ("key", "value")}
    for length in (100, 20):  # longer than the original positions, and shorter
        ids = torch.arange(2, 2 + length)[None]
        given = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        given["position_ids"] = torch.arange(length)[None]
        feed = {**past, **{name: value.numpy() for name, value in given.items()}}
        with torch.no_grad():
            wanted = model(**given).logits
        found = torch.from_numpy(session.run(["logits"], feed)[0])
        torch.testing.assert_close(found, wanted, atol=1e-5, rtol=0)


def test_models_that_cannot_be_exported_are_refused(tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    def refused(model: Any, match: str, **options: Any) -> None:
        with pytest.raises(ValueError, match=match):
            hf_sparse.export_onnx(model, tmp_path / "graph", **options)
        assert not (tmp_path / "graph").exists()

    config = CONFIGS["bert"]
    refused(nn.Linear(2, 2), "takes a transformers model, not a Linear")
    refused(transformers.BertForPreTraining(config), "ForSequenceClassification, ForToken")
    rope = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
    refused(tiny_model("llama", rope_parameters=rope), "has rope_type 'dynamic'")
    by_layer = {"full_attention": rope, "sliding_attention": {**rope, "rope_type": "default"}}
    nested = tiny_model("llama")
    nested.config.rope_parameters = by_layer
    refused(nested, "has rope_type 'dynamic'")
    refused(transformers.BertLMHeadModel(config), "cannot be exported")
    refused(transformers.GPT2DoubleHeadsModel(CONFIGS["gpt2"]), "cannot be exported")
    adapted = get_peft_model(tiny_classifier(), LoraConfig(target_modules=["query"]))
    refused(adapted, "PEFT model")
    refused(adapted.base_model.model, "Merge them first")
    refused(tiny_classifier().bfloat16(), "wanted float32|Wanted float32")
    refused(tiny_classifier().to("meta"), "on the meta device")
    llama = copy.deepcopy(CONFIGS["llama"])
    llama.pad_token_id = None
    refused(transformers.LlamaForSequenceClassification(llama), "pad_token_id")
    refused(tiny_classifier(), "one of dynamic, static", quantize="int4")
    refused(tiny_classifier(), "calibrates on data", quantize="static")
    padding = {"input_ids": torch.ones(1, 4), "attention_mask": torch.zeros(1, 4)}
    for batches in (iter([]), [{}], [padding], ["text"]):
        refused(tiny_classifier(), "calibrates on data", quantize="static", batches=batches)
    refused(tiny_classifier(), "tolerance is", tolerance=float("nan"))
    refused(tiny_model("t5"), "an encoder and a decoder")
    refused(tiny_classifier(), "leave them out", batches=[{}])
    refused(
        tiny_model("gpt2"), "use 'dynamic'", quantize="static", batches=[{"input_ids": [[1, 2]]}]
    )


def test_a_missing_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib.util

    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "onnxruntime" else find(name)
    )
    with pytest.raises(ImportError, match=r"onnxruntime: pip install 'hf_sparse\[onnx\]'"):
        hf_sparse.export_onnx(tiny_classifier(), tmp_path / "graph")


@pytest.mark.slow
def test_the_model_stays_as_it_was(tmp_path: Path) -> None:
    model = tiny_model("llama").train()
    with unchanged(model):
        hf_sparse.export_onnx(model, tmp_path / "graph")
    assert model.training
    assert model.config.use_cache


@pytest.mark.slow
def test_the_command_exports(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = headed_model("bert", "ForSequenceClassification")
    config = SparsityConfig("unstructured", 0.8)
    hf_sparse.save_pretrained(model, tmp_path / "sparse", config, tokenizer=tiny_tokenizer())
    source, output = str(tmp_path / "sparse"), str(tmp_path / "graph")
    assert main(["export", source, output, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["task"] == "text-classification"
    assert (tmp_path / "graph/tokenizer.json").exists()
    assert main(["export", source, output, "--quantize", "static"]) == 1
    (tmp_path / "text.txt").write_text(prose()[:4000])
    static = ["--quantize", "static", "--calibration", str(tmp_path / "text.txt")]
    assert main(["export", source, output, *static, "--window", "16", "--num-samples", "4"]) == 0
    assert "packed" in capsys.readouterr().out


@pytest.mark.slow
def test_the_example_classifies_with_the_graph(tmp_path: Path) -> None:
    hf_sparse.save_pretrained(
        tiny_classifier(), tmp_path / "model", SparsityConfig("unstructured", 0.0),
        tokenizer=tiny_tokenizer(),
    )  # fmt: skip
    script = Path(__file__).parents[2] / "examples/export_onnx.py"
    command = [sys.executable, script, tmp_path / "model", tmp_path / "graph", "--text", "a word"]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1].startswith("LABEL_")
    assert (tmp_path / "graph/model.onnx").exists()


def test_every_head_is_in_the_table() -> None:
    assert {ending for _, ending in FAST + SLOW} | {"GPT2LMHeadModel"} == set(HEADS)
