"""Push a converted model to the Hub: one commit, of what belongs there and nothing else."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from ..interp.errors import OrthoactError
from .card import MARK, make_card
from .files import read_json
from .names import is_adapter
from .provenance import record_in

PICKLES = (
    ".bin",
    ".pt",
    ".pth",
    ".pkl",
    ".pickle",
    ".ckpt",
    ".npy",
    ".npz",
    ".msgpack",
    ".h5",
    ".onnx",
    ".data",
    ".pt2",
    ".pyc",
)
"""Endings that never go along: what could run code, or is no part of a model folder."""

STATE = ("state", "checkpoint-", "runs", "__pycache__")
"""Folders that never go along: the state of a training, its logs."""

ATTEMPTS = 5
"""How often a step is tried while the network or the Hub fails."""

WAIT = 1.0
"""Seconds before the second attempt; twice as many before each later one."""

T = TypeVar("T")


def files_of(folder: Path) -> list[Path]:
    """The files of a model folder that a push takes along; `OrthoactError` for a folder that holds no converted model.

    Hidden files, pickles, logs and the state of a training stay; so does a link that leads out of the folder.
    """
    if not folder.is_dir():
        raise OrthoactError(f"{folder}: there is no such folder; convert a model first")
    if not is_adapter(folder) and not is_converted(folder):
        raise OrthoactError(f"{folder}: holds no converted model or adapter; give the folder that orthoact wrote")
    root, found = folder.resolve(), []
    for path in sorted(folder.rglob("*")):
        parts = path.relative_to(folder).parts
        if any(part.startswith((".", *STATE)) for part in parts[:-1]) or parts[-1].startswith("."):
            continue
        if path.is_file() and path.suffix.lower() not in PICKLES and path.resolve().is_relative_to(root):
            found.append(path)
    return found


def is_converted(folder: Path) -> bool:
    """Whether a folder's config has a record."""
    try:
        return bool(record_in(read_json(folder / "config.json", strict=False)))
    except OrthoactError:
        return False


def check_push(repo: str, *, token: bool = True) -> None:
    """Refuse, before any work is done, a repository's name that is none, and where `token`, a push without one."""
    from huggingface_hub import get_token
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise OrthoactError(f"{repo!r} is no name of a repository: expected NAME or OWNER/NAME ({error})") from error
    if token and get_token() is None:
        raise OrthoactError("no token for the Hub: log in with `hf auth login`, or set HF_TOKEN")


def push(
    folder: str | Path,
    repo: str,
    *,
    private: bool = False,
    revision: str | None = None,
    dry_run: bool = False,
    message: str | None = None,
    wait: float = WAIT,
) -> dict[str, Any]:
    """Push the converted model or adapter in `folder` to the repository `repo`, made if absent, in one commit.

    A card is written for it (see `card`) unless the folder, or the repository, has a README.md of somebody's own.
    `revision` is a branch, made if absent; `dry_run` only tells what would go. Returns `repo`, `revision`, `files`
    ({path, bytes}), and after the push `url` and `commit`. A fault of the network or of the Hub is tried again, five
    times in all; a commit is there whole or not at all. Raises `OrthoactError` without a token or the right to write,
    for a wrong name, and where the network stays away.
    """
    from huggingface_hub import CommitOperationAdd, HfApi

    folder = Path(folder)
    paths = files_of(folder)
    contents: dict[str, bytes | Path] = {path.relative_to(folder).as_posix(): path for path in paths}
    made = {} if "README.md" in contents else make_card(folder, repo)

    def result() -> dict[str, Any]:
        held = sorted((made | contents).items())
        rows = [{"path": k, "bytes": len(v) if isinstance(v, bytes) else v.stat().st_size} for k, v in held]
        return {"repo": repo, "revision": revision or "main", "files": rows}

    check_push(repo, token=not dry_run)
    if dry_run:
        return result()
    api = HfApi()

    def tried(step: Callable[[], T]) -> T:
        return _retried(step, repo, wait)

    url = tried(lambda: api.create_repo(repo, private=private or None, exist_ok=True))
    repo = getattr(url, "repo_id", None) or repo  # with its owner
    if revision and not revision.startswith("refs/"):
        tried(lambda: api.create_branch(repo, branch=revision, exist_ok=True))
    if made and tried(lambda: api.file_exists(repo, "README.md", revision=revision)):
        path = tried(lambda: api.hf_hub_download(repo, "README.md", revision=revision))
        if MARK not in Path(path).read_text(encoding="utf-8", errors="replace"):
            made = {}  # somebody wrote it by hand
    made = make_card(folder, repo) if made else {}
    operations = [
        CommitOperationAdd(path_in_repo=name, path_or_fileobj=data if isinstance(data, bytes) else str(data))
        for name, data in (made | contents).items()
    ]
    title = message or f"Add {folder.resolve().name}, converted by orthoact"
    done = tried(lambda: api.create_commit(repo, operations, commit_message=title, revision=revision))
    return result() | {"url": str(url), "commit": done.oid}


def _retried(step: Callable[[], T], repo: str, wait: float) -> T:
    """The result of a step that may meet a fault of the network; what is no such fault becomes one sentence."""
    from huggingface_hub.errors import (
        HfHubHTTPError,
        HTTPError,  # pyright: ignore[reportPrivateImportUsage]  # of httpx or httpx2, as the client has it
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
    )

    last: Exception = RuntimeError("never tried")
    for attempt in range(ATTEMPTS):
        if attempt:
            time.sleep(wait * 2 ** (attempt - 1))
        try:
            return step()
        except OfflineModeIsEnabled as error:
            raise OrthoactError("HF_HUB_OFFLINE is set, so that nothing is pushed: unset it") from error
        except HfHubHTTPError as error:
            status = error.response.status_code if error.response is not None else 0
            if status == 401 or (isinstance(error, RepositoryNotFoundError) and status != 404):
                raise OrthoactError(
                    f"{repo}: the Hub does not accept the token: log in again with `hf auth login`, or set HF_TOKEN"
                ) from error
            if status == 403:
                raise OrthoactError(
                    f"{repo}: the token has no right to write there: use one with write access, or a repository of "
                    f"your own"
                ) from error
            if status != 429 and status < 500:
                why = (error.server_message or str(error)).strip().splitlines()[0]
                raise OrthoactError(f"{repo}: the Hub refused ({status}): {why}") from error
            last = error
        except (HTTPError, ConnectionError, TimeoutError) as error:
            last = error
    endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
    why = (str(last).strip().splitlines() or [type(last).__name__])[0]
    raise OrthoactError(
        f"{repo}: {endpoint} did not answer in {ATTEMPTS} attempts ({why}): nothing was committed; check the network "
        f"and push again"
    ) from last
