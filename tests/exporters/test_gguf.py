"""GGUF files of the same codes: every weight as in the model, and what cannot be written is refused."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

import hf_sparse
from hf_sparse import SparsityConfig
from hf_sparse.cli import main
from hf_sparse.quantization import OffGridError
from hf_sparse.structure.grids import gridded
from tests.support.few_bits import INT4, quantised
from tests.support.tiny_models import prose, tiny_batches, tiny_model, tiny_tokenizer

gguf = pytest.importorskip("gguf")
EMBEDDINGS, QUERIES = "token_embd.weight", "blk.1.attn_q.weight"


@cache
def trained() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    special = ["<eos>", "<pad>"]
    trainer = trainers.BpeTrainer(vocab_size=250, special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator([prose()[:50_000]], trainer)
    return tokenizer


def byte_level() -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(tokenizer_object=trained(), eos_token="<eos>", pad_token="<pad>")


def tensors(file: Path) -> dict[str, torch.Tensor]:
    """The weights, by a reader of the specification: blocks of 32 codes, and a float16 scale each."""
    found = {}
    for stored in gguf.GGUFReader(file).tensors:
        shape = tuple(int(size) for size in reversed(stored.shape))
        kind, data = stored.tensor_type.name, np.array(stored.data)
        if kind == "F32":
            values = data.astype(np.float32)
        else:
            blocks = data.reshape(-1, 34 if kind == "Q8_0" else 18)
            scales = blocks[:, :2].copy().view(np.float16).astype(np.float32)
            if kind == "Q8_0":
                codes = blocks[:, 2:].copy().view(np.int8)
            else:
                codes = np.concatenate([blocks[:, 2:] & 15, blocks[:, 2:] >> 4], 1).astype(int) - 8
            values = scales * codes
        found[stored.name] = torch.from_numpy(np.array(values, np.float32)).reshape(shape)
    return found


def turned(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows of queries or keys from GGUF's order to that of transformers."""
    places = [head * 8 + 2 * j + half for head in range(heads) for half in (0, 1) for j in range(4)]
    return weight[places]


@pytest.mark.few(2)
@pytest.mark.parametrize(
    "config",
    [
        INT4,
        SparsityConfig("unstructured", 0.7, bits=8, embedding_bits=8),
        SparsityConfig("2:4", bits=8, group_size=32),
        SparsityConfig("2:4", bits=4),
    ],
    ids=repr,
)
@pytest.mark.parametrize("tied", [True, False])
def test_a_file_has_the_weights_of_the_model(tmp_path, config, tied):
    model = quantised(config, tie_word_embeddings=tied)
    report = hf_sparse.export_gguf(model, tmp_path / "model.gguf")
    found = tensors(tmp_path / "model.gguf")
    state = model.state_dict()
    assert ("output.weight" in found) is not tied
    assert torch.equal(found[EMBEDDINGS], state["model.embed_tokens.weight"])
    for block in range(3):
        mine, theirs = f"model.layers.{block}", f"blk.{block}"
        queries, keys = found[f"{theirs}.attn_q.weight"], found[f"{theirs}.attn_k.weight"]
        assert torch.equal(turned(queries, 4), state[f"{mine}.self_attn.q_proj.weight"])
        assert torch.equal(turned(keys, 2), state[f"{mine}.self_attn.k_proj.weight"])
        assert torch.equal(
            found[f"{theirs}.ffn_down.weight"], state[f"{mine}.mlp.down_proj.weight"]
        )
        norm = state[f"{mine}.post_attention_layernorm.weight"]
        assert torch.equal(found[f"{theirs}.ffn_norm.weight"], norm)
    assert report.zeros == sum(int((weight == 0).sum()) for weight in found.values())
    assert report.zeros >= 0.5 * sum(
        layer.weight.numel() for layer, _ in gridded(model, config)
    ) * (0.5 if config.embedding_bits else 1)
    kind = "Q4_0" if config.bits == 4 else "Q8_0"
    assert report.types[kind] >= 21
    assert report.bytes == (tmp_path / "model.gguf").stat().st_size
    assert kind in str(report)


def test_transformers_opens_it_as_the_same_model(tmp_path):
    model = quantised().eval()
    hf_sparse.export_gguf(model, tmp_path / "model.gguf", tokenizer=byte_level())
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="model.gguf").eval()
    for name, weight in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], weight), name
    batch = tiny_batches("llama")[0]
    torch.testing.assert_close(loaded(**batch).logits, model(**batch).logits)


def test_the_metadata_are_those_of_the_config_and_the_tokenizer(tmp_path):
    model, tokenizer = quantised(), byte_level()
    hf_sparse.export_gguf(model, tmp_path / "model.gguf", tokenizer=tokenizer)
    fields = gguf.GGUFReader(tmp_path / "model.gguf").fields
    value = {name: field.contents() for name, field in fields.items()}
    assert value["general.architecture"] == "llama"
    assert value["llama.embedding_length"] == 32
    assert value["llama.attention.head_count_kv"] == 2
    assert value["llama.rope.freq_base"] == model.config.rope_parameters["rope_theta"]
    tokens = value["tokenizer.ggml.tokens"]
    assert len(tokens) == model.config.vocab_size
    for token, index in tokenizer.get_vocab().items():
        assert tokens[index] == token
    assert value["tokenizer.ggml.model"] == "gpt2"
    assert value["tokenizer.ggml.pre"] == "gpt-2"


def test_a_model_without_bits_is_written_in_its_type(tmp_path):
    for dtype, kind in ((torch.float32, "F32"), (torch.bfloat16, "BF16"), (torch.float16, "F16")):
        model = tiny_model("llama").to(dtype)
        report = hf_sparse.export_gguf(model, tmp_path / "model.gguf", overwrite=True)
        assert report.types[kind] >= 22


@pytest.mark.slow
def test_what_cannot_be_written_is_refused_and_nothing_changes(tmp_path):
    file = tmp_path / "model.gguf"
    with pytest.raises(ValueError, match="wanted a LlamaForCausalLM"):
        hf_sparse.export_gguf(tiny_model("gpt2"), file)
    with pytest.raises(ValueError, match="attention_bias=True"):
        hf_sparse.export_gguf(tiny_model("llama", attention_bias=True), file)
    with pytest.raises(ValueError, match=r"wanted NAME\.gguf"):
        hf_sparse.export_gguf(quantised(), tmp_path / "model.bin")
    points = SparsityConfig("2:4", bits=4, group_size=32, symmetric=False)
    with pytest.raises(ValueError, match="zero points"):
        hf_sparse.export_gguf(quantised(points), file)
    model = quantised()
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.mul_(2.0**-30)
    with pytest.raises(ValueError, match=r"up_proj.*are no float16"):
        hf_sparse.export_gguf(model, file)
    model = quantised()
    with torch.no_grad():
        weight = model.model.layers[0].mlp.up_proj.weight
        weight.mul_(1 + torch.rand_like(weight))
    with pytest.raises(OffGridError, match="up_proj"):
        hf_sparse.export_gguf(model, file)
    assert not list(tmp_path.iterdir())
    hf_sparse.export_gguf(quantised(), file)
    before = file.read_bytes()
    with pytest.raises(ValueError, match="there already"):
        hf_sparse.export_gguf(quantised(), file)
    with pytest.raises(OffGridError):
        hf_sparse.export_gguf(model, file, overwrite=True)
    assert file.read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["model.gguf"]


def test_another_tokenizer_is_refused(tmp_path):
    with pytest.raises(ValueError, match="byte-level BPE"):
        hf_sparse.export_gguf(quantised(), tmp_path / "model.gguf", tokenizer=tiny_tokenizer())


def test_the_command_writes_a_file(tmp_path, capsys):
    hf_sparse.save_pretrained(quantised(), tmp_path / "model", INT4, tokenizer=byte_level())
    assert main(["export", str(tmp_path / "model"), str(tmp_path / "model.gguf"), "--gguf"]) == 0
    assert "21 Q4_0, 1 Q8_0" in capsys.readouterr().out.replace("7 F32, ", "")
    assert len(tensors(tmp_path / "model.gguf")) == 29
    assert main(["export", str(tmp_path / "model"), str(tmp_path / "model.gguf"), "--gguf"]) != 0
    assert "there already" in capsys.readouterr().err
