"""A local stand-in of the Hugging Face Hub: the part of its HTTP interface that huggingface_hub uses for a checkpoint.

Files ending in .safetensors, .npz and .mp4 go through its large file storage (LFS), as on the real Hub.
"""

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

LARGE = (".safetensors", ".npz", ".mp4")
OWNER, TOKEN, READER = "owner", "hf_secretsecretsecret", "hf_readeronly"


@dataclass
class Repo:
    visibility: str | None
    commits: dict[str, dict[str, bytes]] = field(default_factory=lambda: {"0" * 40: {}})  # the newest last

    @property
    def newest(self) -> str:
        return list(self.commits)[-1]

    @property
    def files(self) -> dict[str, bytes]:
        return self.commits[self.newest]


@dataclass
class Hub:
    """State of the stand-in; `failure` is a status that every request gets."""

    url: str = ""
    repos: dict[str, Repo] = field(default_factory=dict)
    large: dict[str, bytes] = field(default_factory=dict)
    downloaded: list[str] = field(default_factory=list)
    failure: int | None = None


@contextmanager
def running_hub() -> Iterator[Hub]:
    hub = Hub()

    class Handler(_Handler):
        state = hub

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    state: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        self._answer()

    def do_HEAD(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        self._answer()

    def do_PUT(self) -> None:
        self._answer()

    def _answer(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        path = self.path.partition("?")[0]
        if self.state.failure is not None:
            self._error(self.state.failure)
        elif path == "/api/repos/create":
            self._create(json.loads(body))
        elif path == "/api/validate-yaml":
            self._json({"errors": [], "warnings": []})
        elif found := re.fullmatch(r"/lfs/(\w+)", path):
            assert hashlib.sha256(body).hexdigest() == found[1]
            self.state.large[found[1]] = body
            self._json({})
        elif found := re.fullmatch(r"/(?:api/models/)?([^/]+/[^/]+?)(\.git)?(?:/(\w+)(?:/(.*))?)?", path):
            self._of_repo(found[1], found[3], found[4] or "", body)
        else:
            self._error(404)

    def _create(self, wanted: dict[str, Any]) -> None:
        name = f"{wanted['organization'] or OWNER}/{wanted['name']}"
        if self._token is None:
            self._error(401)
        elif self._token != TOKEN or not name.startswith(f"{OWNER}/"):
            self._error(403)
        else:
            status = 409 if name in self.state.repos else 200
            self.state.repos.setdefault(name, Repo(wanted.get("visibility")))
            self._json({"url": f"{self.state.url}/{name}", "id": name}, status)

    def _of_repo(self, name: str, verb: str | None, rest: str, body: bytes) -> None:
        repo = self.state.repos.get(name)
        if repo is None or (repo.visibility == "private" and self._token is None):
            self._error(404 if self._token else 401, "RepoNotFound")
            return
        revision = rest.partition("/")[0] if verb in ("revision", "tree", "resolve") else "main"
        commit = repo.newest if revision in ("main", "") else revision
        if commit not in repo.commits:
            self._error(404, "RevisionNotFound")
            return
        files = repo.commits[commit]
        if verb in (None, "revision"):
            siblings = [{"rfilename": path} for path in files]
            self._json({"id": name, "sha": commit, "siblings": siblings, "private": repo.visibility == "private"})
        elif verb == "tree":
            self._json([_entry(path, content) for path, content in files.items()])
        elif verb == "resolve":
            self._file(commit, files, rest.partition("/")[2])
        elif self._token != TOKEN:
            self._error(403)
        elif verb == "preupload":
            sent = json.loads(body)["files"]
            modes = {one["path"]: "lfs" if one["path"].endswith(LARGE) else "regular" for one in sent}
            self._json({"files": [{"path": p, "uploadMode": m, "shouldIgnore": False} for p, m in modes.items()]})
        elif verb == "info":
            sent = json.loads(body)["objects"]
            places = {one["oid"]: {"upload": {"href": f"{self.state.url}/lfs/{one['oid']}"}} for one in sent}
            self._json({"transfer": "basic", "objects": [one | {"actions": places[one["oid"]]} for one in sent]})
        else:
            self._commit(repo, name, body)

    def _commit(self, repo: Repo, name: str, body: bytes) -> None:
        files = dict(repo.files)
        for line in map(json.loads, body.decode().splitlines()):
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.state.large[value["oid"]]
            elif line["key"] == "deletedFile":
                del files[value["path"]]
        commit = hashlib.sha1(body).hexdigest()
        repo.commits[commit] = files
        self._json({"commitUrl": f"{self.state.url}/{name}/commit/{commit}", "commitOid": commit})

    def _file(self, commit: str, files: dict[str, bytes], path: str) -> None:
        if path not in files:
            self._error(404, "EntryNotFound")
            return
        if self.command == "GET":
            self.state.downloaded.append(path)
        etag = hashlib.sha256(files[path]).hexdigest()
        self._send(200, files[path], {"X-Repo-Commit": commit, "ETag": f'"{etag}"'})

    @property
    def _token(self) -> str | None:
        return (self.headers.get("Authorization") or "").removeprefix("Bearer ") or None

    def _json(self, value: Any, status: int = 200) -> None:
        self._send(status, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _error(self, status: int, code: str = "") -> None:
        self._send(status, b"{}", {"X-Error-Code": code} if code else {})

    def _send(self, status: int, content: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in (headers | {"Content-Length": str(len(content))}).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)


def _entry(path: str, content: bytes) -> dict[str, Any]:
    oid = hashlib.sha1(content).hexdigest()
    large = {"lfs": {"oid": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 130}}
    return {"type": "file", "path": path, "size": len(content), "oid": oid} | (large if path.endswith(LARGE) else {})
