"""Train adapters on one process, copies or shards, and print what was refused."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import Any

import torch
from accelerate import Accelerator
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.nn.parallel import DistributedDataParallel

import hf_sparse
from tests.support.adapters import adapter_configs
from tests.support.sharding import sharded
from tests.support.sparse_models import sparse_model

folder, kind = sys.argv[1:]
accelerator = Accelerator(cpu=True)
rank, size = accelerator.process_index, accelerator.num_processes
refused: list[str] = []


def refuses(function: Callable[..., Any], *arguments: Any) -> None:
    try:
        function(*arguments)
    except ValueError as error:
        refused.append(str(error))


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
    for _ in range(6):
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
    print(*refused, sep="\n")
sys.stdout.flush()
accelerator.wait_for_everyone()
os._exit(0)  # threads of gloo now and then abort a process that ends with shards in it
