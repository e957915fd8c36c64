"""What a weight has to be before its values are read and changed: a matrix of floats, on its own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from hf_sparse.structure.layers import TargetLayer


def check_floats(name: str, weight: Tensor) -> None:
    """Refuse weights whose values cannot be read and changed one by one, or are not here.

    Raises:
        ValueError: another layout than a dense one, a class of tensors that stores its values in its
            own way, a type that is quantized or no float, or the meta device.
    """
    if weight.layout is not torch.strided or weight.is_nested:
        layout = "a nested tensor" if weight.is_nested else f"{weight.layout}"
        raise ValueError(
            f"{name} is stored as {layout}; wanted a dense matrix. Set the weight to "
            "nn.Parameter(weight.to_dense()) first."
        )
    own = type(weight).__torch_dispatch__
    if not isinstance(weight, DTensor) and own not in (
        Tensor.__torch_dispatch__,
        nn.Parameter.__torch_dispatch__,
    ):
        raise ValueError(
            f"{name} is a {type(weight).__name__}, which stores its values in its own way (quantized "
            "or compressed); wanted a plain tensor of floats. Load the model without it."
        )
    if weight.is_complex():
        raise ValueError(
            f"{name} is of {weight.dtype}; wanted float32, float16 or bfloat16. Leave the layer out: "
            "SparsityConfig(..., ignore=[...])."
        )
    if not weight.is_floating_point() or weight.element_size() == 1:
        raise ValueError(
            f"{name} is stored as {weight.dtype}, quantized; wanted float32, float16 or bfloat16. "
            "Load the model without quantization, or call model.dequantize() first."
        )
    if weight.device.type == "meta":
        raise ValueError(
            f"{name} has no values here: device_map left it on the disk. Load the model without "
            "device_map, or with more memory."
        )


def check_matrices(layers: Sequence[TargetLayer]) -> None:
    """Refuse layers whose weights are no matrices of floats, or change when another one is changed.

    Raises:
        ValueError: see `check_floats`; a weight that is no matrix, or two of whose elements are one;
            two weights that share memory and are not tied.
    """
    spans: list[_Span] = []
    for layer in layers:
        check_floats(layer.weight_name, layer.parameter)
        weight = layer.weight
        if weight.ndim != 2:
            raise ValueError(
                f"{layer.weight_name} has the shape {tuple(weight.shape)}; wanted a matrix, "
                "(out_features, in_features)."
            )
        if isinstance(weight, DTensor) or not weight.numel():
            continue
        if _repeats(weight):
            raise ValueError(
                f"several elements of {layer.weight_name} are one in memory (an expanded tensor): they "
                "cannot be zero one by one. Set the weight to nn.Parameter(weight.clone()) first."
            )
        size = _length(weight) * weight.element_size()
        spans.append(_Span(str(weight.device), weight.data_ptr(), size, layer))
    _check_apart(spans)


@dataclass(frozen=True)
class _Span:
    """The memory from a weight's first element to its last one, in bytes."""

    device: str
    start: int
    size: int
    layer: TargetLayer

    def reaches(self, other: _Span) -> bool:
        """Whether it goes beyond the start of another one, which starts later."""
        return self.device == other.device and self.start + self.size > other.start


def _check_apart(spans: Sequence[_Span]) -> None:
    """Refuse weights that share elements."""
    earlier: list[_Span] = []
    for span in sorted(spans, key=lambda span: (span.device, span.start)):
        earlier = [other for other in earlier if other.reaches(span)]
        for other in earlier:
            if _shares(other.layer.weight, span.layer.weight):
                raise ValueError(
                    f"{other.layer.weight_name} and {span.layer.weight_name} share memory, and are "
                    "not one parameter: to prune one would change the other. Tie them "
                    "(one.weight = other.weight), or set one to nn.Parameter(weight.clone()) first."
                )
        earlier.append(span)


def _length(weight: Tensor) -> int:
    """From a weight's first element to behind its last one, in elements."""
    sizes = zip(weight.shape, weight.stride(), strict=True)
    return 1 + sum((size - 1) * stride for size, stride in sizes)


def _places(weight: Tensor, length: int, offset: int = 0) -> Tensor:
    """How many of a weight's elements are at each place of a piece of memory, `(length,)`."""
    places = torch.arange(length).as_strided(weight.shape, weight.stride(), offset)
    return torch.bincount(places.reshape(-1), minlength=length)


def _repeats(weight: Tensor) -> bool:
    """Whether two elements of a matrix are at one place."""
    (near, count), (far, _) = sorted(
        zip(weight.stride(), weight.shape, strict=True), key=lambda axis: axis[0]
    )
    apart = near > 0 and far > near * (count - 1)
    return not apart and bool((_places(weight, _length(weight)) > 1).any())


def _shares(one: Tensor, other: Tensor) -> bool:
    """Whether two weights share elements; the first one starts before the other, or with it."""
    bytes_between = other.data_ptr() - one.data_ptr()
    if one.element_size() != other.element_size() or bytes_between % one.element_size():
        return True
    offset = bytes_between // one.element_size()
    length = max(_length(one), offset + _length(other))
    return bool(((_places(one, length) > 0) & (_places(other, length, offset) > 0)).any())
