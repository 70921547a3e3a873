"""Where a converted model comes from: its base and the hash of every file of it, versions, seed and command."""

from __future__ import annotations

import hashlib
import re
import sys
from collections.abc import Iterable, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from .._version import __version__
from ..interp.errors import OrthoactError
from .files import read_json
from .names import demo_name, portable
from .record import SENTINEL
from .sources import Source, demo_folder

VERSIONS = ("torch", "transformers", "timm", "peft", "safetensors", "numpy", "scipy")
"""The packages whose versions a record names, where they are installed."""

FORMS = (("model.safetensors.index.json", "model.safetensors"), ("pytorch_model.bin.index.json", "pytorch_model.bin"))
"""The weights of a folder, the first that is there: index and single file, as transformers and timm look for them."""


def weight_files(folder: Path) -> list[Path]:
    """The files with the weights of a model folder, in order; `OrthoactError` for an index that names another place.

    >>> from .sources import demo_folder
    >>> [path.name for path in weight_files(demo_folder())]
    ['model.safetensors']
    """
    for index, single in FORMS:
        if (folder / single).is_file():
            return [folder / single]
        if (folder / index).is_file():
            try:
                names = set(read_json(folder / index)["weight_map"].values())
            except (KeyError, TypeError, AttributeError) as error:
                raise OrthoactError(f"{folder / index}: expected a weight_map of names to files") from error
            for name in names:
                if not isinstance(name, str) or not re.fullmatch(r"[\w][\w.-]*", name):
                    raise OrthoactError(f"{folder / index} names the file {str(name)[:60]!r}: expected one beside it")
            return [folder / name for name in sorted(names)]
    return []


def sha256(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal."""
    with open(path, "rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def recorded_sha256(path: Path) -> str:
    """The SHA-256 of a file as the Hub's cache names it, which costs no reading; computed for any other."""
    real = path.resolve()
    return real.name if real.parent.name == "blobs" and re.fullmatch(r"[0-9a-f]{64}", real.name) else sha256(path)


def weights_folder(source: Source) -> Path | None:
    """Where the weights of a loaded model lie, None where that is not known (timm loaded them by a URL)."""
    if source.folder is not None:
        return source.folder
    where = getattr(source.model, "pretrained_cfg", {}).get("hf_hub_id")
    if not where:
        return None
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(where, "model.safetensors", revision=source.revision)
    return Path(found).parent if isinstance(found, str) else None


def commit_of(folder: Path | None) -> str | None:
    """The commit of a folder in the Hub's cache."""
    if folder is not None and folder.parent.name == "snapshots" and re.fullmatch(r"[0-9a-f]{40}", folder.name):
        return folder.name
    return None


def provenance(source: Source, *, seed: int | None = None, command: Iterable[str] = ()) -> dict[str, Any]:
    """What a record says of its origin: `base` (model, revision, library, files) and `made` (command, seed, versions).

    A model that was converted before keeps the base that it had. The revision is the commit where the Hub's cache
    tells it. Weights that were too large to be loaded are not read for their hashes either.
    """
    folder = weights_folder(source)
    read = not source.planned
    name = demo_name() if source.folder == demo_folder() else source.base
    base = recorded_base(source.folder) or {
        "model": name,
        "revision": commit_of(folder) or source.revision,
        "library": source.kind,
        "files": {path.name: recorded_sha256(path) for path in weight_files(folder)} if read and folder else {},
    }
    return {"base": base, "made": {"command": command_line(command), "seed": seed, "versions": versions()}}


def recorded_base(folder: Path | None) -> dict[str, Any] | None:
    """The base that the record in a converted folder names."""
    try:
        config = read_json((folder or Path()) / "config.json", strict=False)
        base = record_in(config).get("base")
    except (OSError, OrthoactError):
        return None
    return base if folder is not None and isinstance(base, dict) else None


def record_in(config: Mapping[str, Any]) -> dict[str, Any]:
    """The record in a config.json of either library or in an adapter_config.json; empty where there is none."""
    found = config.get(SENTINEL) or (config.get("model_args") or {}).get(SENTINEL) or {}
    return found if isinstance(found, dict) else {}


def versions() -> dict[str, str]:
    """The versions of what took part."""
    found = {"orthoact": __version__}
    for name in VERSIONS:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def own_command() -> list[str]:
    """The command line of this process as it was given; nothing where another program calls these functions."""
    started = Path(sys.argv[0])
    ours = started.name.removesuffix(".exe") == "orthoact" or started == Path(__file__).parent.parent / "__main__.py"
    return ["orthoact", *sys.argv[1:]] if ours else []


def command_line(arguments: Iterable[str]) -> str | None:
    """A command as it was given, paths of this machine by their last part.

    >>> command_line(["orthoact", "convert", "gpt2", "-o", "/tmp/out"])
    'orthoact convert gpt2 -o out'
    """
    import shlex

    parts = []
    for argument in arguments:
        flag, equals, value = argument.partition("=") if argument.startswith("--") else ("", "", argument)
        local = value.startswith(("/", "~", ".")) or re.match(r"[A-Za-z]:\\", value)
        parts.append(f"{flag}{equals}{portable(value) if local else value}")
    return shlex.join(parts) or None
