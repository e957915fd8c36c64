"""The gains of norms: what they multiply each normalised feature by."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

_CLOSE = 1e-2


@dataclass(frozen=True)
class Norm:
    """A norm over hidden features.

    Attributes:
        name: of the module.
        module: the norm.
        centred: whether it takes the mean away (LayerNorm), or does not (RMSNorm).
        offset: what is added to its weight to give the gain, 0 or 1; None: not known, or no weight.
    """

    name: str
    module: nn.Module
    centred: bool
    offset: float | None

    @classmethod
    def of(cls, name: str, module: Any, size: int) -> Norm | None:
        """Look what a module does to two vectors; None if it is no norm over `size` features."""
        weight = getattr(module, "weight", None)
        dtype, device = torch.float32, torch.device("cpu")
        if isinstance(weight, Tensor):
            dtype, device = weight.dtype, weight.device
        generator = torch.Generator().manual_seed(0)
        wave = torch.randn(size, generator=generator, dtype=torch.float64)
        wave = (wave - wave.mean()) / wave.std(correction=0)
        try:
            up, down = (module(sign * wave.to(device, dtype)[None, None]) for sign in (1, -1))
            level = module(torch.full((1, 1, size), 2.0, dtype=dtype, device=device))
        except (RuntimeError, TypeError, ValueError):
            return None
        middle = (up.double() + down.double()) / 2  # its bias
        safe = torch.where(wave.abs() > 0.1, wave, 1.0).to(device)
        gain = (up.double() - down.double())[0, 0] / (2 * safe)
        known = (wave.abs() > 0.1).to(device)
        centred = bool((level.double() - middle).abs().max() < _CLOSE * gain[known].abs().max())
        offset = None
        for tried in (0.0, 1.0):
            if weight is None or tuple(weight.shape) != (size,):
                break
            error = (gain - weight.double() - tried)[known].abs().max()
            if error < _CLOSE * gain[known].abs().max().clamp(min=1e-6):
                offset = tried
                break
        return cls(name, module, centred, offset)

    @torch.no_grad()
    def multiply_(self, factor: float) -> None:
        """Multiply the gain of all features; nothing happens where it is not known."""
        if self.offset is None:
            return
        weight: Any = self.module.weight
        weight.copy_((weight.double() + self.offset) * factor - self.offset)


def norms_of(model: nn.Module, size: int) -> list[Norm]:
    """The norms over hidden features, each module once."""
    norms = []
    for name, module in model.named_modules():
        if "Norm" not in type(module).__name__ or any(True for _ in module.children()):
            continue
        weight = getattr(module, "weight", None)
        shape = getattr(module, "normalized_shape", None)
        if weight is None and shape is None:
            continue
        width = (size,) if weight is None else tuple(weight.shape)
        if width == (size,) and shape in (None, (size,)):
            norm = Norm.of(name, module, size)
            if norm is not None:
                norms.append(norm)
    return norms
