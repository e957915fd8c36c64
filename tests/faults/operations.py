"""What writes files: how it begins, what it does, and what its files hold."""

from __future__ import annotations

import copy
import hashlib
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, logging

import hf_sparse
from hf_sparse import SparsityConfig
from hf_sparse.checkpoint.digests import digest_of
from hf_sparse.effort.plan import SparsifyPlan
from hf_sparse.provenance.record import provenance_of
from tests.faults import pushes
from tests.support.tiny_models import tiny_batches, tiny_model

CONFIG = SparsityConfig("2:4")
NOTHING = "nothing"


@dataclass(frozen=True)
class Operation:
    """Something that writes.

    Attributes:
        begin: makes what it starts from in an empty folder.
        work: writes; again and again it ends with the same.
        state: what is there, as text; `NOTHING` if it cannot be read because it is not there.
        kept: names in the folder, of what is meant to be there.
        resumes: a run that was stopped leaves its work, and the next one goes on with it.
    """

    begin: Callable[[Path], None]
    work: Callable[[Path], None]
    state: Callable[[Path], str]
    kept: tuple[str, ...] = ("model",)
    resumes: bool = False


def _batches() -> list[Any]:
    return tiny_batches("llama", length=48)


@cache
def _model(seed: int, blocks: int = 2) -> Any:
    model = tiny_model("llama", seed, num_hidden_layers=blocks)
    hf_sparse.prune_(model, CONFIG, "magnitude")
    return model


def _of_model(folder: Path) -> str:
    if not (folder / "model").exists():
        return NOTHING
    hf_sparse.inspect_checkpoint(folder / "model")
    return digest_of(AutoModelForCausalLM.from_pretrained(folder / "model").state_dict())


def _save(folder: Path, seed: int, shards: str = "10GB") -> None:
    hf_sparse.save_pretrained(_model(seed), folder / "model", CONFIG, max_shard_size=shards)


def _begin_save(folder: Path) -> None:
    _save(folder, 0)
    (folder / "model" / "notes.txt").write_text("mine")


def _of_kept_model(folder: Path) -> str:
    assert (folder / "model" / "notes.txt").read_text() == "mine"
    return _of_model(folder)


def _save_compiled(folder: Path, seed: int) -> None:
    hf_sparse.save_compiled(hf_sparse.compile(_model(seed)), folder / "model")


def _of_compiled(folder: Path) -> str:
    if not (folder / "model" / "compiled.json").exists():
        return NOTHING
    model = hf_sparse.load_compiled(folder / "model")
    with torch.no_grad():
        return str(model(torch.tensor([[3, 4, 5]])).logits.double().sum().item())


def _dense(folder: Path) -> None:
    tiny_model("llama", num_hidden_layers=2).save_pretrained(folder / "dense")


def _stream(folder: Path) -> None:
    hf_sparse.prune_checkpoint(
        folder / "dense",
        folder / "model",
        CONFIG,
        "wanda",
        _batches(),
        resume=(folder / "model.unfinished").exists(),
        overwrite=True,
    )


def _sparsify(folder: Path) -> None:
    model = tiny_model("llama", num_hidden_layers=2)
    batches = _batches()
    plan = folder.parent / "plan.json"
    if not plan.exists():
        hf_sparse.plan_sparsify(model, CONFIG, batches, "minutes").save(plan)
    resume = (folder / "model.unfinished").exists()
    target = folder / "model"
    hf_sparse.sparsify_(model, CONFIG, batches, effort=plan, folder=target, resume=resume)
    hf_sparse.save_pretrained(model, target, CONFIG)


def _plan(effort: str) -> SparsifyPlan:
    model = tiny_model("llama", num_hidden_layers=2)
    return hf_sparse.plan_sparsify(model, CONFIG, _batches(), effort)


def _of_plan(folder: Path) -> str:
    file = folder / "model"
    return str(SparsifyPlan.load(file)) if file.exists() else NOTHING


def _export(folder: Path, seed: int) -> None:
    hf_sparse.export_gguf(_model(seed, 1), folder / "model.gguf", overwrite=True)


def _of_file(folder: Path) -> str:
    file = folder / "model.gguf"
    return hashlib.sha256(file.read_bytes()).hexdigest() if file.exists() else NOTHING


def _recover(folder: Path) -> None:
    model = copy.deepcopy(_model(0))
    hf_sparse.recover_(model, _batches())
    hf_sparse.save_pretrained(model, folder / "model", CONFIG)


def _steps_of_model(folder: Path) -> str:
    """What was done to a model that is whole: training need not give the same last bits again."""
    hf_sparse.inspect_checkpoint(folder / "model")
    model = AutoModelForCausalLM.from_pretrained(folder / "model")
    return str([step.method for step in provenance_of(model).steps])


def _nothing(folder: Path) -> None:
    pass


@cache
def _plan_of(effort: str) -> SparsifyPlan:
    return _plan(effort)


OPERATIONS: dict[str, Operation] = {
    "save": Operation(_begin_save, lambda folder: _save(folder, 1), _of_kept_model),
    "save-new": Operation(_nothing, lambda folder: _save(folder, 1), _of_model),
    "save-shards": Operation(
        lambda folder: _save(folder, 0, "30KB"),
        lambda folder: _save(folder, 1, "30KB"),
        _of_model,
    ),
    "save-compiled": Operation(
        lambda folder: _save_compiled(folder, 0),
        lambda folder: _save_compiled(folder, 1),
        _of_compiled,
    ),
    "recipe": Operation(
        lambda folder: (_plan_of("seconds").save(folder / "model"), None)[1],
        lambda folder: (_plan_of("minutes").save(folder / "model"), None)[1],
        _of_plan,
    ),
    "gguf": Operation(
        lambda folder: _export(folder, 0),
        lambda folder: _export(folder, 1),
        _of_file,
        kept=("model.gguf",),
    ),
    "stream": Operation(_dense, _stream, _of_model, kept=("dense", "model"), resumes=True),
    "sparsify": Operation(_nothing, _sparsify, _of_model, resumes=True),
    "recover": Operation(lambda folder: _save(folder, 0), _recover, _steps_of_model),
    "push": Operation(
        lambda folder: pushes.begin(folder, _model(0)),
        lambda folder: pushes.push(folder, _model(1)),
        pushes.state,
        kept=(pushes.ROOM,),
    ),
}


@contextmanager
def quietly() -> Iterator[None]:
    """Without warnings and bars."""
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
