"""Proves the stand-in for the Hub with the real client libraries, each in a fresh process."""

import os
import subprocess
import sys
from pathlib import Path

from tests.support.hub_stand_in import HubStandIn

PUSH_AND_PULL = """
import sys
from pathlib import Path

import torch
from huggingface_hub import HfApi, hf_hub_download, snapshot_download
from transformers import AutoModel, AutoTokenizer, BertConfig, BertModel, BertTokenizer

folder, repo = Path(sys.argv[1]), "user/tiny"
sizes = dict(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64)
model = BertModel(BertConfig(vocab_size=8, **sizes))
model.save_pretrained(folder)
words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "b", "c"]
tokenizer = BertTokenizer(vocab={word: i for i, word in enumerate(words)})
tokenizer.save_pretrained(folder)
(folder / "onnx").mkdir()
(folder / "onnx" / "x.txt").write_text("inner")

api = HfApi()
assert api.whoami()["name"] == "user"
assert not api.repo_exists(repo)
api.create_repo(repo)
assert api.create_repo(repo, exist_ok=True).repo_id == repo
pushed = api.upload_folder(repo_id=repo, folder_path=folder, commit_message="Add the model")

local = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
assert set(api.list_repo_files(repo)) == local | {".gitattributes"}
assert api.model_info(repo).sha == pushed.oid
assert Path(hf_hub_download(repo, "onnx/x.txt")).read_text() == "inner"
copy = Path(snapshot_download(repo, revision=pushed.oid))
assert all((copy / name).read_bytes() == (folder / name).read_bytes() for name in local)

weights = model.state_dict()
pulled = AutoModel.from_pretrained(repo).state_dict()
assert pulled.keys() == weights.keys()
assert all(torch.equal(pulled[name], weights[name]) for name in weights)
assert AutoTokenizer.from_pretrained(repo)("a b")["input_ids"] == tokenizer("a b")["input_ids"]

api.delete_file("onnx/x.txt", repo, commit_message="Remove a file")
assert not api.file_exists(repo, "onnx/x.txt")
assert api.file_exists(repo, "onnx/x.txt", revision=pushed.oid)
"""

MISSING = """
from huggingface_hub import HfApi, hf_hub_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    HfHubHTTPError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from transformers import AutoModel


def raised(call, *arguments, **options):
    try:
        call(*arguments, **options)
    except Exception as error:
        return type(error).__mro__


api = HfApi()
assert RepositoryNotFoundError in raised(api.model_info, "user/missing")
assert RepositoryNotFoundError in raised(hf_hub_download, "user/missing", "config.json")
assert OSError in raised(AutoModel.from_pretrained, "user/missing")
api.create_repo("user/empty")
assert EntryNotFoundError in raised(hf_hub_download, "user/empty", "config.json")
assert RevisionNotFoundError in raised(api.model_info, "user/empty", revision="v1")
assert HfHubHTTPError in raised(HfApi(token=False).create_repo, "user/other")
"""


def run_client(hub: HubStandIn, script: str, tmp_path: Path, *arguments: str) -> None:
    command = [sys.executable, "-c", script, *arguments]
    environment = hub.environment(tmp_path / "home")
    result = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    assert result.returncode == 0, result.stderr


def test_a_pushed_model_comes_back(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    with HubStandIn() as hub:
        run_client(hub, PUSH_AND_PULL, tmp_path, os.fspath(folder))
        files = hub.files("user/tiny")
        assert hub.repos["user/tiny"][-1].files["model.safetensors"].large
        assert files["model.safetensors"] == (folder / "model.safetensors").read_bytes()
        assert files["config.json"] == (folder / "config.json").read_bytes()
        assert "onnx/x.txt" not in files
        assert hub.commits("user/tiny") == ["initial commit", "Add the model", "Remove a file"]


def test_what_is_missing_raises_the_clients_errors(tmp_path: Path) -> None:
    with HubStandIn(lfs=False) as hub:
        run_client(hub, MISSING, tmp_path)
        assert list(hub.files("user/empty")) == [".gitattributes"]
