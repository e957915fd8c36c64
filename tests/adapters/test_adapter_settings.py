"""Each setting of an adapter ends in one of two ways: it can be trained, saved, loaded and merged,
or it is refused before anything is trained."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

import hf_sparse
from hf_sparse.upstream.peft_by_name import has_adapters
from tests.support.tiny_models import tiny_batches, tiny_model

peft = pytest.importorskip("peft")
from peft.tuners.lora.config import CordaConfig, LoraGAConfig  # noqa: E402

LAYERS = {"llama": ["q_proj", "down_proj"], "gpt2": ["c_attn", "c_fc"]}

# The family to try it on, the settings.
TAKEN: list[tuple[str, dict[str, Any]]] = [
    ("llama", {}),
    ("gpt2", {"bias": "all"}),
    ("gpt2", {"bias": "lora_only"}),
    ("gpt2", {"lora_bias": True}),
    ("gpt2", {"fan_in_fan_out": True}),
    ("llama", {"task_type": "CAUSAL_LM"}),
    ("llama", {"task_type": "SEQ_CLS"}),
    ("llama", {"r": 40}),
    ("llama", {"lora_alpha": -3.5}),
    ("llama", {"lora_dropout": 0.1}),
    ("llama", {"use_rslora": True}),
    ("llama", {"target_modules": "all-linear"}),
    ("llama", {"target_modules": None}),
    ("llama", {"exclude_modules": ["down_proj"]}),
    ("llama", {"modules_to_save": ["lm_head"]}),
    ("llama", {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}),
    ("llama", {"modules_to_save": ["norm"]}),
    ("llama", {"init_lora_weights": False}),
    ("llama", {"init_lora_weights": "gaussian"}),
    ("llama", {"init_lora_weights": "orthogonal"}),
    ("llama", {"layers_to_transform": [0], "layers_pattern": "layers"}),
    ("llama", {"rank_pattern": {"q_proj": 4}}),
    ("llama", {"alpha_pattern": {"q_proj": 4}}),
    ("untied", {"trainable_token_indices": [1, 2]}),
    # What follows has a meaning for other layers, starts or devices alone, and does nothing here.
    ("llama", {"megatron_config": {}, "megatron_core": "megatron"}),
    ("llama", {"loftq_config": {"loftq_bits": 4}}),
    ("llama", {"eva_config": peft.EvaConfig()}),
    ("llama", {"corda_config": CordaConfig()}),
    ("llama", {"lora_ga_config": LoraGAConfig()}),
    ("llama", {"qalora_group_size": 8}),
    ("llama", {"runtime_config": peft.LoraRuntimeConfig(ephemeral_gpu_offload=True)}),
    # What the file of an adapter tells of itself.
    ("llama", {"auto_mapping": {}, "peft_version": "1", "revision": "main"}),
    ("llama", {"base_model_name_or_path": "user/base"}),
]
REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"lora_bias": True}, "q_proj has no bias that lora_bias=True could be merged into"),
    ({"inference_mode": True}, "inference_mode=True makes an adapter that is not trained"),
    ({"lora_alpha": 0}, "changes nothing in .*q_proj: lora_alpha"),
    ({"alpha_pattern": {"down_proj": 0}}, "changes nothing in .*down_proj"),
    ({"lora_alpha": float("nan")}, "not finite, .* the scale of"),
    ({"lora_alpha": "16"}, "lora_alpha='16'; wanted a finite number"),
    ({"lora_dropout": 1.0}, "lora_dropout=1.0; wanted a number from 0 on, below 1"),
    ({"lora_dropout": -0.1}, "lora_dropout=-0.1; wanted"),
    ({"r": 0}, "r=0; wanted a whole number"),
    ({"r": 4.0}, "r=4.0; wanted a whole number"),
    ({"rank_pattern": {"q_proj": 0}}, "rank_pattern=.*; wanted names with whole numbers"),
    ({"bias": "some"}, "bias='some'; wanted 'none', 'all' or 'lora_only'"),
    ({"modules_to_save": ["gate_proj"]}, "gate_proj is in modules_to_save.*it has zeros"),
    ({"target_modules": ["lm_head"]}, "tied to another layer"),
    ({"trainable_token_indices": [1, 2]}, "tied to another layer"),
    ({"use_dora": True}, "use_dora cannot be combined with a mask"),
    ({"use_qalora": True}, "use_qalora cannot be combined with a mask"),
    ({"velora_config": {"rank": 1}}, "velora_config cannot be combined"),
    ({"alora_invocation_tokens": [1]}, "alora_invocation_tokens cannot be combined"),
    ({"monteclora_config": {}}, "monteclora_config cannot be combined"),
    ({"use_bdlora": {"a": 1}}, "use_bdlora cannot be combined"),
    ({"arrow_config": {"a": 1}}, "arrow_config cannot be combined"),
    ({"kasa_config": {"a": 1}}, "kasa_config cannot be combined"),
    ({"layer_replication": [(0, 2), (1, 3)]}, "layer_replication cannot be combined"),
    ({"target_parameters": ["q_proj.weight"]}, "target_parameters cannot be combined"),
    *[
        ({"init_lora_weights": start}, f"init_lora_weights='{start}' changes the base weights")
        for start in ("eva", "olora", "pissa", "pissa_niter_4", "corda", "mica", "lora_ga")
    ],
    ({"init_lora_weights": "loftq", "loftq_config": {"loftq_bits": 4}}, "'loftq' changes the base"),
]
SHIRA_TAKEN: list[dict[str, Any]] = [
    {},
    {"random_seed": 3},
    {"init_weights": False},
    {"fan_in_fan_out": True},
    {"mask_type": "random", "task_type": "CAUSAL_LM"},
    {"modules_to_save": ["lm_head"]},
    {"target_modules": "all-linear"},
    {"base_model_name_or_path": "user/base", "auto_mapping": {}, "peft_version": "1"},
    {"revision": "main"},
]
SHIRA_REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"inference_mode": True}, "inference_mode=True"),
    ({"mask_type": "mine"}, "mask_type is 'mine'"),
    ({"r": 0}, "r=0; wanted a whole number"),
    ({"r": 20}, "Wanted r <="),
    ({"modules_to_save": ["gate_proj"]}, "it has zeros"),
]


def base(family: str) -> Any:
    changes = {"tie_word_embeddings": False} if family == "untied" else {}
    model = tiny_model("gpt2" if family == "gpt2" else "llama", **changes).eval()
    hf_sparse.prune_(model, hf_sparse.SparsityConfig("unstructured", 0.5), "magnitude")
    return model


def lora(family: str, settings: dict[str, Any]) -> Any:
    names = LAYERS.get(family, LAYERS["llama"])
    return peft.LoraConfig(**{"r": 2, "target_modules": names, **settings})


def shira(settings: dict[str, Any]) -> Any:
    return peft.ShiraConfig(**{"r": 2, "target_modules": LAYERS["llama"], **settings})


@torch.no_grad()
def outputs(model: Any) -> Tensor:
    batch = tiny_batches("llama")[0]
    return model.eval()(**batch).logits


def check_round_trip(family: str, config: Any, folder: Path) -> None:
    sparse = base(family)
    model = hf_sparse.get_peft_model(copy.deepcopy(sparse), config)
    model.train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=0.5)
    batch = tiny_batches("llama")[0]
    for _ in range(2):
        model(**batch, labels=batch["input_ids"]).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    wanted = outputs(model)
    assert (wanted - outputs(sparse)).abs().max() > 1e-6
    model.save_pretrained(folder / "adapter")
    loaded = hf_sparse.load_adapter(copy.deepcopy(sparse), folder / "adapter")
    hf_sparse.save_pretrained(model, folder / "model")
    again = AutoModelForCausalLM.from_pretrained(folder / "model")
    merged = hf_sparse.merge_adapters_(model)
    for found in (loaded, again, merged):
        torch.testing.assert_close(outputs(found), wanted, atol=1e-5, rtol=1e-5)
    kept = dict(merged.named_parameters())
    for layer in hf_sparse.structure.layers.block_layers(sparse):
        assert torch.equal(kept[layer.weight_name] == 0, layer.parameter == 0), layer.name


def label(value: Any) -> str | None:
    return ",".join(value) or "none" if isinstance(value, dict) else None


@pytest.mark.few(1)
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("family", "settings"), TAKEN, ids=label)
def test_a_setting_that_is_taken_survives_to_the_end(
    family: str, settings: dict[str, Any], tmp_path: Path
) -> None:
    check_round_trip(family, lora(family, settings), tmp_path)


@pytest.mark.few(2)
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("settings", SHIRA_TAKEN, ids=label)
def test_a_setting_of_shira_that_is_taken_survives_to_the_end(
    settings: dict[str, Any], tmp_path: Path
) -> None:
    check_round_trip("llama", shira(settings), tmp_path)


def check_refused(config: Any, message: str) -> None:
    model = base("llama")
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=message):
        hf_sparse.get_peft_model(model, config)
    assert not has_adapters(model)
    assert before.keys() == model.state_dict().keys()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.few(15)
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("settings", "message"), REFUSED, ids=label)
def test_a_setting_that_is_refused_leaves_the_model_alone(
    settings: dict[str, Any], message: str
) -> None:
    check_refused(lora("llama", settings), message)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("settings", "message"), SHIRA_REFUSED, ids=label)
def test_a_setting_of_shira_that_is_refused_leaves_the_model_alone(
    settings: dict[str, Any], message: str
) -> None:
    check_refused(shira(settings), message)


def test_a_mask_function_of_ones_own_is_refused() -> None:
    config = shira({})
    config.mask_fn = lambda layer, r, **_: torch.ones_like(layer.weight)
    check_refused(config, "mask_fn <lambda>; wanted those of PEFT's default")


def test_every_setting_is_in_the_tables() -> None:
    known = {"r", "target_modules", "peft_type"}
    tables: list[tuple[Any, set[str]]] = [
        (
            peft.LoraConfig,
            {name for _, s in TAKEN for name in s} | {n for s, _ in REFUSED for n in s},
        ),
        (
            peft.ShiraConfig,
            {name for s in SHIRA_TAKEN for name in s} | {n for s, _ in SHIRA_REFUSED for n in s},
        ),
    ]
    for config, tried in tables:
        assert set(config.__dataclass_fields__) == tried | known


@pytest.mark.parametrize("tokens", [[3, 256], {"embed_tokens": [256]}])
def test_tokens_that_the_vocabulary_lacks_are_refused(tokens: Any) -> None:
    model = base("llama")
    with pytest.raises(ValueError, match="names token 256; model"):
        hf_sparse.get_peft_model(model, lora("llama", {"trainable_token_indices": tokens}))
    assert not has_adapters(model)


def test_a_layer_without_bias_among_others_is_found() -> None:
    model = tiny_model("qwen2")  # its queries have biases, what follows attention has none
    hf_sparse.prune_(model, hf_sparse.SparsityConfig("2:4"), "magnitude")
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "o_proj"], lora_bias=True)
    with pytest.raises(ValueError, match="o_proj has no bias"):
        hf_sparse.get_peft_model(model, config)
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], lora_bias=True)
    hf_sparse.merge_adapters_(hf_sparse.get_peft_model(model, config))


def test_stock_peft_says_who_loads_a_masked_adapter_and_old_files_are_read(tmp_path: Path) -> None:
    model = base("llama")
    hf_sparse.get_peft_model(copy.deepcopy(model), lora("llama", {})).save_pretrained(tmp_path)
    with pytest.raises(
        KeyError, match=r"load this adapter by hf_sparse.load_adapter\(model, folder\)"
    ):
        peft.PeftModel.from_pretrained(copy.deepcopy(model), tmp_path)
    file = tmp_path / "adapter_config.json"
    old = {**json.loads(file.read_text()), "peft_type": "HF_SPARSE_MASKED_LORA"}
    file.write_text(json.dumps(old))
    hf_sparse.load_adapter(model, tmp_path)
