"""Regular expressions of adapters from files: none that takes longer than there is time for."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest

import hf_sparse
from hf_sparse.adapters.expressions import is_fast_expression
from tests.support.tiny_models import tiny_model

peft = pytest.importorskip("peft")

FAST = [
    "q_proj",
    r".*\.(q|k|v|o)_proj",
    r"model\.layers\.(\d+)\.self_attn\.[qv]_proj$",
    r"^(?!lm_head).*_proj",
    r"(?:.*?(?:vision|language).*?(?:self_attn|mlp).*?(?:q_proj|up_proj).*?)|(?:\bmodel\.x)",
    r"(?:model\.)?(?:layers\.){1,2}\d{1,3}\..*",
]
SLOW = [
    "(a+)+b",
    "(a|a)*b",
    "(.*)*x",
    "(?:[^.]+\\.)*x",
    "(a|b|ab)*c",
    ".*.*.*.*.*x",
    "a?" * 30 + "a" * 30,
    "(a?){30}a{30}",
    "((a{1,9}){1,9}){1,9}b",
    "(?=(a+)+b)x",
    "(" * 5000 + ")" * 5000,
    "a{1,99999999999999999999999}",
    "(",
    None,
    3,
]


@pytest.mark.parametrize("text", FAST)
def test_expressions_that_adapters_have_are_allowed(text: str) -> None:
    assert is_fast_expression(text)


@pytest.mark.parametrize("text", SLOW, ids=lambda text: str(text)[:20])
def test_expressions_that_take_forever_are_not(text: Any) -> None:
    start = time.process_time()
    assert not is_fast_expression(text)
    assert time.process_time() - start < 60


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("target_modules", "(m|m|o|d|e|l|.)*(.+)+!"),
        ("exclude_modules", "(.+)+!"),
        ("layers_pattern", "(.+)+!"),
        ("layers_pattern", ["layers", "(.+)+!"]),
        ("rank_pattern", {"(.+)+!": 4}),
        ("alpha_pattern", {"(.+)+!": 4}),
    ],
    ids=str,
)
def test_an_adapter_with_such_an_expression_is_not_loaded(
    setting: str, value: Any, tmp_path: Path
) -> None:
    model = tiny_model("llama")
    hf_sparse.prune_(model, hf_sparse.SparsityConfig("2:4"), "magnitude")
    adapted = hf_sparse.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj"]))
    adapted.save_pretrained(tmp_path)
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), setting: value}))
    base = adapted.unload()
    with pytest.raises(ValueError, match=f"has {setting}="):
        hf_sparse.load_adapter(base, tmp_path)
