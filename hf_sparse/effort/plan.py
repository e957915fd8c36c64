"""SparsifyPlan: what a run does, what it is estimated to take, and the recipe file that repeats it."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from hf_sparse.configuration_sparse import SparsityConfig
from hf_sparse.counts import format_table
from hf_sparse.effort.stages import EFFORTS, PRUNE, RECOVER, Stage
from hf_sparse.files.single import write_file
from hf_sparse.provenance.values import Calibration
from hf_sparse.pruning.methods import Recipe
from hf_sparse.recovery.methods import RECOVERIES
from hf_sparse.suggestions import check_name, shortened
from hf_sparse.version import __version__

_FORMAT = "hf_sparse recipe"
_VERSION = 1
_KEYS = ("format", "version", "hf_sparse", "effort", "family", "config", "data", "stages")
# What a recovery may be told by a recipe.
_RECOVERY_OPTIONS = (
    *("epochs", "accumulate", "lr", "r", "seed", "logits", "hidden", "temperature", "distilled"),
)


@dataclass(frozen=True)
class SparsifyPlan:
    """What `sparsify_` does; `print` shows it with its estimates, `save` writes it as a recipe.

    Attributes:
        effort: by which it was chosen.
        family: the model type that it is for.
        config: pattern, sparsity and targets.
        data: that it was made for.
        stages: in order.
        seconds: that each loop of each stage is estimated to take; empty if nothing was estimated.
        memory_mb: that each stage is estimated to need beside the model; likewise.
        notes: for the reader.
    """

    effort: str
    family: str
    config: SparsityConfig
    data: Calibration
    stages: tuple[Stage, ...]
    seconds: tuple[tuple[float, ...], ...] = ()
    memory_mb: tuple[float, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def total_seconds(self) -> float:
        """Estimated seconds of the whole run."""
        return sum(map(sum, self.seconds))

    @property
    def digest(self) -> str:
        """By which the same recipe is known again."""
        plain = json.dumps(self._plain(), sort_keys=True)
        return hashlib.sha256(plain.encode()).hexdigest()[:12]

    def save(self, file: str | os.PathLike[str]) -> Path:
        """Write the recipe: a JSON file that `sparsify_(..., effort=file)` follows.

        Raises:
            OSError: the file cannot be written; one that was there has not changed then.
        """
        path = Path(file)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_file(path, (json.dumps(self._plain(), indent=2) + "\n").encode())
        return path

    @classmethod
    def load(cls, file: str | os.PathLike[str]) -> SparsifyPlan:
        """Read a recipe.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: it is no recipe, of a newer version, or damaged.
        """
        if not Path(file).is_file():
            raise FileNotFoundError(f"no such recipe: {file}")
        try:
            found = json.loads(Path(file).read_text(encoding="utf-8"))
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{file} is no recipe: it is no JSON ({error}).") from error
        if not isinstance(found, dict) or found.get("format") != _FORMAT:
            raise ValueError(
                f"{file} is no recipe of hf_sparse; wanted a file of plan.save, or --save-recipe."
            )
        version = found.get("version")
        if type(version) is not int or version > _VERSION:
            raise ValueError(
                f"{file} is a recipe of version {shortened(version)}, this hf_sparse {__version__} "
                f"reads up to {_VERSION}. Install hf_sparse {found.get('hf_sparse', 'newer')} or newer."
            )
        try:
            return cls._read(found)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            told = f"{error} is missing" if isinstance(error, KeyError) else error
            raise ValueError(f"{file} is a damaged recipe: {told}") from error

    @classmethod
    def _read(cls, found: Mapping[str, Any]) -> SparsifyPlan:
        if unknown := sorted(set(found) - set(_KEYS)):
            raise ValueError(f"it has the unknown key {unknown[0]!r}; wanted {', '.join(_KEYS)}.")
        check_name(found["effort"], EFFORTS, "effort", "efforts")
        config = SparsityConfig.from_dict(found["config"])
        stages = tuple(Stage(**stage) for stage in found["stages"])
        plan = cls(
            found["effort"], str(found["family"]), config, Calibration(**found["data"]), stages
        )
        if not stages or stages[0].kind != PRUNE:
            raise ValueError("its first stage is no pruning.")
        for stage in stages:
            _check_stage(stage, config)
        return plan

    def _plain(self) -> dict[str, Any]:
        """The recipe as JSON has it."""
        return {
            "format": _FORMAT,
            "version": _VERSION,
            "hf_sparse": __version__,
            "effort": self.effort,
            "family": self.family,
            "config": self.config.to_dict(),
            "data": asdict(self.data),
            "stages": [{**asdict(stage), "options": dict(stage.options)} for stage in self.stages],
        }

    def for_data(self, data: Calibration, batches: int) -> SparsifyPlan:
        """The plan for other data than it was made for, which it tells then.

        Raises:
            ValueError: they are too few.
        """
        wanted = max(stage.batches + stage.held_out for stage in self.stages)
        if batches < wanted:
            raise ValueError(
                f"the recipe looks at {wanted} batches, and the data have {batches}. Give as many as "
                f"it was made with ({self.data.windows} windows of {self.data.length} tokens), or an "
                "effort."
            )
        if data == self.data:
            return self
        note = "the data are not those that the recipe was made with: the result is another."
        return replace(self, data=data, notes=(*self.notes, note))

    def __str__(self) -> str:
        rows = []
        for index, stage in enumerate(self.stages):
            row = [f"{index + 1}. {stage}", f"{stage.batches:,}"]
            if self.seconds:
                row += [_time(sum(self.seconds[index])), f"{self.memory_mb[index]:,.0f} MB"]
            rows.append(row)
        head = ["stage", "batches", *(["time", "memory beside the model"] if self.seconds else [])]
        lines = [
            f"{self.family} to {self.config.pattern}, sparsity {self.config.sparsity:.4g}, effort "
            f"{self.effort} (recipe {self.digest}):",
            format_table(head, rows),
        ]
        if self.seconds:
            lines.append(f"estimated from a short measurement: {_time(self.total_seconds)} in all")
        return "\n".join([*lines, *self.notes])


def _check_stage(stage: Stage, config: SparsityConfig) -> None:
    for name in ("batches", "held_out"):
        least = 1 if name == "batches" else 0
        if type(getattr(stage, name)) is not int or getattr(stage, name) < least:
            raise ValueError(f"{name} is {getattr(stage, name)!r}; wanted a number >= {least}.")
    if stage.kind == PRUNE:
        Recipe.of(stage.method, config.pattern, stage.options)
        return
    if stage.kind != RECOVER:
        raise ValueError(f"a stage is {stage.kind!r}; wanted '{PRUNE}' or '{RECOVER}'.")
    check_name(stage.method, RECOVERIES, "method", "methods")
    if unknown := sorted(set(stage.options) - set(_RECOVERY_OPTIONS)):
        raise ValueError(f"recovery has no option {unknown[0]!r}; wanted {_RECOVERY_OPTIONS}.")


def _time(seconds: float) -> str:
    """A time in the unit that people would use."""
    if seconds < 100:
        return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.1f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"
