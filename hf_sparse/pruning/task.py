"""What is to be pruned, and on which data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from hf_sparse.calibration.activations import Store, in_memory
from hf_sparse.calibration.processes import is_shared
from hf_sparse.calibration.recording import Batch
from hf_sparse.calibration.token_weights import WeightedTokens
from hf_sparse.calibration.walk import Residence
from hf_sparse.configuration_sparse import SparsityConfig
from hf_sparse.pruning.problem import Notes
from hf_sparse.structure.layers import Stack, TargetLayer, layers_outside
from hf_sparse.structure.targets import Targets


@dataclass
class Task:
    """A model, its layers to prune, and the calibration data of this process.

    Attributes:
        model: in eval mode.
        targets: what to prune, and to which pattern and sparsity.
        batches: this process's share of the calibration data.
        accelerator: its processes share the data and the work; None: one process.
        sparsities: of each layer, by name.
        notes: for the report.
        residence: where blocks live between their turns.
        store: where hidden states wait for their block.
        token_weights: how much each token counts in the errors of layers; None: all alike.
    """

    model: nn.Module
    targets: Targets
    batches: Sequence[Batch]
    accelerator: Any = None
    sparsities: dict[str, float] = field(default_factory=dict)
    notes: Notes = field(default_factory=Notes)
    residence: Residence = field(default_factory=Residence)
    store: Store = in_memory
    token_weights: WeightedTokens | None = None

    @property
    def stacks(self) -> Sequence[Stack]:
        """The model's blocks."""
        return self.targets.stacks

    @property
    def layers(self) -> Sequence[TargetLayer]:
        """What to prune."""
        return self.targets.layers

    @property
    def config(self) -> SparsityConfig:
        """Pattern and sparsity."""
        return self.targets.config

    @property
    def data(self) -> dict[str, Any]:
        """The arguments of `walk`: blocks of a stack without a target are not looked at."""
        count = len(self.layers)
        return {
            "model": self.model,
            "stacks": [s for s in self.stacks if len(layers_outside([s], self.layers)) < count],
            "batches": self.batches,
            "residence": self.residence,
            "store": self.store,
        }

    @property
    def is_shared(self) -> bool:
        """Whether other processes work on it too."""
        return is_shared(self.accelerator)

    @property
    def rank(self) -> int:
        """The number of this process."""
        return self.accelerator.process_index if self.is_shared else 0
