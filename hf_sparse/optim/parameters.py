"""The sparse parameters of an optimizer, as its param groups and state have them now.

They are looked up whenever they are needed and never kept: FSDP2 and Accelerate replace parameters.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from hf_sparse.optim.sharding import check_shardable, local_part
from hf_sparse.patterns import Pattern

Group = dict[str, Any]
# Some rows of a weight: a slice, or their indices.
Rows = slice | Tensor
_ALL = slice(None)


@dataclass(frozen=True)
class SparseParameter:
    """A parameter of a sparse group, with what its shrinkage needs; or one matrix of a stack.

    Attributes:
        number: of the matrix, in the part of the stack that this process holds; None: all of it.
    """

    name: str
    group: Group
    parameter: Tensor
    state: Mapping[str, Any]
    number: int | None = None

    def matrices(self) -> list[SparseParameter]:
        """The matrices of a stack, which the pattern divides one by one; others as they are."""
        if not self.group.get("stacked", False):
            return [self]
        return [
            replace(self, name=f"{self.name}.{number}", number=number)
            for number in range(len(local_part(self.parameter)))
        ]

    @property
    def weight(self) -> Tensor:
        """The values of this process as `(out_features, in_features)`; writes reach the model."""
        return self.view(self.parameter.detach())

    def view(self, tensor: Tensor) -> Tensor:
        """A tensor of the parameter's shape as `weight` is seen; a scalar as a vector."""
        tensor = local_part(tensor)
        tensor = tensor if self.number is None else tensor[self.number]
        return tensor.T if self.group["transposed"] else torch.atleast_1d(tensor)

    def metric(self, rows: Rows = _ALL) -> Tensor | None:
        """The diagonal of Adam's metric, `sqrt(v) + eps`, for scale `adaptive`; else None."""
        if self.group["scale"] != "adaptive":
            return None
        moments = self.state.get("max_exp_avg_sq", self.state.get("exp_avg_sq"))
        if moments is None and not self.state:
            raise ValueError(
                f"{self.name} has had no gradient so far, so that Adam has no metric for it. Leave it "
                "out with SparsityConfig(ignore=...), or use scale='lr'."
            )
        if moments is None:
            raise ValueError(
                f"{self.name}: scale='adaptive' needs Adam's second moments (exp_avg_sq), which this "
                "optimizer does not keep in its state. Use scale='lr' or 'constant'."
            )
        if not float(self.state["step"]):
            raise ValueError(f"{self.name}: Adam has taken no step yet, it has no metric.")
        correction = 1 - self.group["betas"][1] ** float(self.state["step"])
        part = self.view(moments)[rows]
        root = (part if part.element_size() >= 4 else part.float()).sqrt()
        return root.mul_(1 / math.sqrt(correction)).add_(self.group["eps"])

    def alpha(self, rows: Rows = _ALL) -> Tensor | None:
        """The factors of reweighted l1, once they are set; else None."""
        return self.view(self.state["alpha"])[rows] if "alpha" in self.state else None


def sparse_groups(optimizer: Optimizer) -> list[Group]:
    """The param groups that are to be sparse: those with a pattern."""
    return [group for group in optimizer.param_groups if group.get("pattern") is not None]


def sparse_parameters(
    optimizer: Optimizer, groups: Iterable[Group] | None = None
) -> Iterator[SparseParameter]:
    """The parameters of the sparse groups, as they are now; stacks of experts matrix by matrix."""
    for sparse in whole_parameters(optimizer, groups):
        yield from sparse.matrices()


def whole_parameters(
    optimizer: Optimizer, groups: Iterable[Group] | None = None
) -> Iterator[SparseParameter]:
    """The parameters of the sparse groups, as they are now, each once."""
    for number, group in enumerate(sparse_groups(optimizer) if groups is None else groups):
        names = group.get("param_names")
        pattern = Pattern.parse(group["pattern"])
        for index, parameter in enumerate(group["params"]):
            name = names[index] if names else f"parameter {index} of group {number}"
            # Here, too: FSDP2 replaces parameters after __init__.
            check_shardable(name, parameter, pattern, transposed=group["transposed"])
            state = optimizer.state[parameter]
            yield SparseParameter(name, group, parameter, state)


def unit_strength(group: Group) -> float:
    """The strength of the penalty in one step at `lam = 1`."""
    return 1.0 if group["scale"] == "constant" else float(group["lr"])


def take_over(optimizer: Optimizer) -> None:
    """Set a `lam` that was not given to 0: from now on it is steered."""
    for group in sparse_groups(optimizer):
        if group["lam"] is None:
            group["lam"] = 0.0


def set_strength(optimizer: Optimizer, lam: float) -> None:
    """Set `lam` of all sparse groups."""
    for group in sparse_groups(optimizer):
        group["lam"] = lam
