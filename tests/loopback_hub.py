"""A Hub on the loopback interface that speaks enough of the real protocol to be read from by the real client.

Every folder `ROOT/OWNER/NAME` is a model repository; its only revision is `main`, its commit the hash of its name.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit


def commit(repo: str) -> str:
    return hashlib.sha1(repo.encode()).hexdigest()


class Handler(BaseHTTPRequestHandler):
    root: Path
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        parts = [unquote(p) for p in urlsplit(self.path).path.strip("/").split("/")]
        if parts[:2] == ["api", "models"]:
            return self.api("/".join(parts[2:4]), parts[4:])
        if len(parts) > 4 and parts[2] == "resolve":
            return self.file("/".join(parts[:2]), parts[3], "/".join(parts[4:]))
        self.fail(404, "EntryNotFound")

    def api(self, repo: str, rest: list[str]):
        folder = self.root / repo
        if not folder.is_dir():
            return self.fail(404, "RepoNotFound")
        if len(rest) > 1 and rest[1] not in ("main", commit(repo)):
            return self.fail(404, "RevisionNotFound")
        files = sorted(p for p in folder.rglob("*") if p.is_file())
        names = [str(p.relative_to(folder)) for p in files]
        if rest[:1] == ["tree"]:
            oids = [hashlib.sha1(p.read_bytes()).hexdigest() for p in files]
            entries = zip(names, files, oids, strict=True)
            body = [{"type": "file", "path": n, "size": p.stat().st_size, "oid": oid} for n, p, oid in entries]
        else:
            body = {"id": repo, "sha": commit(repo), "siblings": [{"rfilename": n} for n in names], "tags": []}
            body |= {"private": False, "downloads": 0, "likes": 0}
        self.answer(200, json.dumps(body).encode(), {"Content-Type": "application/json"})

    def file(self, repo: str, revision: str, name: str):
        path = self.root / repo / name
        if not (self.root / repo).is_dir():
            return self.fail(404, "RepoNotFound")
        if revision not in ("main", commit(repo)):
            return self.fail(404, "RevisionNotFound")
        if not path.is_file():
            return self.fail(404, "EntryNotFound")
        data = path.read_bytes()
        headers = {"ETag": f'"{hashlib.sha1(data).hexdigest()}"', "X-Repo-Commit": commit(repo)}
        self.answer(200, data, headers | {"Content-Type": "application/octet-stream"})

    def fail(self, status: int, code: str):
        self.answer(status, b"", {"X-Error-Code": code, "X-Error-Message": code})

    def answer(self, status: int, body: bytes, headers: dict[str, str]):
        self.send_response(status)
        for name, value in (headers | {"Content-Length": str(len(body))}).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


@contextmanager
def serve(root: Path) -> Iterator[str]:
    """Serve the repositories under `root`; yields the endpoint."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Bound", (Handler,), {"root": root}))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
