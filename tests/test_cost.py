"""Time and memory of a conversion. `make test-long`; the figures are those of a quiet machine."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

COST = Path(__file__).parent.parent / "benchmarks" / "cost.py"


@pytest.mark.long
def test_a_conversion_is_cheap():
    done = subprocess.run([sys.executable, str(COST)], capture_output=True, text=True, check=True, timeout=900)
    cost = json.loads(done.stdout)
    assert cost["fit"] < 1, cost
    assert cost["peak"] < 1.2, cost
    assert all(ms < 10 for name, ms in cost["fit_one_ms"].items() if "mish" not in name), cost
    assert cost["fit_one_ms"]["mish 12"] < 30, "joints that are not symmetric are searched in two dimensions"
