"""SparsityConfig: what a sparse model is, in a few values that survive JSON.

It describes the artefact, not how it was made: knobs of methods are arguments of those methods.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from fnmatch import fnmatchcase
from numbers import Real
from pathlib import Path
from typing import Any

from hf_sparse.formats import FORMATS, FormatError
from hf_sparse.patterns import Pattern
from hf_sparse.quantization import Grid
from hf_sparse.suggestions import check_name, did_you_mean, shortened

# Raised when the meaning of a stored config or format changes; older readers then refuse it.
CONFIG_VERSION = 1
# Of a model whose weights are all zero: a config tells a sparsity below 1.
HIGHEST_SPARSITY = 0.999999


@dataclass(frozen=True, init=False)
class SparsityConfig:
    """The pattern, sparsity, place and storage of a model's zeros, and the bits of what is left.

    Args:
        pattern: `"unstructured"`, `"2:4"` or any N:M, `"block:RxC"`, `"row"`, `"column"`, `"head"`,
            `"expert"`. `row`, `column` and `head` without targets: whole neurons and heads (see
            `hf_sparse.shrink_`); `expert`: whole experts of a mixture.
        sparsity: fraction of zeros in the targets, in `[0, 1)`. N:M fixes it (2:4 is 0.5): there
            it may be left out, and another value is an error. Elsewhere it is needed.
        targets: globs of the layers to be sparse, such as `"q_proj"` or `"model.layers.3.mlp.*"`.
            None: every Linear and Conv1D in the repeated blocks, and every matrix of the experts of
            a mixture, so that embeddings, norms, routers, poolers and task heads are left alone.
        ignore: globs of layers to leave out of the targets.
        format: how the weights are stored: `"auto"` (the smallest), `"bitmask"`, `"gap4"`, `"gap8"`,
            `"nm"`, `"block"`, `"rice"`, or `"dense"` (zeros in place: loads without hf_sparse).
        uniform: of whole neurons and heads: every block loses the same number, so that what
            `hf_sparse.shrink_` leaves is a plain model of the family. `hf_sparse.prune_` refuses sizes
            that the family's config cannot tell.
        bits: 8 or 4: the targets lie on a grid of so many bits, zeros on code 0. None: any values.
        group_size: consecutive inputs of a row that share a scale: 128, 64 or 32; None: the whole row.
        symmetric: codes lie around zero; False: each group has a zero point.
        embedding_bits: 8 or 4: the input embeddings and the output head lie on such a grid, too, with
            the same groups. None: they hold any values.

    A glob matches the whole dotted name of a layer, or the end of it from a dot on: `"q_proj"`
    matches `model.layers.0.self_attn.q_proj`. An expert's matrix has the name of its parameter and the
    expert's number: `"down_proj.3"`, `"down_proj"` and `"experts.*"` match
    `model.layers.0.mlp.experts.down_proj.3`.

    Raises:
        ValueError: a value outside what is allowed.
    """

    pattern: Pattern
    sparsity: float
    targets: tuple[str, ...] | None
    ignore: tuple[str, ...]
    format: str
    uniform: bool
    bits: int | None
    group_size: int | None
    symmetric: bool
    embedding_bits: int | None

    def __init__(
        self,
        pattern: str | Pattern = "unstructured",
        sparsity: float | None = None,
        targets: str | Sequence[str] | None = None,
        ignore: str | Sequence[str] | None = None,
        format: str = "auto",
        uniform: bool = False,
        bits: int | None = None,
        group_size: int | None = None,
        symmetric: bool = True,
        embedding_bits: int | None = None,
    ) -> None:
        parsed = Pattern.parse(pattern)
        check_name(format, FORMATS, "format", "formats")
        object.__setattr__(self, "pattern", parsed)
        object.__setattr__(self, "sparsity", _checked_sparsity(parsed, sparsity))
        object.__setattr__(self, "targets", _globs("targets", targets))
        object.__setattr__(self, "ignore", _globs("ignore", ignore) or ())
        object.__setattr__(self, "format", format)
        object.__setattr__(self, "uniform", _checked_uniform(parsed, uniform))
        _check_grids(bits, group_size, symmetric, embedding_bits)
        object.__setattr__(self, "bits", bits)
        object.__setattr__(self, "group_size", group_size)
        object.__setattr__(self, "symmetric", symmetric)
        object.__setattr__(self, "embedding_bits", embedding_bits)

    def __repr__(self) -> str:
        """The call that makes it, with what is not the default."""
        parts = [repr(str(self.pattern))]
        if self.pattern.implied_sparsity is None:
            parts.append(f"sparsity={self.sparsity!r}")
        if self.targets is not None:
            parts.append(f"targets={list(self.targets)!r}")
        if self.ignore:
            parts.append(f"ignore={list(self.ignore)!r}")
        if self.format != "auto":
            parts.append(f"format={self.format!r}")
        if self.uniform:
            parts.append("uniform=True")
        parts += [f"{name}={value!r}" for name, value in self.grid_values().items()]
        return f"SparsityConfig({', '.join(parts)})"

    @property
    def grid(self) -> Grid | None:
        """The grid of the targets; None: they hold any values."""
        return None if self.bits is None else Grid(self.bits, self.group_size, self.symmetric)

    @property
    def embedding_grid(self) -> Grid | None:
        """The grid of the input embeddings and of the output head; None: they hold any values."""
        bits = self.embedding_bits
        return None if bits is None else Grid(bits, self.group_size, self.symmetric)

    def grid_values(self) -> dict[str, Any]:
        """What of bits, groups, zero points and embeddings is not the default."""
        names = ("bits", "group_size", "symmetric", "embedding_bits")
        values = {name: getattr(self, name) for name in names}
        return {
            name: value for name, value in values.items() if value is not None and value is not True
        }

    def ignores(self, layer: str) -> bool:
        """Whether `ignore` names the layer."""
        return any(matches(layer, glob) for glob in self.ignore)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as stored in `config.json`; `from_dict` undoes it."""
        return {
            "version": CONFIG_VERSION,
            "pattern": str(self.pattern),
            "sparsity": self.sparsity,
            "targets": None if self.targets is None else list(self.targets),
            "ignore": list(self.ignore),
            "format": self.format,
            **({"uniform": True} if self.uniform else {}),  # older readers know no such key
            **self.grid_values(),
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> SparsityConfig:
        """Read what `to_dict` wrote.

        Raises:
            FormatError: written by a newer version of hf_sparse.
            ValueError: an unknown key, or a value outside what is allowed.
        """
        values = dict(values)
        version = values.pop("version", CONFIG_VERSION)
        if type(version) is not int or version < 1:
            raise FormatError(f"sparsity config has version {version!r}; wanted 1 or more")
        if version > CONFIG_VERSION:
            raise FormatError(
                f"sparsity config has version {version}, this hf_sparse reads up to "
                f"{CONFIG_VERSION}. Upgrade it: pip install -U hf_sparse"
            )
        known = [field.name for field in fields(cls)]
        if unknown := sorted(set(values) - set(known)):
            raise ValueError(
                f"unknown keys {unknown} in a sparsity config. Known keys: {', '.join(known)}."
                f"{did_you_mean(unknown[0], known)}"
            )
        return cls(**values)

    def to_json(self) -> str:
        """`to_dict` as JSON text."""
        return json.dumps(self.to_dict(), indent=2)

    @classmethod
    def from_json(cls, text: str | Path) -> SparsityConfig:
        """Read JSON text, or the file at a Path."""
        return cls.from_dict(json.loads(text.read_text() if isinstance(text, Path) else text))


def check_config(config: Any) -> None:
    """Raise a ValueError if this is no SparsityConfig."""
    if not isinstance(config, SparsityConfig):
        way = f"SparsityConfig({config!r})" if isinstance(config, str) else "SparsityConfig('2:4')"
        way = "SparsityConfig.from_dict(config)" if isinstance(config, Mapping) else way
        raise ValueError(f"config is {shortened(config)}; wanted a SparsityConfig, as {way}.")


def matches(layer: str, glob: str) -> bool:
    """Whether a glob names a layer: its whole dotted name, or the end of it from a dot on.

    >>> matches("model.layers.0.self_attn.q_proj", "q_proj")
    True
    >>> matches("model.layers.0.self_attn.q_proj", "layers.0.*")
    True
    >>> matches("model.layers.0.self_attn.q_proj", "proj")
    False
    """
    return fnmatchcase(layer, glob) or fnmatchcase(layer, f"*.{glob}")


def _checked_sparsity(pattern: Pattern, sparsity: float | None) -> float:
    implied = pattern.implied_sparsity
    if sparsity is None:
        if implied is None:
            raise ValueError(
                f"pattern '{pattern}' needs a sparsity, the fraction of zeros in [0, 1): "
                f'SparsityConfig("{pattern}", sparsity=0.5).'
            )
        return implied
    if isinstance(sparsity, bool) or not isinstance(sparsity, Real):
        raise ValueError(
            f"sparsity is {shortened(sparsity)}; wanted a number in [0, 1).{_meant_share(sparsity)}"
        )
    if not 0 <= sparsity < 1:  # False for NaN too
        reason = "; 1 would leave no weight" if sparsity == 1 else ""
        raise ValueError(
            f"sparsity is {sparsity}; wanted a fraction of zeros in [0, 1){reason}."
            f"{_meant_share(sparsity)}"
        )
    if implied is not None and not math.isclose(sparsity, implied, abs_tol=1e-6):
        raise ValueError(
            f"pattern '{pattern}' fixes the sparsity at {implied:.4g}, but sparsity={sparsity} was "
            "asked for. Leave sparsity out, or choose another pattern."
        )
    return float(sparsity) if implied is None else implied


def _checked_uniform(pattern: Pattern, uniform: bool) -> bool:
    if not isinstance(uniform, bool):
        raise ValueError(f"uniform is {shortened(uniform)}; wanted True or False.")
    if uniform and pattern.unit_layer is None:
        units = ", ".join(f"'{kind.notations[0]}'" for kind in Pattern.kinds() if kind.unit_layer)
        raise ValueError(
            f"uniform=True means as many whole heads or neurons of each block, and pattern '{pattern}' "
            f"has no such units. Leave uniform out, or take one of {units}."
        )
    return uniform


def _check_grids(
    bits: int | None, group_size: int | None, symmetric: bool, embedding_bits: int | None
) -> None:
    if bits is None and embedding_bits is None:
        if group_size is not None or symmetric is not True:
            raise ValueError(
                f"group_size={group_size!r} and symmetric={symmetric!r} tell of a grid, and no bits "
                "are given: add bits=8 or bits=4."
            )
        return
    for number in (bits, embedding_bits):
        if number is not None:
            Grid(number, group_size, symmetric)


def _meant_share(sparsity: Any) -> str:
    """A question after an error: the fraction that a text or a percentage probably means."""
    text = str(sparsity).strip()
    try:
        share = float(text.rstrip("% "))
    except ValueError:
        return ""
    if text.endswith("%") or share > 1:
        share /= 100
    return f" Did you mean {share:g}?" if 0 < share < 1 else ""


def _globs(name: str, globs: str | Sequence[str] | None) -> tuple[str, ...] | None:
    if globs is None:
        return None
    if not isinstance(globs, str | Sequence):
        raise ValueError(f"{name} is {globs!r}; wanted globs of layer names, such as 'q_proj'.")
    globs = (globs,) if isinstance(globs, str) else tuple(globs)
    if not all(isinstance(glob, str) and glob for glob in globs):
        raise ValueError(f"{name} is {globs!r}; wanted globs of layer names, such as 'q_proj'.")
    if name == "targets" and not globs:
        raise ValueError("targets is empty; wanted globs, or None for every layer in the blocks.")
    return globs
