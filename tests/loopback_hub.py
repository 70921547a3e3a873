"""A Hub on the loopback interface that speaks enough of the real protocol for the real client to read and write.

Every folder `ROOT/OWNER/NAME` is a model repository, its branch `main`; other branches lie in `ROOT/.branches`. The
commit of a branch is a hash of its files, so that it changes with them. `Hub.faults` breaks it on purpose.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

LICENCES = {"apache-2.0", "mit", "bsd-3-clause", "cc-by-4.0", "cc-by-sa-4.0", "gpl-3.0", "openrail", "llama3", "other"}
RELATIONS = {"finetune", "adapter", "merge", "quantized"}
ID = r"[\w][\w.-]{0,95}(/[\w][\w.-]{0,95})?"


@dataclass
class Fault:
    """What goes wrong, at a request whose line `METHOD PATH` matches, so many times."""

    where: str
    what: int | str  # a status, `cut` (the connection is cut in the middle of the body), `after` (cut after the work)
    times: int = 1


@dataclass
class Hub:
    root: Path
    endpoint: str = ""
    token: str = "hf_test"
    writable: tuple[str, ...] = ("tester",)
    faults: list[Fault] = field(default_factory=list)
    log: list[str] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)
    private: set[str] = field(default_factory=set)

    def folder(self, repo: str, branch: str = "main") -> Path:
        return self.root / repo if branch == "main" else self.root / ".branches" / repo / branch

    def objects(self) -> Path:
        (self.root / ".lfs").mkdir(exist_ok=True)
        return self.root / ".lfs"

    def branches(self, repo: str) -> list[str]:
        others = self.root / ".branches" / repo
        return ["main", *(p.name for p in others.glob("*"))] if self.folder(repo).is_dir() else []

    def commit(self, repo: str, branch: str = "main") -> str:
        digest = hashlib.sha1(f"{repo} {branch}".encode())
        for path in files(self.folder(repo, branch)):
            digest.update(str(path.relative_to(self.folder(repo, branch))).encode() + path.read_bytes())
        return digest.hexdigest()

    def resolve(self, repo: str, revision: str) -> str | None:
        """The branch that a revision (a branch, or the commit of one) names."""
        return next((b for b in self.branches(repo) if revision in (b, self.commit(repo, b))), None)


def files(folder: Path) -> list[Path]:
    return sorted(p for p in folder.rglob("*") if p.is_file())


def is_lfs(path: Path | str) -> bool:
    return str(path).endswith((".safetensors", ".png"))


def validate(content: str) -> list[str]:
    """What the Hub's check of a card's metadata would object to: its documented rules, as far as they are known."""
    import yaml

    match = re.match(r"---\r?\n(.*?)\r?\n---", content, re.S)
    if match is None:
        return []
    try:
        data = yaml.safe_load(match[1])
    except yaml.YAMLError as error:
        return [f"invalid YAML: {error}"]
    wrong = []
    if not isinstance(data, dict):
        return ["metadata must be an object"]
    if "license" in data and data["license"] not in LICENCES:
        wrong.append(f'"license" must be one of {sorted(LICENCES)}')
    if data.get("license") == "other" and "license_name" not in data:
        wrong.append('"license_name" is required for the licence "other"')
    for key in ("tags", "language"):
        value = data.get(key, [])
        if not all(isinstance(v, str) for v in (value if isinstance(value, list) else [value])):
            wrong.append(f'"{key}" must be a list of strings')
    bases = data.get("base_model", [])
    for base in bases if isinstance(bases, list) else [bases]:
        if not isinstance(base, str) or not re.fullmatch(ID, base):
            wrong.append(f'"base_model" {base!r} is no id of a model')
    if "base_model_relation" in data and data["base_model_relation"] not in RELATIONS:
        wrong.append(f'"base_model_relation" must be one of {sorted(RELATIONS)}')
    for key in ("pipeline_tag", "library_name"):
        if key in data and not isinstance(data[key], str):
            wrong.append(f'"{key}" must be a string')
    for model in data.get("model-index", []):
        if not isinstance(model.get("name"), str):
            wrong.append('"model-index[0].name" is required')
        for result in model.get("results", []):
            if not isinstance(result.get("task", {}).get("type"), str):
                wrong.append('"model-index[0].results[0].task.type" is required')
            if not all(isinstance(result.get("dataset", {}).get(key), str) for key in ("type", "name")):
                wrong.append('"model-index[0].results[0].dataset" needs type and name')
            if not result.get("metrics"):
                wrong.append('"model-index[0].results[0].metrics" is required')
            for metric in result.get("metrics", []):
                if not isinstance(metric.get("type"), str) or not isinstance(metric.get("value"), int | float | str):
                    wrong.append('"model-index[0].results[0].metrics[0]" needs type and value')
    return wrong


class Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    # -- what goes wrong ----------------------------------------------------------------------------------------------

    def handle_one(self, work):
        line = f"{self.command} {urlsplit(self.path).path}"
        self.hub.log.append(line)
        with self.hub.lock:
            fault = next((f for f in self.hub.faults if f.times and re.search(f.where, line)), None)
            if fault is not None:
                fault.times -= 1
        length = int(self.headers.get("Content-Length") or 0)
        if fault is not None and fault.what == "cut":
            self.rfile.read(length // 2)
            return self.cut()
        self.body = self.rfile.read(length) if length else self.chunks()
        if fault is not None and isinstance(fault.what, int):
            return self.answer(fault.what, b"", {"X-Error-Message": f"a fault {fault.what}"})
        if fault is not None and fault.what == "after":
            self.silent = True
            with self.hub.lock:
                work()
            return self.cut()
        return work()

    silent = False

    def chunks(self) -> bytes:
        """A body without a length."""
        if "chunked" not in (self.headers.get("Transfer-Encoding") or ""):
            return b""
        parts = []
        while size := int(self.rfile.readline().strip() or b"0", 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def cut(self):
        import socket

        self.close_connection = True
        try:
            self.connection.shutdown(socket.SHUT_RDWR)
        except OSError:
            pass

    # -- reading ------------------------------------------------------------------------------------------------------

    def do_HEAD(self):
        self.handle_one(self.read)

    def do_GET(self):
        self.handle_one(self.read)

    def parts(self) -> list[str]:
        return [unquote(p) for p in urlsplit(self.path).path.strip("/").split("/")]

    def read(self):
        parts = self.parts()
        if parts[:2] == ["api", "whoami-v2"]:
            if not self.allowed():
                return self.fail(401, "Unauthorized", "Invalid username or password.")
            return self.json({"name": "tester", "type": "user", "orgs": [], "auth": {"accessToken": {"role": "write"}}})
        if parts[:2] == ["api", "models"]:
            return self.api("/".join(parts[2:4]), parts[4:])
        if len(parts) > 4 and parts[2] == "resolve":
            return self.file("/".join(parts[:2]), parts[3], "/".join(parts[4:]))
        self.fail(404, "EntryNotFound")

    def allowed(self) -> bool:
        return self.headers.get("Authorization") == f"Bearer {self.hub.token}"

    def branch(self, repo: str, revision: str) -> str | None:
        """The branch, or None after an answer."""
        if not self.hub.folder(repo).is_dir() or (repo in self.hub.private and not self.allowed()):
            self.fail(404, "RepoNotFound")
            return None
        found = self.hub.resolve(repo, revision)
        if found is None:
            self.fail(404, "RevisionNotFound")
        return found

    def api(self, repo: str, rest: list[str]):
        if rest[:1] == ["refs"]:
            heads = [
                {"name": b, "ref": f"refs/heads/{b}", "targetCommit": self.hub.commit(repo, b)}
                for b in self.hub.branches(repo)
            ]
            return self.json({"branches": heads, "tags": [], "converts": [], "pullRequests": []})
        branch = self.branch(repo, rest[1] if len(rest) > 1 else "main")
        if branch is None:
            return
        folder = self.hub.folder(repo, branch)
        names = [(str(p.relative_to(folder)), p) for p in files(folder)]
        if rest[:1] == ["tree"]:
            body: Any = []
            for name, path in names:
                data = path.read_bytes()
                row = {"type": "file", "path": name, "size": len(data), "oid": git_oid(data)}
                if is_lfs(name):
                    row["lfs"] = {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 130}
                body.append(row)
        else:
            body = {"id": repo, "sha": self.hub.commit(repo, branch), "tags": [], "downloads": 0, "likes": 0}
            body |= {"siblings": [{"rfilename": n} for n, _ in names], "private": repo in self.hub.private}
        self.json(body)

    def file(self, repo: str, revision: str, name: str):
        branch = self.branch(repo, revision)
        if branch is None:
            return
        path = self.hub.folder(repo, branch) / name
        if not path.is_file():
            return self.fail(404, "EntryNotFound", headers={"X-Repo-Commit": self.hub.commit(repo, branch)})
        data = path.read_bytes()
        etag = hashlib.sha256(data).hexdigest() if is_lfs(name) else git_oid(data)
        headers = {"ETag": f'"{etag}"', "X-Repo-Commit": self.hub.commit(repo, branch)}
        if match := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or ""):
            start, end = int(match[1]), int(match[2] or len(data) - 1)
            headers["Content-Range"] = f"bytes {start}-{end}/{len(data)}"
            return self.answer(206, data[start : end + 1], headers)
        self.answer(200, data, headers | {"Content-Type": "application/octet-stream"})

    # -- writing ------------------------------------------------------------------------------------------------------

    def do_POST(self):
        self.handle_one(self.write)

    def do_PUT(self):
        self.handle_one(self.write)

    def write(self):
        parts = self.parts()
        if parts[0] == "_lfs":
            return self.put_object(parts[1])
        if parts[0] == "_verify":
            held = self.hub.objects() / json.loads(self.body)["oid"]
            return self.answer(200 if held.is_file() else 404, b"")
        if not self.allowed():
            return self.fail(401, "Unauthorized", "Invalid username or password.")
        if parts == ["api", "validate-yaml"]:
            wrong = [{"message": text} for text in validate(json.loads(self.body)["content"])]
            return self.json({"errors": wrong, "warnings": []}, 400 if wrong else 200)
        if parts == ["api", "repos", "create"]:
            return self.create()
        if parts[-3:] == ["lfs", "objects", "batch"]:
            return self.batch()
        repo = "/".join(parts[2:4])
        if repo.split("/")[0] not in self.hub.writable:
            return self.fail(403, "Forbidden", "You don't have the rights to write here.")
        if parts[4] == "branch":
            return self.create_branch(repo, "/".join(parts[5:]))
        branch = self.branch(repo, "/".join(parts[5:]))
        if branch is None:
            return
        if parts[4] == "preupload":
            rows = json.loads(self.body)["files"]
            return self.json({"files": [self.preupload(repo, branch, row) for row in rows]})
        if parts[4] == "commit":
            return self.commit(repo, branch)
        self.fail(404, "EntryNotFound")

    def create(self):
        wanted = json.loads(self.body)
        owner = wanted.get("organization") or "tester"
        repo = f"{owner}/{wanted['name']}"
        if owner not in self.hub.writable:
            return self.fail(403, "Forbidden", "You don't have the rights to create a model there.")
        url = f"{self.hub.endpoint}/{repo}"
        if self.hub.folder(repo).is_dir():
            return self.json({"error": "You already created this model repo", "url": url}, 409)
        self.hub.folder(repo).mkdir(parents=True)
        if wanted.get("private") or wanted.get("visibility") == "private":
            self.hub.private.add(repo)
        self.json({"url": url, "name": repo, "id": "0"})

    def create_branch(self, repo: str, branch: str):
        if self.hub.resolve(repo, branch) is not None:
            return self.json({"error": "Reference already exists"}, 409)
        shutil.copytree(self.hub.folder(repo), self.hub.folder(repo, branch))
        self.json({})

    def preupload(self, repo: str, branch: str, row: dict[str, Any]) -> dict[str, Any]:
        path = self.hub.folder(repo, branch) / row["path"]
        mode = "lfs" if is_lfs(row["path"]) else "regular"
        oid = None
        if path.is_file():
            data = path.read_bytes()
            oid = hashlib.sha256(data).hexdigest() if mode == "lfs" else git_oid(data)
        return {"path": row["path"], "uploadMode": mode, "shouldIgnore": False, "oid": oid}

    def batch(self):
        wanted = json.loads(self.body)
        rows = []
        for item in wanted["objects"]:
            row = {"oid": item["oid"], "size": item["size"]}
            if not (self.hub.objects() / item["oid"]).is_file():
                upload = {"href": f"{self.hub.endpoint}/_lfs/{item['oid']}", "header": {}}
                row["actions"] = {"upload": upload, "verify": {"href": f"{self.hub.endpoint}/_verify", "header": {}}}
            rows.append(row)
        self.json({"transfer": "basic", "objects": rows, "hash_algo": "sha256"})

    def put_object(self, oid: str):
        if hashlib.sha256(self.body).hexdigest() != oid:
            return self.answer(400, b"wrong content")
        (self.hub.objects() / oid).write_bytes(self.body)
        self.answer(200, b"")

    def commit(self, repo: str, branch: str):
        lines = [json.loads(line) for line in self.body.splitlines() if line.strip()]
        folder, changes = self.hub.folder(repo, branch), {}
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                changes[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                changes[value["path"]] = (self.hub.objects() / value["oid"]).read_bytes()
            elif line["key"] == "deletedFile":
                changes[value["path"]] = None
        new = folder.with_name(f".{folder.name}.new")  # a commit is there whole or not at all
        shutil.rmtree(new, ignore_errors=True)
        shutil.copytree(folder, new)
        for name, data in changes.items():
            (new / name).parent.mkdir(parents=True, exist_ok=True)
            (new / name).unlink(missing_ok=True) if data is None else (new / name).write_bytes(data)
        shutil.rmtree(folder)
        new.rename(folder)
        oid = self.hub.commit(repo, branch)
        self.json({"success": True, "commitOid": oid, "commitUrl": f"{self.hub.endpoint}/{repo}/commit/{oid}"})

    # -- answers ------------------------------------------------------------------------------------------------------

    def json(self, body: Any, status: int = 200):
        self.answer(status, json.dumps(body).encode(), {"Content-Type": "application/json"})

    def fail(self, status: int, code: str, message: str = "", headers: dict[str, str] | None = None):
        known = {"X-Error-Code": code} if code[-8:] == "NotFound" else {}
        self.answer(status, b"", known | {"X-Error-Message": message or code} | (headers or {}))

    def answer(self, status: int, body: bytes, headers: dict[str, str] | None = None):
        if self.silent:
            return
        self.send_response(status)
        for name, value in ((headers or {}) | {"Content-Length": str(len(body))}).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


def git_oid(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


@contextmanager
def hub(root: Path) -> Iterator[Hub]:
    """Serve the repositories under `root`."""
    made = Hub(root)
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Bound", (Handler,), {"hub": made}))
    server.daemon_threads = True
    made.endpoint = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield made
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@contextmanager
def serve(root: Path) -> Iterator[str]:
    """Serve the repositories under `root`; yields the endpoint."""
    with hub(root) as made:
        yield made.endpoint


def environment(made: Hub, home: Path) -> dict[str, str]:
    """What makes the real client talk to it, and to nothing else."""
    import os

    env = {k: v for k, v in os.environ.items() if not k.startswith("HF_")}
    env |= {"HF_ENDPOINT": made.endpoint, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1", "HF_TOKEN": made.token}
    return env | {"HF_HUB_DISABLE_TELEMETRY": "1", "NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1"}
