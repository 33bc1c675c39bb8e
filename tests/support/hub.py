"""A server that speaks the hub's HTTP protocol: what a client asks to list, fetch and commit files of repositories."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub:
    """Repositories by name: path -> content. Revisions are "main" and those of `revisions`."""

    def __init__(self) -> None:
        self.repositories: dict[str, dict[str, bytes]] = {}
        self.revisions: dict[tuple[str, str], dict[str, bytes]] = {}
        self.asked: list[str] = []
        self.endpoint = ""

    def files(self, repository: str, revision: str) -> dict[str, bytes] | None:
        if revision in ("main", COMMIT):
            return self.repositories.get(repository)
        return self.revisions.get((repository, revision))


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *args: object) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        pass

    def _answer(self, code: int, content: bytes = b"", headers: dict[str, str] | None = None) -> None:
        self.send_response(code)
        for name, value in {"Content-Length": str(len(content)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def _json(self, value: object) -> None:
        self._answer(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _missing(self, what: str) -> None:
        self._answer(404, b"{}", {"X-Error-Code": what, "X-Error-Message": what})

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.hub.asked.append(path)
        kind, owner, name, *rest = [*path.strip("/").removeprefix("api/").split("/"), "", "", ""]
        if path.startswith("/api/models/") and rest[0] in ("tree", "revision"):
            files = self.hub.files(f"{owner}/{name}", rest[1])
            listed = [{"type": "file", "path": p, "size": len(c), "oid": "0"} for p, c in (files or {}).items()]
            if files is None:
                known = f"{owner}/{name}" in self.hub.repositories
                return self._missing("RevisionNotFound" if known else "RepoNotFound")
            tree = {"id": f"{owner}/{name}", "sha": COMMIT, "siblings": [{"rfilename": p} for p in files]}
            return self._json(listed if rest[0] == "tree" else tree)
        repository, revision, within = (
            f"{kind}/{owner}",
            rest[0],
            "/".join(filter(None, rest[1:])),
        )  # /owner/name/resolve/main/file
        files = self.hub.files(repository, revision)
        if files is None or within not in files:
            return self._missing("RepoNotFound" if files is None else "EntryNotFound")
        content = files[within]
        etag = f'"{hashlib.sha256(content).hexdigest()}"'
        return self._answer(200, content, {"ETag": etag, "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"})

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        path = unquote(urlsplit(self.path).path)
        self.hub.asked.append(path)
        if self.headers.get("Authorization") is None:
            return self._answer(401, b"{}", {"X-Error-Message": "Invalid username or password."})
        if path == "/api/repos/create":
            asked = json.loads(body)
            name = asked["name"] if asked.get("organization") is None else f"{asked['organization']}/{asked['name']}"
            self.hub.repositories.setdefault(name, {})
            return self._json({"url": f"{self.hub.endpoint}/{name}", "name": name, "id": name})
        repository = "/".join(path.split("/")[3:5])
        if "/preupload/" in path:
            names = [file["path"] for file in json.loads(body)["files"]]
            return self._json(
                {"files": [{"path": p, "uploadMode": "regular", "shouldIgnore": False, "oid": None} for p in names]}
            )
        for line in map(json.loads, body.splitlines()):
            if line.get("key") == "file":
                self.hub.repositories[repository][line["value"]["path"]] = base64.b64decode(line["value"]["content"])
        url = f"{self.hub.endpoint}/{repository}/commit/{COMMIT}"
        return self._json({"success": True, "commitOid": COMMIT, "commitUrl": url, "hookOutput": ""})


@contextmanager
def served() -> Iterator[Hub]:
    """A hub of one's own, at `endpoint`."""
    hub = Hub()
    handler = type("Handler", (_Handler,), {"hub": hub})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        hub.endpoint = f"http://127.0.0.1:{server.server_address[1]}"
        thread = Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            yield hub
        finally:
            server.shutdown()
            thread.join()
