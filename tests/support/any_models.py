"""Small random models of every type of transformers, made from configs by the names of sizes."""

from __future__ import annotations

import copy
import importlib
import inspect
import re
from collections.abc import Iterator
from functools import cache
from itertools import product
from typing import Any

import torch
from transformers import CONFIG_MAPPING, PreTrainedConfig, PreTrainedModel
from transformers.models.auto import modeling_auto

from hf_sparse.structure.layers import find_stacks

# Models above this are not built: the machine that tests has little memory.
MOST_WEIGHTS = 12_000_000
VOCABULARY = 256
# What sizes become, by the first pattern that their name matches as a whole.
_SIZES: tuple[tuple[str, int], ...] = (
    (r"(.*_)?vocab_size(_per_layer_input)?|num_embeddings|codebook_size|n_words", VOCABULARY),
    (r"(.*_)?(num_)?(key_value|kv)_heads|num_kv_heads|n_kv_heads|num_groups|n_group|topk_group", 2),
    (r"(swa_|text_|vision_)?num_attention_heads|(en|de)coder_attention_heads|attention_heads", 4),
    (
        r"num_heads|n_heads?|num_encoder_attention_heads|num_decoder_attention_heads|(en|de)coder_heads",
        4,
    ),
    (r"index_n_heads|linear_num_key_heads|linear_num_value_heads|linear_num_heads", 4),
    (r"(.*_)?head_dim(_.*)?|d_kv|attention_head_dim|dim_head|d_rel|head_size", 8),
    (r"qk_nope_head_dim|qk_rope_head_dim|v_head_dim|index_head_dim", 8),
    (r"(kv|q|o)_lora_rank|rotary_dim|mamba_d_state|state_size", 8),
    (
        r"(.*_)?(num_(hidden_|en|de)?.*layers?|n_layers?|(en|de)coder_layers|num_blocks|depth|layers)",
        2,
    ),
    (r"num_hidden_groups|inner_group_num", 1),
    (r"first_k_dense_replace|(en|de)coder_sparse_step", 1),
    (r"num_experts_per_tok|num_experts_per_token|moe_k|moe_topk|top_k|router_top_k", 2),
    (r"(n_routed|num_local|num|moe_num|n)_experts|num_experts_total", 4),
    (
        r"(.*_)?(max|n)(_source|_target)?_position(s|_embeddings)(_.*)?|n_positions|n_ctx|block_size",
        128,
    ),
    (
        r"(.*_)?(intermediate_size|ffn_dim|ffn_hidden_size|mlp_dim|d_ff|n_inner|intermediate_dim)",
        64,
    ),
    (
        r"(.*_)?hidden_size(_.*)?|d_model|n_embd|embed_dim|embedding_size|hidden_dim|emb_dim|d_embed",
        32,
    ),
    (
        r"projection_dim|word_embed_proj_dim|out_hidden_size|projector_hidden_size|text_embed_dim",
        32,
    ),
    (r"(image|input|pretrain_image)_size|max_image_size", 32),
    (r"patch_size", 8),
    (r"(sliding_window|window)(_size)?|local_attention|attention_window", 8),
    (r"num_queries|num_query_tokens|num_latents|resampler_n_latents", 8),
    (r"num_mel_bins|num_filters|mel_dim", 16),
)
# Beside widths, what makes a model large and may be changed in any.
_ALWAYS = re.compile(r"vocab|layers?|experts|position|groups|depth|block")
# Lists of sizes for stages, of which the items are cut.
_STAGES: tuple[tuple[str, int], ...] = (
    (r"conv_dim|tdnn_dim", 32),
    (r"depths|encoder_depths|stage_num_blocks|blocks_per_stage|num_blocks|layers_per_stage", 1),
)
# What the rules do not find; a name with dots is in a part of the config.
_MIXED = ["dense", "sparse"]
_IN_THREE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}
_IN_THREE_WHOLE = {**_IN_THREE, "partial_rotary_factor": 1.0}  # its default turns half of a head
_OVERRIDES: dict[str, dict[str, Any]] = {
    "beam": {"mlp_layer_types": _MIXED},
    "dbrx": {
        **{"attn_config.rope_theta": 1e4, "attn_config.kv_n_heads": 2, "attn_config.clip_qkv": 8.0},
        **{"ffn_config.moe_top_k": 2},
    },
    "deepseek_ocr2_text": {"mlp_layer_types": _MIXED},
    "dots1": {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1},
    "esm": {"vocab_size": VOCABULARY, "pad_token_id": 1},
    "flint": {"mlp_only_layers": [0]},
    "gemma4_text": {
        **{"enable_moe_block": True, "num_experts": 4, "top_k_experts": 2},
        **{"moe_intermediate_size": 64},
    },
    "glm4v": {"text_config.rope_parameters": _IN_THREE},
    "glm46v": {"text_config.rope_parameters": _IN_THREE},
    "glm4v_moe": {"text_config.rope_parameters": _IN_THREE_WHOLE},
    "glm_image": {"text_config.rope_parameters": _IN_THREE},
    "glm_ocr": {"text_config.rope_parameters": _IN_THREE},
    "glm4v_text": {"rope_parameters": _IN_THREE},
    "glm4v_moe_text": {"rope_parameters": _IN_THREE_WHOLE},
    "glm_image_text": {"rope_parameters": _IN_THREE},
    "glm_ocr_text": {"rope_parameters": _IN_THREE},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "granitemoehybrid": {
        **{"mamba_n_heads": 4, "mamba_n_groups": 1, "layer_types": ["mamba", "attention"]},
        **{"num_local_experts": 4, "num_experts_per_tok": 2},
    },
    "hunyuan_v1_moe": {
        **{"head_dim": 8, "num_experts": 4, "moe_topk": 2, "num_key_value_heads": 2},
    },
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "mistral4": {"head_dim": 16},  # turns half of it: as many as qk_rope_head_dim
    "qwen3_omni_moe_talker_text": {"shared_expert_intermediate_size": 64},
    "step3p5": {"mlp_layer_types": _MIXED},
    "vitpose_backbone": {"num_experts": 4, "part_features": 8},
}


def model_types() -> list[str]:
    """Every model type of transformers, once for each config class."""
    first: dict[str, str] = {}
    for model_type, name in CONFIG_MAPPING._mapping.items():
        first.setdefault(name, model_type)
    return sorted(first.values())


def _small(name: str, value: Any, widths: bool) -> Any:
    """The value that a size of this name gets; the value itself if it stays."""
    if isinstance(value, bool) or not isinstance(value, int | list | tuple):
        return value
    if isinstance(value, list | tuple):
        for pattern, most in _STAGES:
            if re.fullmatch(pattern, name) and all(isinstance(item, int) for item in value):
                return [min(item, most) for item in value]
        return value
    # As many as there are sizes in `conv_dim`; the sum of two other sizes.
    if name in ("num_feat_extract_layers", "qk_head_dim"):
        return value
    for pattern, most in _SIZES:
        if re.fullmatch(pattern, name):
            return min(value, most) if widths or _ALWAYS.search(name) else value
    return value


def _changes(config: PreTrainedConfig, widths: bool, kinds: bool) -> dict[str, Any]:
    """The arguments that make a small config of this kind.

    Args:
        config: with the default sizes.
        widths: whether layers become narrow, too.
        kinds: whether the kinds of layers are listed anew, the first and the last of them.
    """
    changes: dict[str, Any] = {}
    special = 2
    for name, value in vars(config).items():
        if isinstance(value, PreTrainedConfig):
            own = value.to_diff_dict()
            stale = ("layer_types", "mlp_layer_types", "transformers_version")
            own = {key: item for key, item in own.items() if key not in stale}
            own.pop("_out_indices", None)
            changes[name] = {
                **own,
                **_changes(value, widths, kinds),
                "model_type": value.model_type,
            }
        elif name.startswith("_"):
            continue
        elif name == "rope_parameters" and isinstance(value, dict) and "mrope_section" in value:
            changes[name] = {**value, "mrope_section": [2, 1, 1]} if widths else value
        elif kinds and isinstance(value, list) and value and isinstance(value[0], str):
            if re.search(r"layer_types$|layers_block_type$", name):
                changes[name] = [value[0], next((k for k in value if k != value[0]), value[0])]
        elif re.search(r"token_(id|index)$", name) and isinstance(value, int):
            special += 1
            changes[name] = value if 0 <= value < 4 else 10 + special
        elif (small := _small(name, value, widths)) != value:
            changes[name] = small
    if (
        "qk_rope_head_dim" in vars(config) and "num_key_value_heads" in changes
    ):  # all heads have keys
        changes["num_key_value_heads"] = changes.get("num_attention_heads", 4)
    return changes


@cache
def tiny_config(model_type: str) -> PreTrainedConfig:
    """A small config of a type.

    Raises:
        ValueError: no rule gives one of which a model can be built.
    """
    config_class = CONFIG_MAPPING[model_type]
    problem: Exception | None = None
    for widths, kinds in product((True, False), (False, True)):
        try:
            changes = _changes(config_class(), widths, kinds)
            for path, value in _OVERRIDES.get(model_type, {}).items():
                place = changes
                *parents, name = path.split(".")
                for parent in parents:
                    place = place.setdefault(parent, {})
                place[name] = value
            config = config_class(**copy.deepcopy(changes))
            weights = count_weights(config)
        except (
            Exception
        ) as error:  # whatever classes of others raise at sizes that they do not like
            problem = error
            continue
        if weights <= MOST_WEIGHTS:
            return config
        problem = ValueError(f"{weights:,} weights")
    raise ValueError(f"no small {model_type}: {problem!r:.300}") from problem


def classes_of(config: PreTrainedConfig) -> list[type[PreTrainedModel]]:
    """The classes that the Auto classes have for a config, the one without a head first."""
    found: dict[type[PreTrainedModel], None] = {}
    for name, mapping in vars(modeling_auto).items():
        if re.fullmatch(r"MODEL_(FOR_.*)?(WITH_.*)?MAPPING", name) and type(config) in mapping:
            classes = mapping[type(config)]
            for each in classes if isinstance(classes, tuple | list) else (classes,):
                found.setdefault(each)
    return list(found) or _public_classes(type(config))


def _public_classes(config_class: type[PreTrainedConfig]) -> list[type[PreTrainedModel]]:
    """The classes of a config that no Auto class has: parts of larger models."""
    place = re.sub(r"\.configuration_(\w+)$", r".modeling_\1", config_class.__module__)
    try:
        module = importlib.import_module(place)
    except ImportError:
        return []
    named = (getattr(module, name) for name in getattr(module, "__all__", ()))
    return [
        each
        for each in named
        if isinstance(each, type)
        and issubclass(each, PreTrainedModel)
        and each.config_class is config_class
        and not each.__name__.endswith("PreTrainedModel")
    ]


def has_blocks(config: PreTrainedConfig, model_class: type[PreTrainedModel]) -> bool:
    """Whether a model has blocks with matrices, which are pruned by default."""
    return bool(find_stacks(_on_meta(config, model_class)))


def state_of(model_type: str) -> str:
    """Whether a type is tried by the tests, and if not, why."""
    try:
        config = tiny_config(model_type)
    except ValueError as error:
        return f"not built: {error}"
    return "tried" if has_blocks(config, classes_of(config)[0]) else "no blocks of matrices"


def count_weights(config: PreTrainedConfig) -> int:
    """The weights of a config's first class."""
    classes = classes_of(config)
    if not classes:
        raise ValueError("no public class is a model of it")
    model = _on_meta(config, classes[0])
    return sum(parameter.numel() for parameter in model.parameters())


def _on_meta(config: PreTrainedConfig, model_class: type[PreTrainedModel]) -> Any:
    with torch.device("meta"):
        return model_class._from_config(copy.deepcopy(config), attn_implementation="eager")


def build(config: PreTrainedConfig, model_class: type[PreTrainedModel], seed: int = 0) -> Any:
    """A random model in eval mode, in float32; no value is what an initialisation would give."""
    torch.manual_seed(seed)
    model = model_class._from_config(copy.deepcopy(config), attn_implementation="eager")
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.is_floating_point():
                noise = torch.randn(parameter.shape, generator=generator)
                parameter += (0.02 * noise).to(parameter.dtype)
        for module in model.modules():  # transformers makes them zero once more when it loads
            if isinstance(module, torch.nn.Embedding) and module.padding_idx is not None:
                module.weight[module.padding_idx] = 0
    return model.float().eval()


def dummy_inputs(model: Any) -> Iterator[dict[str, Any]]:
    """Inputs to try with a model's forward, one after the other."""
    arguments = inspect.signature(model.forward).parameters
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(4, 10, (2, 9), generator=generator)
    config = model.config
    size = getattr(config, "image_size", 32) or 32
    size = size if isinstance(size, int) else size[0]
    vision = getattr(config, "vision_config", None) or config
    size = getattr(vision, "image_size", size) if isinstance(vision, PreTrainedConfig) else size
    size = size if isinstance(size, int) else size[0]
    channels = getattr(vision, "num_channels", 3)
    pixels = torch.randn(
        2, channels if isinstance(channels, int) else 3, size, size, generator=generator
    )
    texts: dict[str, Any] = {"input_ids": ids}
    decoder = {"decoder_input_ids": ids} if "decoder_input_ids" in arguments else {}
    main = getattr(model, "main_input_name", "input_ids")
    mels = getattr(config, "num_mel_bins", 16) or 16
    waves = torch.randn(2, 4000, generator=generator)
    if main == "input_ids" and "input_ids" in arguments:
        yield {**texts, **decoder}
        yield {**texts, "pixel_values": pixels}
    if "pixel_values" in arguments:
        yield {"pixel_values": pixels, **decoder}
        yield {**texts, "pixel_values": pixels, **decoder}
    length = 2 * getattr(config, "max_source_positions", 64)
    if "input_features" in arguments:
        yield {"input_features": torch.randn(2, mels, length, generator=generator), **decoder}
        yield {"input_features": torch.randn(2, 64, mels, generator=generator), **decoder}
    if "input_values" in arguments:
        yield {"input_values": waves, **decoder}
        yield {"input_values": waves[:, None], **decoder}
    if "input_ids" in arguments:
        yield {**texts, **decoder}


@torch.no_grad()
def outputs_of(model: Any, inputs: dict[str, Any]) -> list[torch.Tensor]:
    """The tensors of a model's outputs, in order."""
    torch.manual_seed(0)
    return list(_tensors(model(**inputs)))


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        if value.is_floating_point():
            yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from _tensors(item)
    elif isinstance(value, tuple | list):
        for item in value:
            yield from _tensors(item)
