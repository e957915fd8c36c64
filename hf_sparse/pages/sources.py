"""Finding the models that a page is about: folders, names on the Hub, and models in memory."""

from __future__ import annotations

import fnmatch
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from hf_sparse.arguments import check_model
from hf_sparse.checkpoint.index import read_object
from hf_sparse.checkpoint.inspect import CheckpointSparsity, read_checkpoint
from hf_sparse.checkpoint.matrices import StoredMatrices
from hf_sparse.checkpoint.promised import CONFIG_NAME
from hf_sparse.checkpoint.reading import check_is_checkpoint
from hf_sparse.checkpoint.source import stored_in
from hf_sparse.checkpoint.writing import is_weight_file
from hf_sparse.counts import measure_sparsity
from hf_sparse.files.checkpoint_folder import checkpoint_folder
from hf_sparse.pages.facts import Files, Looking, ModelFacts
from hf_sparse.provenance.record import provenance_of
from hf_sparse.structure.layers import promised_config
from hf_sparse.structure.targets import Targets
from hf_sparse.suggestions import did_you_mean

Source = Path | nn.Module
_TEXT_FILES = ("tokenizer*", "vocab*", "merges.txt", "*.model", "special_tokens*", "added_tokens*")


def find_sources(models: Any) -> dict[str, Source]:
    """The models of a page by their titles, each a folder or a model in memory.

    Args:
        models: a folder, Hub name or model; several of them; or a mapping from titles to them.

    Raises:
        FileNotFoundError: there is no such folder, and the name is none of the Hub.
        ValueError: there are none, one is neither, or two have one title.
    """
    if isinstance(models, Mapping):
        return {str(title): _source(one) for title, one in models.items()}
    one = isinstance(models, str | os.PathLike | nn.Module)
    found: dict[str, Source] = {}
    for given in [models] if one else _several(models):
        source, title = _source(given), _title(given)
        if title in found:
            title = next(t for n in range(2, 10_000) if (t := f"{title} ({n})") not in found)
        found[title] = source
    if not found:
        raise ValueError("report was given no model; wanted a folder, or a model, or several.")
    return found


def _several(models: Any) -> Sequence[Any]:
    if isinstance(models, Sequence):
        return models
    check_model(models, "report")
    return ()


def _title(given: Any) -> str:
    if isinstance(given, nn.Module):
        return type(given).__name__
    name = os.fspath(given)
    return Path(name).resolve().name if Path(name).exists() else name


def _source(given: Any) -> Source:
    if not isinstance(given, str | os.PathLike):
        check_model(given, "report")
        return given  # type: ignore[no-any-return]
    folder = checkpoint_folder(given)
    check_is_checkpoint(folder)
    return folder


def read_facts(
    title: str,
    source: Source,
    base: Source | None = None,
    matrix: str | None = None,
) -> ModelFacts:
    """Read what a page tells of a model, with one matrix in memory beside it.

    Args:
        title: what the page calls it.
        source: the model.
        base: the dense model that it was made from.
        matrix: name or glob of the matrix whose mask is shown, the first that matches.

    Raises:
        FormatError: a folder is no checkpoint, or is damaged.
    """
    dense = None if base is None else _reader(base)
    if isinstance(source, Path):
        facts, looking = _read_folder(title, source, matrix, dense)
    else:
        facts, looking = _read_model(title, source, matrix, dense)
    if looking.without_base:
        missing = looking.without_base
        facts = facts.with_notes(
            f"{len(missing)} of {len(facts.report.tensors)} matrices are not in the dense model that "
            f"was given, or have another shape there, first {missing[0]}."
        )
    told = None if base is None else str(base) if isinstance(base, Path) else type(base).__name__
    return _completed(facts, looking, told)


def _completed(facts: ModelFacts, looking: Looking, base: str | None) -> ModelFacts:
    return replace(
        facts,
        mask=looking.mask,
        spreads=looking.spreads(),
        changes=tuple(looking.changes),
        base=base,
    )


def _reader(source: Source) -> Callable[[str], Tensor | None]:
    """A function that gives the matrix of a name, or None."""
    if isinstance(source, Path):
        return StoredMatrices(source).read
    layers = {layer.weight_name: layer for layer in Targets.in_blocks(source).layers}
    return lambda name: layers[name].weight if name in layers else None


def _read_folder(
    title: str, folder: Path, matrix: str | None, dense: Callable[[str], Tensor | None] | None
) -> tuple[ModelFacts, Looking]:
    looking = Looking(matrix, dense)
    wanted = _Choice(matrix, looking)
    found = read_checkpoint(folder, wanted)
    config = read_object(folder / CONFIG_NAME)
    architecture = next(iter(config.get("architectures") or [""]), "")
    promised = "" if found.config is None else str(found.config.pattern)
    facts = ModelFacts(
        title,
        str(folder),
        str(architecture),
        found.report,
        promised,
        stored_in(folder),
        files=_files(folder, found, looking),
        no_such_matrix=wanted.missing(title),
    )
    lost = found.config is not None and found.report.has_lost_zeros(found.config.sparsity)
    if lost and found.config is not None:
        facts = facts.with_notes(
            f"Zeros are lost: config.json promises sparsity {found.config.sparsity:.4f}, and "
            f"{found.report.sparsity:.4f} was found."
        )
    return facts, looking


def _read_model(
    title: str, model: nn.Module, matrix: str | None, dense: Callable[[str], Tensor | None] | None
) -> tuple[ModelFacts, Looking]:
    report = measure_sparsity(model)
    looking = Looking(matrix, dense)
    wanted = _Choice(matrix, looking)
    named = {layer.weight_name: layer for layer in _layers(model)}
    for tensor in report.tensors:
        wanted(tensor.name, named[tensor.name].weight)
    name = type(model).__name__
    config = promised_config(model)
    promised = "" if config is None else str(config.pattern)
    facts = ModelFacts(
        title,
        name,
        name,
        report,
        promised,
        provenance_of(model),
        no_such_matrix=wanted.missing(title),
    )
    return facts, looking


def _layers(model: nn.Module) -> list[Any]:
    promised = promised_config(model)
    targets = Targets.in_blocks(model) if promised is None else Targets.of(model, promised)
    return [*targets.layers, *targets.others]


class _Choice:
    """Passes matrices on, and tells the first that a glob matches to be the chosen one."""

    def __init__(self, glob: str | None, looking: Looking) -> None:
        self._glob, self._looking, self._names = glob, looking, list[str]()
        self._found = glob is None

    def __call__(self, name: str, weight: Tensor) -> None:
        self._names.append(name)
        plain = name.removesuffix(".weight")
        if not self._found and self._glob is not None:
            globs = (self._glob, f"*{self._glob}") if "*" not in self._glob else (self._glob,)
            if any(fnmatch.fnmatchcase(text, glob) for text in (name, plain) for glob in globs):
                self._found = True
                self._looking.choose(name)
        self._looking(name, weight)

    def missing(self, title: str) -> str:
        """What is wrong if nothing matched; empty if something did."""
        if self._found:
            return ""
        plain = [name.removesuffix(".weight") for name in self._names]
        meant = did_you_mean(str(self._glob), plain)
        first = f", such as {plain[len(plain) // 2]!r}" if plain else ""
        return (
            f"no matrix of {title} is called {self._glob!r}; wanted one of its {len(plain)} "
            f"targets{first}, or a glob.{meant}"
        )


def _files(folder: Path, found: CheckpointSparsity, looking: Looking) -> Files:
    """The bytes of a folder, by what they are for."""
    stored = sum(found.stored_bytes.values())
    parts = {"target weights": stored, "other weights": max(found.file_bytes - stored, 0)}
    for file in sorted(folder.rglob("*")):
        name = file.name
        if not file.is_file() or is_weight_file(name):
            continue
        of_text = any(fnmatch.fnmatch(name, glob) for glob in _TEXT_FILES)
        part = "tokenizer" if of_text else "config, card and the rest"
        if file.parent != folder:
            part = f"folder {file.relative_to(folder).parts[0]}/"
        parts[part] = parts.get(part, 0) + file.stat().st_size
    dense = found.file_bytes - stored + sum(looking.dense_bytes.values())
    return Files({name: size for name, size in parts.items() if size}, found.file_bytes, dense)
