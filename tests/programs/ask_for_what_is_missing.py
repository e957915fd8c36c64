"""Ask the Hub for what it does not have: the client raises its own errors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from huggingface_hub import HfApi, hf_hub_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    HfHubHTTPError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from transformers import AutoModel


def raised(call: Callable[..., Any], *arguments: Any, **options: Any) -> tuple[type, ...]:
    try:
        call(*arguments, **options)
    except Exception as error:
        return type(error).__mro__
    return ()


api = HfApi()
assert RepositoryNotFoundError in raised(api.model_info, "user/missing")
assert RepositoryNotFoundError in raised(hf_hub_download, "user/missing", "config.json")
assert OSError in raised(AutoModel.from_pretrained, "user/missing")
api.create_repo("user/empty")
assert EntryNotFoundError in raised(hf_hub_download, "user/empty", "config.json")
assert RevisionNotFoundError in raised(api.model_info, "user/empty", revision="v1")
assert HfHubHTTPError in raised(HfApi(token=False).create_repo, "user/other")
