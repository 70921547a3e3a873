import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
if workers := os.environ.get("PYTEST_XDIST_WORKER_COUNT"):  # not where these are started: they would inherit it
    # the cores shared among the workers, for each and its children
    os.environ.setdefault("OMP_NUM_THREADS", str((os.cpu_count() or 1) // int(workers) or 1))

import pytest
import torch


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@pytest.fixture
def without_loops(monkeypatch):
    """As where activations do not run as machine code of `loops`: on a GPU, or without llvmlite."""
    from orthoact.interp import loops

    monkeypatch.setattr(loops, "available", lambda: False)
    monkeypatch.setattr(loops, "_loops", {})


def pytest_collection_modifyitems(config, items):
    if "long" in (config.getoption("markexpr") or ""):
        return
    skip = pytest.mark.skip(reason="takes minutes: make test-long")
    for item in items:
        if "long" in item.keywords:
            item.add_marker(skip)
