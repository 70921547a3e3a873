"""Pushing: the real client against a Hub on loopback that also breaks, then loaded back by id in a fresh process."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import loopback_hub
import pytest
import tiny_models as tiny
from loopback_hub import Fault

import orthoact
from orthoact.convert.checkpoint import save
from orthoact.convert.hub import files_of
from orthoact.convert.sources import load_source


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A demo conversion in each form and a timm model, with what must not be pushed."""
    root = tmp_path_factory.mktemp("out")
    for form in ("full", "adapter"):
        source = load_source("demo")
        orthoact.convert_(source.model)
        report = {"fidelity": {"data": "demo", "tokens": 10, "kl": 1e-5}, "sites": [], "left": []}
        command = ["orthoact", "convert", "demo"]
        save(source.model, root / form, source=source, form=form, seed=0, command=command, report=report)
    timm_model = tiny.timm_model("vit")
    orthoact.convert_(timm_model)
    save(timm_model, root / "timm")
    full = root / "full"
    (full / "state").mkdir()
    for name in ("state/optimizer.bin", "model.bin", "training_args.pt", ".secret", "checkpoint-3.pkl"):
        (full / name).write_bytes(b"\x80\x04.")
    (full / "link.txt").symlink_to(Path(__file__))
    return root


@pytest.fixture
def hub(tmp_path):
    with loopback_hub.hub(tmp_path / "hub") as made:
        yield made


@pytest.fixture
def run(hub, folders, tmp_path):
    """Run Python code in a process of its own that talks to this Hub; it prints one JSON value."""
    env = loopback_hub.environment(hub, tmp_path / "home")

    def run(code, **changes):
        code = "import json, sys, orthoact\nfrom orthoact.convert.hub import push\n" + code
        command = [sys.executable, "-W", "ignore", "-c", code]
        done = subprocess.run(command, capture_output=True, text=True, env=env | changes, cwd=folders, timeout=300)
        assert done.returncode == 0, done.stderr[-3000:]
        return json.loads(done.stdout.splitlines()[-1])

    return run


PUSHED = {"README.md", "activations.png", "config.json", "generation_config.json", "model.safetensors", "orthoact.json"}
PUSHED |= {"tokenizer.json", "tokenizer_config.json"}

TRY = """
def attempt(*args, **options):
    try:
        return push(*args, wait=0.05, **options)
    except orthoact.OrthoactError as error:
        return str(error)
"""


def test_what_belongs_there(folders):
    names = {p.name for p in files_of(folders / "full")}
    assert names == PUSHED - {"README.md", "activations.png"}
    with pytest.raises(orthoact.OrthoactError, match="no converted model"):
        files_of(folders)
    with pytest.raises(orthoact.OrthoactError, match="no such folder"):
        files_of(folders / "missing")


def test_push_and_load_back(hub, run, folders):
    hub.root.mkdir()
    code = """
dry = push("full", "tester/m", dry_run=True)
print(json.dumps([dry, push("full", "m"), push("adapter", "tester/a", private=True), push("timm", "tester/t"),
                  push("second", "tester/m", revision="next", message="Next")]))
"""
    shutil.copytree(folders / "full", folders / "second", symlinks=True)
    (folders / "second" / "NOTES.md").write_text("what is new on this branch")
    dry, full, adapter, _, branch = run(code)
    assert {row["path"] for row in dry["files"]} == PUSHED
    assert {p.name for p in hub.folder("tester/m").iterdir()} == PUSHED
    assert full["repo"] == "tester/m" and full["commit"] == hub.commit("tester/m")
    assert (hub.folder("tester/m") / "model.safetensors").read_bytes() == (
        folders / "full" / "model.safetensors"
    ).read_bytes()
    assert {row["path"] for row in adapter["files"]} == {"README.md", "activations.png"} | {
        "adapter_config.json",
        "adapter_model.safetensors",
    }
    assert "tester/a" in hub.private and branch["revision"] == "next" and hub.branches("tester/m") == ["main", "next"]
    commits = [line for line in hub.log if "/commit/" in line]
    assert len(commits) == 4, "one for each push, whatever it uploads"
    assert (hub.folder("tester/m", "next") / "NOTES.md").is_file()
    code = """
import torch, timm
from transformers import AutoModelForCausalLM
from peft import PeftModel
x = torch.randint(5, 90, (2, 9), generator=torch.Generator().manual_seed(0))
base = orthoact.load("demo")
plain = AutoModelForCausalLM.from_pretrained
models = [plain("tester/m"), plain("tester/m", revision="next"),
          orthoact.load("tester/a"), PeftModel.from_pretrained(base, "tester/a"), orthoact.load("full")]
with torch.no_grad():
    out = [m.eval()(input_ids=x).logits for m in models]
net, wrapped = timm.create_model("hf-hub:tester/t", pretrained=True), orthoact.load("tester/t")
acts = sum(isinstance(m, orthoact.Activation) for m in net.modules())
print(json.dumps([[torch.equal(o, out[-1]) for o in out], acts]))
"""
    same, acts = run(code)
    assert all(same) and acts == 2


def test_the_libraries_own_ways_of_pushing(hub, run):
    hub.root.mkdir()
    code = """
import torch, timm
from transformers import AutoModelForCausalLM
from peft import PeftModel
model = AutoModelForCausalLM.from_pretrained("full")
model.push_to_hub("tester/own")
net = timm.create_model("local-dir:timm", pretrained=True)
timm.models.push_to_hf_hub(net, "tester/own-timm", private=True, safe_serialization=True)
wrapped = PeftModel.from_pretrained(orthoact.load("demo"), "adapter")
wrapped.push_to_hub("tester/own-adapter")
x = torch.randint(5, 90, (2, 9))
with torch.no_grad():
    out = [m.eval()(input_ids=x).logits for m in (model, AutoModelForCausalLM.from_pretrained("tester/own"),
           PeftModel.from_pretrained(orthoact.load("demo"), "tester/own-adapter"))]
    y = torch.randn(2, 3, 32, 32)
    again = timm.create_model("hf-hub:tester/own-timm", pretrained=True).eval()
    images = torch.equal(again(y), net.eval()(y))
print(json.dumps([[torch.equal(o, out[0]) for o in out], images]))
"""
    same, images = run(code)
    assert all(same) and images
    assert not any(p.suffix in (".bin", ".pt") for p in hub.root.rglob("*"))


@pytest.mark.parametrize(
    ("where", "what", "times"),
    [
        ("POST /api/repos/create", 503, 2),
        ("POST .*/preupload/", 503, 1),
        ("PUT /_lfs/", "cut", 1),
        ("POST .*/commit/", "cut", 1),
        ("POST .*/commit/", 503, 2),
        ("POST .*/commit/", "after", 1),
        ("POST .*lfs/objects/batch", "cut", 1),
    ],
    ids=["create-503", "preupload-503", "upload-cut", "commit-cut", "commit-503", "answer-lost", "batch-cut"],
)
def test_a_fault_of_the_network_is_tried_again(hub, run, where, what, times):
    hub.root.mkdir()
    hub.faults.append(Fault(where, what, times))
    result = run(TRY + 'print(json.dumps(attempt("full", "tester/m")))')
    assert result["commit"] == hub.commit("tester/m"), result
    assert {p.name for p in hub.folder("tester/m").iterdir()} == PUSHED
    assert not hub.faults[0].times, "the fault must have happened"


def test_a_network_that_stays_away_leaves_the_repository_as_it_was(hub, run, folders):
    hub.root.mkdir()
    run(TRY + 'print(json.dumps(attempt("adapter", "tester/m")))')
    before = hub.commit("tester/m")
    hub.faults.append(Fault("POST .*/commit/", "cut", 99))
    said = run(TRY + 'print(json.dumps(attempt("full", "tester/m")))')
    assert "did not answer in 5 attempts" in said and "nothing was committed" in said
    assert hub.commit("tester/m") == before


def test_what_cannot_be_pushed_is_said_in_one_sentence(hub, run):
    hub.root.mkdir()
    one = run(TRY + 'print(json.dumps([attempt("full", "other/m"), attempt("full", "a//b"), attempt("full", "-x")]))')
    assert "no right to write" in one[0] and all("no name of a repository" in text for text in one[1:])
    assert "no token" in run(TRY + 'print(json.dumps(attempt("full", "tester/m")))', HF_TOKEN="")
    assert "does not accept the token" in run(
        TRY + 'print(json.dumps(attempt("full", "tester/m")))', HF_TOKEN="hf_wrong"
    )
    assert "HF_HUB_OFFLINE" in run(TRY + 'print(json.dumps(attempt("full", "tester/m")))', HF_HUB_OFFLINE="1")
    assert not hub.branches("tester/m")


def test_a_card_of_somebodys_own_stays(hub, run):
    hub.root.mkdir()
    hub.folder("tester/m").mkdir(parents=True)
    (hub.folder("tester/m") / "README.md").write_text("mine")
    result = run('print(json.dumps(push("adapter", "tester/m")))')
    assert (hub.folder("tester/m") / "README.md").read_text() == "mine"
    assert "README.md" not in {row["path"] for row in result["files"]}


def test_convert_and_push_in_one_command(hub, run, folders):
    hub.root.mkdir()
    code = """
from orthoact.cli import main
arguments = ["convert", "demo", "-o", "new", "--adapter", "--push-to-hub", "tester/n", "--private", "--json"]
main(arguments, standalone_mode=False)
"""
    report = run(code)
    assert report["pushed"]["repo"] == "tester/n" and "tester/n" in hub.private
    card = (hub.folder("tester/n") / "README.md").read_text()
    assert not loopback_hub.validate(card) and 'orthoact.load("tester/n")' in card
