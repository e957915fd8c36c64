"""SparseBertModel and its siblings: the transformers class plus the sparse contract.

Forward code is inherited, never copied. The classes are made from transformers' own when they are
first asked for, since importing those takes about a second.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import AutoTokenizer, PreTrainedConfig, PreTrainedModel

from hf_sparse.checkpoint.promised import check_to_load
from hf_sparse.checkpoint.reading import restore_state_dict
from hf_sparse.checkpoint.save import is_saving_process, save_model
from hf_sparse.checkpoint.sparse_configs import base_config_class, sparse_config_class
from hf_sparse.hub import push_to_hub as push
from hf_sparse.structure.parts import sizes_in
from hf_sparse.structure.units import resize_
from hf_sparse.upstream.transformers.auto import auto_classes, tokenizers_of
from hf_sparse.upstream.transformers.models import import_modeling

_UPLOAD_ARGUMENTS = {
    "commit_message",
    "commit_description",
    "private",
    "token",
    "create_pr",
    "tags",
}


class SparseModelMixin:
    """The sparse contract: weights are compressed when saved, and restored when loaded.

    A config with `block_sizes` makes blocks as small as those that `hf_sparse.shrink_` left.
    """

    def __init__(self, config: PreTrainedConfig, *args: Any, **kwargs: Any) -> None:
        sizes = sizes_in(config)
        super().__init__(config, *args, **kwargs)  # type: ignore[call-arg]
        if sizes is not None:
            resize_(self, sizes)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """As `PreTrainedModel.from_pretrained`; a damaged folder is refused before a model is built.

        Raises:
            FormatError: the checkpoint is damaged, incomplete, or of another model than its
                config.json describes.
        """
        check_to_load(pretrained_model_name_or_path, kwargs.get("subfolder"), kwargs.get("variant"))
        return super().from_pretrained(  # type: ignore[misc]
            pretrained_model_name_or_path, *args, **kwargs
        )

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
            FormatError: a compressed tensor is damaged, or of another shape than the model's.
        """
        own: Any = super().state_dict()  # type: ignore[misc]
        shapes = {name: tuple(tensor.shape) for name, tensor in own.items()}
        restored = restore_state_dict(state_dict, shapes)
        return super().load_state_dict(restored, strict, assign)  # type: ignore[misc]


@cache
def model_classes(model_type: str) -> dict[str, type[PreTrainedModel]]:
    """The Sparse classes of a family by name, one for each public class of transformers."""
    module = import_modeling(model_type)
    bases = [getattr(module, name) for name in module.__all__]
    bases = [base for base in bases if inspect.isclass(base) and issubclass(base, PreTrainedModel)]
    classes = {
        f"Sparse{base.__name__}": _define(base, model_type)
        for base in bases
        if not base.__name__.endswith("PreTrainedModel")
    }
    return classes


def _define(base: type[PreTrainedModel], model_type: str) -> type[PreTrainedModel]:
    body = {
        "config_class": sparse_config_class(model_type),
        "__module__": "hf_sparse.models",
        "__doc__": (
            f"{base.__name__} that is stored compressed. Takes the same arguments; "
            "`from_pretrained` reads dense and compressed checkpoints alike."
        ),
    }
    return type(f"Sparse{base.__name__}", (SparseModelMixin, base), body)


@cache
def register_models(model_type: str) -> None:
    """Register the Sparse classes and the tokenizer of a family with transformers' Auto classes."""
    config_class = sparse_config_class(model_type)
    base_config = base_config_class(model_type)
    classes = model_classes(model_type)
    for auto_class, base in auto_classes(base_config):
        if (name := f"Sparse{base.__name__}") in classes:  # some configs have heads of others
            auto_class.register(config_class, classes[name], exist_ok=True)
    if (tokenizer := tokenizers_of(base_config)) is not None:
        AutoTokenizer.register(config_class, tokenizer, exist_ok=True)
