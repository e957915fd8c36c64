"""Uploads to a stand-in of the Hub, which lives in this process: those of forked ones reach it, too."""

from __future__ import annotations

import atexit
import shutil
import tempfile
import threading
from functools import cache
from pathlib import Path
from typing import Any

from huggingface_hub import constants
from transformers import AutoModelForCausalLM

import hf_sparse
from hf_sparse.checkpoint.digests import digest_of
from tests.support import hub_stand_in
from tests.support.hub_stand_in import HubStandIn

# Where temporary files of an upload lie, beside the artefacts of an operation.
ROOM = "room"


@cache
def _hub() -> HubStandIn:
    """The stand-in, to which the client of this process is pointed until its end."""
    hub, cache_of_hub = HubStandIn(), tempfile.mkdtemp()
    starter = threading.Thread(target=hub.__enter__, daemon=True)  # so that its thread is one, too
    starter.start()
    starter.join()
    atexit.register(shutil.rmtree, cache_of_hub, ignore_errors=True)
    hub_stand_in._Server.handle_error = lambda *about: None  # type: ignore[method-assign]
    client: Any = constants
    client.ENDPOINT, client.HF_HUB_OFFLINE, client.HF_HUB_DISABLE_XET = hub.endpoint, False, True
    client.HUGGINGFACE_CO_URL_TEMPLATE = hub.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    client.HF_HUB_CACHE = cache_of_hub
    return hub


def begin(folder: Path, model: Any) -> None:
    """A new repository that holds a model."""
    _hub().repos.pop(_repository(folder), None)
    push(folder, model)


def push(folder: Path, model: Any) -> None:
    """Upload a model in place of the one that is there."""
    room = folder / ROOM
    shutil.rmtree(room, ignore_errors=True)  # as the system does it with temporary files
    room.mkdir()
    before, tempfile.tempdir = tempfile.tempdir, str(room)
    try:
        hf_sparse.push_to_hub(model, _repository(folder), token="hf_dummy")
    finally:
        tempfile.tempdir = before


def state(folder: Path) -> str:
    """The weights of the model in the repository, which is whole."""
    with tempfile.TemporaryDirectory() as copy:
        for name, content in _hub().files(_repository(folder)).items():
            (Path(copy) / name).parent.mkdir(parents=True, exist_ok=True)
            (Path(copy) / name).write_bytes(content)
        hf_sparse.inspect_checkpoint(copy)
        return digest_of(AutoModelForCausalLM.from_pretrained(copy).state_dict())


def _repository(folder: Path) -> str:
    return f"user/tiny-{folder.name}"
