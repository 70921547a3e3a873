"""A run from recipe to folder: what it writes, that it learns, that it stops with a reason, that it goes on exactly."""

import json
import subprocess
import sys
import time
from pathlib import Path

import loopback_hub
import psutil
import pytest
import tiny_training as tiny
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file
from tiny_training import SHORT, short

import orthoact
from orthoact import OrthoactError
from orthoact.convert.card import make_card
from orthoact.convert.fidelity import evaluate
from orthoact.convert.sources import demo_folder
from orthoact.finetune.recipe import read
from orthoact.interp import engine, kernels


def lines(out):
    return [json.loads(line) for line in (Path(out) / "metrics.jsonl").read_text().splitlines()]


def losses(out):
    return [line["loss"] for line in lines(out)]


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """An uninterrupted run."""
    out = tmp_path_factory.mktemp("run") / "done"
    return orthoact.train(short(), out), out


def test_the_folder_is_an_ordinary_converted_checkpoint(done):
    from transformers import AutoModelForCausalLM

    _, out = done
    model = AutoModelForCausalLM.from_pretrained(out)
    acts = [m for m in model.modules() if isinstance(m, orthoact.Activation)]
    assert len(acts) == 6 and all(act.theta.abs().max() > 0 for act in acts), "the trained coefficients are in it"
    base, new = load_file(demo_folder() / "model.safetensors"), load_file(out / "model.safetensors")
    assert all(torch.equal(base[k], new[k]) for k in base), "no weight has changed"
    assert (out / "tokenizer.json").is_file()
    assert not [p.name for p in out.iterdir() if p.name.startswith(".")], "nothing is left behind"
    suffixes = {p.suffix for p in out.rglob("*") if p.is_file()}
    assert suffixes <= {".json", ".jsonl", ".safetensors"}, "nothing is pickled"


def test_long_work_is_compiled_where_that_is_faster(done, tmp_path, monkeypatch, request):
    facts, out = done
    monkeypatch.setattr(engine, "COST", 0.0)  # every run is worth the kernels
    monkeypatch.setattr(engine._State, "broken", "")  # what other tests in this process left
    monkeypatch.setattr(engine._State, "chosen", False)
    cpu = torch.device("cpu")
    assert facts["path"] == "eager" == engine.suited(1e12, training=True, device=cpu), "loops are as fast"
    request.getfixturevalue("without_loops")
    compiled = orthoact.train(short(), tmp_path / "compiled")
    assert compiled["path"] == "compiled" and any(kind.startswith("gradients") for kind, *_ in kernels._kernels)
    assert losses(tmp_path / "compiled") == pytest.approx(losses(out), rel=1e-5)
    found = evaluate(str(out), limit=4)
    with engine.using("eager"):
        assert engine.suited(1e12, training=True) == "eager", "what was chosen stays"
        assert evaluate(str(out), limit=4)["kl"] == pytest.approx(found["kl"], rel=1e-3)


def test_the_record_says_what_trained(done):
    facts, out = done
    record = json.loads((out / "orthoact.json").read_text())
    training = record["training"]
    assert training["finished"] and training["what"] == "activations" and training["trainable"] == 30
    assert training["trainable_by"] == {"activations": 30} and training["recipe"]["train"]["max_steps"] == 8
    assert {"zero_step", "validation", "test", "best", "seconds", "peak_memory", "step"} <= set(training)
    assert len(record["sites"]) == 6 and record["base"]["model"] == "demo"
    text = (out / "orthoact.json").read_text()
    assert str(out.parent) not in text and str(demo_folder()) not in text, "no local path may be pushed"
    assert facts["test"] == training["test"]


def test_the_card_says_what_training_gave(done):
    _, out = done
    training, text = json.loads((out / "orthoact.json").read_text())["training"], make_card(out, "you/m")["README.md"]
    assert not loopback_hub.validate(text.decode())
    found = {(r.metric_type, r.dataset_split): r.metric_value for r in ModelCard(text.decode()).data.eval_results}
    assert found == {(name, "test"): value for name, value in training["test"].items()}
    figures = [f"{training[key]['perplexity']:.6g}" for key in ("zero_step", "validation", "test")]
    assert f"| perplexity | {' | '.join(figures)} |".encode() in text and b"for 8 steps" in text


def test_the_metrics_are_one_line_a_logged_step(done):
    _, out = done
    found = lines(out)
    assert [line["step"] for line in found] == list(range(1, 9))
    assert all(isinstance(line["loss"], float) and line["learning_rate"] >= 0 for line in found)
    assert [line["step"] for line in found if "validation_loss" in line] == [4, 8]
    assert set(found[0]["sites"]) == {f"transformer.h.{i}.mlp.act" for i in range(6)}
    rates = [line["learning_rate"] for line in found]
    assert rates[-1] == 0 and rates[0] == max(rates), "a cosine down to nothing after one step of warm-up"


def test_it_learns(tmp_path):
    options = ["train.max_steps=24", "data.length=32", "train.evaluate_every=8", "convert.degree=2"]
    facts = orthoact.train(read("demo-smoke", options), tmp_path / "o")
    assert facts["best"]["loss"] < facts["zero_step"]["loss"] - 0.05


def test_the_last_checkpoints_and_the_best_are_kept(done):
    facts, out = done
    kept = sorted(int(p.name.removeprefix("step-")) for p in (out / "state").iterdir())
    assert kept == sorted({6, 8, facts["best"]["step"]})


def test_accumulated_batches_are_one_large_one(done, tmp_path):
    still = ["train.dropout=false", "train.evaluate_every=null"]
    orthoact.train(short(*still, "train.batch_size=4"), tmp_path / "a")
    orthoact.train(short(*still, "train.batch_size=2", "train.accumulate=2"), tmp_path / "b")
    assert losses(tmp_path / "a") == pytest.approx(losses(tmp_path / "b"), abs=1e-5)


def test_bf16_checkpointing_and_the_tracker(tmp_path):
    options = ["train.mixed_precision=bf16", "train.gradient_checkpointing=true", "train.tracker=tensorboard"]
    facts = orthoact.train(short("train.max_steps=2", *options), tmp_path / "o")
    assert facts["loss"] == pytest.approx(facts["zero_step"]["loss"], rel=0.3)
    assert list((tmp_path / "o" / "state").rglob("events.out.tfevents*"))


def test_early_stopping(tmp_path):
    patient = ["train.learning_rate=0.1", "train.evaluate_every=1", "train.patience=1", "train.schedule=constant"]
    facts = orthoact.train(short(*patient, "train.max_steps=30"), tmp_path / "o")
    assert facts["step"] == facts["best"]["step"] + 1 < 30


def test_a_loss_that_is_not_finite_stops_with_step_site_and_checkpoint(tmp_path):
    wild = ["train.learning_rate=1e30", "train.warmup=0", "train.clip=null", "train.save_every=1"]
    wild += ["train.evaluate_every=null", "train.schedule=constant"]
    said = r"step \d+: the loss is not finite, first at the activation transformer\.h\.\d\.mlp\.act; the last good "
    with pytest.raises(OrthoactError, match=said + r"checkpoint is .*step-0000000\d; lower train\.learning_rate"):
        orthoact.train(short(*wild), tmp_path / "o")
    assert not (tmp_path / "o" / "config.json").exists(), "no model is left that did not train"


def test_folders_that_must_not_be_written(done, tmp_path):
    _, out = done
    before = {p: p.stat().st_mtime_ns for p in out.rglob("*")}
    with pytest.raises(OrthoactError, match=r"exists: give another folder with --output, --resume, or --overwrite"):
        orthoact.train(short(), out)
    with pytest.raises(OrthoactError, match=r"has another recipe \(train\.max_steps was 8, is 9\)"):
        orthoact.train(short("train.max_steps=9"), out, resume=True)
    foreign = tmp_path / "mine"
    foreign.mkdir()
    (foreign / "thesis.txt").write_text("x")
    with pytest.raises(OrthoactError, match="was not written by orthoact"):
        orthoact.train(short(), foreign, overwrite=True)
    assert {p: p.stat().st_mtime_ns for p in out.rglob("*")} == before


def test_what_cannot_begin_leaves_everything_as_it_was(tmp_path):
    out = tmp_path / "out"
    with pytest.raises(OrthoactError, match="there is no file or folder"):
        orthoact.train(short("data.path=/nowhere.txt"), out)
    assert not out.exists()
    orthoact.train(short("train.max_steps=1"), out)
    before = {p: p.stat().st_mtime_ns for p in out.rglob("*")}
    with pytest.raises(OrthoactError, match="there is no file or folder"):
        orthoact.train(short("data.path=/nowhere.txt"), out, overwrite=True)
    assert {p: p.stat().st_mtime_ns for p in out.rglob("*")} == before


def test_a_model_that_the_last_update_broke_has_diverged(tmp_path):
    with pytest.raises(OrthoactError, match="step 1: the loss is not finite"):
        orthoact.train(short("train.learning_rate=1e30", "train.max_steps=1", "train.warmup=0"), tmp_path / "out")
    assert not (tmp_path / "out" / "config.json").exists()


def test_an_encoder_is_no_causal_language_model(tmp_path):
    tiny.bert_folder(tmp_path / "model")
    with pytest.raises(OrthoactError, match="a token sees the tokens after it"):
        orthoact.train(short(f"model={tmp_path / 'model'}"), tmp_path / "out")


def test_other_data_are_not_resumed_on(tmp_path):
    text = (demo_folder() / "heldout.txt").read_text()
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "t.txt").write_text(text if name == "a" else text.upper())
    orthoact.train(short(f"data.path={tmp_path / 'a' / 't.txt'}"), tmp_path / "out")
    with pytest.raises(OrthoactError, match=r"--resume: .* had other data"):
        orthoact.train(short(f"data.path={tmp_path / 'b' / 't.txt'}"), tmp_path / "out", resume=True)


def test_keys_and_trackers_that_do_not_fit(tmp_path):
    for override, said in (
        ("convert.groups=7", "^convert.groups 7"),
        ("convert.degree=1000", "^convert.degree 1000"),
        ("train.tracker=nonsense", "train.tracker: nonsense is none of those installed"),
        ("seed=99999999999999999999", "seed: expected a whole number"),
    ):
        with pytest.raises(OrthoactError, match=said):
            orthoact.train(short(override), tmp_path / "out")
        assert not (tmp_path / "out").exists()


# -- classification ----------------------------------------------------------------------------------------------------


def texts(path, names=("no", "yes")):
    path.write_text("text,label\n" + "".join(f"{'good' if i % 2 else 'bad'} {i},{names[i % 2]}\n" for i in range(60)))
    return path


SENTENCES = ["task=sequence-classification", "convert.groups=4", "train.head_learning_rate=0.02", *SHORT[1:]]


def test_a_trunk_gets_a_head_for_the_labels(tmp_path):
    model, data = tiny.bert_folder(tmp_path / "bert"), texts(tmp_path / "d.csv")
    recipe = read("demo-smoke", [f"model={model}", f"data.path={data}", *SENTENCES, "train.max_steps=12"])
    facts = orthoact.train(recipe, tmp_path / "o")
    assert facts["trainable_by"] == {"head": 2 * 32 + 2, "activations": 2 * 4 * 5}
    assert set(facts["test"]) == {"loss", "accuracy", "f1"}
    config = json.loads((tmp_path / "o" / "config.json").read_text())
    assert config["architectures"] == ["BertForSequenceClassification"] and config["id2label"] == {
        "0": "no",
        "1": "yes",
    }
    loaded = orthoact.load(tmp_path / "o")
    assert type(loaded).__name__ == "BertForSequenceClassification"


def test_labels_that_do_not_fit_the_head(tmp_path):
    model, data = tiny.bert_folder(tmp_path / "bert", classes=3), texts(tmp_path / "d.csv")
    options = [f"model={model}", f"data.path={data}", *SENTENCES, "train.max_steps=2"]
    with pytest.raises(OrthoactError, match=r"the head of bert has 3 classes .* the data has 2 .* new_head: true"):
        orthoact.train(read("demo-smoke", options), tmp_path / "o")
    facts = orthoact.train(read("demo-smoke", [*options, "new_head=true"]), tmp_path / "o2")
    assert facts["trainable_by"]["head"] == 2 * 32 + 2


def test_a_converted_model_is_trained_as_it_is(tmp_path):
    net = orthoact.load("demo")
    orthoact.convert_(net, family="rational", degree=3)
    source = orthoact.convert.sources.load_source("demo")  # type: ignore[attr-defined]
    source.model = net
    orthoact.save(net, tmp_path / "converted", source=source)
    facts = orthoact.train(short(f"model={tmp_path / 'converted'}", "train.max_steps=2"), tmp_path / "o")
    assert str(tmp_path) not in (tmp_path / "o" / "orthoact.json").read_text(), "no local path may be pushed"
    assert facts["recipe"]["model"] == "converted"
    assert facts["trainable_by"] == {"activations": 6 * orthoact.FAMILIES["rational"].size(3)}
    assert (
        json.loads((tmp_path / "o" / "config.json").read_text())["orthoact"]["sites"]["transformer.h.0.mlp.act"][
            "family"
        ]
        == "rational"
    )


# -- going on ----------------------------------------------------------------------------------------------------------

KILLED = """
import os, sys, json
import orthoact, transformers, safetensors.torch, datasets, torchmetrics
from orthoact.finetune import folder, loop, run, state
from orthoact.finetune.recipe import read
from orthoact.interp import engine
recipe = read("demo-smoke", json.loads(sys.argv[1]))

def dies(name, owner, at):
    inner, count = getattr(owner, name), [0]
    def call(*args, **options):
        count[0] += 1
        if count[0] == at:
            os.kill(os.getpid(), 9)
        return inner(*args, **options)
    setattr(owner, name, call)

def half(folder):  # removed: renamed, not deleted yet
    os.rename(folder, folder.with_name(".half.new"))
    os.kill(os.getpid(), 9)

MOMENTS = {
    "in a step": lambda: dies("measure", loop, 2),
    "before the first checkpoint": lambda: dies("save_file", safetensors.torch, 1),
    "in the middle of a checkpoint": lambda: dies("save_file", safetensors.torch, 5),
    "between line and checkpoint": lambda: dies("get_model_state_dict", state, 3),
    "while an old checkpoint is removed": lambda: setattr(state, "remove", half),
    "while the model is written": lambda: dies("save", folder, 1),
    "while the model is moved": lambda: dies("replace", folder.os, 4),
}
for moment, prepare in MOMENTS.items():  # nothing has computed yet: the process is safe to fork
    pid = os.fork()
    if pid == 0:
        prepare()
        run.train(recipe, moment.replace(" ", "-"))
        os._exit(0)
    _, status = os.waitpid(pid, 0)
    print(moment, os.WTERMSIG(status) if os.WIFSIGNALED(status) else "survived", flush=True)
"""


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    """Runs that were killed (-9) at several moments, by moment."""
    work = tmp_path_factory.mktemp("killed")
    command = [sys.executable, "-W", "ignore", "-c", KILLED, json.dumps(SHORT)]
    done = subprocess.run(command, cwd=work, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    told = done.stdout.splitlines()
    assert len(told) == 7 and all(line.endswith(" 9") for line in told), told
    return sorted(path for path in work.iterdir())


def test_a_killed_run_goes_on_to_the_same_end(killed, done, caplog):
    facts, whole = done
    trained = load_file(whole / "model.safetensors")
    for out in killed:
        resumed = orthoact.train(short(), out, resume=True)
        assert losses(out) == losses(whole), f"{out.name}: every loss is the same, to the last bit"
        assert resumed["test"] == facts["test"], out.name
        assert all(torch.equal(v, trained[k]) for k, v in load_file(out / "model.safetensors").items()), out.name
        assert {p.name for p in out.iterdir()} == {p.name for p in whole.iterdir()}, f"{out.name}: nothing is left over"
    assert "no checkpoint to resume from, starting afresh" in caplog.text and "resuming from step 6" in caplog.text


def test_resuming_what_is_not_there_or_finished(done, tmp_path, caplog):
    facts, out = done
    fresh = orthoact.train(short(), tmp_path / "new", resume=True)
    assert "starting afresh" in caplog.text and fresh["test"] == facts["test"]
    again = orthoact.train(short(), out, resume=True)
    assert "finished already" in caplog.text and again["test"] == facts["test"]


def test_a_line_that_a_kill_cut_short_is_dropped(done, tmp_path):
    from orthoact.finetune.folder import keep_lines

    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "loss": 2.0}\n{"step": 4, "loss": 1.0}\n{"step": 5, "lo')
    keep_lines(path, 3)
    assert path.read_text() == '{"step": 1, "loss": 2.0}\n'


# -- several processes -------------------------------------------------------------------------------------------------


def command(out, *overrides, processes=2):
    options = ["--output", str(out), "--num-processes", str(processes), "--quiet"]
    return [sys.executable, "-W", "ignore", "-m", "orthoact", "finetune", "demo-smoke", *SHORT, *overrides, *options]


def test_two_processes_are_one_with_the_doubled_batch_and_go_on(tmp_path):
    """One test, since each start of two processes takes seconds."""
    still = ["train.dropout=false"]
    orthoact.train(short(*still, "train.batch_size=4"), tmp_path / "one")
    whole = subprocess.run(command(tmp_path / "two", *still), capture_output=True, text=True, timeout=300)
    assert whole.returncode == 0, whole.stderr[-3000:]
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), abs=1e-5)
    facts = [json.loads((tmp_path / n / "orthoact.json").read_text())["training"] for n in ("one", "two")]
    assert facts[1]["processes"] == 2
    assert facts[1]["test"] == pytest.approx(facts[0]["test"], abs=1e-4)

    out = tmp_path / "killed"
    launcher = subprocess.Popen(command(out, *still), stderr=subprocess.DEVNULL)
    end = time.monotonic() + 300
    while not (out / "state" / "step-00000004").exists() and time.monotonic() < end:
        time.sleep(0.01)
    for process in [*psutil.Process(launcher.pid).children(recursive=True), psutil.Process(launcher.pid)]:
        process.kill()
    launcher.wait(60)
    assert not (out / "config.json").exists(), "it was killed before its end"
    resumed = subprocess.run([*command(out, *still), "--resume"], capture_output=True, text=True, timeout=300)
    assert resumed.returncode == 0, resumed.stderr[-3000:]
    assert "resuming from step" in resumed.stderr
    assert losses(out) == losses(tmp_path / "two")


def test_a_launcher_that_gives_one_process_is_refused(tmp_path):
    with pytest.raises(OrthoactError, match=r"--num-processes 2: 1 are running"):
        orthoact.train(short(), tmp_path / "o", processes=2)
