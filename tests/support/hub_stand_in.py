"""A local stand-in for the Hugging Face Hub, for tests that push and pull without a network.

`HubStandIn` serves the Hub's HTTP API for model repositories on 127.0.0.1, from memory. There is
one branch, `main`, and every commit hash works as a revision. As on the Hub, a new repository
starts with an "initial commit" that holds `.gitattributes`, and calls that write need a token
(any token). Not served: datasets, spaces, branches, tags, pull requests, copies, range requests.

Use it from a subprocess, because `huggingface_hub` reads `HF_ENDPOINT` when it is imported:
`subprocess.run([...], env=hub.environment(tmp_path))`. In the test's own process
`HfApi(endpoint=hub.endpoint, token="hf_dummy")` works too; what takes no endpoint, such as
`from_pretrained`, also needs these patched: `ENDPOINT`, `HUGGINGFACE_CO_URL_TEMPLATE` and
`HF_HUB_CACHE` of `huggingface_hub.constants`, `huggingface_hub.hf_api.api.endpoint`, and
`transformers.utils.hub._hf_api` set to None.

Large files come in over plain Git LFS. Where `hf_xet` is installed the client would use Xet for
them whatever the server offers; only `HF_HUB_DISABLE_XET=1` (in-process: the constant of that
name) prevents it, and `environment` sets it. `HubStandIn(lfs=False)` needs no switch: it asks the
client to send all files inline.
"""

import base64
import hashlib
import json
import os
import re
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path, PurePosixPath
from typing import Any, Self
from urllib.parse import parse_qs, unquote, urlsplit

LARGE_SUFFIXES = (".bin", ".h5", ".model", ".msgpack", ".onnx", ".pt", ".pth", ".safetensors")
LARGE_SIZE = 10 * 1024 * 1024
GIT_ATTRIBUTES = "".join(f"*{s} filter=lfs diff=lfs merge=lfs -text\n" for s in LARGE_SUFFIXES)
USER = "user"
DATE = "2024-01-01T00:00:00.000Z"
CLIENT_VARIABLES = ("HF_", "HUGGING", "TRANSFORMERS_")
REPO = r"(?P<repo>[^/]+(?:/[^/]+?)??)"
API = rf"/api/models/{REPO}"


@dataclass(frozen=True)
class StoredFile:
    """One file of a repository; `large` files are those that came in over Git LFS."""

    content: bytes
    large: bool = False

    @cached_property
    def blob_id(self) -> str:
        """The hash that git gives to the content."""
        return hashlib.sha1(b"blob %d\0" % len(self.content) + self.content).hexdigest()

    @cached_property
    def etag(self) -> str:
        """What the client compares with its own copy: sha256 of LFS files, else the git hash."""
        return hashlib.sha256(self.content).hexdigest() if self.large else self.blob_id

    def facts(self) -> dict[str, Any]:
        """Size and hashes, in the words of both listings: the tree and `siblings`."""
        size = len(self.content)
        lfs = {"oid": self.etag, "sha256": self.etag, "size": size, "pointerSize": 134}
        facts = {"size": size, "oid": self.blob_id, "blobId": self.blob_id}
        return {**facts, "lfs": lfs} if self.large else facts


Files = dict[str, StoredFile]


@dataclass(frozen=True)
class Commit:
    """The state of a repository after one commit."""

    title: str
    sha: str
    files: Files


@dataclass(frozen=True)
class Reply:
    """An HTTP answer; `body` is sent as JSON unless it is bytes."""

    body: Any
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)


class HubError(Exception):
    """An answer other than success, with the headers from which the client picks its exception."""

    def __init__(
        self, status: int, message: str, code: str = "", commit: Commit | None = None
    ) -> None:
        sha = commit.sha if commit else ""
        headers = {"X-Error-Code": code, "X-Error-Message": message, "X-Repo-Commit": sha}
        super().__init__(message)
        sent = {name: value for name, value in headers.items() if value}
        self.reply = Reply({"error": message}, status, sent)


def _entries(files: Files) -> list[dict[str, Any]]:
    """All files and folders in the form of the Hub's tree listing."""
    folders = {p.as_posix() for path in files for p in PurePosixPath(path).parents} - {"."}
    entries: list[dict[str, Any]] = [
        {"type": "directory", "path": path, "oid": "0" * 40, "size": 0} for path in folders
    ]
    entries += [{"type": "file", "path": path, **file.facts()} for path, file in files.items()]
    return sorted(entries, key=lambda entry: entry["path"])


class HubStandIn:
    """A running stand-in for the Hub; see the module's docstring for how to point a client at it.

    Use it as a context manager. With `lfs=False` the client is asked to send all files inline, so
    that it needs neither Git LFS nor Xet.
    """

    def __init__(self, lfs: bool = True) -> None:
        self.lfs = lfs
        self.repos: dict[str, list[Commit]] = {}
        self.blobs: dict[str, bytes] = {}
        self.lock = threading.Lock()
        self.endpoint = ""

    def __enter__(self) -> Self:
        self._server = _Server(self)
        self.endpoint = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,))
        self._thread.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    def files(self, repo_id: str) -> dict[str, bytes]:
        """What the repository holds now: path -> content."""
        return {path: file.content for path, file in self.at(repo_id).files.items()}

    def commits(self, repo_id: str) -> list[str]:
        """The commit titles, oldest first."""
        return [commit.title for commit in self.repos[repo_id]]

    def environment(self, home: Path) -> dict[str, str]:
        """The variables for a subprocess whose Hub is this one and whose cache is below `home`."""
        kept = {k: v for k, v in os.environ.items() if not k.startswith(CLIENT_VARIABLES)}
        proxy = dict.fromkeys(("NO_PROXY", "no_proxy"), "127.0.0.1,localhost")
        client = {"HF_ENDPOINT": self.endpoint, "HF_TOKEN": "hf_dummy", "HF_HOME": str(home)}
        switches = {"HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}
        return {**kept, **proxy, **client, **switches}

    def at(self, repo_id: str, revision: str = "main") -> Commit:
        """The commit that `revision` (`main` or a commit hash) stands for."""
        if repo_id not in self.repos:
            raise HubError(404, "Repository not found", "RepoNotFound")
        for commit in reversed(self.repos[repo_id]):
            if revision in ("main", commit.sha):
                return commit
        raise HubError(404, f"Invalid rev id: {revision}", "RevisionNotFound")

    def add_commit(self, repo_id: str, title: str, files: Files) -> Commit:
        """Appends a commit, whose hash follows from its content and its predecessors."""
        history = self.repos.setdefault(repo_id, [])
        parent = history[-1].sha if history else repo_id
        state = [parent, title, sorted((path, file.etag) for path, file in files.items())]
        commit = Commit(title, hashlib.sha1(json.dumps(state).encode()).hexdigest(), files)
        history.append(commit)
        return commit


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, hub: HubStandIn) -> None:
        self.hub = hub
        super().__init__(("127.0.0.1", 0), _Handler)


class _Handler(BaseHTTPRequestHandler):
    """Answers one connection; each public method stands for one endpoint of the Hub."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: _Server

    def log_message(self, *args: object) -> None:
        """Keeps the test output quiet."""

    def _answer(self) -> None:
        self.hub = self.server.hub
        self.body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        url = urlsplit(self.path)
        self.query = parse_qs(url.query)
        try:
            with self.hub.lock:
                reply = self._dispatch(url.path)
        except HubError as error:
            reply = error.reply
        self._send(reply)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = _answer

    def _dispatch(self, path: str) -> Reply:
        for methods, pattern, endpoint in ROUTES:
            match = re.fullmatch(pattern, path)
            if match and self.command in methods.split():
                groups = match.groupdict(default="")
                return endpoint(self, **{name: unquote(text) for name, text in groups.items()})
        raise HubError(404, f"The stand-in has no endpoint {self.command} {path}")

    def _send(self, reply: Reply) -> None:
        content = reply.body if isinstance(reply.body, bytes) else json.dumps(reply.body).encode()
        self.send_response(reply.status)
        for name, value in {"Content-Length": str(len(content)), **reply.headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def _require_token(self) -> None:
        if not self.headers.get("Authorization", "").startswith("Bearer "):
            raise HubError(401, "Invalid username or password.")

    def whoami(self) -> Reply:
        """Who the token belongs to."""
        self._require_token()
        return Reply({"type": "user", "name": USER, "fullname": "A User", "orgs": []})

    def validate_yaml(self) -> Reply:
        """The check of a model card's metadata, which here never complains."""
        return Reply({"errors": [], "warnings": []})

    def create_repo(self) -> Reply:
        """A new repository; 409 if there is one of that name, which `exist_ok` accepts."""
        self._require_token()
        payload = json.loads(self.body)
        repo = f"{payload.get('organization') or USER}/{payload['name']}"
        url = {"url": f"{self.hub.endpoint}/{repo}"}
        if repo in self.hub.repos:
            return Reply({"error": "You already created this model repo", **url}, 409)
        attributes = StoredFile(GIT_ATTRIBUTES.encode())
        self.hub.add_commit(repo, "initial commit", {".gitattributes": attributes})
        return Reply({**url, "name": repo})

    def model_info(self, repo: str, revision: str = "main") -> Reply:
        """Facts about a repository, with its file list (`siblings`)."""
        commit = self.hub.at(repo, revision or "main")
        siblings = [
            {"rfilename": path, **(file.facts() if "blobs" in self.query else {})}
            for path, file in sorted(commit.files.items())
        ]
        info = {"id": repo, "modelId": repo, "author": repo.split("/")[0], "sha": commit.sha}
        state = {"private": False, "gated": False, "tags": [], "lastModified": DATE}
        return Reply({**info, **state, "siblings": siblings})

    def tree(self, repo: str, revision: str, folder: str = "") -> Reply:
        """The listing of a folder, with or without what lies deeper."""
        commit = self.hub.at(repo, revision)
        start = f"{folder}/" if folder else ""
        below = [entry for entry in _entries(commit.files) if entry["path"].startswith(start)]
        if folder and not below:
            raise HubError(404, f"{folder} does not exist", "EntryNotFound", commit)
        if self.query.get("recursive", [""])[0].lower() not in ("true", "1"):
            below = [entry for entry in below if "/" not in entry["path"][len(start) :]]
        return Reply(below)

    def preupload(self, repo: str, revision: str) -> Reply:
        """How the client is to send each file: inline ("regular") or over Git LFS ("lfs")."""
        self._require_token()
        files = self.hub.at(repo, revision).files
        items = json.loads(self.body)["files"]
        return Reply({"files": [self._mode(item, files) for item in items]})

    def _mode(self, item: dict[str, Any], files: Files) -> dict[str, Any]:
        path, binary = item["path"], b"\0" in base64.b64decode(item["sample"])
        large = path.endswith(LARGE_SUFFIXES) or binary or item["size"] > LARGE_SIZE
        mode = {"path": path, "uploadMode": "lfs" if large and self.hub.lfs else "regular"}
        known = {"oid": files[path].etag} if path in files else {}
        return {**mode, "shouldIgnore": False, **known}

    def lfs_batch(self, repo: str) -> Reply:
        """Where to send the LFS objects; those already stored get no upload action."""
        self._require_token()
        self.hub.at(repo)
        objects = json.loads(self.body)["objects"]
        for item in objects:
            if item["oid"] not in self.hub.blobs:
                item["actions"] = {"upload": {"href": f"{self.hub.endpoint}/lfs/{item['oid']}"}}
        return Reply({"transfer": "basic", "objects": objects})

    def lfs_upload(self, oid: str) -> Reply:
        """The storage behind Git LFS: one object, named by its sha256."""
        if hashlib.sha256(self.body).hexdigest() != oid:
            raise HubError(400, "The content does not have the announced sha256")
        self.hub.blobs[oid] = self.body
        return Reply({})

    def commit(self, repo: str, revision: str) -> Reply:
        """A commit: a header line and one line per operation, each of them a JSON object."""
        self._require_token()
        if "create_pr" in self.query or revision != "main":
            raise HubError(400, "The stand-in takes commits to main only")
        head = self.hub.at(repo)
        files, header = dict(head.files), {"summary": ""}
        for line in self.body.splitlines():
            operation = json.loads(line)
            if operation["key"] == "header":
                header = operation["value"]
            else:
                self._apply(operation["key"], operation["value"], files, head)
        if header.get("parentCommit", head.sha) != head.sha:
            raise HubError(412, "A commit has happened since. Please refresh and try again.")
        sha = self.hub.add_commit(repo, header["summary"], files).sha
        url = f"{self.hub.endpoint}/{repo}/commit/{sha}"
        return Reply({"success": True, "commitOid": sha, "commitUrl": url, "hookOutput": ""})

    def _apply(self, key: str, value: dict[str, Any], files: Files, head: Commit) -> None:
        path = value["path"]
        if key == "file":
            files[path] = StoredFile(base64.b64decode(value["content"]))
        elif key == "lfsFile":
            if value["oid"] not in self.hub.blobs:
                raise HubError(400, f"The LFS object of {path} was not uploaded")
            files[path] = StoredFile(self.hub.blobs[value["oid"]], large=True)
        elif key in ("deletedFile", "deletedFolder"):
            start = path.rstrip("/") + "/"
            gone = [
                p for p in files if p == path or (key == "deletedFolder" and p.startswith(start))
            ]
            if not gone:
                raise HubError(404, "A file with this name doesn't exist", "EntryNotFound", head)
            for name in gone:
                del files[name]
        else:
            raise HubError(400, f"The stand-in does not know the operation {key}")

    def resolve(self, repo: str, revision: str, path: str) -> Reply:
        """A file's content (GET) or, for HEAD, the headers that tell the client about it."""
        commit = self.hub.at(repo, revision)
        if path not in commit.files:
            raise HubError(404, "Entry not found", "EntryNotFound", commit)
        file = commit.files[path]
        headers = {"ETag": f'"{file.etag}"', "X-Repo-Commit": commit.sha}
        linked = {"X-Linked-Etag": headers["ETag"], "X-Linked-Size": str(len(file.content))}
        return Reply(file.content, headers={**headers, **linked} if file.large else headers)


ROUTES: tuple[tuple[str, str, Callable[..., Reply]], ...] = (
    ("GET", "/api/whoami-v2", _Handler.whoami),
    ("POST", "/api/validate-yaml", _Handler.validate_yaml),
    ("POST", "/api/repos/create", _Handler.create_repo),
    ("GET", f"{API}(?:/revision/(?P<revision>[^/]+))?", _Handler.model_info),
    ("GET", f"{API}/tree/(?P<revision>[^/]+)(?:/(?P<folder>.+))?", _Handler.tree),
    ("POST", f"{API}/preupload/(?P<revision>[^/]+)", _Handler.preupload),
    ("POST", f"{API}/commit/(?P<revision>[^/]+)", _Handler.commit),
    ("POST", rf"/{REPO}\.git/info/lfs/objects/batch", _Handler.lfs_batch),
    ("PUT", "/lfs/(?P<oid>[0-9a-f]+)", _Handler.lfs_upload),
    ("GET HEAD", f"/{REPO}/resolve/(?P<revision>[^/]+)/(?P<path>.+)", _Handler.resolve),
)
