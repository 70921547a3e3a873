"""A process that is killed (-9) at any step leaves the old state or the new one, whole; the next run sweeps up."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

KILLING = Path(__file__).parent.parent / "killing.py"


def killed(job, folder):
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "ignore", str(KILLING), job, str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize(
    ("form", "steps"),
    [("full", 12), *(pytest.param(*case, marks=pytest.mark.long) for case in (("adapter", 5), ("standalone", 12)))],
)
def test_saving(form, steps, tmp_path):
    found = killed(form, tmp_path / "work")
    assert found["old"] >= steps and found["new"] >= 1, "killed before the exchange and after it"
    assert found["beside"] == ["out"], "nothing is left beside it"


@pytest.mark.long
def test_converting(tmp_path):
    found = killed("convert", tmp_path / "work")
    assert found["old"] >= 3 and found["beside"] == ["out"]


def test_pushing(tmp_path):
    found = killed("push", tmp_path / "work")
    assert found["old"] >= 4 and found["after"], "killed at each request, and then it came to its end"
