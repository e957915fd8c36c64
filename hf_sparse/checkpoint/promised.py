"""What the config.json of a compressed checkpoint says is stored, compared with what is.

The class that config.json names is built on the meta device, without memory for weights. Each of its
parameters must be stored, in its shape, and no others in the blocks. A class that is given to
`from_pretrained` may have other heads: transformers initialises those.
"""

from __future__ import annotations

import json
import os
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from hf_sparse.checkpoint.bounds import AGAIN, Size, bounded, check_widths
from hf_sparse.checkpoint.described import (
    check_counts,
    class_named,
    dense_class_of,
    describe,
    describing,
)
from hf_sparse.checkpoint.generation_files import check_generation
from hf_sparse.checkpoint.index import read_index, read_object, read_sparsity
from hf_sparse.checkpoint.on_grids import OnGrid, on_grids
from hf_sparse.checkpoint.reading import StoredTensor, open_file, read_headers
from hf_sparse.checkpoint.sparse_configs import NOT_MADE
from hf_sparse.configuration_sparse import SparsityConfig
from hf_sparse.formats import FORMATS, FormatError, join, layout_in, locate
from hf_sparse.structure.layers import (
    TargetLayer,
    by_identity,
    find_stacks,
    target_layers,
)
from hf_sparse.structure.orientation import transposed_weights
from hf_sparse.structure.parts import parts_of
from hf_sparse.upstream.transformers.models import (
    not_expected_in_files,
    not_required_in_files,
    tied_names,
)

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

CONFIG_NAME = "config.json"
QUANT_METHOD = "hf_sparse"
_SHRUNK = "Of a shrunk model, block_sizes in the config tell the sizes of its blocks. "
# What TensorFlow called the parameters of a norm; transformers still loads them.
_OLD_NAMES = {"LayerNorm.gamma": "LayerNorm.weight", "LayerNorm.beta": "LayerNorm.bias"}


@dataclass(frozen=True)
class Promised:
    """The model that a checkpoint's config.json describes, on the meta device.

    Attributes:
        model: of the transformers class that the checkpoint was saved from, or of its Sparse class.
        file: the config.json.
        exact: whether that class is known; else the model is the family's base model.
    """

    model: PreTrainedModel
    file: Path
    exact: bool

    def check(self, stored: Iterable[StoredTensor]) -> None:
        """Raise a FormatError if tensors are missing, too many, or of other shapes."""
        found, meant = dict[str, StoredTensor](), dict[str, StoredTensor]()
        for tensor in stored:
            first = meant.setdefault(self._meant(tensor.name), tensor)
            if first is not tensor:
                raise FormatError(
                    f"{tensor.place}: {first.name} is stored, too, and both are the same weight of the "
                    f"{self._kind}. The file is damaged: copy or download it again."
                )
            found[self.local(tensor.name)] = tensor
        self._check_missing(found)
        self._check_known(found)
        shrunk = _SHRUNK if parts_of(self.model.config) is not None else ""
        check_shapes(found, self.tensors(), self._transposed(), shrunk)

    def targets(self, config: SparsityConfig) -> dict[str, tuple[TargetLayer, ...]]:
        """The layers that `config` promises a pattern of, by the names of their parameters.

        These are without the base model's prefix.

        Raises:
            FormatError: the model has no such layers.
        """
        if not self.exact:
            return {}
        with describing(self.file):
            held = by_identity(target_layers(self.model, config))
        return {self.local(layers[0].parameter_name): layers for layers in held.values()}

    def grids(self, config: SparsityConfig) -> dict[str, OnGrid]:
        """The weights that `config` promises few bits of, by their names as in `targets`.

        Raises:
            FormatError: the model has no such layers.
        """
        if not self.exact or (config.grid is None and config.embedding_grid is None):
            return {}
        with describing(self.file):
            found = on_grids(self.model, config)
        return {self.local(name): weights for name, weights in found.items()}

    def missing(self, found: Mapping[str, StoredTensor]) -> list[str]:
        """The names of the parameters that no tensor is stored for, nor for what they are tied to.

        Args:
            found: the tensors by their names without the base model's prefix.
        """
        model = self.model
        tied = tied_names(model)
        parameters = dict(model.named_parameters(remove_duplicate=False))
        shared: dict[int, list[str]] = {}
        for name, parameter in parameters.items():
            source = parameters.get(tied.get(name, name), parameter)
            shared.setdefault(id(source), []).append(name)
        ignored = not_required_in_files(model)
        return [
            names[0]
            for names in shared.values()
            if not any(self.local(name) in found for name in names)
            and not any(re.search(pattern, name) for pattern in ignored for name in names)
        ]

    def _check_missing(self, found: Mapping[str, StoredTensor]) -> None:
        missing = [
            name for name in self.missing(found) if self.exact or self.in_blocks(self.local(name))
        ]
        if missing:
            raise FormatError(
                f"{self.file.parent} lacks {len(missing)} tensors of the {self._kind} "
                f"that {self.file.name} describes, first {missing[0]}. {AGAIN}"
            )

    def _check_known(self, found: Mapping[str, StoredTensor]) -> None:
        model = self.model
        known = {name for name, _ in model.named_buffers()} | self._own
        known = {self.local(name) for name in known}
        passed = not_expected_in_files(model)
        for name, tensor in found.items():
            if name in known or any(re.search(pattern, name) for pattern in passed):
                continue
            if self.in_blocks(name) or (self.exact and tensor.compressed):
                raise FormatError(
                    f"{tensor.place}: the {self._kind} that {self.file.name} describes has "
                    f"no such tensor. {AGAIN}"
                )

    @property
    def _kind(self) -> str:
        return dense_class_of(self.model).__name__

    @cached_property
    def _own(self) -> set[str]:
        return set(self.model.state_dict())

    @cached_property
    def _stacks(self) -> tuple[str, ...]:
        return tuple(f"{self.local(stack.name)}." for stack in find_stacks(self.model))

    def local(self, name: str) -> str:
        """A name without the base model's prefix, which heads put before it.

        A model that has weights of both names keeps them apart.
        """
        short = name.removeprefix(f"{self.model.base_model_prefix}.")
        return name if short in self._own and name in self._own else short

    def _meant(self, name: str) -> str:
        """The weight that transformers takes a name for: prefixes are cut off, old names replaced."""
        if name in self._own:
            return self.local(name)
        while name != (local := self.local(name)):
            name = local
        for old, new in _OLD_NAMES.items():
            name = name.replace(old, new)
        return name

    def in_blocks(self, local: str) -> bool:
        """Whether a tensor is one of the repeated blocks, by its name without the prefix."""
        return local.startswith(self._stacks)

    def tensors(self) -> dict[str, Tensor]:
        """The model's tensors, by their names without the base model's prefix."""
        return {self.local(name): tensor for name, tensor in self.model.state_dict().items()}

    def _transposed(self) -> dict[str, bool]:
        """Whether a weight is stored `(in_features, out_features)`, by its name."""
        return {self.local(name): own for name, own in transposed_weights(self.model).items()}


def promised_by(
    folder: Path, stored: Sequence[StoredTensor], made: PreTrainedModel | None = None
) -> Promised:
    """The model that the config.json of a compressed checkpoint describes.

    Args:
        folder: of the checkpoint.
        stored: the tensors in its files.
        made: the model that is about to be loaded, on the meta device. Its config is taken where there
            is no config.json.

    Raises:
        FileNotFoundError: there is neither.
        FormatError: it describes no model that transformers knows, or one of more or fewer blocks
            than are stored.
    """
    file = folder / CONFIG_NAME
    if made is not None and not file.exists():
        values = json.loads(made.config.to_json_string())
    else:
        values = read_object(file)
    family, kind, exact = class_named(values, file)
    check_counts(values, family, kind, stored, file)
    check_widths(values, size := Size.of(stored), file)
    return Promised(describe(values, kind, family, file, size, made), file, exact)


@contextmanager
def checked_to_load(
    source: str | os.PathLike[str] | None, subfolder: str | None = None, variant: str | None = None
) -> Iterator[None]:
    """A folder from which a model is made and loaded inside: its size is that of what is stored.

    Raises:
        FormatError: the model cannot be made, because of what its config.json says.
    """
    stored = check_to_load(source, subfolder, variant)
    if not stored:
        yield
        return
    try:
        with bounded(Size.of(stored)):
            yield
    except FormatError:
        raise
    except NOT_MADE:
        promised_by(stored[0].file.parent, stored)  # if the file is the reason, it says so
        raise


def check_to_load(
    source: str | os.PathLike[str] | None, subfolder: str | None = None, variant: str | None = None
) -> list[StoredTensor]:
    """Check what transformers would follow before it calls the loader: index and number of blocks.

    Args:
        source: a folder; of a Hub name nothing is known yet, nor of None.
        subfolder, variant: as in `PreTrainedModel.from_pretrained`.

    Returns:
        The tensors that are stored; none if they are not known, or the folder holds a dense model.

    Raises:
        FormatError: they are damaged, or not of the tensors in the files.
        FileNotFoundError: a shard is missing.
    """
    folder = Path(source or "") / (subfolder or "")
    file, infix = folder / CONFIG_NAME, f".{variant}" if variant else ""
    if not source or not file.is_file():
        return []
    values = read_object(file)
    files = [folder / f"model{infix}.safetensors"]
    index = folder / f"model.safetensors.index{infix}.json"
    if not files[0].exists() and index.is_file():
        files = [folder / name for name in sorted(set(read_index(index).files.values()))]
        if lost := [shard.name for shard in files if not shard.is_file()]:
            raise FileNotFoundError(
                f"{folder} lacks the shards {', '.join(lost)} that {index.name} names. Copy or "
                "download the folder again."
            )
    section = values.get("quantization_config")
    compressed = isinstance(section, dict) and section.get("quant_method") == QUANT_METHOD
    if isinstance(section, dict) and compressed and files[0].is_file():
        read_sparsity(file, section)
        check_generation(folder)
        family, kind, exact = class_named(values, file)
        if not exact and values.get("architectures"):
            warnings.warn(
                f"{file} was saved of the class {values['architectures'][0]}, which transformers does "
                f"not have: what it is beyond {kind.__name__} is not in the model that is loaded. Load "
                "it by from_pretrained of that class, or register the class with an Auto class.",
                stacklevel=2,
            )
        stored = read_headers(files)
        check_counts(values, family, kind, stored, file)
        check_widths(values, Size.of(stored), file)
        return stored
    return []


def check_shapes(
    found: Mapping[str, StoredTensor],
    wanted: Mapping[str, Tensor],
    transposed: Mapping[str, bool] | None = None,
    hint: str = "",
) -> None:
    """Raise a FormatError if stored tensors have other shapes than the model's, or another direction.

    What the model has as floats must be floats: transformers would make others its parameters.

    Of weights only headers and layouts are read.

    Args:
        found: the tensors by name.
        wanted: the model's, by the same names.
        transposed: whether a weight of the model is `(in_features, out_features)`; None: not compared.
        hint: a sentence on shapes for errors.
    """
    for file in dict.fromkeys(tensor.file for tensor in found.values()):
        with open_file(file) as reader:
            for name, tensor in found.items():
                if tensor.file != file or name not in wanted:
                    continue
                values = reader.get_slice(tensor.name)
                shape = tuple(values.get_shape())
                floats = values.get_dtype().startswith(("F", "BF"))
                if wanted[name].is_floating_point() and not (floats or tensor.coding):
                    raise FormatError(
                        f"{tensor.place}: it holds numbers of type {values.get_dtype()}, the model "
                        "wants floats. The file is damaged: copy or download it again."
                    )
                if tensor.compressed:
                    layout = reader.get_tensor(join(tensor.name, "layout"))
                    with locate(tensor.place):
                        known = layout_in(tensor.parts, layout)
                    shape = known.shape
                if shape != (meant := tuple(wanted[name].shape)):
                    raise FormatError(
                        f"{tensor.place}: shape mismatch: {shape} is stored, the model of "
                        f"{CONFIG_NAME} wants {meant}. {hint}{AGAIN}"
                    )
                if tensor.compressed and transposed is not None:
                    with locate(tensor.place):
                        FORMATS[tensor.format].check_direction(known, transposed.get(name, False))
