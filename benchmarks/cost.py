"""What converting a 12-layer GPT-2 (124 M parameters, random weights) costs in time and memory.

    python benchmarks/cost.py            # prints one JSON object

`fit` is the whole conversion beyond loading and saving: checking the weights, finding the sites, the audit, the fits,
the swap. `peak` is the largest resident memory above that after the imports, as a multiple of the weights. `fit_one_ms`
is the median time of a single fit by target and degree.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile

CONVERT = """
import json, os, sys
import orthoact.cli, orthoact.convert.fidelity, orthoact.convert.checkpoint, orthoact.convert.surgeon
from transformers import GPT2LMHeadModel
from click.testing import CliRunner
memory = lambda key: int(next(l for l in open("/proc/self/status") if l.startswith(key)).split()[1]) * 1024
before = memory("VmRSS")
result = CliRunner().invoke(orthoact.cli.main, ["convert", sys.argv[1], "-o", sys.argv[2], "--json"])
assert result.exit_code == 0, result.output
peak = memory("VmHWM") - before  # not getrusage, which counts the parent too
weights = os.path.getsize(sys.argv[1] + "/model.safetensors")
print(json.dumps({**json.loads(result.stdout)["seconds"], "peak": peak / weights}))
"""


def convert_gpt2() -> dict[str, float]:
    from transformers import GPT2Config, GPT2LMHeadModel

    with tempfile.TemporaryDirectory() as folder:
        GPT2LMHeadModel(GPT2Config()).save_pretrained(f"{folder}/base")
        command = [sys.executable, "-c", CONVERT, f"{folder}/base", f"{folder}/out"]
        env = {**os.environ, "HF_HUB_OFFLINE": "1"}
        done = subprocess.run(command, capture_output=True, text=True, env=env, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def fit_one() -> dict[str, float]:
    from orthoact import fit

    times = {}
    for target in ("gelu", "gelu_tanh", "silu", "mish", "relu"):
        for degree in (8, 12):
            runs = [fit(target, degree=degree).seconds for _ in range(11)]
            times[f"{target} {degree}"] = round(1e3 * statistics.median(runs), 1)
    return times


if __name__ == "__main__":
    print(json.dumps({**convert_gpt2(), "fit_one_ms": fit_one()}, indent=1))
