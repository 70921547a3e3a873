"""Run docs/demo.ipynb from top to bottom; as a script, keep what its cells show: `python tests/notebook.py`."""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path
from typing import Any
from unittest import mock

from loopback_hub import environment, hub

NOTEBOOK = Path(__file__).parent.parent / "docs" / "demo.ipynb"


def execute(folder: Path) -> Any:
    """The executed notebook; it runs in `folder` and pushes to a Hub on the loopback interface."""
    import nbformat
    from nbclient import NotebookClient

    notebook = nbformat.read(NOTEBOOK, as_version=4)
    with hub(folder / ".hub") as made:
        made.writable = ("tester", "you")
        env = environment(made, folder / ".home")
        env["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{env['PATH']}"
        env |= {
            "PYTHONWARNINGS": "ignore",
            "TTY_COMPATIBLE": "0",  # rich: a command of a cell has a terminal, whose spinner would be kept
            "IPYTHONDIR": str(folder / ".ipython"),
            "PYDEVD_DISABLE_FILE_VALIDATION": "1",
        }
        with mock.patch.dict(os.environ, env, clear=True):
            client = NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(folder)}})
            return client.execute()


if __name__ == "__main__":
    import nbformat

    with tempfile.TemporaryDirectory() as folder:
        done = execute(Path(folder))
    for cell in done.cells:
        cell.get("metadata", {}).pop("execution", None)
        if "outputs" in cell:  # progress bars go to stderr
            cell.outputs = [out for out in cell.outputs if out.get("name") != "stderr"]
    done.metadata.pop("widgets", None)
    nbformat.write(done, NOTEBOOK)
