"""What a changed config.json says of sizes and counts: refused in words, before memory is taken."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

import hf_sparse
from hf_sparse import FormatError, SparsityConfig
from tests.support.any_models import build, tiny_config
from tests.support.peak_memory import extra

READERS = (AutoModelForCausalLM.from_pretrained, hf_sparse.inspect_checkpoint)


def saved(folder: Path, model_type: str, auto_class: Any = AutoModelForCausalLM) -> Path:
    config = tiny_config(model_type)
    model = build(config, auto_class._model_mapping[type(config)])
    hf_sparse.prune_(model, SparsityConfig("unstructured", 0.5), "magnitude")
    return hf_sparse.save_pretrained(model, folder)


def change(folder: Path, **values: Any) -> None:
    """Change values of config.json; of a part where a name has dots, written as `__`."""
    file = folder / "config.json"
    known = json.loads(file.read_text())
    for path, value in values.items():
        place, (*parents, name) = known, path.split("__")
        for parent in parents:
            place = place[parent]
        place[name] = value
    file.write_text(json.dumps(known))


@pytest.mark.parametrize(
    ("model_type", "values"),
    [
        ("gptj", {"n_positions": 10**9}),  # a table of angles, in each block
        ("gptj", {"n_positions": 10**8}),
        ("codegen", {"n_positions": 10**9}),
        ("codegen", {"rotary_dim": 10**9}),
        ("deepseek_v3", {"head_dim": 10**9}),
    ],
)
def test_buffers_that_are_not_stored_are_bounded(
    tmp_path: Path, model_type: str, values: dict[str, int]
) -> None:
    folder = saved(tmp_path, model_type)
    change(folder, **values)
    for read in READERS:
        with pytest.raises(FormatError, match=r"buffers of [\d,]+ bytes|has head_dim="):
            read(folder)


@pytest.mark.parametrize("size", [10**9, 3 * 10**7])
def test_widths_beyond_all_that_is_stored_take_no_memory(tmp_path: Path, size: int) -> None:
    folder = saved(tmp_path, "xlnet", AutoModel)  # takes memory wherever it is to be made
    change(folder, d_model=size, d_head=size // 4)

    def load() -> None:
        with pytest.raises(FormatError, match=rf"has d_head={size // 4}|has d_model={size}"):
            AutoModel.from_pretrained(folder)

    load()
    assert extra(load) < 50


@pytest.mark.few(3)
@pytest.mark.parametrize(
    ("model_type", "values", "message"),
    [
        ("gpt_oss", {"num_experts_per_tok": 5}, "each token to 5 experts.*there are 4"),
        ("mixtral", {"num_experts_per_tok": 10**9}, "to 1000000000 experts.*there are 4"),
        ("qwen3_moe", {"num_experts_per_tok": 0}, "to 0 experts"),
        ("llama4_text", {"num_experts_per_tok": -1}, "to -1 experts"),
        ("jetmoe", {"num_experts_per_tok": 5}, "to 5 experts"),
        ("gpt_oss", {"num_hidden_layers": 3}, "IndexError"),
        ("llama4_text", {"num_hidden_layers": 3}, "IndexError"),
        ("gpt_oss", {"num_local_experts": -1}, "num_local_experts=-1; wanted 0 at least"),
        ("gpt_oss", {"num_local_experts": 10**9}, "wanted 10000 at most"),
        ("gpt_oss", {"num_hidden_layers": 10**9}, "wanted 10000 at most"),
        ("gptj", {"n_head": -1}, "n_head=-1; wanted 0 at least"),
        ("gptj", {"n_embd": -1}, "describes no model"),
        ("gptj", {"n_head": 3}, "describes no model"),
        ("phi3", {"hidden_size": "large"}, "StrictDataclass"),
        ("phi3", {"hidden_act": "nothing"}, "describes no model"),
        ("phi3", {"num_hidden_layers": 3}, "describes no model.*StrictDataclass|lacks"),
    ],
)
def test_values_of_which_no_model_is_made_are_told(
    tmp_path: Path, model_type: str, values: dict[str, Any], message: str
) -> None:
    folder = saved(tmp_path, model_type)
    change(folder, **values)
    for read in READERS:
        with pytest.raises(FormatError, match=message):
            read(folder)


@pytest.mark.parametrize("count", [3, 8])
def test_another_number_of_experts_is_no_matter_of_shrunk_blocks(
    tmp_path: Path, count: int
) -> None:
    folder = saved(tmp_path, "mixtral")
    change(folder, num_local_experts=count)
    for read in READERS:
        with pytest.raises(FormatError, match="shape mismatch") as found:
            read(folder)
        assert "block_sizes" not in str(found.value)


@pytest.mark.parametrize("family", ["no_such_family", "sparse_bert", "", "bert2"])
def test_a_family_that_is_not_known_is_refused_without_a_question(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str
) -> None:
    def ask(*_: object) -> str:
        raise AssertionError("transformers asks whether to run code")

    monkeypatch.setattr("builtins.input", ask)
    folder = saved(tmp_path, "phi3")
    change(folder, model_type=f"sparse_{family}")
    for read in (*READERS, AutoConfig.from_pretrained):
        with pytest.raises(FormatError, match=f"model_type is 'sparse_{family}'; wanted"):
            read(folder)


def test_options_of_the_caller_keep_their_own_errors(tmp_path: Path) -> None:
    folder = saved(tmp_path, "phi3")
    with pytest.raises(TypeError, match="no_such_option"):
        AutoModelForCausalLM.from_pretrained(folder, no_such_option=1)
