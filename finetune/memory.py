"""The most memory that a piece of work took."""

from __future__ import annotations

import re
import resource
import sys
from pathlib import Path

import torch


class Peak:
    """Measures, from its start to its end, the most memory of the accelerator, or else of the whole process.

    Linux counts a process's peak anew when asked to; elsewhere it is that since the process began.
    """

    bytes: int = 0

    def __enter__(self) -> Peak:
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        else:
            try:
                Path("/proc/self/clear_refs").write_text("5")
            except OSError:
                pass
        return self

    def __exit__(self, *_: object) -> None:
        if torch.cuda.is_available():
            self.bytes = torch.cuda.max_memory_allocated()
        else:
            self.bytes = _resident()

    @property
    def now(self) -> int:
        """So far."""
        return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else _resident()


def _resident() -> int:
    status = Path("/proc/self/status")
    if status.is_file() and (found := re.search(r"VmHWM:\s+(\d+) kB", status.read_text())):
        return int(found[1]) * 1024
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024
