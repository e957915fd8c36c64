"""ShiRA adapters whose trained weights are all among the kept ones.

Source: SHiRA, https://arxiv.org/abs/2406.13175. PEFT's adapter changes `r * (in + out)` single weights
of a layer and stores their places, so that it stays what it is wherever it is loaded. PEFT draws the
places among all weights; here they are drawn among the nonzero ones.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel, ShiraConfig
from torch import Tensor, nn

from hf_sparse.structure.layers import block_layers, is_conv1d
from hf_sparse.upstream.peft import ShiraLayer, is_target, random_mask


@dataclass
class KeptShiraConfig(ShiraConfig):
    """PEFT's `ShiraConfig` that knows the base model. Stock PEFT warns of `base_zeros` and goes on.

    Args:
        base_zeros: hash of the zeros that the adapter was made for; filled in.
    """

    base_zeros: str | None = None


def on_kept_weights(config: ShiraConfig, model: nn.Module) -> KeptShiraConfig:
    """The config with a mask function that draws from the nonzero weights of each layer.

    Args:
        config: its `r` fixes how many, its `random_seed` (None: 0) which.
        model: whose layers are adapted, for their names in errors.

    Raises:
        ValueError: a mask of the caller's own, or a target is a Conv1D; when PEFT makes the adapter:
            a layer keeps fewer weights than `r` asks for.
    """
    own = isinstance(config, KeptShiraConfig) or config.mask_fn is random_mask
    if config.mask_type != "random" or not own:
        name = getattr(config.mask_fn, "__name__", None)
        raise ValueError(
            f"mask_type is {config.mask_type!r}, and mask_fn {name}; "
            "wanted those of PEFT's default: which weights are trained is drawn here, among those that "
            "are not zero. Leave mask_type and mask_fn alone; random_seed chooses the draw."
        )
    for name, module in model.named_modules():
        if is_conv1d(module) and is_target(config, name):
            raise ValueError(
                f"{name} is a Conv1D, which PEFT's ShiRA does not adapt. Use masked LoRA: LoraConfig."
            )
    # PEFT makes sparse tensors. torch warns unless it was told whether to check them: say what holds.
    checks = torch.sparse.check_sparse_tensor_invariants
    with checks(checks.is_enabled()):
        pass
    names = {id(module): name for name, module in model.named_modules()}
    generator = torch.Generator().manual_seed(
        config.random_seed or 0
    )  # all processes draw the same

    def mask_fn(base_layer: Any, r: int, **kwargs: Any) -> Tensor:
        name = names.get(id(base_layer), type(base_layer).__name__)
        _check_rank(name, base_layer.weight.detach(), r, model)
        return draw(base_layer.weight.detach(), r, generator)

    values = {name: getattr(config, name) for name in ShiraConfig.__dataclass_fields__}
    kept = KeptShiraConfig(**copy.deepcopy(values))
    kept.mask_fn = mask_fn  # type: ignore[assignment]
    return kept


def largest_rank(weights: Iterable[tuple[str, Tensor]]) -> tuple[int, str]:
    """The largest `r` for which every layer has enough nonzero weights, and the layer that bounds it.

    Args:
        weights: names and weights `(out_features, in_features)`; at least one.
    """
    return min(
        (int(torch.count_nonzero(weight)) // sum(weight.shape), name) for name, weight in weights
    )


def _check_rank(name: str, weight: Tensor, r: int, model: nn.Module) -> None:
    """Refuse a rank that asks for more weights than a layer keeps."""
    most, _ = largest_rank([(name, weight)])
    if r <= most:
        return
    rows, columns = weight.shape
    in_blocks = [(layer.name, layer.parameter.detach()) for layer in block_layers(model)]
    all_fit, bound = largest_rank([(name, weight), *in_blocks])
    way = f" r={all_fit} fits every layer of the blocks (the least room is in {bound})."
    raise ValueError(
        f"{name} ({rows} x {columns}) has {int(torch.count_nonzero(weight))} weights that can be "
        f"trained; r={r} asks ShiRA for r * (in + out) = {r * (rows + columns)}. Wanted r <= {most} "
        f"for this layer, or leave it out.{way if all_fit else ''}"
    )


def draw(weight: Tensor, r: int, generator: torch.Generator) -> Tensor:
    """Mark `r * (in + out)` weights, nonzero ones, of which there are as many.

    Returns:
        1 where a weight is to be trained, of the weight's shape and type.
    """
    rows, columns = weight.shape
    wanted = r * (rows + columns)
    places = weight.reshape(-1).nonzero()[:, 0] if bool((weight == 0).any()) else None
    available = weight.numel() if places is None else len(places)
    drawn = torch.randperm(available, generator=generator)[:wanted].to(weight.device)
    mask = torch.zeros_like(weight).view(-1)
    mask[drawn if places is None else places[drawn]] = 1
    return mask.view(weight.shape)


def check_places(model: PeftModel, adapter_name: str) -> None:
    """Refuse a ShiRA adapter that changes weights which are not there, or zero in this base model.

    Raises:
        ValueError: what was found.
    """
    filled, layers = 0, []
    for name, module in model.named_modules():
        if isinstance(module, ShiraLayer) and adapter_name in module.shira_weight:
            base: Any = module.get_base_layer()
            weight, count = base.weight.detach(), module.shira_weight[adapter_name].numel()
            places = module.shira_indices.get(adapter_name, torch.empty(0)).to(weight.device).long()
            limits = torch.tensor(weight.shape, device=weight.device)[:, None]
            if places.shape != (2, count) or bool(((places < 0) | (places >= limits)).any()):
                raise ValueError(
                    f"adapter '{adapter_name}' has places of shape {tuple(places.shape)} for {name} "
                    f"({limits[0, 0]} x {limits[1, 0]}) that are no rows and columns of {count} of its "
                    "weights: it is damaged, or was made for another model. Save it again, or load it "
                    "on the sparse model that it was trained on."
                )
            rows, columns = places
            if zeros := int((weight[rows, columns] == 0).sum()):
                filled += zeros
                layers.append(name)
    if filled:
        raise ValueError(
            f"adapter '{adapter_name}' changes {filled} weights that are zero in this model, first in "
            f"{layers[0]}: it was made for another model, or without hf_sparse.get_peft_model. Load "
            "it on the sparse model that it was trained on."
        )
