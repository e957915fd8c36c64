"""Finding the transformers class that a checkpoint was saved with."""

from __future__ import annotations

from typing import Any

import transformers
from transformers import AutoConfig, PreTrainedConfig

from hf_sparse.checkpoint.model_classes import model_class_named


def dense_model_class(source: str, config: PreTrainedConfig | None = None) -> Any:
    """The class that `architectures` of a dense checkpoint's config names.

    Args:
        source: folder or Hub name.
        config: of it, if it is known already.

    Raises:
        ValueError: it names none, or one that transformers does not have.
    """
    config = AutoConfig.from_pretrained(source) if config is None else config
    name = (config.architectures or [""])[0]
    found = model_class_named(name, type(config))
    if found is None:
        raise ValueError(
            f"{source}: config.json names the class {name!r}, which is not in transformers "
            f"{transformers.__version__}. Save the model again with a current version."
        )
    return found
