"""The model that the config.json of a checkpoint describes, on the meta device.

Nothing in the file is trusted: sizes are compared with what is stored before anything of that size is
made.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import CONFIG_MAPPING

from hf_sparse.checkpoint.bounds import AGAIN, Size, bounded
from hf_sparse.checkpoint.model_classes import (
    all_classes_of,
    first_class_of,
    model_class_named,
)
from hf_sparse.checkpoint.reading import StoredTensor
from hf_sparse.checkpoint.sparse_configs import (
    NOT_MADE,
    UNKNOWN_TYPE,
    base_config_class,
    sparse_config_class,
)
from hf_sparse.formats import FormatError, locate
from hf_sparse.structure.experts import ExpertStack
from hf_sparse.structure.families import base_type
from hf_sparse.structure.parts import PARTS, sizes_in
from hf_sparse.structure.units import resize_
from hf_sparse.upstream.transformers.configs import NAME_OR_PATH, with_special_floats
from hf_sparse.upstream.transformers.models import build

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

# What the shapes of the weights do not tell, or tell only in part; defaults would be another model.
_SIZES = ("num_hidden_layers", "num_attention_heads", "hidden_size", "vocab_size")
# Where else than in `num_hidden_layers` a config tells how many blocks are stored, and their names.
_COUNTED = {
    "albert": {
        "num_hidden_groups": r"encoder\.albert_layer_groups",
        "inner_group_num": r"encoder\.albert_layer_groups\.\d+\.albert_layers",
    }
}
# What a config.json tells the loader, and not the model.
_LOADER_KEYS = ("quantization_config", "auto_map")
# Where a config was read, and the type of its weights: the model has the same names and shapes.
_CHANGES_NO_SHAPE = (*_LOADER_KEYS, NAME_OR_PATH, "transformers_version", "dtype")
# What modules call the number of experts that a token is sent to.
_CHOICES = ("top_k", "num_experts_per_tok")


def check_counts(
    values: Mapping[str, Any], family: str, kind: Any, stored: Sequence[StoredTensor], file: Path
) -> None:
    """Raise a FormatError if sizes are missing, or other numbers of blocks are stored.

    The model is only built after that: a number that was changed may be any.
    """
    if family not in PARTS:
        return
    prefix = f"{kind.base_model_prefix}."
    names = [tensor.name.removeprefix(prefix) for tensor in stored]
    others = sparse_config_class(family).attribute_map
    for key in _SIZES:
        if not {key, others.get(key, key)} & values.keys():
            raise FormatError(f"{file} has no {others.get(key, key)}. {AGAIN}")
    key = others.get("num_hidden_layers", "num_hidden_layers")
    count = values.get(key, values.get("num_hidden_layers"))
    counted = {key: (count, re.escape(PARTS[family].stack))}
    if family in _COUNTED:
        # Blocks are run again and again: how often, no weight tells.
        if not isinstance(count, int) or count < 1:
            raise FormatError(f"{file} has {key}={count!r:.40}; wanted 1 or more. {AGAIN}")
        counted = {key: (values.get(key, 1), path) for key, path in _COUNTED[family].items()}
    for key, (wanted, path) in counted.items():
        numbers = re.compile(rf"{path}\.(\d{{1,9}})\.")
        number = (
            max((int(match[1]) for match in map(numbers.match, names) if match), default=-1) + 1
        )
        if wanted != number:
            raise FormatError(f"{file} has {key}={wanted!r:.40}, but {number} are stored. {AGAIN}")


def class_named(values: Mapping[str, Any], file: Path) -> tuple[str, Any, bool]:
    """The family of a config, the dense class that it names, and whether there is one.

    If there is none, the class is the family's without a head.

    Raises:
        FormatError: AutoConfig does not know the family, or the class is one of another family.
    """
    family = base_type(str(values.get("model_type")))
    if family not in CONFIG_MAPPING or family != base_type(family):
        raise FormatError(f"{file}: {UNKNOWN_TYPE.format(values.get('model_type'))}")
    config_class = base_config_class(family)
    names = values.get("architectures")
    name = str(names[0]).removeprefix("Sparse") if isinstance(names, list) and names else ""
    kind = model_class_named(name, config_class)
    if kind is not None:
        made_for = getattr(kind.config_class, "model_type", None)
        if made_for != family and not _serves(kind, config_class):
            raise FormatError(
                f"{file}: model_type is {values['model_type']!r}, and architectures names {name}, a "
                f"class of models of type {made_for!r}. {AGAIN}"
            )
        return family, kind, True
    if (base := first_class_of(config_class)) is None:
        raise FormatError(
            f"{file}: architectures names {name!r}, which transformers does not have, and no Auto "
            f"class has a model of type {family!r}. Register it with AutoModel.register, or update "
            "transformers."
        )
    return family, base, False


def _serves(kind: Any, config_class: Any) -> bool:
    """Whether an Auto class has this class for a config that it was not made for."""
    return kind in all_classes_of(config_class)


def describe(
    values: Mapping[str, Any],
    kind: Any,
    family: str,
    file: Path,
    stored: Size,
    made: PreTrainedModel | None = None,
) -> PreTrainedModel:
    """The model of a class that a config describes.

    Args:
        values: of the config.
        kind, family: see `class_named`.
        file: the config's, for errors.
        stored: what there is for the model.
        made: a model that was made before any weight is loaded; it is returned if it is of the class
            and the config, so that no second one is made.

    Raises:
        FormatError: it describes none, one that is far larger than what is stored, or one that
            chooses more experts than it has.
    """
    values = {key: value for key, value in values.items() if key not in _LOADER_KEYS}
    with describing(file):
        config_class = sparse_config_class(family)
        config = config_class.from_dict(with_special_floats(config_class, values))
        if made is not None and _is_of(made, kind, config):
            _check_choices(made)
            return made
        sizes = sizes_in(config)
        vars(config)["model_type"] = family  # as the Sparse classes do
        with torch.device("meta"), bounded(stored):
            model: PreTrainedModel = build(kind, config)
            if sizes is not None:
                resize_(model, sizes)
        _check_choices(model)
    return model


def dense_class_of(model: nn.Module) -> type:
    """The transformers class of a model, also of one that is of a Sparse class."""
    own: type = getattr(type(model), "dense_class", type(model))
    return own


def _is_of(model: PreTrainedModel, kind: Any, config: PreTrainedConfig) -> bool:
    """Whether a model is of the Sparse class of `kind`, and was made of a config."""
    if type(model) is kind or dense_class_of(model) is not kind:
        return False  # only the Sparse class makes blocks of other sizes
    return type(model.config) is type(config) and _sizes_told(model.config) == _sizes_told(config)


def _sizes_told(config: PreTrainedConfig) -> dict[str, Any]:
    """The values of a config, without what changes no name and no shape of a weight."""
    values = config.to_dict()
    return {key: value for key, value in values.items() if key not in _CHANGES_NO_SHAPE}


def _check_choices(model: nn.Module) -> None:
    """Raise a FormatError if tokens are to be sent to more experts than there are, or to none."""
    for parent in model.modules():
        for stack in filter(None, map(ExpertStack.called, parent.children())):
            if stack.shared:
                continue
            for module in (parent, *parent.children()):
                for name in _CHOICES:
                    count = vars(module).get(name)
                    if isinstance(count, int) and not 1 <= count <= stack.number:
                        raise FormatError(
                            f"the config sends each token to {count} experts ({name} of "
                            f"{type(module).__name__}), and there are {stack.number}. {AGAIN}"
                        )


@contextmanager
def describing(file: Path) -> Iterator[None]:
    """Turn the errors of building a model from a config into FormatErrors that name its file."""
    with locate(str(file)):
        try:
            yield
        except FormatError:
            raise
        except NOT_MADE as error:
            raise FormatError(f"it describes no model of transformers: {error!r}") from error
