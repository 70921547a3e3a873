"""Models by Hub id: the real client against a Hub on loopback, in a process of its own."""

import json
import os
import shutil
import subprocess
import sys

import loopback_hub
import pytest
import tiny_models as tiny
import torch

from orthoact.convert.checkpoint import save
from orthoact.convert.sources import demo_folder


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    root = tmp_path_factory.mktemp("hub")
    shutil.copytree(demo_folder(), root / "tester" / "demo")
    save(tiny.timm_model("vit"), root / "tester" / "vit")
    pickled = tiny.hf("gpt2")
    pickled.save_pretrained(root / "tester" / "pickled")
    (root / "tester" / "pickled" / "model.safetensors").unlink()
    torch.save(pickled.state_dict(), root / "tester" / "pickled" / "pytorch_model.bin")
    with loopback_hub.serve(root) as endpoint:
        yield endpoint


@pytest.fixture
def orthoact_on(hub, tmp_path):
    env = {k: v for k, v in os.environ.items() if not k.startswith("HF_")}
    env |= {"HF_ENDPOINT": hub, "HF_HOME": str(tmp_path / "home"), "HF_HUB_DISABLE_XET": "1", "HF_TOKEN": "hf_test"}
    env |= {"HF_HUB_DISABLE_TELEMETRY": "1", "NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1"}

    def run(*args, code=0):
        command = [sys.executable, "-m", "orthoact", *map(str, args)]
        done = subprocess.run(command, capture_output=True, text=True, env=env, cwd=tmp_path, timeout=300)
        assert done.returncode == code, done.stderr[-3000:]
        return done

    return run


def test_convert_by_id(orthoact_on, tmp_path):
    report = json.loads(orthoact_on("convert", "tester/demo", "--family", "hermite", "--json").stdout)
    assert report["output"] == "demo-hermite" and len(report["sites"]) == 6
    held = json.loads((tmp_path / "demo-hermite" / "orthoact.json").read_text())
    base = held["base"]
    assert (base["model"], base["revision"], base["library"]) == ("tester/demo", None, "transformers")
    assert base["card"]["license"] == "apache-2.0"
    assert (tmp_path / "demo-hermite" / "tokenizer.json").read_bytes() == (
        demo_folder() / "tokenizer.json"
    ).read_bytes()
    (tmp_path / "t.txt").write_text(
        "It is a truth universally acknowledged, that a single man must be in want of a wife."
    )
    measured = json.loads(
        orthoact_on("evaluate", "demo-hermite", "--data", "t.txt", "--against", "tester/demo", "--json").stdout
    )
    assert measured["tokens"] > 10 and measured["kl"] < 1e-3


def test_convert_a_timm_repository(orthoact_on, tmp_path):
    report = json.loads(orthoact_on("convert", "tester/vit", "--revision", "main", "--json").stdout)
    assert [s["name"] for s in report["sites"]] == ["blocks.0.mlp.act", "blocks.1.mlp.act"]
    assert json.loads((tmp_path / "vit-hermite" / "config.json").read_text())["architecture"] == "orthoact"


def test_pickled_weights_come_out_as_safetensors(orthoact_on, tmp_path):
    orthoact_on("convert", "tester/pickled", "--json")
    names = {p.name for p in (tmp_path / "pickled-hermite").iterdir()}
    assert "model.safetensors" in names and not any(n.endswith(".bin") for n in names)


def test_what_the_hub_does_not_have(orthoact_on, tmp_path):
    for args in (["tester/missing"], ["tester/demo", "--revision", "no-such-branch"]):
        failed = orthoact_on("convert", *args, code=1)
        assert "the Hub did not give it" in failed.stderr and "Traceback" not in failed.stderr
    assert {p.name for p in tmp_path.iterdir()} <= {"home"}
