"""The example of plain smaller models, run on a tiny one."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoConfig

from tests.support.tiny_models import prose, tiny_model, tiny_tokenizer

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_slim_llm(tmp_path: Path) -> None:
    dense, out, text = tmp_path / "dense", tmp_path / "out", tmp_path / "text.txt"
    tiny_model("llama", num_hidden_layers=4).save_pretrained(dense)
    tiny_tokenizer().save_pretrained(dense)
    text.write_text(prose()[:30_000])
    command = [sys.executable, ROOT / "examples/slim_llm.py", dense, out, "--data", text]
    command += ["--held-out", text, "--params", "0.8", "--num-samples", 16, "--window", 32]
    command += ["--max-windows", 4, "--search", 2, "--lr", "0.01"]
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "params=0.8: at most" in done.stdout
    found = dict(re.findall(r"perplexity, (\w+): ([\d.]+)", done.stdout))
    assert float(found["trained"]) < float(found["smaller"])
    config = AutoConfig.from_pretrained(out)
    assert config.model_type == "llama"
    assert (config.num_hidden_layers, config.intermediate_size) != (4, 64)
