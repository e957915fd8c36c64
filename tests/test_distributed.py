"""Sparse training on two processes: DDP and FSDP2 give what one process gives."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from hf_sparse import SparsityConfig, load_adapter, merge_adapters_, prune_
from hf_sparse.patterns import Pattern
from hf_sparse.structure.layers import target_layers
from tests.test_frozen import sparse_model
from tests.tiny_models import tiny_model

ROOT = Path(__file__).parent.parent
WORKER = """
import sys
import torch
from accelerate import Accelerator
from safetensors.torch import save_file
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from hf_sparse import Schedule, SparseAdamW, SparsityConfig, Sparsifier, sparse_param_groups
from tests.tiny_models import tiny_model

folder, kind, pattern, method = sys.argv[1:]
accelerator = Accelerator(cpu=True)
model = tiny_model("llama", tie_word_embeddings=False)
config = SparsityConfig(pattern, None if ":" in pattern and pattern[0].isdigit() else 0.6)
if kind == "fsdp2":  # Accelerate has FSDP for accelerators only
    for block in model.model.layers:
        fully_shard(block, mesh=init_device_mesh("cpu", (2,)))
    fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
groups = sparse_param_groups(model, config)
optimizer = SparseAdamW(groups, lr=1e-3, penalty="l0", scale="adaptive")
if kind != "fsdp2":
    model, optimizer = accelerator.prepare(model, optimizer)
sparsifier = Sparsifier(optimizer, config, 12, method=method, interval=2)
generator = torch.Generator().manual_seed(0)
rank, size = accelerator.process_index, accelerator.num_processes
model.train()
for step in range(12):
    ids = torch.randint(2, 256, (4, 12), generator=generator)[rank::size]
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    sparsifier.step()
sparsifier.check()
state = accelerator.unwrap_model(model).state_dict()
state = {k: v.full_tensor() if kind == "fsdp2" else v for k, v in state.items()}
if accelerator.is_main_process:
    save_file({k: v.contiguous() for k, v in state.items()}, f"{folder}/{kind}.safetensors")
print("sparsity", sparsifier.sparsity)
"""


def torchrun(script: Path, processes: int, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run a script in several processes of one thread each."""
    command = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    return subprocess.run(
        [sys.executable, *command, str(script), *arguments],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        check=False,
    )


def launch(folder: Path, kind: str, pattern: str, method: str = "proximal") -> str:
    script = folder / "worker.py"
    script.write_text(WORKER)
    processes = 1 if kind == "one" else 2
    done = torchrun(script, processes, str(folder), kind, pattern, method)
    return done.stdout if done.returncode == 0 else f"failed: {done.stdout}{done.stderr}"


def same_share(one: dict, other: dict) -> float:
    """The share of weights that are zero, or not, in both."""
    same = sum(int(((one[name] == 0) == (other[name] == 0)).sum()) for name in one)
    return same / sum(value.numel() for value in one.values())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "pattern", "method"),
    [
        ("ddp", "unstructured", "proximal"),
        ("ddp", "block:4x1", "proximal"),
        ("ddp", "unstructured", "movement"),
        ("fsdp2", "unstructured", "proximal"),
        ("fsdp2", "unstructured", "magnitude"),
        ("fsdp2", "2:4", "proximal"),
        ("fsdp2", "block:1x4", "proximal"),
        ("fsdp2", "block:4x1", "proximal"),
        ("fsdp2", "row", "magnitude"),
    ],
)
def test_two_processes_give_the_result_of_one(
    kind: str, pattern: str, method: str, tmp_path: Path
) -> None:
    for name in ("one", kind):
        output = launch(tmp_path, name, pattern, method)
        assert "sparsity" in output, output
    one, two = (load_file(tmp_path / f"{name}.safetensors") for name in ("one", kind))
    # Under FSDP2 the strength is the mean of what the shards call for: a little another one.
    alike = 0.97 if kind == "fsdp2" else 0.99
    assert same_share(one, two) > alike
    close = [torch.isclose(value, two[name], atol=2e-3).float() for name, value in one.items()]
    assert torch.cat([part.flatten() for part in close]).mean() > alike
    targets = [name for name in two if "layers" in name and two[name].ndim == 2]
    zeros = sum(int((two[name] == 0).sum()) for name in targets)
    numel = sum(two[name].numel() for name in targets)
    if pattern != "row":
        config = SparsityConfig(pattern, None if pattern == "2:4" else 0.6)
        assert zeros == pytest.approx(config.sparsity * numel, abs=4)
    assert all(Pattern.parse(pattern).follows(two[name]) for name in targets)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("pattern", "method", "message"),
    [
        ("block:16x1", "proximal", "groups of pattern 'block:16x1' span 16 rows"),
        ("column", "magnitude", "groups of pattern 'column' span"),
        ("unstructured", "movement", "movement pruning does not work on sharded parameters"),
    ],
)
def test_what_shards_cannot_do_is_refused(
    pattern: str, method: str, message: str, tmp_path: Path
) -> None:
    output = launch(tmp_path, "fsdp2", pattern, method)
    assert output.startswith("failed")
    assert message in output


MASKS = """
import sys
from accelerate import Accelerator
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
import hf_sparse
from tests.tiny_models import tiny_batches, tiny_model

kind, method = sys.argv[1:]
accelerator = Accelerator(cpu=True)
model = tiny_model("llama", tie_word_embeddings=False)
if kind == "fsdp2":
    for block in model.model.layers:
        fully_shard(block, mesh=init_device_mesh("cpu", (2,)))
    fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
batches = tiny_batches("llama", count=4)
options = {"accumulate": 1, "lam": 0.3, "epochs": 4} if method == "proxsparse" else {}
config = hf_sparse.SparsityConfig("2:4")
report = hf_sparse.prune_(model, config, method, batches, accelerator, **options)
assert report.sparsity == 0.5, report.sparsity
assert report.violations == 0
if accelerator.is_main_process:
    print("notes", *report.notes)
"""


@pytest.mark.slow
def test_masks_are_learned_on_shards_as_on_copies(tmp_path: Path) -> None:
    script = tmp_path / "worker.py"
    script.write_text(MASKS)
    found = {}
    for kind, method in (("ddp", "proxsparse"), ("fsdp2", "proxsparse"), ("fsdp2", "wanda")):
        done = torchrun(script, 2, kind, method)
        found[kind, method] = done.stdout + done.stderr
    copies = found["ddp", "proxsparse"]
    assert "notes 21 layers had these shares of groups" in copies, copies
    shards = found["fsdp2", "proxsparse"]
    assert copies.splitlines()[0] in shards, (copies, shards)
    assert "is cut into shards by FSDP" in found["fsdp2", "wanda"]


FROZEN = """
import sys
import torch
from accelerate import Accelerator
from safetensors.torch import save_file
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
import hf_sparse
from tests.tiny_models import tiny_model

folder, kind = sys.argv[1:]
accelerator = Accelerator(cpu=True)
model = tiny_model("llama", tie_word_embeddings=False)
hf_sparse.prune_(model, hf_sparse.SparsityConfig("unstructured", 0.6), "magnitude")
if kind == "fsdp2":
    for block in model.model.layers:
        fully_shard(block, mesh=init_device_mesh("cpu", (2,)))
    fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.3)
if kind != "fsdp2":
    model, optimizer = accelerator.prepare(model, optimizer)
mask = hf_sparse.keep_zeros_(optimizer, model)
generator = torch.Generator().manual_seed(0)
rank, size = accelerator.process_index, accelerator.num_processes
model.train()
for step in range(6):
    ids = torch.randint(2, 256, (4, 12), generator=generator)[rank::size]
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    optimizer.zero_grad()
mask.check()
state = accelerator.unwrap_model(model).state_dict()
state = {k: v.full_tensor() if kind == "fsdp2" else v for k, v in state.items()}
if accelerator.is_main_process:
    save_file({k: v.contiguous() for k, v in state.items()}, f"{folder}/{kind}.safetensors")
accelerator.wait_for_everyone()
accelerator.end_training()
"""


@pytest.mark.slow
def test_zeros_are_kept_on_copies_and_on_shards(tmp_path: Path) -> None:
    model = tiny_model("llama", tie_word_embeddings=False)
    prune_(model, SparsityConfig("unstructured", 0.6), "magnitude")
    script = tmp_path / "worker.py"
    script.write_text(FROZEN)
    found = {}
    for kind in ("one", "ddp", "fsdp2"):
        processes = 1 if kind == "one" else 2
        done = torchrun(script, processes, str(tmp_path), kind)
        assert done.returncode == 0, done.stderr
        found[kind] = load_file(tmp_path / f"{kind}.safetensors")
    for kind, weights in found.items():
        for layer in target_layers(model):
            name = layer.weight_name
            assert torch.equal(weights[name] == 0, layer.parameter == 0), (kind, name)
            torch.testing.assert_close(weights[name], found["one"][name], atol=2e-3, rtol=0)


ADAPTERS = """
import os
import sys
import peft
import torch
from accelerate import Accelerator
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
import hf_sparse
from tests.test_distributed import adapter_configs
from tests.test_frozen import sparse_model
from tests.tiny_models import tiny_model

folder, kind = sys.argv[1:]
accelerator = Accelerator(cpu=True)
rank, size = accelerator.process_index, accelerator.num_processes
refused = []


def refuses(function, *arguments):
    try:
        function(*arguments)
    except ValueError as error:
        refused.append(str(error))


def sharded(model, blocks):
    mesh = init_device_mesh("cpu", (2,))
    for block in blocks:
        fully_shard(block, mesh=mesh)
    return fully_shard(model, mesh=mesh)


for name, config in adapter_configs().items():
    model = sparse_model(tie_word_embeddings=False)
    torch.manual_seed(rank if kind == "ddp" else 0)  # DDP sends the first one's to all
    adapted = hf_sparse.get_peft_model(model, config)
    if kind == "fsdp2":
        sharded(adapted, model.model.layers)
    trained = [parameter for parameter in adapted.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=0.5, momentum=0.9)
    wrapped = adapted
    if kind != "fsdp2":
        wrapped, optimizer = accelerator.prepare(adapted, optimizer)
    generator = torch.Generator().manual_seed(0)
    wrapped.train()
    for step in range(6):
        ids = torch.randint(2, 256, (4, 12), generator=generator)[rank::size]
        wrapped(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    state = None
    if kind == "fsdp2":
        refuses(hf_sparse.merge_adapters_, adapted)
        refuses(hf_sparse.save_pretrained, adapted, f"{folder}/merged")
        options = StateDictOptions(full_state_dict=True, ignore_frozen_params=True)
        state = get_model_state_dict(adapted, options=options)
    adapted.save_pretrained(f"{folder}/{kind}-{name}-{rank}", state_dict=state)
    if kind == "ddp":
        refuses(hf_sparse.merge_adapters_, wrapped)
        wrapped = DistributedDataParallel(sparse_model())
        refuses(hf_sparse.get_peft_model, wrapped, config)
    if kind == "fsdp2":
        model = sparse_model(tie_word_embeddings=False)
        refuses(hf_sparse.get_peft_model, sharded(model, model.model.layers), config)
if kind == "fsdp2":  # single layers are sharded: the adapter does not find its weights
    model = sparse_model(tie_word_embeddings=False)
    adapted = hf_sparse.get_peft_model(model, adapter_configs()["lora"])
    sharded(adapted, [layer.self_attn.q_proj.base_layer for layer in model.model.layers])
    ids = torch.arange(2, 9)[None]
    refuses(lambda: adapted(input_ids=ids, labels=ids))
accelerator.wait_for_everyone()
if accelerator.is_main_process:
    print(*refused, sep="\\n")
sys.stdout.flush()
accelerator.wait_for_everyone()
os._exit(0)  # threads of gloo now and then abort a process that ends with shards in it
"""


def adapter_configs() -> dict[str, Any]:
    """What the processes train: no seed is given, so that they have to agree by themselves."""
    import peft

    layers = ["q_proj", "down_proj"]
    return {
        "lora": peft.LoraConfig(r=4, target_modules=layers, use_rslora=True),
        "shira": peft.ShiraConfig(r=3, target_modules=layers),
    }


@pytest.mark.slow
def test_adapters_are_trained_on_copies_and_on_shards(tmp_path: Path) -> None:
    pytest.importorskip("peft")
    base = sparse_model(tie_word_embeddings=False)
    script = tmp_path / "worker.py"
    script.write_text(ADAPTERS)
    refused = {}
    for kind, processes in (("one", 1), ("ddp", 2), ("fsdp2", 2)):
        done = torchrun(script, processes, str(tmp_path), kind)
        assert done.returncode == 0, done.stderr
        refused[kind] = done.stdout
    assert refused["ddp"].count("the model inside") == 4, refused["ddp"]
    for message, times in (
        ("To merge, gather the adapter", 4),
        ("before it is sharded", 2),
        ("whole blocks", 1),
    ):
        assert refused["fsdp2"].count(message) == times, refused["fsdp2"]
    assert not (tmp_path / "merged").exists()
    for name in adapter_configs():
        merged = {}
        for run in ("one-{}-0", "ddp-{}-0", "ddp-{}-1", "fsdp2-{}-0", "fsdp2-{}-1"):
            adapted = load_adapter(copy.deepcopy(base), tmp_path / run.format(name))
            merged[run] = merge_adapters_(adapted).state_dict()
        for layer in target_layers(base):
            weight = layer.weight_name
            for run, weights in merged.items():
                assert torch.equal(weights[weight] == 0, layer.parameter == 0), (run, weight)
                other = merged[run[:-1] + "0"]
                assert torch.equal(weights[weight], other[weight]), (run, weight)
                one = merged["one-{}-0"][weight]
                # gradients are taken in bfloat16 where that is faster
                torch.testing.assert_close(weights[weight], one, atol=2e-4, rtol=0)
        changed = merged["one-{}-0"]["model.layers.0.self_attn.q_proj.weight"]
        start = base.state_dict()["model.layers.0.self_attn.q_proj.weight"]
        assert (changed - start).abs().max() > 5e-4
