"""Push a dense model with the client of the Hub and pull it again."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from huggingface_hub import HfApi, hf_hub_download, snapshot_download
from transformers import AutoModel, AutoTokenizer, BertTokenizer

from tests.support.tiny_models import tiny_model

folder, repo = Path(sys.argv[1]), "user/tiny"
model = tiny_model("bert", num_hidden_layers=1)
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
