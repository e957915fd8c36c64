"""Libraries that people train, log and serve with: TRL, TensorBoard, Trackio, Accelerate, pipelines."""

from __future__ import annotations

import copy
import json
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Trainer, TrainingArguments, pipeline

import hf_sparse
from hf_sparse import KeepZeros, SparsityCallback, SparsityConfig, trainer_optimizer
from tests.support.closeness import same
from tests.support.processes import ROOT, environment
from tests.support.tiny_models import prose, tiny_model, tiny_tokenizer

pytestmark = pytest.mark.slow
SETTINGS: dict[str, Any] = {
    "per_device_train_batch_size": 2,
    "max_steps": 4,
    "learning_rate": 1e-2,
    "save_strategy": "no",
    "use_cpu": True,
    "bf16": False,
    "disable_tqdm": True,
    "report_to": [],
}


@pytest.fixture
def model() -> Any:
    """A 2:4 model of few weights."""
    found = tiny_model("llama")
    hf_sparse.prune_(found, SparsityConfig("2:4"), "magnitude")
    return found


@pytest.fixture
def texts() -> Any:
    """A data set of texts."""
    datasets = pytest.importorskip("datasets", reason="the extra train is not installed")
    return datasets.Dataset.from_dict(
        {"text": [part[:80] for part in prose()[:4000].split("\n\n")]}
    )


def zeros_of(model: Any) -> dict[str, torch.Tensor]:
    names = {tensor.name for tensor in hf_sparse.measure_sparsity(model).tensors}
    return {name: weight == 0 for name, weight in model.state_dict().items() if name in names}


def assert_same_zeros(model: Any, zeros: dict[str, torch.Tensor]) -> None:
    assert len(zeros) == 21
    for name, found in zeros_of(model).items():
        assert torch.equal(found, zeros[name]), name


def test_trl_fine_tunes_with_a_frozen_mask(model: Any, texts: Any, tmp_path: Path) -> None:
    trl = pytest.importorskip("trl", reason="trl is not installed")
    zeros, before = zeros_of(model), model.lm_head.weight.clone()
    args = trl.SFTConfig(str(tmp_path), max_length=32, **SETTINGS)
    trainer = trl.SFTTrainer(
        model, args, train_dataset=texts, processing_class=tiny_tokenizer(), callbacks=[KeepZeros()]
    )
    trainer.train()
    assert_same_zeros(trainer.model, zeros)
    assert not torch.equal(before, trainer.model.lm_head.weight)


def test_trl_trains_a_masked_lora(model: Any, texts: Any, tmp_path: Path) -> None:
    trl = pytest.importorskip("trl", reason="trl is not installed")
    peft = pytest.importorskip("peft", reason="the extra peft is not installed")
    zeros = zeros_of(model)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    adapted = hf_sparse.get_peft_model(model, peft.LoraConfig(r=4, task_type="CAUSAL_LM"))
    args = trl.SFTConfig(str(tmp_path), max_length=32, **SETTINGS)
    trainer = trl.SFTTrainer(adapted, args, train_dataset=texts, processing_class=tiny_tokenizer())
    trainer.train()
    merged = hf_sparse.merge_adapters_(trainer.model)
    assert_same_zeros(merged, zeros)
    changed = [name for name in zeros if not torch.equal(before[name], merged.state_dict()[name])]
    assert changed


def test_an_ordinary_lora_of_trl_is_not_merged(model: Any, texts: Any, tmp_path: Path) -> None:
    trl = pytest.importorskip("trl", reason="trl is not installed")
    peft = pytest.importorskip("peft", reason="the extra peft is not installed")
    args = trl.SFTConfig(str(tmp_path), max_length=32, **SETTINGS)
    lora = peft.LoraConfig(r=4, task_type="CAUSAL_LM", target_modules=["q_proj"])
    trainer = trl.SFTTrainer(
        model, args, train_dataset=texts, processing_class=tiny_tokenizer(), peft_config=lora
    )
    trainer.train()
    with pytest.raises(ValueError, match="zeros"):
        hf_sparse.merge_adapters_(trainer.model)


def test_trl_learns_preferences_with_a_frozen_mask(model: Any, tmp_path: Path) -> None:
    trl = pytest.importorskip("trl", reason="trl is not installed")
    datasets = pytest.importorskip("datasets", reason="the extra train is not installed")
    rows = [{"prompt": "the ", "chosen": "model", "rejected": "statement"}] * 8
    zeros = zeros_of(model)
    args = trl.DPOConfig(str(tmp_path), max_length=32, **SETTINGS)
    trainer = trl.DPOTrainer(
        model,
        ref_model=copy.deepcopy(model),
        args=args,
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=tiny_tokenizer(),
        callbacks=[KeepZeros()],
    )
    trainer.train()
    assert_same_zeros(trainer.model, zeros)


def trained_sparsely(logger: str, folder: Path) -> Trainer:
    """A training to 75 % zeros that tells a logger of them."""
    config = SparsityConfig("unstructured", 0.75)
    sparsity = SparsityCallback(config)
    rows = torch.randint(2, 256, (8, 12), generator=torch.Generator().manual_seed(0))
    settings = {**SETTINGS, "max_steps": 8, "logging_steps": 1, "report_to": [logger]}
    trainer = Trainer(
        tiny_model("llama"),
        TrainingArguments(str(folder), **settings),
        train_dataset=[{"input_ids": row, "labels": row} for row in rows],
        optimizer_cls_and_kwargs=trainer_optimizer(config, lr=1e-3),
        callbacks=[sparsity],
    )
    sparsity.log_through(trainer)
    trainer.train()
    return trainer


def test_tensorboard_shows_the_sparsity(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "runs"))
    trained_sparsely("tensorboard", tmp_path)
    events = EventAccumulator(str(tmp_path / "runs"))
    events.Reload()
    logged = [event.value for event in events.Scalars("train/sparsity")]
    assert len(logged) == 8
    assert logged[0] < 0.1
    assert logged[-1] == pytest.approx(0.75, abs=1e-3)
    assert "train/lam" in events.Tags()["scalars"]


def test_trackio_keeps_the_sparsity(tmp_path: Path) -> None:
    pytest.importorskip("trackio", reason="trackio is not installed")
    code = (
        "import sys; from pathlib import Path\n"
        "from tests.project.test_other_libraries import trained_sparsely\n"
        "trained_sparsely('trackio', Path(sys.argv[1]))\n"
        "from trackio.sqlite_storage import SQLiteStorage as storage\n"
        "(project,) = storage.get_projects()\n"
        "(run,) = storage.get_runs(project)\n"
        "logged = [row['train/sparsity'] for row in storage.get_logs(project, run)"
        " if 'train/sparsity' in row]\n"
        "print(len(logged), logged[-1])\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)],
        capture_output=True,
        text=True,
        check=False,
        env=environment(TRACKIO_DIR=str(tmp_path / "trackio"), HF_HUB_OFFLINE="1"),
    )
    assert done.returncode == 0, done.stderr
    count, last = done.stdout.splitlines()[-1].split()
    assert int(count) == 8
    assert float(last) == pytest.approx(0.75, abs=1e-3)


def test_accelerate_launches_an_example(tmp_path: Path) -> None:
    tiny_model("gpt2").save_pretrained(tmp_path / "dense")
    tiny_tokenizer().save_pretrained(tmp_path / "dense")
    (tmp_path / "text.txt").write_text(prose()[:8000])
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "1"]
    launch += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    flags = {"model": "dense", "text": "text.txt", "output": "out", "sparsity": 0.6}
    small = {"steps": 12, "window": 16, "batch": 4}
    given = [
        part for name, value in {**flags, **small}.items() for part in (f"--{name}", str(value))
    ]
    command = [*launch, str(ROOT / "examples/accelerate_loop.py"), *given]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
        env=environment(HF_HUB_OFFLINE="1"),
    )
    assert done.returncode == 0, done.stderr
    found = hf_sparse.inspect_checkpoint(tmp_path / "out")
    assert found.report.sparsity == pytest.approx(0.6, abs=1e-3)


def test_transformers_serves_a_checkpoint_with_its_zeros_in_place(
    model: Any, tmp_path: Path
) -> None:
    from transformers.utils.import_utils import is_serve_available

    if not is_serve_available():
        pytest.skip("the extra serving of transformers is not installed")
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    config = SparsityConfig("2:4", format="dense")  # it knows transformers' own classes alone
    hf_sparse.save_pretrained(model, tmp_path / "sparse", config, tokenizer=tokenizer)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "transformers.cli.transformers", "serve"]
    command += [str(tmp_path / "sparse"), "--port", str(port)]
    log = tmp_path / "log.txt"
    with log.open("w") as file:
        server = subprocess.Popen(
            command, stdout=file, stderr=file, env=environment(HF_HUB_OFFLINE="1")
        )
    body = {
        "model": str(tmp_path / "sparse"),
        "messages": [{"role": "user", "content": prose()[:40]}],
        "max_tokens": 8,
        "temperature": 0,
    }
    request = urllib.request.Request(
        f"http://localhost:{port}/v1/chat/completions",
        json.dumps(body).encode(),
        {"Content-Type": "application/json"},
    )
    try:
        for _ in range(120):
            assert server.poll() is None, log.read_text()
            try:
                with urllib.request.urlopen(request, timeout=60) as reply:
                    answer = json.loads(reply.read())
                break
            except urllib.error.HTTPError as error:
                raise AssertionError(error.read().decode() + log.read_text()) from error
            except OSError:
                time.sleep(0.5)
        else:
            raise AssertionError(log.read_text())
    finally:
        server.terminate()
        server.wait(timeout=30)
    ids = tokenizer(prose()[:40], return_tensors="pt")
    tokens = model.generate(**ids, max_new_tokens=8, do_sample=False)[
        0, ids["input_ids"].shape[1] :
    ]
    assert answer["choices"][0]["message"]["content"] == tokenizer.decode(tokens)


def test_a_pipeline_takes_a_compiled_model(model: Any) -> None:
    pytest.importorskip("llvmlite", reason="the extra runtime is not installed")
    tokenizer = tiny_tokenizer()
    asked: dict[str, Any] = {"max_new_tokens": 12, "do_sample": False, "return_full_text": False}
    generate = pipeline("text-generation", model=hf_sparse.compile(model), tokenizer=tokenizer)
    dense = pipeline("text-generation", model=model, tokenizer=tokenizer)
    prompts = [prose()[:40], prose()[100:160]]
    assert generate(prompts, **asked) == dense(prompts, **asked)
    extract = pipeline("feature-extraction", model=hf_sparse.compile(model), tokenizer=tokenizer)
    plain = pipeline("feature-extraction", model=model, tokenizer=tokenizer)
    found, wanted = (torch.tensor(each(prompts[0])) for each in (extract, plain))
    assert same(found, wanted)
