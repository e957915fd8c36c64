"""The tensors of a checkpoint whose weights a config puts on a grid of few bits."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace

from torch import Tensor, nn

from hf_sparse.configuration_sparse import SparsityConfig
from hf_sparse.formats import CODINGS, FormatError, coding_of
from hf_sparse.formats.codes import ZERO_POINTS
from hf_sparse.quantization import Grid, codes_of
from hf_sparse.structure.grids import gridded
from hf_sparse.structure.layers import TargetLayer
from hf_sparse.structure.targets import Targets


@dataclass(frozen=True)
class OnGrid:
    """The weights of one tensor that lie on a grid.

    Attributes:
        grid: of all of them.
        layers: the matrix, or those of a stack of experts.
    """

    grid: Grid
    layers: tuple[TargetLayer, ...]

    def is_whole(self, tensor: Tensor) -> bool:
        """Whether nothing else is in the tensor."""
        stack = self.layers[0].stack
        return stack is None or len(self.layers) == stack.number

    def check(self, tensor: Tensor) -> None:
        """Refuse weights that left the grid.

        Raises:
            OffGridError: the message names the weight, and tells how many.
            ValueError: the group size does not divide the inputs of one.
        """
        for layer in self.layers:
            with named(layer.weight_name):
                codes_of(layer.part(tensor), self.grid)

    def check_stored(self, parts: Mapping[str, Tensor], weight: Tensor) -> None:
        """Refuse a weight that is stored on another grid, or lies on none.

        Args:
            parts: as it is stored.
            weight: that they give, as the model has it.

        Raises:
            FormatError: see there.
        """
        coding = coding_of(parts)
        try:
            if coding is None:
                self.check(weight)
                return
            columns = self.layers[0].part(weight).shape[1]
            wanted = self.grid.columns_per_scale(columns)
        except ValueError as error:
            raise FormatError(f"{error} config.json promises {self.grid}.") from error
        groups = parts[coding].shape[1]
        bits, size = CODINGS[coding].bits, columns // groups if groups else wanted
        symmetric = ZERO_POINTS not in parts
        if (bits, size, symmetric) != (self.grid.bits, wanted, self.grid.symmetric):
            points = "" if symmetric else ", with zero points"
            raise FormatError(
                f"codes of {bits} bits in groups of {size}{points} are stored, but config.json "
                f"promises {self.grid}"
            )


@contextmanager
def named(name: str) -> Iterator[None]:
    """Put the name of a weight before the ValueErrors raised inside."""
    try:
        yield
    except ValueError as error:
        error.args = (f"{name}: {error}", *error.args[1:])
        raise


def on_grids(model: nn.Module, config: SparsityConfig | Targets) -> dict[str, OnGrid]:
    """The weights that a config promises few bits of, under every name of their parameters.

    Args:
        model: that has them; it may be on the meta device.
        config: a config, or its targets in the model.

    Raises:
        ValueError: see `gridded`.
    """
    found: dict[int, OnGrid] = {}
    for layer, grid in gridded(model, config):
        known = found.get(id(layer.parameter), OnGrid(grid, ()))
        found[id(layer.parameter)] = replace(known, layers=(*known.layers, layer))
    parameters = model.named_parameters(remove_duplicate=False) if found else ()
    return {name: found[id(parameter)] for name, parameter in parameters if id(parameter) in found}


def bits_in_words(config: SparsityConfig) -> str:
    """What a config promises of bits; `""` if it promises none."""
    told = [] if config.grid is None else [str(config.grid)]
    if config.embedding_grid is not None:
        told.append(f"embeddings {config.embedding_grid}")
    return "; ".join(told)
