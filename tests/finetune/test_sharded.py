"""Sharded training (FSDP2) on two processes: the same losses, exact resume, the model whole again in the end.

Accelerate shards on accelerators only, so the model is sharded here as its FSDP2 plugin does it (`fully_shard` of every
block, then of the objective), and handed to the loop as it is.
"""

import json
import subprocess
import sys

import pytest
from tiny_training import SHORT, short

import orthoact
from orthoact.finetune.state import STATE

SCRIPT = """
import json, sys, logging
from pathlib import Path
import torch
import orthoact
from torch.distributed.fsdp import fully_shard
from torch.distributed.device_mesh import init_device_mesh
from orthoact.finetune import run as running
from orthoact.finetune.data import make_examples, read_rows
from orthoact.finetune.evaluate import Objective
from orthoact.finetune.examples import Stream
from orthoact.finetune.launch import close, make_accelerator
from orthoact.finetune.loop import Job, loop
from orthoact.finetune.models import make_model
from orthoact.finetune.monitor import Monitor
from orthoact.finetune.recipe import read
from orthoact.finetune.state import States, is_sharded

recipe, out = read("demo-smoke", json.loads(sys.argv[1])), Path(sys.argv[2])
accelerator = make_accelerator(recipe, None, 2)
accelerator.prepare_model = lambda model, **options: model  # sharded here
rows = read_rows(recipe)

def go(resume):
    source, _ = make_model(recipe, rows)
    examples = make_examples(rows, source, recipe)
    objective = Objective(source.model)
    mesh = init_device_mesh("cpu", (2,))
    for block in source.model.transformer.h:
        fully_shard(block, mesh=mesh)
    fully_shard(objective, mesh=mesh)
    assert is_sharded(objective)
    trainable, said = running.choose_what(source.model, recipe), []
    train = recipe.train
    job = Job(objective, trainable.groups, Stream(examples.train, 8 * 2 * 2, 0), examples.validation, examples.collate,
              recipe.task, train, States(out / "state"), Monitor(source.model), said.append, lambda *figures: None,
              resume=resume)
    with job.monitor:
        return loop(job, accelerator)["objective"], [line["loss"] for line in said]

objective, whole = go(None)
_, rest = go(6)
_, trainable = running._gathered(objective, recipe, rows)
theta = trainable.model.transformer.h[3].mlp.act.theta
if accelerator.is_main_process:
    print(json.dumps({"whole": whole, "rest": rest, "theta": theta.tolist()}))
close()
"""


def test_a_sharded_model_learns_the_same_resumes_and_is_whole_again(tmp_path):
    options = [*SHORT, "train.dropout=false"]
    whole = short("train.dropout=false", "train.batch_size=4")
    orthoact.train(whole, tmp_path / "one")
    (tmp_path / "script.py").write_text(SCRIPT)
    command = [sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += [str(tmp_path / "script.py"), json.dumps(options), str(tmp_path / "sharded")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    lines = [json.loads(line) for line in (tmp_path / "one" / "metrics.jsonl").read_text().splitlines()]
    assert found["whole"] == pytest.approx([line["loss"] for line in lines], abs=1e-5)
    assert found["rest"] == found["whole"][6:], "it goes on exactly"
    assert max(map(abs, found["theta"])) > 0
    from safetensors.torch import load_file

    best = json.loads((tmp_path / "one" / "orthoact.json").read_text())["training"]["best"]["step"]
    held = load_file(tmp_path / "one" / STATE / f"step-{best:08d}" / "trained.safetensors")
    assert found["theta"] == pytest.approx(held["model.transformer.h.3.mlp.act.theta"].tolist(), abs=1e-4)
