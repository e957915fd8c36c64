"""What the config.json of a compressed checkpoint says is stored, compared with what is.

The class that config.json names is built on the meta device, without memory for weights. Each of its
parameters must be stored, in its shape, and no others in the blocks. A class that is given to
`from_pretrained` may have other heads: transformers initialises those.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers
from huggingface_hub.errors import StrictDataclassError

from hf_sparse.checkpoint.index import read_index, read_object
from hf_sparse.checkpoint.reading import StoredTensor, open_file, read_headers
from hf_sparse.checkpoint.sparse_configs import base_config_class, sparse_config_class
from hf_sparse.configuration_sparse import SparsityConfig
from hf_sparse.formats import FORMATS, FormatError, join, locate
from hf_sparse.structure.families import FAMILIES, base_type, sparse_type
from hf_sparse.structure.layers import TargetLayer, by_identity, is_transposed, target_layers
from hf_sparse.structure.parts import sizes_in, stack_of
from hf_sparse.structure.units import resize_

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

CONFIG_NAME = "config.json"
QUANT_METHOD = "hf_sparse"
# What the shapes of the weights do not tell, or tell only in part; defaults would be another model.
_SIZES = ("num_hidden_layers", "num_attention_heads", "hidden_size", "vocab_size")
# Where else than in `num_hidden_layers` a config tells how many blocks are stored, and their names.
_COUNTED = {
    "albert": {
        "num_hidden_groups": r"encoder\.albert_layer_groups",
        "inner_group_num": r"encoder\.albert_layer_groups\.\d+\.albert_layers",
    }
}
# What TensorFlow called the parameters of a norm; transformers still loads them.
_OLD_NAMES = {"LayerNorm.gamma": "LayerNorm.weight", "LayerNorm.beta": "LayerNorm.bias"}
_AGAIN = (
    "Config and weights are of different checkpoints, or incomplete: copy or download them again."
)


@dataclass(frozen=True)
class Promised:
    """The model that a checkpoint's config.json describes, on the meta device.

    Attributes:
        model: of the transformers class that the checkpoint was saved from.
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
                    f"{type(self.model).__name__}. The file is damaged: copy or download it again."
                )
            found[self.local(tensor.name)] = tensor
        self._check_missing(found)
        check_shapes(found, self._shapes(), self._transposed())

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

    def _check_missing(self, found: Mapping[str, StoredTensor]) -> None:
        model = self.model
        tied = model.all_tied_weights_keys
        parameters = dict(model.named_parameters(remove_duplicate=False))
        shared: dict[int, list[str]] = {}
        for name, parameter in parameters.items():
            source = parameters.get(tied.get(name, name), parameter)
            shared.setdefault(id(source), []).append(name)
        ignored = [
            *(model._keys_to_ignore_on_load_missing or ()),
            *(model._keys_to_ignore_on_save or ()),
        ]
        missing = [
            names[0]
            for names in shared.values()
            if not any(self.local(name) in found for name in names)
            and not any(re.search(pattern, name) for pattern in ignored for name in names)
            and (self.exact or self._in_blocks(names[0]))
        ]
        if missing:
            raise FormatError(
                f"{self.file.parent} lacks {len(missing)} tensors of the {type(model).__name__} that "
                f"{self.file.name} describes, first {missing[0]}. {_AGAIN}"
            )
        known = {name for name, _ in model.named_buffers()} | model.state_dict().keys()
        known = {self.local(name) for name in known}
        passed = model._keys_to_ignore_on_load_unexpected or ()
        for name, tensor in found.items():
            if name in known or any(re.search(pattern, name) for pattern in passed):
                continue
            if self._in_blocks(name) or (self.exact and tensor.compressed):
                raise FormatError(
                    f"{tensor.place}: the {type(model).__name__} that {self.file.name} describes has "
                    f"no such tensor. {_AGAIN}"
                )

    def local(self, name: str) -> str:
        """A name without the base model's prefix, which heads put before it."""
        return name.removeprefix(f"{self.model.base_model_prefix}.")

    def _meant(self, name: str) -> str:
        """The weight that transformers takes a name for: prefixes are cut off, old names replaced."""
        while name != (local := self.local(name)):
            name = local
        for old, new in _OLD_NAMES.items():
            name = name.replace(old, new)
        return name

    def _in_blocks(self, name: str) -> bool:
        stack = stack_of(base_type(self.model.config.model_type))
        return self.local(name).startswith(f"{stack}.")

    def _shapes(self) -> dict[str, tuple[int, ...]]:
        tensors = self.model.state_dict()
        return {self.local(name): tuple(tensor.shape) for name, tensor in tensors.items()}

    def _transposed(self) -> dict[str, bool]:
        """Whether a weight is stored `(in_features, out_features)`, by its name."""
        modules = dict(self.model.named_modules())
        return {
            self.local(name): is_transposed(modules[name.rpartition(".")[0]], attribute)
            for name, _ in self.model.named_parameters(remove_duplicate=False)
            for attribute in [name.rpartition(".")[2]]
        }


def promised_by(
    folder: Path, stored: Sequence[StoredTensor], config: PreTrainedConfig | None = None
) -> Promised:
    """The model that the config.json of a compressed checkpoint describes.

    Args:
        folder: of the checkpoint.
        stored: the tensors in its files.
        config: taken where there is no config.json.

    Raises:
        FileNotFoundError: there is neither.
        FormatError: it describes no model of a family in `FAMILIES`, or one of more or fewer
            blocks than are stored.
    """
    file = folder / CONFIG_NAME
    if config is not None and not file.exists():
        values = json.loads(config.to_json_string())
    else:
        values = read_object(file)
    family, kind, exact = _class_named(values, file)
    _check_counts(values, family, kind, stored, file)
    return Promised(_described(values, kind, family, file), file, exact)


def check_to_load(
    source: str | os.PathLike[str] | None, subfolder: str | None = None, variant: str | None = None
) -> None:
    """Check what transformers would follow before it calls the loader: index and number of blocks.

    Args:
        source: a folder; of a Hub name nothing is known yet, nor of None.
        subfolder, variant: as in `PreTrainedModel.from_pretrained`.

    Raises:
        FormatError: they are damaged, or not of the tensors in the files.
        FileNotFoundError: a shard is missing.
    """
    folder = Path(source or "") / (subfolder or "")
    file, infix = folder / CONFIG_NAME, f".{variant}" if variant else ""
    if not source or not file.is_file():
        return
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
    if compressed and files[0].is_file():
        family, kind, _ = _class_named(values, file)
        _check_counts(values, family, kind, read_headers(files), file)


def check_shapes(
    found: Mapping[str, StoredTensor],
    shapes: Mapping[str, tuple[int, ...]],
    transposed: Mapping[str, bool] | None = None,
) -> None:
    """Raise a FormatError if stored tensors have other shapes than the model's, or another direction.

    Weights and biases must be floats, too: transformers would make others the model's parameters.

    Of weights only headers and layouts are read.
    """
    for file in dict.fromkeys(tensor.file for tensor in found.values()):
        with open_file(file) as reader:
            for name, tensor in found.items():
                if tensor.file != file or name not in shapes:
                    continue
                values = reader.get_slice(tensor.name)
                shape, flipped = tuple(values.get_shape()), None
                is_parameter = name.endswith((".weight", ".bias"))
                if is_parameter and not values.get_dtype().startswith(("F", "BF")):
                    raise FormatError(
                        f"{tensor.place}: it holds numbers of type {values.get_dtype()}, its parameter "
                        "wants floats. The file is damaged: copy or download it again."
                    )
                if tensor.compressed:
                    layout = reader.get_tensor(join(tensor.name, "layout"))
                    with locate(tensor.place):
                        known = FORMATS[tensor.format].read_layout(layout)
                    shape, flipped = known.shape, known.transposed
                if shape != shapes[name]:
                    raise FormatError(
                        f"{tensor.place}: shape mismatch: {shape} is stored, the model of "
                        f"{CONFIG_NAME} wants {shapes[name]}. Its block_sizes tell the sizes of a "
                        "shrunk model's blocks: config and weights are of different checkpoints."
                    )
                wanted = (transposed or {}).get(name, flipped)
                if FORMATS[tensor.format].structured and flipped != wanted:
                    raise FormatError(
                        f"{tensor.place}: the layout has transposed={int(bool(flipped))}, its layer "
                        f"wants {int(bool(wanted))}: '{tensor.format}' is stored as (out_features, "
                        "in_features). The file is damaged: copy or download it again."
                    )


def _check_counts(
    values: Mapping[str, Any], family: str, kind: Any, stored: Sequence[StoredTensor], file: Path
) -> None:
    """Raise a FormatError if sizes are missing, or other numbers of blocks are stored.

    The model is only built after that: a number that was changed may be any.
    """
    prefix = f"{kind.base_model_prefix}."
    names = [tensor.name.removeprefix(prefix) for tensor in stored]
    others = sparse_config_class(family).attribute_map
    for key in _SIZES:
        if not {key, others.get(key, key)} & values.keys():
            raise FormatError(f"{file} has no {others.get(key, key)}. {_AGAIN}")
    key = others.get("num_hidden_layers", "num_hidden_layers")
    count = values.get(key, values.get("num_hidden_layers"))
    counted = {key: (count, re.escape(stack_of(family)))}
    if family in _COUNTED:
        counted = {key: (values.get(key, 1), path) for key, path in _COUNTED[family].items()}
    for key, (wanted, path) in counted.items():
        numbers = re.compile(rf"{path}\.(\d{{1,9}})\.")
        found = max((int(match[1]) for match in map(numbers.match, names) if match), default=-1) + 1
        if wanted != found:
            raise FormatError(f"{file} has {key}={wanted!r:.40}, but {found} are stored. {_AGAIN}")


def _class_named(values: Mapping[str, Any], file: Path) -> tuple[str, Any, bool]:
    """The family of a config, the transformers class that it names, and whether there is one.

    If there is none, the class is the family's without a head.
    """
    family = base_type(str(values.get("model_type")))
    if family not in FAMILIES:
        raise FormatError(
            f"{file}: model_type is {values.get('model_type')!r}; wanted one of "
            f"{', '.join(map(sparse_type, FAMILIES))}."
        )
    names = values.get("architectures")
    name = str(names[0]).removeprefix("Sparse") if isinstance(names, list) and names else ""
    kind = getattr(transformers, name, None) if name.isidentifier() else None
    if isinstance(kind, type) and issubclass(kind, transformers.PreTrainedModel):
        made_for = getattr(kind.config_class, "model_type", None)
        if made_for != family:
            raise FormatError(
                f"{file}: model_type is {values['model_type']!r}, and architectures names {name}, a "
                f"class of models of type {made_for!r}. {_AGAIN}"
            )
        return family, kind, True
    base: Any = transformers.MODEL_MAPPING[base_config_class(family)]
    return family, base[0] if isinstance(base, tuple | list) else base, False


def _described(values: dict[str, Any], kind: Any, family: str, file: Path) -> PreTrainedModel:
    """The model of a class that a config describes."""
    ours = ("quantization_config", "auto_map")
    values = {key: value for key, value in values.items() if key not in ours}
    with describing(file):
        config = sparse_config_class(family).from_dict(values)
        sizes = sizes_in(config)
        with torch.device("meta"):
            model: PreTrainedModel = kind._from_config(config, attn_implementation="eager")
            if sizes is not None:
                resize_(model, sizes)
    return model


@contextmanager
def describing(file: Path) -> Iterator[None]:
    """Turn the errors of building a model from a config into FormatErrors."""
    try:
        yield
    except (
        *(StrictDataclassError, ArithmeticError, AssertionError, AttributeError, LookupError),
        *(RuntimeError, TypeError, ValueError),
    ) as error:
        raise FormatError(f"{file} describes no model of transformers: {error!r}") from error
