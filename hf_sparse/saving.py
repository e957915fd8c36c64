"""`save_pretrained`: adapters are merged first, then the checkpoint is written."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from hf_sparse.adapters.merging import merged_copy
from hf_sparse.arguments import arguments_for, check_kinds, check_model, check_path
from hf_sparse.checkpoint.save import ADAPTERS, save_model
from hf_sparse.configuration_sparse import SparsityConfig, check_config
from hf_sparse.provenance.values import Metric
from hf_sparse.report import SparsityReport
from hf_sparse.upstream.peft_by_name import has_adapters, is_peft_model
from hf_sparse.upstream.transformers.models import has_own_adapters


def save_pretrained(
    model: PreTrainedModel,
    folder: str | os.PathLike[str],
    config: SparsityConfig | None = None,
    *,
    tokenizer: Any = None,
    report: SparsityReport | None = None,
    metrics: Sequence[Metric] = (),
    tags: Sequence[str] = (),
    base_model: str | None = None,
    card_data: Mapping[str, Any] | None = None,
    **kwargs: Any,
) -> Path:
    """Save a model so that `AutoModel*.from_pretrained(folder)` gives the same weights back.

    Weights of the config's targets are stored compressed, bit for bit (`-0.0` as `0.0`), under
    `model_type: "sparse_..."`; so are other matrices of the blocks that get smaller by it, such as
    those that another pattern was pruned into before. Where the config has bits, the codes and scales
    of its weights are stored; what is loaded has their products, exact in float32. With
    `format="dense"` the zeros are written in place under the family's own type, which loads without
    hf_sparse. The folder's old files stay untouched until the new ones are complete (see
    `hf_sparse.files.atomic`).

    Args:
        model: a transformers model, of any type that AutoConfig knows. A `peft.PeftModel` is
            copied, and its adapters are merged into the copy as `merge_adapters_` does it: the zeros
            stay, and who loads it needs no adapter. (Its own `save_pretrained` saves the adapter
            alone.)
        folder: made if it does not exist. Other files in it stay, but for weights: what
            `save_compiled` wrote there before, and a `pytorch_model.bin`, with a warning. A README.md
            that is no card of hf_sparse stays, with a warning.
        config: pattern, targets and format. None: what the model was pruned with or loaded with,
            or else `unstructured` at the sparsity that is measured.
        tokenizer: saved beside the model if given.
        report: of a step that the model does not remember. It remembers all that was done to it here
            (pruning, sparse training, recovery, merging, shrinking), and what the checkpoint that it
            was loaded from tells.
        metrics: measured figures for the model card. Without any: those that are known of the model, if
            its weights are still the same.
        tags: for the model card, beside its own.
        base_model: Hub name of the dense model, for the card. None: what is known, or what the model
            was loaded from, if that was no folder.
        card_data: for the metadata of the model card, which the Hub searches by: `license`,
            `license_name`, `license_link`, `language`, `datasets` and `tags`, such as
            `{"license": "apache-2.0", "language": "en"}`. Later saves keep them.
        **kwargs: `max_shard_size` (default `"5GB"`), `state_dict`, `is_main_process` and `variant`
            as in `PreTrainedModel.save_pretrained`. If there are several processes, the first saves.

    Returns:
        The folder.

    Memory: beside the model, one shard.

    Raises:
        OffGridError: weights that `config` promises few bits of are not on its grid; it tells where,
            and how many. (With `config=None` a warning: they are saved with the values that they have.)
        ValueError: the model's code is not registered with the Auto classes, or its config does not
            describe it; an adapter without a mask would fill zeros, a weight breaks the N:M pattern
            that `config` promises, the format cannot hold it, or the folder holds an ONNX export.
            Nothing has been written then. (With
            `config=None` a broken N:M promise is a warning, and the model is saved as
            `unstructured`: a Trainer must be able to write its checkpoints.)
        OSError: the folder cannot be written or the disk is full. Nothing has changed then.
    """
    given = dict(locals())
    check_path(folder, "save_pretrained")
    if config is not None:
        check_config(config)
    check_kinds(save_pretrained, given)
    if is_peft_model(model):
        model = merged_copy(model)
    check_model(model, "save_pretrained", PreTrainedModel)
    if has_own_adapters(model) or has_adapters(model):
        raise ValueError(ADAPTERS)
    folder = Path(folder)
    save_model(model, folder, **arguments_for(save_model, given), **kwargs)
    return folder
