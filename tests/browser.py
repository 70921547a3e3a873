"""A headless Chromium for pages: what the console says, and the document after its scripts have run."""

from __future__ import annotations

import re
import shutil
import subprocess
import tempfile

FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--hide-scrollbars"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync", "--disable-extensions"),
    *("--enable-logging=stderr", "--log-level=0", "--host-resolver-rules=MAP * ~NOTFOUND"),
)


def find() -> str | None:
    return next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)


def require() -> str:
    import pytest

    path = find()
    if path is None:
        pytest.skip("no Chromium: apt-get install chromium")
    return path


def visit(url: str, *flags: str) -> tuple[str, list[str]]:
    """The document as text and the lines of the console."""
    with tempfile.TemporaryDirectory() as profile:
        command = [require(), *FLAGS, f"--user-data-dir={profile}", *flags, "--dump-dom", url]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout, re.findall(r"CONSOLE.*?\] (.*)", done.stderr)
