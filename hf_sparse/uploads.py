"""What an upload does to a repository of the Hub: planned without writing, then done in one commit."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import (
    CommitInfo,
    CommitOperationAdd,
    CommitOperationDelete,
    EvalResultEntry,
    HfApi,
    eval_result_entries_to_yaml,
)
from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

from hf_sparse.checkpoint.card import CARD_NAME, OUR_FACT
from hf_sparse.checkpoint.card_file import settle
from hf_sparse.checkpoint.source import stored_in
from hf_sparse.checkpoint.writing import MANIFEST_NAME, is_weight_file
from hf_sparse.exporters.can_export import written_files

GRAPH_FOLDER = "onnx"
# Results in the form that the Hub shows on a model's page and on the benchmark's.
RESULTS_NAME = ".eval_results/hf_sparse.yaml"
_NOT_UPLOADED = (".git", ".cache", "__pycache__", ".DS_Store")
# Any of these makes a repository a model's.
_OF_A_MODEL = ("config.json", "adapter_config.json", CARD_NAME)


@dataclass(frozen=True)
class Upload:
    """What is to be done.

    Attributes:
        repo_id: with its owner, if the Hub told.
        exists: whether the repository does.
        files: what goes up, by its name there.
        removed: files that are there and go, since they would contradict.
        replaced: files that are there and get other content, or may.
        foreign: why what is there is not an earlier upload of hf_sparse; None if it is, or nothing.
        warning: of a card that stays.
        head: the commit that was looked at.
        private: of a repository that is made.
        makes_branch: whether there is no branch of that name yet.
    """

    repo_id: str
    exists: bool
    files: dict[str, Path | bytes]
    removed: tuple[str, ...] = ()
    replaced: tuple[str, ...] = ()
    foreign: str | None = None
    warning: str | None = None
    head: str | None = None
    private: bool | None = None
    makes_branch: bool = False

    @property
    def bytes(self) -> int:
        """Of all files."""
        return sum(map(_size, self.files.values()))

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "repo_id": self.repo_id,
            "exists": self.exists,
            "files": {name: _size(content) for name, content in self.files.items()},
            "bytes": self.bytes,
            "removed": list(self.removed),
            "replaced": list(self.replaced),
            "foreign": self.foreign,
        }

    def __str__(self) -> str:
        lines = [f"{self.repo_id} {'is there' if self.exists else 'would be made'}"]
        for name, content in self.files.items():
            what = "replace" if name in self.replaced else "add"
            lines.append(f"  {what:8}{name}  {_size(content) / 1e6:,.2f} MB")
        lines += [f"  {'remove':8}{name}" for name in self.removed]
        lines.append(f"{len(self.files)} files, {self.bytes / 1e6:,.2f} MB, in one commit")
        return "\n".join([*lines, *([self.foreign] if self.foreign else [])])


def _size(content: Path | bytes) -> int:
    return len(content) if isinstance(content, bytes) else content.stat().st_size


def plan_upload(
    api: HfApi,
    folder: Path,
    repo_id: str,
    *,
    revision: str | None = None,
    private: bool | None = None,
    settle_card: bool = False,
) -> Upload:
    """Find out what an upload of a checkpoint folder does. Nothing is written, here or there.

    Args:
        api: of the Hub.
        folder: with sub-folders.
        repo_id: `"name"` or `"user/name"`.
        revision: a branch; None: main.
        private: of a repository that is made.
        settle_card: the card is written anew with regard to the one that is there; see
            `hf_sparse.checkpoint.card_file.settle`.
    """
    files: dict[str, Path | bytes] = {
        path.relative_to(folder).as_posix(): path
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not set(path.relative_to(folder).parts) & set(_NOT_UPLOADED)
    }
    results = results_of(folder)
    if results is not None:
        files[RESULTS_NAME] = results
    if "/" not in repo_id:  # of whoever uploads; by itself the Hub takes it for a name of old
        repo_id = f"{api.whoami()['name']}/{repo_id}"
    try:
        info = api.model_info(repo_id, revision=revision)
    except RevisionNotFoundError:
        return Upload(repo_id, True, files, private=private, makes_branch=True)
    except RepositoryNotFoundError:
        return Upload(repo_id, False, files, private=private, makes_branch=revision is not None)
    there = [sibling.rfilename for sibling in info.siblings or ()]
    with tempfile.TemporaryDirectory() as temporary:
        old = _read(api, info.id, CARD_NAME, there, revision, Path(temporary))
        warning = None
        if settle_card and old is not None and CARD_NAME in files:
            card = files[CARD_NAME]
            new = card.decode() if isinstance(card, bytes) else card.read_text(encoding="utf-8")
            settled, warning = settle(new, old, f"{CARD_NAME} of {info.id}")
            files[CARD_NAME] = settled.encode()
        stale = {name for name in there if is_weight_file(name) or name == RESULTS_NAME}
        stale |= _old_graph(api, info.id, there, revision, Path(temporary))
    ours = old is not None and OUR_FACT in old
    has_model = any(is_weight_file(name) or name in _OF_A_MODEL for name in there)
    foreign = None
    if has_model and not ours:
        foreign = (
            f"{info.id} holds a model, and its {CARD_NAME} is no card of hf_sparse: files of the same "
            "names are replaced, and other weight files removed. The repository's history keeps them."
        )
    return Upload(
        info.id,
        True,
        files,
        tuple(sorted(stale - files.keys())),
        tuple(name for name in files if name in there),
        foreign,
        warning,
        info.sha,
        private,
    )


def carry_out(
    api: HfApi,
    upload: Upload,
    *,
    revision: str | None = None,
    create_pr: bool = False,
    commit_message: str = "Upload sparse model",
    commit_description: str | None = None,
) -> CommitInfo:
    """Do what was planned: the repository is made if need be, and everything comes in one commit.

    What an upload that broke off had sent of large files is not sent again. If somebody has committed
    since the plan was made, the Hub refuses.
    """
    repo = api.create_repo(upload.repo_id, private=upload.private, exist_ok=True)
    if upload.makes_branch and revision is not None:
        api.create_branch(repo.repo_id, branch=revision, exist_ok=True)
    operations: list[CommitOperationAdd | CommitOperationDelete] = [
        CommitOperationAdd(name, content if isinstance(content, bytes) else str(content))
        for name, content in upload.files.items()
    ]
    operations += [CommitOperationDelete(name, is_folder=False) for name in upload.removed]
    return api.create_commit(
        repo.repo_id,
        operations,
        commit_message=commit_message,
        commit_description=commit_description,
        revision=revision,
        create_pr=create_pr,
        parent_commit=upload.head,
    )


def results_of(folder: Path) -> bytes | None:
    """The metrics of a folder that name a benchmark of the Hub, as its own YAML; None if none do."""
    entries = [
        EvalResultEntry(
            dataset_id=metric.dataset,
            task_id=metric.task,
            value=metric.sparse,
            notes=metric.name + ("" if metric.dense is None else f"; dense {metric.dense:.6g}"),
        )
        for metric in stored_in(folder).metrics
        if metric.dataset is not None and metric.task is not None
    ]
    if not entries:
        return None
    plain = eval_result_entries_to_yaml(entries)
    return str(yaml.safe_dump(plain, sort_keys=False, allow_unicode=True)).encode()


def _read(
    api: HfApi, repo_id: str, name: str, there: list[str], revision: str | None, place: Path
) -> str | None:
    """The text of a file of a repository; None if it is not there."""
    if name not in there:
        return None
    api.hf_hub_download(repo_id, name, revision=revision, local_dir=place)
    return (place / name).read_text(encoding="utf-8", errors="replace")


def _old_graph(
    api: HfApi, repo_id: str, there: list[str], revision: str | None, place: Path
) -> set[str]:
    """The files of an export of hf_sparse in the folder `onnx/` of a repository."""
    about = [f"{GRAPH_FOLDER}/{name}" for name in (MANIFEST_NAME, CARD_NAME)]
    texts = [_read(api, repo_id, name, there, revision, place) for name in about]
    if texts[0] is None or texts[1] is None or OUR_FACT not in texts[1]:
        return set()
    ours = written_files(place / GRAPH_FOLDER) | {MANIFEST_NAME, CARD_NAME, "config.json"}
    return {name for name in there if name in {f"{GRAPH_FOLDER}/{file}" for file in ours}}
