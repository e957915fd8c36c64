"""Encoders with decoders: what is refused, what goes layer by layer, and files that were changed."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import DynamicCache, EncoderDecoderCache, PreTrainedModel

import hf_sparse
from hf_sparse.checkpoint.writing import COMPILED_DESCRIPTION, COMPILED_WEIGHTS
from hf_sparse.runtime.model.pairs import PAIRS
from hf_sparse.upstream.transformers.caches import cache_name
from tests.support.compiled_folders import write
from tests.support.compiled_models import change_attribute
from tests.support.pairs import ids_of, inputs_of, pair_of


@functools.cache
def pair(family: str) -> tuple[PreTrainedModel, PreTrainedModel]:
    model = pair_of(family)
    return model, hf_sparse.compile(model)


@pytest.mark.parametrize("family", ["bart", "t5"])
def test_attentions_are_refused(family: str) -> None:
    _, compiled = pair(family)
    with pytest.raises(ValueError, match="output_attentions"):
        compiled(**inputs_of(2, 9, 5), output_attentions=True)


@pytest.mark.parametrize("name", ["attention_mask", "decoder_attention_mask"])
def test_masks_by_query_are_refused(name: str) -> None:
    _, compiled = pair("bart")
    given = inputs_of(2, 9, 9)
    given[name] = torch.ones(2, 1, 9, 9)
    with pytest.raises(ValueError, match="masks of shape"):
        compiled(**given)


def test_masks_and_states_of_other_sizes_are_refused() -> None:
    _, compiled = pair("t5")
    decoder, states = compiled.decoder, torch.zeros(2, 9, 32)
    ids = ids_of(2, 4)[0]
    call = functools.partial(decoder, ids, use_cache=False)
    call(encoder_hidden_states=states)
    for given, told in (
        ({"encoder_hidden_states": states[:1]}, "1 sequences of 9 tokens; wanted 2"),
        (
            {"encoder_hidden_states": states[..., :16]},
            r"\(2, 9, 16\); wanted \(batch, tokens, 32\)",
        ),
        ({"encoder_hidden_states": states[:, :0]}, "one token or more"),
    ):
        with torch.no_grad(), pytest.raises(ValueError, match=told):
            call(**given)
    with torch.no_grad(), pytest.raises(ValueError, match=r"\(2, 8\); wanted \(2, 9\)"):
        call(encoder_hidden_states=states, encoder_attention_mask=torch.ones(2, 8))


def test_a_cache_without_a_place_for_the_encoder_is_refused() -> None:
    _, compiled = pair("bart")
    given = inputs_of(2, 9, 5)
    name = cache_name(compiled.forward)
    with pytest.raises(ValueError, match="needs an EncoderDecoderCache"):
        compiled(**given, **{name: DynamicCache()})
    cache = EncoderDecoderCache(DynamicCache(), DynamicCache())
    with torch.no_grad():
        given.pop("decoder_attention_mask")
        compiled(**given, **{name: cache}, use_cache=True)
        cache.is_updated.clear()
        with pytest.raises(ValueError, match="is_updated"):
            compiled(**given, **{name: cache}, use_cache=True)


def test_the_encoder_runs_once_for_all_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keys and values of its states are kept, and go with their sequences in a beam search."""
    _, compiled = pair("t5")
    runner = compiled.decoder.block[0].runner
    filled: list[int] = []
    before = type(runner)._fill

    def counted(self: Any, states: Tensor, layers: list[Any]) -> None:
        filled.append(len(states))
        before(self, states, layers)

    monkeypatch.setattr(type(runner), "_fill", counted)
    ids, mask = ids_of(2, 9)
    compiled.generate(ids, attention_mask=mask, num_beams=3, max_new_tokens=5, min_new_tokens=5)
    assert filled == [6]


@pytest.mark.few(1)
@pytest.mark.parametrize(
    ("family", "changes", "reason"),
    [
        ("t5", {"relative_attention_max_distance": 1 << 20}, "max_distance=1048576"),
        ("t5", {"d_kv": 6}, "heads of size 6"),
        ("bart", {"activation_function": "mish"}, "activation 'mish'"),
        ("bart", {"decoder_attention_heads": 16}, "heads of size 2"),
    ],
)
def test_what_kernels_cannot_do_goes_layer_by_layer(
    family: str, changes: dict[str, Any], reason: str
) -> None:
    compiled = hf_sparse.compile(pair_of(family, **changes))
    assert reason in compiled.explain(tokens=1).reason


@pytest.mark.parametrize("part", ["encoder", "decoder"])
def test_one_of_the_two_alone_goes_layer_by_layer(part: str) -> None:
    model = getattr(pair_of("bart").model, part)
    compiled = hf_sparse.compile(model)
    assert "has no encoder and no decoder" in compiled.explain(tokens=1).reason


@pytest.mark.parametrize(
    ("family", "stack", "name"),
    [
        ("bart", 0, "self_attn.scaling"),
        ("bart", 1, "encoder_attn.scaling"),
        ("bart", 1, "encoder_attn.head_dim"),
        ("t5", 0, "layer.0.SelfAttention.relative_attention_num_buckets"),
        ("t5", 1, "layer.1.EncDecAttention.n_heads"),
        ("t5", 1, "layer.2.layer_norm.variance_epsilon"),
    ],
)
def test_attributes_that_are_built_in_are_compared(family: str, stack: int, name: str) -> None:
    model = pair_of(family)
    described = PAIRS[family](model.config)[stack]
    change_attribute(model.base_model.get_submodule(described.stack)[1], name)
    with pytest.raises(ValueError, match=rf"\.1\.{name} is 0\.123; its config makes it"):
        hf_sparse.compile(model)


@pytest.mark.parametrize(
    ("family", "path"),
    [
        ("bart", "model.decoder.layers.1.encoder_attn.k_proj"),
        ("t5", "decoder.block.1.layer.1.EncDecAttention.k"),
        ("t5", "encoder.block.0.layer.0.SelfAttention.relative_attention_bias"),
    ],
)
def test_hooks_in_blocks_are_refused(family: str, path: str) -> None:
    model = pair_of(family)
    model.get_submodule(path).register_forward_hook(lambda *given: None)
    with pytest.raises(ValueError, match=rf"{path.split('.', 3)[-1]} has a forward hook"):
        hf_sparse.compile(model)


def test_a_copy_of_the_config_that_was_changed_is_refused() -> None:
    model = pair_of("t5")
    model.decoder.config.d_ff = 65
    with pytest.raises(ValueError, match=r"config\.d_ff is 65; .* makes it 64"):
        hf_sparse.compile(model)


def test_a_config_that_is_changed_afterwards_is_refused() -> None:
    compiled = hf_sparse.compile(pair_of("bart"))
    compiled.config.decoder_layers = 1
    with pytest.raises(ValueError, match="num_hidden_layers is 1, and was 2"):
        compiled(**inputs_of(1, 5, 4))


Damage = Callable[[dict[str, Any], dict[str, Tensor]], object]
DAMAGES: dict[str, tuple[str, Damage]] = {
    "one stack": ("other stacks", lambda d, t: (d["stacks"].pop(), drop(t, "stacks.1."))),
    "places swapped": ("are not those of", lambda d, t: d["stacks"].reverse() or swap(t)),
    "another place": ("are not those of", lambda d, t: d["stacks"][1].update(place="x")),
    "no stacks": ("the number of its stacks", lambda d, t: d.update(stacks=[])),
    "a tensor too many": ("does not need", lambda d, t: t.update({"stacks.2.x": torch.ones(2)})),
    "biases of other heads": (
        "biases by distance",
        lambda d, t: t.update({BIASES: t[BIASES][:1].clone()}),
    ),
    "biases of other distances": (
        "unlike the config",
        lambda d, t: t.update({BIASES: t[BIASES][:, :-2].contiguous()}),
    ),
    "biases that are not finite": ("infinite", lambda d, t: t[BIASES].fill_(float("inf"))),
    "biases of a block that is not there": (
        "missing",
        lambda d, t: d["stacks"][1]["blocks"][1].update(distances=7),
    ),
    "no norm": (
        "cross.query",
        lambda d, t: d["stacks"][1]["blocks"][0]["epsilons"].pop("cross_norm"),
    ),
    "a norm of nothing": (
        "the norm of its cross-attention",
        lambda d, t: d["stacks"][1]["blocks"][0]["epsilons"].update(cross_norm=[None]),
    ),
    "no query": (
        "cross.query",
        lambda d, t: d["stacks"][1]["blocks"][0]["linears"].pop("cross.query"),
    ),
    "blocks without end": (
        "there are 3 blocks",
        lambda d, t: d["config"].update(num_layers=10**29),
    ),
    "blocks of a decoder without end": (
        "there are 2 blocks",
        lambda d, t: d["config"].update(num_decoder_layers=10**29),
    ),
    "another class": ("other stacks", lambda d, t: d.update({"class": "T5EncoderModel"})),
}
BIASES = "stacks.1.blocks.0.distances"


def drop(tensors: dict[str, Tensor], prefix: str) -> None:
    for name in [name for name in tensors if name.startswith(prefix)]:
        del tensors[name]


def swap(tensors: dict[str, Tensor]) -> None:
    old = dict(tensors)
    drop(tensors, "stacks.")
    for name, tensor in old.items():
        first, number, rest = [*name.split(".", 2), "", ""][:3]
        tensors[f"{first}.{1 - int(number)}.{rest}" if first == "stacks" else name] = tensor


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return hf_sparse.save_compiled(pair("t5")[1], tmp_path_factory.mktemp("t5"))


@pytest.mark.few(3)
@pytest.mark.parametrize("name", DAMAGES)
def test_files_that_were_changed_are_refused(name: str, saved: Path, tmp_path: Path) -> None:
    told, damage = DAMAGES[name]
    described = json.loads((saved / COMPILED_DESCRIPTION).read_text())
    tensors = load_file(saved / COMPILED_WEIGHTS)
    del described["digests"]  # it should be found by other checks
    damage(described, tensors)
    write(tmp_path, described, tensors)
    with pytest.raises(hf_sparse.FormatError, match=told):
        hf_sparse.load_compiled(tmp_path)
