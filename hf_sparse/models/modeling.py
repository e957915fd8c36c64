"""SparseBertModel and its siblings: the transformers class plus the sparse contract.

Forward code is inherited, never copied. The classes are made from transformers' own when they are
first asked for, since importing those takes about a second.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor
from transformers import AutoModel, AutoTokenizer, PreTrainedConfig, PreTrainedModel

from hf_sparse.checkpoint.model_classes import (
    all_classes_of,
    classes_of,
    is_model_class,
    model_class_named,
    part_classes,
)
from hf_sparse.checkpoint.promised import checked_to_load
from hf_sparse.checkpoint.reading import restore_state_dict
from hf_sparse.checkpoint.save import is_saving_process, save_model
from hf_sparse.checkpoint.sparse_configs import (
    SparseConfigMixin,
    base_config_class,
    sparse_config_class,
    type_of,
)
from hf_sparse.hub import push_to_hub as push
from hf_sparse.structure.orientation import transposed_weights
from hf_sparse.structure.parts import sizes_in
from hf_sparse.structure.units import resize_
from hf_sparse.upstream.transformers.auto import auto_classes, register_classes_, tokenizers_of
from hf_sparse.upstream.transformers.configs import registered_configs
from hf_sparse.upstream.transformers.loading import convert_alike_
from hf_sparse.upstream.transformers.models import import_modeling, is_from_transformers

_UPLOAD_ARGUMENTS = {
    "commit_message",
    "commit_description",
    "private",
    "token",
    "create_pr",
    "tags",
}


_REGISTERED: set[type[PreTrainedConfig]] = set()


class SparseModelMixin:
    """The sparse contract: weights are compressed when saved, and restored when loaded.

    A config with `block_sizes` makes blocks as small as those that `hf_sparse.shrink_` left.
    """

    dense_class: ClassVar[type[PreTrainedModel]]

    def __init__(self, config: PreTrainedConfig | None = None, *args: Any, **kwargs: Any) -> None:
        sizes = sizes_in(config)
        if isinstance(config, SparseConfigMixin):
            # In memory it is a model of its family: generation and pipelines ask for the type.
            vars(config)["model_type"] = config.base_model_type
        super().__init__(config, *args, **kwargs)  # type: ignore[call-arg]
        if sizes is not None:
            resize_(self, sizes)

    @classmethod
    def is_custom_code(cls) -> bool:
        """Whether the family's code is not of transformers, which converts names of its own."""
        return cls.dense_class.is_custom_code()

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """As `PreTrainedModel.from_pretrained`; a damaged folder is refused before a model is built.

        Raises:
            FormatError: the checkpoint is damaged, incomplete, or of another model than its
                config.json describes.
        """
        source, place = (
            pretrained_model_name_or_path,
            (kwargs.get("subfolder"), kwargs.get("variant")),
        )
        with checked_to_load(source, *place):
            return super().from_pretrained(source, *args, **kwargs)  # type: ignore[misc]

    def save_pretrained(
        self: Any,
        save_directory: str | os.PathLike[str],
        *,
        push_to_hub: bool = False,
        repo_id: str | None = None,
        **kwargs: Any,
    ) -> None:
        """Save the model compressed; arguments as `PreTrainedModel.save_pretrained`.

        With `push_to_hub=True` it is uploaded too, to `repo_id` or the name of the folder; all
        other arguments but those of `hf_sparse.push_to_hub` are for saving. See
        `hf_sparse.save_pretrained` for what is stored and how, and for the errors.
        """
        upload = {name: kwargs.pop(name) for name in _UPLOAD_ARGUMENTS & kwargs.keys()}
        save_model(self, Path(save_directory), **kwargs)
        if push_to_hub and is_saving_process(kwargs.get("is_main_process", True)):
            push(self, repo_id or Path(save_directory).name, **upload, **kwargs)

    def push_to_hub(self: Any, repo_id: str, **kwargs: Any) -> Any:
        """Upload the compressed model and its card: see `hf_sparse.push_to_hub`."""
        return push(self, repo_id, **kwargs)

    def load_state_dict(
        self, state_dict: Mapping[str, Tensor], strict: bool = True, assign: bool = False
    ) -> Any:
        """As `torch.nn.Module.load_state_dict`; compressed tensors are restored first.

        Trainer resumes from checkpoints through this method.

        Raises:
            FormatError: a compressed tensor is damaged, or of another shape or direction than the
                model's.
            TypeError: no mapping.
        """
        if not isinstance(state_dict, Mapping):
            raise TypeError(
                f"state_dict is a {type(state_dict).__name__}; wanted tensors by their names, as "
                "state_dict() gives them."
            )
        model: Any = self
        own: Any = super().state_dict()  # type: ignore[misc]
        shapes = {name: tuple(tensor.shape) for name, tensor in own.items()}
        restored = restore_state_dict(state_dict, shapes, transposed_weights(model))
        return super().load_state_dict(restored, strict, assign)  # type: ignore[misc]


@cache
def sparse_class(base: type[PreTrainedModel], model_type: str) -> type[PreTrainedModel]:
    """The Sparse class of a dense one.

    Args:
        base: the class.
        model_type: of its config.
    """
    name = f"Sparse{base.__name__}"
    convert_alike_(name, base.__name__)
    body = {
        "config_class": sparse_config_class(model_type),
        "dense_class": base,
        "__module__": "hf_sparse.models",
        "__doc__": (
            f"{base.__name__} that is stored compressed. Takes the same arguments; "
            "`from_pretrained` reads dense and compressed checkpoints alike."
        ),
    }
    return type(name, (SparseModelMixin, base), body)


def model_classes(model_type: str) -> dict[str, type[PreTrainedModel]]:
    """The Sparse classes of a family by name: of its module's public classes, and its Auto classes."""
    base_config = base_config_class(model_type)
    module = import_modeling(base_config)
    bases = [getattr(module, name) for name in getattr(module, "__all__", ())]
    bases += all_classes_of(base_config)
    return {
        f"Sparse{base.__name__}": sparse_class(base, model_type)
        for base in bases
        if is_model_class(base)
        and base.config_class is base_config
        and not base.__name__.endswith("PreTrainedModel")
    }


def sparse_class_named(name: str) -> type[PreTrainedModel] | None:
    """The Sparse class of a name; None if there is none."""
    wanted = name.removeprefix("Sparse")
    own = [] if wanted.endswith("PreTrainedModel") else [model_class_named(wanted)]
    registered = (
        model_class_named(wanted, config_class)
        for config_class in registered_configs()
        if not issubclass(config_class, SparseConfigMixin)
    )
    for base in (*own, *registered):
        if (model_type := type_of(getattr(base, "config_class", None))) is not None:
            return sparse_class(base, model_type)
    return None


def register_models(model_type: str) -> None:
    """Register the Sparse classes and the tokenizer of a family with transformers' Auto classes."""
    config_class = sparse_config_class(model_type)
    base_config = base_config_class(model_type)
    if config_class in _REGISTERED:
        return
    if is_from_transformers(base_config):  # other code may register more later
        _REGISTERED.add(config_class)
    parts = set(base_config.sub_configs.values())
    known = {auto_class: classes_of(auto_class, base_config) for auto_class in auto_classes()}
    if not any(known.values()):  # of a part of larger models
        known[AutoModel] = tuple(part_classes(base_config)[:1])
    for auto_class, bases in known.items():
        # A class of a part of the model, such as its language model, is made from the part's config.
        classes = [
            sparse_class(base, type_of(base.config_class) or model_type)
            for base in bases
            if base.config_class not in parts
        ]
        if classes:
            register_classes_(auto_class, config_class, classes)
    if (tokenizer := tokenizers_of(base_config)) is not None:  # its package may be missing
        AutoTokenizer.register(config_class, tokenizer, exist_ok=True)
