"""The command line's contract: names, JSON, exit codes, and that bad input loses nothing."""

import json
import os
import re
import shutil
import subprocess
import sys

import pytest
import tiny_models as tiny
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

import orthoact
from orthoact.cli import main
from orthoact.convert.sources import demo_folder


def call(*args, code=0):
    result = CliRunner().invoke(main, [str(a) for a in args])
    assert result.exit_code == code, f"{result.exit_code}: {result.output} {result.exception!r}"
    return result


def call_json(*args, code=0):
    result = call(*args, "--json", code=code)
    return json.loads(result.stdout)


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    out = tmp_path_factory.mktemp("cli") / "demo-hermite"
    call("convert", "demo", "-o", out, "--quiet")
    return out


def test_convert_writes_what_the_contract_says(tmp_path):
    report = call_json("convert", "demo", "--family", "hermite")
    assert report["output"] == "demo-hermite", "the default folder is MODEL-FAMILY in the current one"
    assert set(report) >= {"output", "sites", "left", "seconds", "parameters"}
    assert set(report["seconds"]) >= {"load", "fit", "save"}
    assert report["left"] == [] and report["parameters"] == 6 * 9
    row = report["sites"][0]
    assert set(row) >= {"name", "target", "family", "degree", "parameters", "value_rms", "slope_rms", "value_max"}
    assert (row["name"], row["target"], row["degree"]) == ("transformer.h.0.mlp.act", "gelu_tanh", 8)
    out = tmp_path / "demo-hermite"
    base = load_file(demo_folder() / "model.safetensors")
    new = load_file(out / "model.safetensors")
    assert all(torch.equal(new[k], base[k]) for k in base), "weights are bit-equal to the base"
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (out / name).read_bytes() == (demo_folder() / name).read_bytes()
    text = "".join(p.read_text() for p in out.glob("*.json"))
    assert str(tmp_path) not in text and str(demo_folder()) not in text, "no local path may be pushed"
    assert {p.name for p in tmp_path.iterdir()} == {"demo-hermite"}, "nothing else is left behind"


def test_the_result_is_an_ordinary_checkpoint(converted):
    from transformers import pipeline

    generate = pipeline("text-generation", str(converted), device="cpu")
    text = generate("It was a truth", max_new_tokens=5, do_sample=False)[0]["generated_text"]
    assert text.startswith("It was a truth")


def test_inspect():
    report = call_json("inspect", "demo")
    assert [s["name"] for s in report["sites"]] == [f"transformer.h.{i}.mlp.act" for i in range(6)]
    assert {s["target"] for s in report["sites"]} == {"gelu_tanh"} and report["left"] == []
    assert {s["module"] for s in report["sites"]} == {"NewGELUActivation"}
    assert "transformer.h.0.mlp.act" in call("inspect", "demo").stderr


def test_fit():
    report = call_json("fit", "gelu")
    names = {"family", "degree", "parameters", "coefficients", "value_rms", "slope_rms", "value_max", "lo", "hi"}
    assert set(report) >= names | {"seconds", "reason"}
    assert len(report["coefficients"]) == report["parameters"] == 9 and report["lo"] == -report["hi"]
    assert call_json("fit", "tanh", "--tails", "none", "--degree", "5")["lo"] is None
    assert call_json("fit", "gelu", "--tolerance", "1e-3")["degree"] > 8
    assert call_json("fit", "gelu", "--mean", "1", "--std", "2")["value_rms"] != report["value_rms"]
    shown = call("fit", "leaky_relu(0.2)")
    assert "joints on the kinks at 0" in shown.stderr and len(shown.stdout.split()) == 9


@pytest.mark.parametrize("ending", ["png", "svg", "pdf"])
def test_fit_plot(ending, tmp_path):
    call("fit", "silu", "--plot", f"curve.{ending}", "--quiet")
    start = (tmp_path / f"curve.{ending}").read_bytes()[:300]
    assert {"png": b"PNG", "svg": b"<svg", "pdf": b"%PDF"}[ending] in start + (
        tmp_path / f"curve.{ending}"
    ).read_bytes()


def test_families_and_env():
    assert [f["name"] for f in call_json("families")["families"]] == list(orthoact.FAMILIES)
    assert "hermite" in call("families").stderr
    versions = call_json("env")
    assert versions["orthoact"] == orthoact.__version__ and torch.__version__.startswith(versions["torch"])


def test_evaluate_and_its_bounds(converted):
    report = call_json("evaluate", converted)
    assert report["data"] == "demo" and report["tokens"] > 1000
    assert set(report) >= {"loss_base", "loss", "perplexity_base", "perplexity", "kl", "top1_agreement"}
    assert 0 < report["kl"] < 5e-4 and abs(report["change"]) < 0.1
    call("evaluate", converted, "--max-kl", "1", "--max-change", "1", "--quiet")
    failed = call("evaluate", converted, "--max-kl", "1e-12", code=1)
    assert "--max-kl" in failed.stderr
    against = call_json("evaluate", converted, "--against", "demo")
    assert against["kl"] == pytest.approx(report["kl"], rel=1e-3)


def test_revert_gives_the_base_back(converted, tmp_path):
    call("revert", converted, "-o", "back", "--quiet")
    base, back = load_file(demo_folder() / "model.safetensors"), load_file(tmp_path / "back" / "model.safetensors")
    assert base.keys() == back.keys() and all(torch.equal(base[k], back[k]) for k in base)
    config = json.loads((tmp_path / "back" / "config.json").read_text())
    assert config["activation_function"] == "gelu_new" and "orthoact" not in config
    code = "import transformers as t, sys; t.AutoModelForCausalLM.from_pretrained('back'); "
    code += "assert 'orthoact' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, cwd=tmp_path)


def test_a_converted_model_is_refused_or_refitted(converted):
    refused = call("convert", converted, "-o", "again", code=1)
    assert "revert" in refused.stderr and "--overwrite" in refused.stderr
    report = call_json("convert", converted, "-o", "again", "--overwrite", "--degree", "4")
    assert {s["degree"] for s in report["sites"]} == {4} and {s["target"] for s in report["sites"]} == {"gelu_tanh"}
    assert call_json("evaluate", "again")["data"] == "demo", "it still knows that its base is the demo model"


def test_dry_run_writes_nothing(tmp_path):
    report = call_json("convert", "demo", "--dry-run", "--tolerance", "1e-2")
    assert report["output"] is None and len(report["sites"]) == 6 and list(tmp_path.iterdir()) == []


def test_choice_of_sites_and_groups():
    report = call_json("convert", "demo", "--include", "transformer.h.[01].*", "--exclude", "*.1.*", "--groups", "4")
    assert [s["name"] for s in report["sites"]] == ["transformer.h.0.mlp.act"]
    assert report["parameters"] == 36 and len(report["left"]) == 5


def test_other_models_dtypes_and_tasks(tmp_path):
    tiny.hf("bert-masked").save_pretrained("bert")
    report = call_json("convert", "bert", "--dtype", "bfloat16", "--include-heads")
    assert len(report["sites"]) == 3 and report["output"] == "bert-hermite"
    assert report["fidelity"]["data"] == "probe"
    tensors = load_file(tmp_path / "bert-hermite" / "model.safetensors")
    kinds = {str(t.dtype) for k, t in tensors.items() if "act_fn" in k}
    assert kinds == {"torch.float32"}
    assert {str(t.dtype) for k, t in tensors.items() if "act_fn" not in k} == {"torch.bfloat16"}
    base = call_json("convert", "bert", "--task", "base", "-o", "trunk")
    assert base["sites"][0]["name"] == "encoder.layer.0.intermediate.intermediate_act_fn"


FREE = """
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel


class FreeConfig(PreTrainedConfig):
    model_type = "free"
    vocab_size: int = 64


def gated(x):
    return F.gelu(x) * x


class FreeModel(PreTrainedModel):
    config_class = FreeConfig

    def __init__(self, config):
        super().__init__(config)
        self.embed, self.act, self.out = nn.Embedding(64, 8), nn.SiLU(), nn.Linear(8, 8)
        self.post_init()

    def forward(self, input_ids):
        return self.out(gated(self.act(self.embed(input_ids))))
"""


def test_strict_fails_on_an_activation_that_stays(tmp_path):
    """A function beside the classes of a model's own code calls it: no module does."""
    folder = tmp_path / "free"
    folder.mkdir()
    (folder / "modeling_free.py").write_text(FREE)
    code = {"AutoConfig": "modeling_free.FreeConfig", "AutoModel": "modeling_free.FreeModel"}
    config = {"model_type": "free", "architectures": ["FreeModel"], "auto_map": code}
    (folder / "config.json").write_text(json.dumps(config))
    tensors = {"embed.weight": torch.randn(64, 8), "out.weight": torch.randn(8, 8), "out.bias": torch.zeros(8)}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    failed = call("inspect", "free", "--trust-remote-code", "--strict", "--json", code=1)
    report = json.loads(failed.stdout)
    (left,) = report["left"]
    assert left["where"] == "" and left["function"] == "gelu" and "cannot be replaced" in left["reason"]
    assert [s["target"] for s in report["sites"]] == ["silu"]
    assert "--strict: 1 activations are left" in failed.stderr and "gelu" in failed.stderr
    assert "--strict" in call("convert", "free", "-o", "out", "--trust-remote-code", "--strict", code=1).stderr
    assert not (tmp_path / "out").exists()


def test_strict_passes_where_calls_of_functions_are_converted():
    import transformers as tf

    config = tf.EsmConfig(
        vocab_size=33, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64, pad_token_id=1
    )
    config.mask_token_id = 32
    tf.EsmModel(config).save_pretrained("esm")
    report = call_json("inspect", "esm", "--strict")
    assert [s["target"] for s in report["sites"]] == ["gelu"] and "functional_gelu" in report["sites"][0]["name"]


def test_poor_copies_are_told_and_refused_by_strict(tmp_path):
    """One harmonic is no GELU: the model it makes is ruined."""
    asked = ("convert", "demo", "--family", "fourier", "--degree", "1", "--dry-run", "--json")
    told = call(*asked)
    assert "warning: 6 of 6 sites get a poor copy: fourier 1 misses gelu_tanh" in told.stderr
    assert len(json.loads(told.stdout)["sites"]) == 6
    refused = call(*asked, "--strict", code=1)
    assert "--strict: 6 of 6 sites get a poor copy" in refused.stderr and not refused.stdout
    assert "poor" not in call("convert", "demo", "--dry-run", "--strict").stderr


def test_a_missed_tolerance_is_told():
    asked = ("convert", "demo", "--dry-run", "--json", "--family", "tropical-rational", "--tolerance")
    assert re.search(
        r"warning: 6 of 6 sites miss --tolerance 1e-06: tropical-rational \d+ comes", call(*asked, "1e-6").stderr
    )
    assert "miss" not in call(*asked, "1e-2").stderr


def test_a_broken_conversion_is_told_in_one_sentence(converted, tmp_path):
    from safetensors.torch import save_file

    config = json.loads((converted / "config.json").read_text())
    sites = config["orthoact"]["sites"]
    sites["transformer.h.9.mlp.act"] = sites["transformer.h.0.mlp.act"]
    shutil.copytree(converted, "site")
    (tmp_path / "site" / "config.json").write_text(json.dumps(config))
    shutil.copytree(converted, "tensor")
    tensors = load_file(converted / "model.safetensors")
    del tensors["transformer.h.2.mlp.act.theta"]
    save_file(tensors, tmp_path / "tensor" / "model.safetensors", {"format": "pt"})
    assert "'transformer.h.9.mlp.act', which GPT2LMHeadModel does not have" in call("evaluate", "site", code=1).stderr
    assert "lacks theta of the learnable activation" in call("evaluate", "tensor", code=1).stderr


# -- bad input ---------------------------------------------------------------------------------------------------------


def truncated(folder):
    shutil.copytree(demo_folder(), folder)
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[: len(data) // 2])


def not_a_number(folder):
    from safetensors.torch import save_file

    shutil.copytree(demo_folder(), folder)
    tensors = load_file(folder / "model.safetensors")
    tensors["transformer.ln_f.weight"][3] = float("nan")
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def no_checkpoint(folder):
    folder.mkdir()
    (folder / "notes.txt").write_text("hello")


def no_json(folder):
    folder.mkdir()
    (folder / "config.json").write_text("{")


def no_activation(folder):
    import transformers as tf

    tiny_config = tf.LlamaConfig(
        vocab_size=16,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        hidden_act="linear",
    )
    tf.LlamaForCausalLM(tiny_config).save_pretrained(folder)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (None, "no such folder"),
        (no_checkpoint, r"expected a checkpoint folder with a config.json, it holds notes.txt"),
        (no_json, "config.json is not JSON"),
        (truncated, "weights could not be loaded"),
        (not_a_number, "transformer.ln_f.weight holds NaN"),
        (no_activation, "nothing to convert in LlamaForCausalLM"),
    ],
)
def test_bad_models(make, message, tmp_path):
    if make:
        make(tmp_path / "model")
    before = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")}
    failed = call("convert", "./model", code=1)
    assert message in failed.stderr, failed.stderr
    assert "Traceback" not in failed.output and failed.stderr.strip().splitlines()[-1].startswith("Error: ")
    assert {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")} == before, "nothing may be written"


@pytest.mark.parametrize(
    ("args", "code", "message"),
    [
        (["--family", "splines"], 1, "unknown family 'splines': choose one of hermite"),
        (["--degree", "0"], 1, "--degree 0: expected a whole number from 1 to 24"),
        (["--degree", "99"], 1, "--degree 99"),
        (["--degree", "many"], 2, "not a valid integer"),
        (["--degree", "4", "--tolerance", "1e-3"], 2, "give one of --degree, --tolerance"),
        (["--tolerance", "-1"], 1, "--tolerance -1.0"),
        (["--tails", "cubic"], 1, "--tails 'cubic'"),
        (["--derivative-weight", "-1"], 1, "--derivative-weight"),
        (["--task", "cooking"], 1, "--task 'cooking': expected one of"),
        (["--dtype", "int8"], 1, "--dtype 'int8'"),
        (["--groups", "5"], 1, "groups 5: expected a divisor"),
        (["--device", "toaster"], 1, "--device 'toaster': torch cannot use it"),
        (["--revision", "main"], 1, "--revision main: demo is a local folder"),
        (["--include", "nothing*"], 1, "nothing to convert"),
        (["--no-such-option"], 2, "No such option"),
    ],
)
def test_bad_options(args, code, message, tmp_path):
    failed = call("convert", "demo", "-o", "out", *args, code=code)
    assert message in failed.stderr, failed.stderr
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_target_and_a_bad_law():
    assert "unknown target 'zelu': choose one of gelu" in call("fit", "zelu", code=1).stderr
    assert "positive std" in call("fit", "gelu", "--std", "0", code=1).stderr
    assert ".png, .svg, .pdf" in call("fit", "gelu", "--plot", "curve.gif", code=1).stderr


def test_a_hub_id_without_a_network():
    failed = call("convert", "somebody/no-such-model", code=1)
    assert "no such folder here" in failed.stderr and "HF_HUB_OFFLINE" in failed.stderr


def test_an_existing_folder_is_kept(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    assert "exists" in call("convert", "demo", "-o", "mine", code=1).stderr
    assert "was not written by orthoact" in call("convert", "demo", "-o", "mine", "--overwrite", code=1).stderr
    assert "was not written by orthoact" in call("convert", "demo", "-o", "missing/..", "--overwrite", code=1).stderr
    (tmp_path / "file").write_text("x")
    assert "is a file" in call("convert", "demo", "-o", "file", "--overwrite", code=1).stderr
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "years of work"
    assert {p.name for p in tmp_path.iterdir()} == {"mine", "file"}


def test_overwriting_replaces_a_converted_folder(tmp_path):
    call("convert", "demo", "--degree", "4", "--quiet")
    (tmp_path / "demo-hermite" / "stale.txt").write_text("from before")
    assert "exists" in call("convert", "demo", code=1).stderr
    call("convert", "demo", "--overwrite", "--quiet")
    assert not (tmp_path / "demo-hermite" / "stale.txt").exists()
    assert {p.name for p in tmp_path.iterdir()} == {"demo-hermite"}


def test_a_failure_while_writing_loses_nothing(tmp_path, monkeypatch):
    call("convert", "demo", "--degree", "4", "--quiet")
    before = {p.name: p.read_bytes() for p in (tmp_path / "demo-hermite").iterdir()}
    from orthoact.convert import checkpoint

    def full_disk(model, folder):
        (folder / "model.safetensors").write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "write_weights", full_disk)
    result = CliRunner().invoke(main, ["convert", "demo", "--overwrite", "--quiet"])
    assert result.exit_code == 1 and "No space left" in result.output
    assert {p.name: p.read_bytes() for p in (tmp_path / "demo-hermite").iterdir()} == before
    assert {p.name for p in tmp_path.iterdir()} == {"demo-hermite"}


def test_evaluate_refuses_bad_data(converted, tmp_path):
    (tmp_path / "empty.txt").write_text("  \n")
    (tmp_path / "folder").mkdir()
    for data, message in (("none.txt", "no such file"), ("empty.txt", "empty"), ("folder", "could not read")):
        assert message in call("evaluate", converted, "--data", data, code=1).stderr
    assert "is not converted" in call("evaluate", "demo", code=1).stderr
    assert "--limit 0" in call("evaluate", converted, "--limit", "0", code=1).stderr


def test_a_disk_without_room_is_told_in_one_sentence(tmp_path):
    """The size of files limited instead: the writes fail alike."""
    code = (
        "import resource, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN);"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000));"
        "sys.dont_write_bytecode = True; from orthoact.cli import main; main(sys.argv[1:])"
    )
    for args, left in ((["convert", "demo", "-o", "out"], []), (["fit", "gelu", "--plot", "old.svg"], ["old.svg"])):
        for name in left:
            (tmp_path / name).write_text("as it was")
        command = [sys.executable, "-W", "ignore", "-c", code, *args]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=tmp_path)
        assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
        assert done.stderr.splitlines()[-1].startswith("Error: ") and "too large" in done.stderr, done.stderr
        assert [p.name for p in tmp_path.iterdir()] == left
        assert all((tmp_path / name).read_text() == "as it was" for name in left)
        (tmp_path / "old.svg").unlink(missing_ok=True)


def test_a_place_that_cannot_be_written_is_refused_before_any_work(tmp_path):
    (tmp_path / "file").write_text("")
    result = call("convert", "demo", "-o", "file/out", code=1)
    assert "nothing can be written into" in result.stderr and "loading" not in result.stderr


@pytest.mark.parametrize(
    ("typed", "given"),
    [("orthoact conv", "convert"), ("orthoact convert --gr", "--groups"), ("orthoact finetune demo-s", "demo-smoke")],
)
def test_the_tab_key_completes(typed, given):
    env = os.environ | {"_ORTHOACT_COMPLETE": "bash_complete", "COMP_WORDS": typed}
    env["COMP_CWORD"] = str(len(typed.split()) - 1)
    code = "import sys; sys.argv[0] = 'orthoact'; from orthoact.cli import main; main(prog_name='orthoact')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, timeout=60)
    assert done.stdout == f"plain,{given}\n", done.stderr
