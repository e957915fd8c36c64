"""What can be combined with every pruning method."""

from __future__ import annotations

from dataclasses import dataclass

from hf_sparse.patterns import Pattern
from hf_sparse.pruning import refit, swaps
from hf_sparse.pruning.allocation import check_allocation
from hf_sparse.suggestions import did_you_mean

REFINEMENTS = ("swaps", "refit")
TOKEN_WEIGHTS = ("loss",)


@dataclass(frozen=True)
class Composition:
    """What can be combined with every method.

    Attributes:
        allocation: how much of the sparsity each block takes: `"uniform"`, `"owl"` or `"alpha"`
            (see `hf_sparse.pruning.allocation`).
        refine: None; `"swaps"`: weights are exchanged for pruned ones while that lowers the
            error of a layer (see `hf_sparse.pruning.swaps`); `"refit"`: where whole columns go, the
            others get the best values for the layer (see `hf_sparse.pruning.refit`).
        reconstruct: passes over the calibration data in which the kept weights of each block are
            trained to give the dense model's outputs (see `hf_sparse.pruning.reconstruction`).
        token_weights: None: all tokens count alike in a layer's error; `"loss"`: more where the layer's
            outputs matter more to the model's loss (see `hf_sparse.calibration.token_weights`).
    """

    allocation: str = "uniform"
    refine: str | None = None
    reconstruct: int = 0
    token_weights: str | None = None

    @property
    def walks(self) -> bool:
        """Whether it goes through the blocks with data after the zeros are chosen."""
        return self.refine is not None or self.reconstruct > 0

    @property
    def needs_calibration(self) -> bool:
        """Whether it looks at data."""
        return self.allocation == "owl" or self.walks or self.token_weights is not None

    def check(self, pattern: Pattern) -> None:
        """Raise a ValueError for an unknown value, or one that the pattern does not allow."""
        if pattern.whole_matrices and self != Composition():
            raise ValueError(
                f"nothing goes with pattern '{pattern}': between its zeros and shrink_ the model is "
                "another one. Leave allocation, refine and reconstruct out, and train what is left."
            )
        check_allocation(self.allocation, pattern)
        if self.refine not in (None, *REFINEMENTS):
            raise ValueError(
                f"refine is {self.refine!r}; wanted None or one of {', '.join(REFINEMENTS)}."
                f"{did_you_mean(self.refine, REFINEMENTS)}"
            )
        if self.refine:
            {"swaps": swaps, "refit": refit}[self.refine].check_pattern(pattern)
        if self.reconstruct < 0:
            raise ValueError(
                f"reconstruct is {self.reconstruct!r}; wanted passes over the data, 0 or more."
            )
        if self.token_weights not in (None, *TOKEN_WEIGHTS):
            raise ValueError(
                f"token_weights is {self.token_weights!r}; wanted None or one of "
                f"{', '.join(TOKEN_WEIGHTS)}.{did_you_mean(self.token_weights, TOKEN_WEIGHTS)}"
            )

    def check_method(self, name: str, *, solves: bool) -> None:
        """Raise a ValueError for what has no effect with a method.

        Args:
            name: of the method.
            solves: whether it looks at the inputs of layers one by one.
        """
        if self.token_weights and not solves and not self.refine:
            raise ValueError(
                f"method '{name}' looks at no errors of layers, in which tokens could count more or "
                "less: leave token_weights out."
            )
