"""Tiny mixtures of experts, and the same models with a Linear for each matrix of an expert."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    DeepseekV3Config,
    GptOssConfig,
    MixtralConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen3MoeConfig,
)

from hf_sparse.structure.experts import ExpertStack
from tests.support.any_models import tiny_config
from tests.support.tiny_models import SIZES

EXPERTS = 4
_SHAPE: dict[str, Any] = {
    **SIZES,
    **{"intermediate_size": 48, "num_hidden_layers": 2, "num_key_value_heads": 2},
    **{"num_local_experts": EXPERTS, "num_experts_per_tok": 2},
}
_OF_QWEN: dict[str, Any] = {
    **{name: size for name, size in _SHAPE.items() if name != "num_local_experts"},
    **{"num_experts": EXPERTS, "moe_intermediate_size": 24, "head_dim": 8},
}
MIXTURES: dict[str, PreTrainedConfig] = {
    "mixtral": MixtralConfig(**_SHAPE),
    "qwen3_moe": Qwen3MoeConfig(**_OF_QWEN),
    "gpt_oss": GptOssConfig(**_SHAPE, head_dim=8),
}


def tiny_mixture(family: str, seed: int = 0, **changes: Any) -> PreTrainedModel:
    """A random mixture in eval mode, whose biases and routers are not zero."""
    config = MIXTURES[family]
    torch.manual_seed(seed)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(
        type(config)(**{**config.to_dict(), **changes})
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1 or name.endswith(("_bias", "gate.weight", "router.weight")):
                parameter.add_(0.2 * torch.randn_like(parameter))
    model.eval()
    return model


def grouped_mixture(**changes: Any) -> PreTrainedModel:
    """DeepSeek-V3 with 8 experts in 2 groups, of which a token gets 2 from 1 group."""
    config = {**tiny_config("deepseek_v3").to_dict(), "n_routed_experts": 8, "n_group": 2}
    config |= {"topk_group": 1, "num_experts_per_tok": 2, "num_key_value_heads": 4}
    config |= {"first_k_dense_replace": 1, **changes}
    torch.manual_seed(0)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(DeepseekV3Config(**config)).eval()
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if "gate.weight" in name or "correction_bias" in name:
                tensor.copy_(0.3 * torch.randn_like(tensor))
    return model


def mixture_batches(count: int = 4, length: int = 24) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(2, 256, (2, length), generator=generator) for _ in range(count)]


class SeparateExperts(nn.Module):
    """The experts of a stack as Linear layers under the names of the stack's matrices."""

    def __init__(self, module: Any) -> None:
        super().__init__()
        stack = ExpertStack.of(module)
        assert stack is not None
        self.own = (module,)  # hidden from named_modules
        self.paths = stack.parameters
        for path in stack.parameters:
            weights = getattr(module, path).detach()
            biases = getattr(module, f"{path}_bias", None)
            layers = []
            for expert, weight in enumerate(weights.mT if path in stack.turned else weights):
                layer = nn.Linear(weight.shape[1], weight.shape[0], bias=biases is not None)
                layer.weight.data = weight.clone()
                if biases is not None:
                    layer.bias.data = biases[expert].detach().clone()
                layers.append(layer)
            setattr(self, path, nn.ModuleList(layers))

    def forward(self, hidden: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        found = torch.zeros_like(hidden)
        entry, inner = (getattr(self, path) for path in self.paths)
        for expert, (first, last) in enumerate(zip(entry, inner, strict=True)):
            tokens, place = torch.where(chosen == expert)
            if len(tokens):
                out = last(self.own[0]._apply_gate(first(hidden[tokens])))
                out = out * weights[tokens, place, None]
                found.index_add_(0, tokens, out.to(found.dtype))
        return found


def separated(model: PreTrainedModel) -> PreTrainedModel:
    """The same model with Linear layers for its experts."""
    model = copy.deepcopy(model)
    for module in list(model.modules()):
        if ExpertStack.of(getattr(module, "experts", nn.Identity())) is not None:
            module.experts = SeparateExperts(module.experts)
    return model
