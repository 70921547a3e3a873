"""Write a file whole or not at all."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def beside(path: str | Path) -> Iterator[Path]:
    """A name beside `path` to write to, which takes its place at the end; on failure what was there is left as it was.

    Folders are made as needed. Raises `OSError` where the place cannot be written.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".part.{path.name}")  # the same ending: matplotlib goes by it
    try:
        yield part
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
