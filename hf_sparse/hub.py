"""Publishing sparse models on the Hugging Face Hub."""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import CommitInfo, HfApi, get_token
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]
from transformers import PreTrainedModel

from hf_sparse.adapters.merging import merged_copy
from hf_sparse.arguments import arguments_for, check_kinds, check_model, check_saves
from hf_sparse.configuration_sparse import SparsityConfig, check_config
from hf_sparse.counts import SparsityReport
from hf_sparse.exporters.can_export import check_packages
from hf_sparse.exporters.onnx_export import export_onnx
from hf_sparse.provenance.values import Metric
from hf_sparse.saving import save_pretrained
from hf_sparse.uploads import GRAPH_FOLDER, carry_out, plan_upload
from hf_sparse.upstream.peft_by_name import is_peft_model


def push_to_hub(
    model: PreTrainedModel,
    repo_id: str,
    config: SparsityConfig | None = None,
    *,
    tokenizer: Any = None,
    report: SparsityReport | None = None,
    metrics: Sequence[Metric] = (),
    commit_message: str = "Upload sparse model",
    commit_description: str | None = None,
    private: bool | None = None,
    token: bool | str | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    tags: Sequence[str] = (),
    base_model: str | None = None,
    card_data: Mapping[str, Any] | None = None,
    onnx: bool = False,
    **saving: Any,
) -> CommitInfo:
    """Upload a model compressed, with a model card that holds what is known and measured.

    What is uploaded is exactly the folder that `save_pretrained` writes; weight files of an
    earlier upload that it does not replace, and its graph in `onnx/`, are removed in the same
    commit. A card of hf_sparse that is there already stays while it tells all that is known now; one
    of somebody else stays, with a warning. Metrics that name a benchmark of the Hub (`dataset` and
    `task` of `Metric`) also become results there, in `.eval_results/`.

    Args:
        model: as in `save_pretrained`, with `config`, `tokenizer`, `report`, `metrics`, `base_model`
            and `card_data`.
        repo_id: `"name"` or `"user/name"`; made if it does not exist.
        commit_message, commit_description, private, token, revision, create_pr: as in
            `PreTrainedModel.push_to_hub`.
        tags: for the model card, beside its own.
        onnx: also put the graph of `export_onnx` into the folder `onnx/`, so that one repository
            serves transformers, Optimum (`subfolder="onnx"`) and ONNX Runtime.
        **saving: other arguments of `save_pretrained`, such as `max_shard_size`.

    Returns:
        The commit.

    Raises:
        ValueError: see `save_pretrained` and `export_onnx`; nothing has been uploaded then.
        huggingface_hub.errors.HfHubHTTPError: the Hub refused.
    """
    given = dict(locals())
    if not is_peft_model(model):
        check_model(model, "push_to_hub", PreTrainedModel)
    if config is not None:
        check_config(config)
    check_kinds(push_to_hub, given)
    check_saves(tokenizer, "push_to_hub")
    if onnx:
        check_packages()
    check_can_push(repo_id, token)
    if is_peft_model(model):
        model = merged_copy(model)
    with tempfile.TemporaryDirectory() as temporary:
        told = arguments_for(save_pretrained, given)
        folder = save_pretrained(model, Path(temporary) / "model", config, **told, **saving)
        if onnx:
            export_onnx(model, folder / GRAPH_FOLDER, tokenizer=tokenizer)
        return upload_folder(
            folder, repo_id, **arguments_for(upload_folder, given), settle_card=True
        )


def check_can_push(repo_id: str, token: bool | str | None = None) -> None:
    """Refuse an upload for its name, or for want of a token, without asking the Hub.

    Args:
        repo_id: `"name"` or `"user/name"`.
        token: as `push_to_hub`'s.

    Raises:
        ValueError: the Hub takes no such name (huggingface_hub's `HFValidationError`), or no token is
            given or stored.
    """
    validate_repo_id(repo_id)
    if not isinstance(token, str) and (token is False or get_token() is None):
        raise ValueError(
            f"uploading to {repo_id} needs a token of the Hub that may write. Log in with `hf auth "
            "login`, or set HF_TOKEN, or give token=."
        )


def upload_folder(
    folder: Path,
    repo_id: str,
    *,
    private: bool | None = None,
    token: bool | str | None = None,
    commit_message: str = "Upload sparse model",
    commit_description: str | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    settle_card: bool = False,
) -> CommitInfo:
    """Upload a checkpoint folder, sub-folders included, to a repository that is made if need be.

    Weight files and an `onnx/` of hf_sparse that are there and are not uploaded are removed.
    With `settle_card` the model card is written anew with regard to the one in the repository: see
    `hf_sparse.checkpoint.card_file.settle`.
    """
    api = HfApi(token=token)
    upload = plan_upload(
        api, folder, repo_id, revision=revision, private=private, settle_card=settle_card
    )
    if upload.warning is not None:
        warnings.warn(upload.warning, stacklevel=3)
    return carry_out(
        api,
        upload,
        revision=revision,
        create_pr=create_pr,
        commit_message=commit_message,
        commit_description=commit_description,
    )
