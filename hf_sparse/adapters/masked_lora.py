"""Masked LoRA: a low-rank update of the kept weights alone, as layers of PEFT's LoRA.

    y = x (W + m * s B A)^T,    m = [W != 0]

Sources: LoRA, https://arxiv.org/abs/2106.09685; with a mask, SQFT, https://arxiv.org/abs/2410.03750;
computing the masked weight again in the backward pass, LoRS, https://arxiv.org/abs/2501.08582.

One product per layer, with the weight that a merge would give: so merging changes nothing, also in
bfloat16. That weight is not kept for the backward pass but computed again. The gradients are, with
`G = dL/dy^T x` `(out_features, in_features)`,

    dL/dB = s (m * G) A^T         dL/dA = s B^T (m * G)

G is half again the products of a layer whose weight is frozen: on CPUs where bfloat16 is faster
than float32 it is computed in it. (LoRS leaves the mask out of the gradients, which spares G. Here
that saved less than a tenth of a step, and the gradients would no longer be the loss's.)
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from peft import LoraConfig
from torch import Tensor, nn
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

from hf_sparse.calibration.losses import is_bfloat16_faster
from hf_sparse.optim.zeros import is_whole, kept_bits, mask_, refill_, unlike
from hf_sparse.upstream.peft import LoraLinear, LoraVariant, use_layers_
from hf_sparse.upstream.torch import has_hooks

MASKED_LORA = "HF_SPARSE_MASKED_LORA"
# Written as `peft_type`: PEFT alone does not know it, and refuses the adapter with it as the reason.
_STORED_TYPE = f"{MASKED_LORA}: load this adapter by hf_sparse.load_adapter(model, folder)"
# Starts that leave the base weights alone, and what is not a matter of single matrices.
_STARTS = (True, False, "gaussian", "orthogonal")
_OTHERS = ("layer_replication", "target_parameters", "use_qalora")


@dataclass
class MaskedLoraConfig(LoraConfig):
    """PEFT's `LoraConfig` for adapters that keep the zeros of their base model.

    Args:
        masked: always true.
        base_zeros: hash of the zeros that the adapter was made for; filled in.

    Raises:
        ValueError: a variant of LoRA that the mask does not go with, or a start that changes the
            base weights.
    """

    masked: bool = field(default=True, metadata={"is_lora_variant": True})
    base_zeros: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        wanted = [
            name
            for name, entry in LoraConfig.__dataclass_fields__.items()
            if entry.metadata.get("is_lora_variant") and getattr(self, name)
        ]
        wanted += [name for name in _OTHERS if getattr(self, name, None)]
        if wanted:
            raise ValueError(
                f"{', '.join(wanted)} cannot be combined with a mask: the update is no masked product "
                "of two factors then. Leave it out."
            )
        if self.init_lora_weights not in _STARTS:
            raise ValueError(
                f"init_lora_weights={self.init_lora_weights!r} changes the base weights, and so fills "
                f"zeros; wanted one of {', '.join(map(repr, _STARTS))}."
            )
        use_layers_(self, {nn.Linear: MaskedLinear, Conv1D: MaskedLinear})

    def to_dict(self) -> dict[str, Any]:
        """As it is saved: under a type that stock PEFT refuses to load without the mask."""
        return {**super().to_dict(), "peft_type": _STORED_TYPE}


class MaskedLinear(LoraLinear):
    """PEFT's LoRA layer for a Linear or Conv1D with zeros; without zeros it is PEFT's own."""

    def __init__(
        self, base_layer: nn.Module, adapter_name: str, config: Any, **kwargs: Any
    ) -> None:
        conv1d = isinstance(base_layer, Conv1D)
        config.fan_in_fan_out = conv1d
        super().__init__(
            base_layer, adapter_name, config=config, is_target_conv_1d_layer=conv1d, **kwargs
        )

    def resolve_lora_variant(self, *, config: LoraConfig, **kwargs: Any) -> LoraVariant | None:
        """PEFT asks here for what a config wants: a mask, or what it has itself."""
        if not isinstance(config, MaskedLoraConfig):
            return super().resolve_lora_variant(config=config, **kwargs)
        base: Any = self.get_base_layer()
        return MaskedVariant() if bool((base.weight == 0).any()) else None

    def get_delta_weight(self, adapter: str) -> Tensor:
        """What a merge adds to the base weight, in its layout."""
        delta = super().get_delta_weight(adapter)
        if adapter in self.lora_variant:
            base: Any = self.get_base_layer()
            delta = delta * unlike(base.weight.detach()).to(delta.dtype)
        return delta

    def factors(self, adapters: list[str]) -> tuple[Tensor, Tensor]:
        """Two factors whose product is the sum of the adapters' updates, in the weight's layout."""
        parts: list[Any] = [(self.lora_A[name], self.lora_B[name]) for name in adapters]
        scales = [self.scaling[name] for name in adapters]
        down = torch.cat([lora_a.weight for lora_a, _ in parts])
        up = torch.cat([p[1].weight * scale for p, scale in zip(parts, scales, strict=True)], 1)
        return (down.T, up.T) if self.fan_in_fan_out else (up, down)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """One product with the masked weight, where the adapters in use allow it."""
        active = [name for name in self.active_adapters if name in self.lora_A]
        base: Any = self.get_base_layer()
        if (
            not active
            or base.weight.requires_grad
            or has_hooks(base)
            or "forward" in vars(base)  # Accelerate's hooks
            or self.disable_adapters
            or self.merged
            or kwargs.get("adapter_names") is not None
            or any(name not in self.lora_variant for name in active)
            or any(self._drops(name) for name in active)
        ):
            return super().forward(x, *args, **kwargs)
        bias = base.bias
        for name in active:
            if self.lora_bias[name]:
                bias = self.scaling[name] * self.lora_B[name].bias + (0 if bias is None else bias)
        return masked_product(x, base.weight, self, active, bias, add_base=True)

    def _drops(self, adapter: str) -> bool:
        return self.training and not isinstance(self.lora_dropout[adapter], nn.Identity)


class MaskedVariant(LoraVariant):
    """What PEFT's LoRA layer calls for an adapter with a mask."""

    def supports_lora_conversion(self) -> bool:
        """A masked update has no low rank."""
        return False

    @staticmethod
    def init(module: Any, adapter_name: str, **kwargs: Any) -> None:
        """Nothing beside LoRA's own weights."""

    @staticmethod
    def merge_safe(module: Any, active_adapter: str, orig_weight: Tensor) -> Tensor:
        """The merged weight, a new tensor."""
        weight = orig_weight.clone()
        MaskedVariant.merge_unsafe(module, active_adapter, weight)
        return weight

    @staticmethod
    @torch.no_grad()
    def merge_unsafe(module: Any, active_adapter: str, orig_weight: Tensor) -> None:
        """Merge in place; no kept weight becomes zero, so that unmerging finds the mask."""
        kept = unlike(orig_weight.data)
        orig_weight.data.copy_(masked_weight(orig_weight.data, *module.factors([active_adapter])))
        refill_(orig_weight.data, kept)

    @staticmethod
    @torch.no_grad()
    def unmerge(module: Any, active_adapter: str, orig_weight: Tensor) -> Tensor:
        """The weight without the adapter."""
        left, right = module.factors([active_adapter])
        weight, kept = orig_weight.data, unlike(orig_weight.data)
        wide = torch.promote_types(weight.dtype, left.dtype)
        before = torch.addmm(weight.to(wide), left.to(wide), right.to(wide), alpha=-1.0)
        before = before.to(weight.dtype)
        refill_(before, kept)
        return before

    @staticmethod
    def forward(
        module: Any, active_adapter: str, x: Tensor, result: Tensor, **kwargs: Any
    ) -> Tensor:
        """Add the masked update of one adapter to the result, after its dropout."""
        base = module.get_base_layer()
        x = module.lora_dropout[active_adapter](x)
        bias = None
        if module.lora_bias[active_adapter]:
            bias = module.scaling[active_adapter] * module.lora_B[active_adapter].bias
        added = masked_product(x, base.weight, module, [active_adapter], bias, add_base=False)
        return result + added.to(result.dtype)


def masked_product(
    x: Tensor,
    weight: Tensor,
    module: MaskedLinear,
    adapters: list[str],
    bias: Any,
    *,
    add_base: bool,
) -> Tensor:
    """`x (W + m * U V)^T + bias`, or without W if not `add_base`; W may be stored transposed."""
    if not is_whole(weight):
        raise ValueError(
            "a weight under an adapter is cut into shards while it computes. Shard whole blocks by "
            "FSDP2 (fully_shard), or train with DDP; FSDP1 and DeepSpeed ZeRO-3 do not work."
        )
    left, right = module.factors(adapters)
    kind = x.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weight.dtype
    with torch.autocast(kind, enabled=False):
        x, weight = x.to(dtype), weight.to(dtype)
        product: Tensor = _MaskedProduct.apply(
            x, weight, left, right, module.fan_in_fan_out, add_base
        )
        return product if bias is None else product + bias.to(dtype)


def masked_weight(
    weight: Tensor,
    left: Tensor,
    right: Tensor,
    *,
    add_base: bool = True,
    kept: Tensor | None = None,
) -> Tensor:
    """`m * (W + U V)`, or `m * U V`, in the weight's type; the product is taken in it too.

    `kept` is the mask as from `kept_bits`, if it is there already.
    """
    left, right = left.to(weight.dtype), right.to(weight.dtype)
    whole = torch.addmm(weight, left, right) if add_base else left @ right
    mask_(whole, kept_bits(weight) if kept is None else kept)
    return whole


class _MaskedProduct(torch.autograd.Function):
    """The product with exact gradients; keeps x and the factors, no matrix of the weight's size."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, x: Tensor, weight: Tensor, left: Tensor, right: Tensor, flipped: bool, base: bool
    ) -> Tensor:
        ctx.save_for_backward(x, weight, left, right)
        ctx.flipped, ctx.base = flipped, base
        whole = masked_weight(weight, left, right, add_base=base)
        return x @ whole if flipped else functional.linear(x, whole)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        x, weight, left, right = ctx.saved_tensors
        [grad] = grads
        grad_x, merged, kept = None, None, kept_bits(weight)
        if ctx.needs_input_grad[0]:
            merged = masked_weight(weight, left, right, add_base=ctx.base, kept=kept)
            grad_x = functional.linear(grad, merged) if ctx.flipped else grad @ merged
        rows, grad_rows = x.flatten(0, -2), grad.flatten(0, -2)
        if is_bfloat16_faster(rows):
            rows, grad_rows = rows.bfloat16(), grad_rows.bfloat16()
            kept, merged = kept.to(torch.int16), None
        # G is written over the merged weight: fresh memory costs more than the mask
        first, second = (rows, grad_rows) if ctx.flipped else (grad_rows, rows)
        whole = torch.mm(first.T, second, out=merged)
        mask_(whole, kept)
        grad_left = (whole @ right.T.to(whole.dtype)).to(left.dtype)
        grad_right = (left.T.to(whole.dtype) @ whole).to(right.dtype)
        return grad_x, None, grad_left, grad_right, None, None
