"""A hub on this machine: the endpoints that huggingface_hub uses, with faults on request.

Large files are redirected to a second server, on another port, as the real hub redirects to its
storage: what an account's token must never reach. Every request is noted.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

LARGE = 4096
"""Files from this size on are redirected."""
BLOCK = 1 << 16
SLOW_S = 0.1


@dataclass(frozen=True, slots=True)
class Request:
    """What somebody asked for."""

    server: str
    """``hub`` or ``storage``."""
    path: str
    token: str
    range: str


@dataclass
class FakeHub:
    """Repositories by name: file contents by path. All fields may be changed while it runs."""

    repos: dict[str, dict[str, bytes]] = field(default_factory=dict)
    token: str = ""
    """If set, nothing is shown without it."""
    gated: set[str] = field(default_factory=set)
    ranges: bool = True
    cuts: list[int] = field(default_factory=list)
    """The next answers of the storage end after so many bytes, one of these each."""
    status: int = 0
    """If set, the answer to everything."""
    refuse: int = 0
    """So many of the next questions to the storage are refused, as when a signature has run out."""
    spoil: dict[str, bytes] = field(default_factory=dict)
    """What the storage sends for a path in place of the file."""
    hurry: threading.Event | None = None
    """If there is one, the storage takes ``SLOW_S`` for each block until it is set."""
    requests: list[Request] = field(default_factory=list)
    hub: str = ""
    storage: str = ""

    def add(self, repo: str, files: dict[str, bytes]) -> None:
        """Files of a repository, beside those it has."""
        self.repos[repo] = {**self.repos.get(repo, {}), **files}

    def add_folder(self, repo: str, folder: Path, below: str = "") -> None:
        """All files of a folder."""
        paths = [path for path in folder.rglob("*") if path.is_file()]
        self.add(
            repo, {below + path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}
        )

    def commit(self, repo: str) -> str:
        """Of the repository as it is now."""
        told = json.dumps(
            {path: hashlib.sha256(data).hexdigest() for path, data in self.repos[repo].items()},
            sort_keys=True,
        )
        return hashlib.sha1(told.encode()).hexdigest()

    def fetched(self) -> list[Request]:
        """Requests for files' bytes."""
        return [request for request in self.requests if "/api/" not in request.path]


@contextlib.contextmanager
def fake_hub() -> Iterator[FakeHub]:
    """A hub that answers until the end of the block."""
    hub = FakeHub()
    servers = []
    for kind in ("hub", "storage"):
        handler = type("Handler", (_Handler,), {"fake": hub, "kind": kind})
        server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        setattr(hub, kind, f"http://127.0.0.1:{server.server_address[1]}")
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        servers.append((server, thread))
    try:
        yield hub
    finally:
        if hub.hurry is not None:
            hub.hurry.set()
        for server, thread in servers:
            server.shutdown()
            thread.join()
            server.server_close()


class _Handler(BaseHTTPRequestHandler):
    fake: FakeHub
    kind: str
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def _answer(self, *, body: bool) -> None:
        path = unquote(urlsplit(self.path).path)
        token = self.headers.get("authorization", "").removeprefix("Bearer ")
        asked = Request(self.kind, path, token, self.headers.get("range", ""))
        self.fake.requests.append(asked)
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            if self.fake.status:
                self._send(self.fake.status, b"", body=body)
            elif self.kind == "storage":
                self._storage(path, body=body)
            else:
                self._hub(path, token, body=body)

    def _send(
        self, status: int, data: bytes, *, body: bool = True, **headers: str | int | None
    ) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": len(data), **headers}.items():
            if value is not None:
                self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        if body:
            self.wfile.write(data)

    def _hub(self, path: str, token: str, *, body: bool) -> None:
        api = re.fullmatch(r"/api/models/([^/]+/[^/]+)(/revision/([^/]+))?", path)
        file = re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path)
        match = api or file
        repo = match[1] if match else ""
        if repo not in self.fake.repos or (self.fake.token and token != self.fake.token):
            status = 401 if not token else 404
            return self._send(status, b"{}", body=body, X_Error_Code="RepoNotFound")
        commit = self.fake.commit(repo)
        if api:
            if api[3] not in (None, "main", commit):
                return self._send(404, b"{}", body=body, X_Error_Code="RevisionNotFound")
            return self._send(
                200, json.dumps(self._listing(repo)).encode(), Content_Type="application/json"
            )
        assert file is not None
        if repo in self.fake.gated:
            return self._send(403, b"{}", body=body, X_Error_Code="GatedRepo")
        data = self.fake.repos[repo].get(file[3])
        if data is None or file[2] not in ("main", commit):
            return self._send(404, b"", body=body, X_Error_Code="EntryNotFound")
        if len(data) < LARGE:
            return self._send(200, data, body=body, ETag=f'"{_git(data)}"', X_Repo_Commit=commit)
        digest = hashlib.sha256(data).hexdigest()
        return self._send(
            302,
            b"",
            Location=f"{self.fake.storage}/{repo}/{file[3]}?signed=1",
            X_Linked_Etag=f'"{digest}"',
            X_Linked_Size=len(data),
            X_Repo_Commit=commit,
        )

    def _listing(self, repo: str) -> dict[str, Any]:
        siblings = []
        for path, data in self.fake.repos[repo].items():
            told: dict[str, Any] = {"rfilename": path, "size": len(data), "blobId": _git(data)}
            if len(data) >= LARGE:
                digest = hashlib.sha256(data).hexdigest()
                told["lfs"] = {"size": len(data), "sha256": digest, "pointerSize": 130}
            siblings.append(told)
        return {"id": repo, "sha": self.fake.commit(repo), "siblings": siblings, "private": False}

    def _storage(self, path: str, *, body: bool) -> None:
        if self.fake.refuse:
            self.fake.refuse -= 1
            return self._send(403, b"")
        _, user, name, file = path.split("/", 3)
        data = self.fake.spoil.get(file, self.fake.repos[f"{user}/{name}"][file])
        begin = 0
        match = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("range", ""))
        headers: dict[str, str] = {}
        if match and self.fake.ranges:
            begin = int(match[1])
            if begin >= len(data):
                return self._send(416, b"")
            end = int(match[2]) + 1 if match[2] else len(data)
            headers["Content_Range"] = f"bytes {begin}-{end - 1}/{len(data)}"
            data = data[:end]
        rest = data[begin:]
        self._send(206 if headers else 200, rest, body=False, **headers, Content_Length=len(rest))
        most = self.fake.cuts.pop(0) if self.fake.cuts else len(rest)
        for at in range(0, min(len(rest), most), BLOCK):
            self.wfile.write(rest[at : min(at + BLOCK, most)])
            if self.fake.hurry is not None:
                self.wfile.flush()
                self.fake.hurry.wait(SLOW_S)
        if most < len(rest):
            self.close_connection = True
        return None


def _git(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
