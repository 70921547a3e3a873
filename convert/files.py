"""Read the small files of a model folder, which may be somebody else's: of bounded size, and without surprises."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ..interp.errors import OrthoactError

MOST_BYTES = 2**26
"""Size of a JSON file from which it is not read."""


def bounded(path: str | Path) -> None:
    """Refuse a JSON file beyond all bounds before anybody reads it; one that is not there is theirs to miss."""
    path = Path(path)
    if path.is_file() and path.stat().st_size > MOST_BYTES:
        raise OrthoactError(f"{path}: {path.stat().st_size} bytes: expected a file of at most {MOST_BYTES}")


def read_json(path: Path, *, strict: bool = True) -> dict[str, Any]:
    """A JSON object in a file; `OrthoactError` for anything else, or for one beyond all bounds.

    With `strict` a name that is given twice is refused: two readers might take different ones.
    """

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if strict and len(dict(pairs)) < len(pairs):
            names = [name for name, _ in pairs]
            twice = next(name for name in names if names.count(name) > 1)
            raise OrthoactError(f"{path}: it names {twice[:60]!r} twice; the file is damaged")
        return dict(pairs)

    bounded(path)
    try:
        value = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=once)
    except FileNotFoundError as error:
        raise OrthoactError(f"{path.parent}: there is no {path.name}; give the folder that orthoact wrote") from error
    except RecursionError as error:
        raise OrthoactError(f"{path} is nested beyond all bounds; the file is damaged") from error
    except ValueError as error:
        raise OrthoactError(f"{path} is not JSON ({error})") from error
    if not isinstance(value, dict):
        raise OrthoactError(f"{path} is not a JSON object")
    return value
