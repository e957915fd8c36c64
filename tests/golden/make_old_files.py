"""Writes `tests/golden/old`: files as commit 408389f wrote them, and what it computed with them.

    git worktree add --detach OLD 408389f
    PYTHONPATH=OLD python tests/golden/make_old_files.py tests/golden/old

in an environment that this commit knows: transformers 5.23, llvmlite, PEFT, ONNX Runtime. The files are
made once, and never anew by newer code: `tests/checkpoint/test_old_files.py` reads them with today's.

Each folder is one model, adapter or export. `expected.safetensors` holds what each of them gives for
`inputs()`, `expected.json` the SHA-256 of its weights.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

import hf_sparse
from hf_sparse import Metric, SparsityConfig

VOCABULARY = 32
SIZES = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 32,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 1,
}
ONE = {"num_hidden_layers": 1}
GROUPED = {**SIZES, "num_key_value_heads": 2}
GPT2 = {
    **{k: v for k, v in SIZES.items() if k.endswith("token_id")},
    "n_embd": 16,
    "n_layer": 2,
    "n_head": 4,
    "vocab_size": VOCABULARY,
    "n_positions": 32,
}
OPT = {**SIZES, **ONE, "ffn_dim": 32, "word_embed_proj_dim": 16}
METRIC = Metric("perplexity, a text of 96 tokens", 51.25, 48.5)
TARGETS = ["q_proj", "down_proj"]
EXPECTED: dict[str, Tensor] = {}
WEIGHTS: dict[str, str] = {}


def inputs() -> Tensor:
    """Two sequences of tokens."""
    return torch.arange(18).mul(7).remainder(VOCABULARY - 2).add(2).view(2, 9)


def batches() -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [
        {"input_ids": torch.randint(2, VOCABULARY, (2, 12), generator=generator)} for _ in range(3)
    ]


def made(name: str, config: str, seed: int, **values: Any) -> PreTrainedModel:
    """A random model whose outputs differ from token to token."""
    torch.manual_seed(seed)
    model = getattr(transformers, name)(getattr(transformers, config)(**values)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter += 0.02 * torch.randn_like(parameter)
            else:
                parameter.normal_(std=0.2)
    return model


def llama(seed: int = 0, **values: Any) -> PreTrainedModel:
    return made("LlamaForCausalLM", "LlamaConfig", seed, **{**GROUPED, **values})


@torch.no_grad()
def outputs(model: Any) -> Tensor:
    found = model(input_ids=inputs())
    result: Tensor = found.logits if hasattr(found, "logits") else found.last_hidden_state
    return result[:, ::4].float().contiguous() if result.ndim > 2 else result.float()


def expect(name: str, model: Any) -> None:
    """Note what a model that was loaded from its files gives, and its weights."""
    WEIGHTS[name], EXPECTED[name] = digest(model.state_dict()), outputs(model)


def digest(tensors: dict[str, Tensor]) -> str:
    """Of the names, types, shapes and bytes of tensors."""
    found = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} ".encode())
        found.update(tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def pruned(model: PreTrainedModel, pattern: str, sparsity: float | None, **how: Any) -> Any:
    hf_sparse.prune_(model, SparsityConfig(pattern, sparsity), **{"method": "magnitude", **how})
    return model


def checkpoints(folder: Path) -> None:
    """Families, patterns and formats; shards, tied weights, cards, shrunk and trained models."""

    def save(name: str, auto: str, model: PreTrainedModel, config: Any = None, **how: Any) -> None:
        hf_sparse.save_pretrained(model, folder / name, config, **how)
        load(name, auto)

    def load(name: str, auto: str) -> None:
        loaded = getattr(transformers, auto).from_pretrained(folder / name, dtype="auto").eval()
        WEIGHTS[name], EXPECTED[name] = digest(loaded.state_dict()), outputs(loaded.float())

    causal = "AutoModelForCausalLM"
    tied = pruned(
        llama(tie_word_embeddings=True), "unstructured", 0.7, method="wanda", batches=batches()
    )
    save("llama-sharded", causal, tied, metrics=[METRIC], tags=["tiny"], max_shard_size="6KB")
    labels = {"num_labels": 3}
    bert = made("BertForSequenceClassification", "BertConfig", 1, **{**SIZES, **ONE}, **labels)
    save("bert-nm", "AutoModelForSequenceClassification", pruned(bert, "2:4", None))
    gpt2 = pruned(made("GPT2LMHeadModel", "GPT2Config", 2, **GPT2), "unstructured", 0.95)
    save("gpt2-gap8", causal, gpt2, SparsityConfig("unstructured", 0.95, format="gap8"))
    opt = pruned(made("OPTForCausalLM", "OPTConfig", 3, **OPT).bfloat16(), "block:4x1", 0.75)
    save("opt-block", causal, opt)
    qwen3 = pruned(
        made("Qwen3ForCausalLM", "Qwen3Config", 4, **{**GROUPED, **ONE}, head_dim=8),
        "unstructured",
        0.5,
    )
    save("qwen3-bitmask", causal, qwen3, SparsityConfig("unstructured", 0.5, format="bitmask"))
    albert = made("AlbertModel", "AlbertConfig", 5, **SIZES, embedding_size=8).half()
    pruned(albert, "4:8", None)
    save("albert-dense", "AutoModel", albert, SparsityConfig("4:8", format="dense"))
    mistral = made("MistralForCausalLM", "MistralConfig", 6, **GROUPED, sliding_window=4).bfloat16()
    pruned(mistral, "head", 0.5)
    hf_sparse.shrink(mistral)
    save("mistral-shrunk", causal, mistral)
    trained = pruned(llama(7, **ONE), "2:4", None, method="sparsegpt", batches=batches())
    hf_sparse.recover_(trained, batches(), "finetune", epochs=1)
    save("llama-trained", causal, trained, metrics=[METRIC], base_model="someone/dense")
    dense = folder / "dense"
    made("Qwen2ForCausalLM", "Qwen2Config", 8, **{**GROUPED, **ONE}).save_pretrained(dense)
    config = SparsityConfig("unstructured", 0.8, format="gap4")
    hf_sparse.prune_checkpoint(dense, folder / "qwen2-streamed", config, "wanda", batches())
    shutil.rmtree(dense)
    load("qwen2-streamed", causal)


def adapters(folder: Path) -> None:
    """Adapters of `llama-trained`."""
    import peft

    kinds = {
        "adapter-lora": peft.LoraConfig(r=2, target_modules=TARGETS),
        "adapter-shira": peft.ShiraConfig(r=2, target_modules=TARGETS, random_seed=0),
    }
    for name, config in kinds.items():
        base = transformers.AutoModelForCausalLM.from_pretrained(folder / "llama-trained").eval()
        model = hf_sparse.get_peft_model(base, config)
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
        model.save_pretrained(folder / name)
        (folder / name / "README.md").unlink()  # PEFT's own
        base = transformers.AutoModelForCausalLM.from_pretrained(folder / "llama-trained").eval()
        loaded = hf_sparse.load_adapter(base, folder / name)
        EXPECTED[name] = outputs(loaded)
        WEIGHTS[name] = digest(peft.get_peft_model_state_dict(loaded))


def compiled(folder: Path) -> None:
    """Causal models and encoders; packed, in blocks, dense; shared, tied and two-byte weights."""
    models: dict[str, Callable[[], PreTrainedModel]] = {
        "compiled-llama": lambda: pruned(
            llama(10, tie_word_embeddings=True, intermediate_size=36, **ONE), "unstructured", 0.7
        ),
        "compiled-gpt2": lambda: made(
            "GPT2LMHeadModel", "GPT2Config", 11, **{**GPT2, "n_layer": 1}
        ).bfloat16(),
        "compiled-bert": lambda: pruned(
            made(
                "BertForSequenceClassification", "BertConfig", 12, **{**SIZES, **ONE}, num_labels=3
            ),
            "block:4x1",
            0.75,
        ),
        "compiled-opt": lambda: hf_sparse.SparseOPTForCausalLM.from_pretrained(
            folder / "opt-block", dtype="auto"
        ).eval(),
        "compiled-albert": lambda: pruned(
            made("AlbertModel", "AlbertConfig", 13, **SIZES, embedding_size=8), "unstructured", 0.8
        ),
    }
    for name, make in models.items():
        model = hf_sparse.compile(make(), target="avx2", cache=None)
        hf_sparse.save_compiled(model, folder / name)
        loaded = hf_sparse.load_compiled(folder / name, target="avx2", cache=None)
        expect(name, loaded)
        if loaded.can_generate() and loaded.dtype == torch.float32:
            ids = inputs()[:1]
            EXPECTED[f"{name} generated"] = loaded.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=6,
                do_sample=False,
                pad_token_id=1,
            )


def export(folder: Path) -> None:
    """A packed graph."""
    sizes = {**SIZES, **ONE}
    model = made("BertForSequenceClassification", "BertConfig", 14, **sizes, num_labels=3)
    pruned(model, "unstructured", 0.8)
    hf_sparse.export_onnx(model, folder / "onnx-bert", metrics=[METRIC])
    EXPECTED["onnx-bert"] = outputs(model)


def main() -> None:
    """Writes all of them into the working directory, so that no file holds its path."""
    for make in (checkpoints, adapters, compiled, export):
        make(Path())
    save_file(EXPECTED, "expected.safetensors")
    Path("expected.json").write_text(json.dumps(WEIGHTS, indent=1) + "\n")


if __name__ == "__main__":
    os.makedirs(sys.argv[1])
    os.chdir(sys.argv[1])
    main()
