"""The server of causal models, started as a process, by the client that its users have."""

from __future__ import annotations

import importlib.util
import json
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM

import hf_sparse
from tests.support.processes import environment
from tests.support.tiny_models import prose, tiny_model, tiny_tokenizer

pytestmark = pytest.mark.slow
openai = pytest.importorskip("openai", reason="openai is not installed")
for package in ("fastapi", "uvicorn"):
    pytest.importorskip(package, reason="the extra serve is not installed")
pytest.importorskip("llvmlite", reason="the extra runtime is not installed")

SERVER = Path(__file__).parents[2] / "examples/serve_cpu.py"
TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant:"
PROMPT = prose()[:80]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sparse model with a chat template."""
    model = tiny_model("llama", eos_token_id=None)
    hf_sparse.prune_(model, hf_sparse.SparsityConfig("2:4"), "magnitude")
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = TEMPLATE
    found = tmp_path_factory.mktemp("served") / "tiny"
    hf_sparse.save_pretrained(model, found, tokenizer=tokenizer)
    return found


@pytest.fixture(scope="module")
def served(folder: Path) -> Iterator[tuple[Any, subprocess.Popen[str]]]:
    """A client of a running server, and the server."""
    command = [sys.executable, str(SERVER), "--model", str(folder), "--port", "0"]
    process = subprocess.Popen(
        [*command, "--threads", "1", "--most", "64"],
        stdout=subprocess.PIPE,
        text=True,
        env=environment(HF_HUB_OFFLINE="1"),
    )
    assert process.stdout is not None
    address = re.fullmatch(r"serving on (http://\S+)\n", process.stdout.readline())
    assert address is not None
    yield openai.OpenAI(base_url=f"{address[1]}/v1", api_key="none", max_retries=0), process
    process.send_signal(signal.SIGINT)
    last = process.stdout.read().splitlines()[-1]
    assert process.wait(timeout=30) == 0
    for name in ("first_token_ms", "next_tokens_ms", "answer_ms"):
        found = json.loads(last)[name]
        assert found["count"] > 0
        assert 0 < found["p50"] <= found["p90"] <= found["p99"]


@pytest.fixture
def client(served: tuple[Any, Any]) -> Any:
    return served[0]


def expected(folder: Path, prompt: str, new_tokens: int) -> str:
    """What transformers answers greedily."""
    tokenizer = tiny_tokenizer()
    model = AutoModelForCausalLM.from_pretrained(folder)
    inputs = tokenizer(prompt, return_tensors="pt")
    tokens = model.generate(**inputs, max_new_tokens=new_tokens, do_sample=False)
    return tokenizer.decode(tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def test_a_completion_is_what_transformers_generates(client: Any, folder: Path) -> None:
    answer = client.completions.create(model="tiny", prompt=PROMPT, max_tokens=12, temperature=0)
    assert answer.choices[0].text == expected(folder, PROMPT, 12)
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage.completion_tokens == 12
    tokens = tiny_tokenizer()(PROMPT)["input_ids"]
    assert answer.usage.prompt_tokens == len(tokens)
    same = client.completions.create(model="tiny", prompt=tokens, max_tokens=12, temperature=0)
    assert same.choices[0].text == answer.choices[0].text


def test_a_talk_follows_the_template_and_comes_in_pieces(client: Any, folder: Path) -> None:
    talk = [{"role": "user", "content": PROMPT}]
    asked = {"model": "tiny", "messages": talk, "max_completion_tokens": 12, "temperature": 0}
    whole = client.chat.completions.create(**asked)
    text = whole.choices[0].message.content
    assert text == expected(folder, f"user: {PROMPT}\nassistant:", 12)
    chunks = list(
        client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True})
    )
    pieces = [c.choices[0].delta.content for c in chunks if c.choices]
    assert "".join(piece or "" for piece in pieces) == text
    assert sum(piece is not None for piece in pieces) > 3
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == "length"
    assert chunks[-1].usage == whole.usage


def test_an_answer_ends_before_a_stop_word(client: Any) -> None:
    asked = {"model": "tiny", "prompt": PROMPT, "max_tokens": 30, "temperature": 0}
    text = client.completions.create(**asked).choices[0].text
    stop = text[len(text) // 2 :][:3]
    kept = text[: text.index(stop)]
    found = client.completions.create(**asked, stop=stop).choices[0]
    assert (found.text, found.finish_reason) == (kept, "stop")
    streamed = list(client.completions.create(**asked, stop=[stop], stream=True))
    assert "".join(chunk.choices[0].text for chunk in streamed) == kept


def test_a_seed_repeats_what_is_sampled(client: Any) -> None:
    def sampled(seed: int) -> str:
        asked = {"model": "tiny", "prompt": PROMPT, "max_tokens": 20, "seed": seed}
        return client.completions.create(**asked, temperature=1.5, top_p=0.9).choices[0].text

    assert sampled(1) == sampled(1) != sampled(2)


def test_the_server_answers_others_while_one_reader_is_slow(client: Any) -> None:
    slow = client.completions.create(model="tiny", prompt=PROMPT, max_tokens=60, stream=True)
    next(iter(slow))
    assert client.models.list().data[0].id == "tiny"
    assert client.completions.create(model="tiny", prompt=PROMPT, max_tokens=2).choices[0].text
    slow.close()


@pytest.mark.parametrize(
    ("wrong", "status", "told"),
    [
        ({"model": "other"}, 404, "'tiny' is served"),
        ({"prompt": ""}, 400, "at least one token"),
        ({"prompt": [0, 100_000]}, 400, "Token 100000 is not one of 0 to 255"),
        ({"prompt": "a " * 200}, 400, "has room for 128"),
        ({"max_tokens": 65}, 400, "gives 64 at most"),
        ({"max_tokens": 0}, 400, "max_tokens"),
        ({"temperature": -1}, 400, "temperature"),
        ({"n": 2}, 400, "n: "),
        ({"logprobs": 3}, 400, "logprobs: Extra inputs are not permitted"),
    ],
)
def test_a_wrong_request_is_refused_with_a_reason(
    client: Any, wrong: dict[str, Any], status: int, told: str
) -> None:
    asked = {"model": "tiny", "prompt": "a", "max_tokens": 2, **wrong}
    with pytest.raises(openai.APIStatusError) as caught:
        client.completions.create(**asked)
    assert caught.value.status_code == status
    assert told in caught.value.body["message"]


def test_the_missing_extra_is_told(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "fastapi.py").write_text("raise ImportError('No module named fastapi')")
    command = [sys.executable, str(SERVER), "--model", str(folder)]
    path = f"{tmp_path}:{SERVER.parents[1]}"
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        check=False,
        env={**environment(), "PYTHONPATH": path},
    )
    assert done.returncode == 1
    assert "pip install 'hf_sparse[serve]'" in done.stderr
    assert importlib.util.find_spec("fastapi")
