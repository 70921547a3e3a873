"""Standalone checkpoints: the same numbers in a process without orthoact, by the code that comes with them."""

import ast
import json
import os
import shutil
import subprocess
import sys

import pytest
import timm
import tiny_models as tiny
import torch
import transformers as tf
from safetensors.torch import load_file, save_file

import orthoact
from orthoact import Activation, OrthoactError
from orthoact.convert.audit import probe_batch
from orthoact.convert.checkpoint import save
from orthoact.convert.standalone import TIMM, TRANSFORMERS, code
from orthoact.interp import engine

WITHOUT = """
import json, sys, warnings
warnings.simplefilter("ignore")

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "orthoact":
            raise ModuleNotFoundError("No module named 'orthoact'", name="orthoact")

sys.meta_path.insert(0, Blocked())
import torch, transformers
from safetensors.torch import load_file, save_file
transformers.logging.set_verbosity_error()
try:
    import orthoact
    raise SystemExit("orthoact is there")
except ModuleNotFoundError:
    pass
"""
"""The start of a process in which orthoact cannot be imported: an editable install is on the path of every other."""


def run(body, *args):
    env = {**os.environ, "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", WITHOUT + body + "\nassert 'orthoact' not in sys.modules\n", *map(str, args)]
    done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


AUTO = {
    "gpt2": "AutoModelForCausalLM",
    "llama-silu": "AutoModelForCausalLM",
    "bert-classifier": "AutoModelForSequenceClassification",
    "bloom": "AutoModelForCausalLM",
    "t5-gated": "AutoModelForSeq2SeqLM",
    "vit": "AutoModelForImageClassification",
}

FORMS = {**AUTO, "timm": "AutoModelForImageClassification"}

FAMILIES = dict(
    zip(AUTO, ["hermite", "fourier", "tropical-rational", "rational", "fourier-free", "tropical"], strict=True)
)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    root, made = tmp_path_factory.mktemp("standalone"), {}
    for name, family in FAMILIES.items():
        model = tiny.hf(name)
        orthoact.convert_(model, family=family, degree=4, groups=2 if name == "llama-silu" else None)
        made[name] = model
    made["timm"] = tiny.timm_model("vit")
    orthoact.convert_(made["timm"], family="rational-sum", degree=4)
    for name, model in made.items():
        with torch.no_grad():
            for m in model.modules():
                if isinstance(m, Activation):
                    m.theta += 0.1 * torch.randn_like(m.theta)
        save(model, root / name, form="standalone")
        save_file({k: v.contiguous() for k, v in probe_batch(model, seed=0).items()}, root / f"{name}.in")
        with engine.using("torch"):  # as who has no orthoact computes
            save_file({"out": tiny.outputs(model)}, root / f"{name}.out")
    return root, made


def test_without_orthoact_the_logits_are_equal(saved):
    root, _ = saved
    body = f"""
root, found = sys.argv[1], {{}}
for name, auto in {FORMS!r}.items():
    model = getattr(transformers, auto).from_pretrained(f"{{root}}/{{name}}", trust_remote_code=True).eval()
    inputs = load_file(f"{{root}}/{{name}}.in")
    if name == "timm":
        inputs = {{"pixel_values": inputs["x"]}} if "x" in inputs else inputs
    with torch.no_grad():
        out = model(**inputs)["logits"]
    wanted = load_file(f"{{root}}/{{name}}.out")["out"]
    found[name] = [float((out - wanted).abs().max()), torch.equal(out, wanted)]
print(json.dumps(found))
"""
    found = run(body, root)
    assert found.keys() == {*AUTO, "timm"}
    assert all(equal for _, equal in found.values()), found


def test_without_orthoact_it_trains_saves_and_stays_loud(saved, tmp_path):
    root, _ = saved
    body = """
folder, again = sys.argv[1], sys.argv[2]
Auto = transformers.AutoModelForCausalLM
model = Auto.from_pretrained(folder, trust_remote_code=True)
half = Auto.from_pretrained(folder, trust_remote_code=True, dtype=torch.bfloat16)
kinds = sorted({str(p.dtype) for n, p in half.named_parameters() if n.endswith("theta")})
trunk = transformers.AutoModel.from_pretrained(folder, trust_remote_code=True)
acts = sum(type(m).__name__ == "Activation" for m in trunk.modules())
ids = torch.arange(5, 17)[None]
loss = model(input_ids=ids, labels=ids).loss
loss.backward()
gradient = [bool(p.grad.any()) for n, p in model.named_parameters() if n.endswith("theta")]
with torch.no_grad():
    for n, p in model.named_parameters():
        p -= 0.01 * (p.grad if p.grad is not None else 0)
model.eval().save_pretrained(again)
with torch.no_grad():
    save_file({"out": model(input_ids=ids).logits}, again + ".out")
    reloaded = Auto.from_pretrained(again, trust_remote_code=True)
    same = torch.equal(reloaded(input_ids=ids).logits, model(input_ids=ids).logits)
loud = []
for where in (folder, again):
    for cls in (Auto, transformers.AutoModel, transformers.GPT2LMHeadModel):
        try:
            cls.from_pretrained(where)
            loud.append("LOADED")
        except Exception as error:
            loud.append(str(error))
config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=True)
fresh = Auto.from_config(config, trust_remote_code=True)
out = fresh(input_ids=ids).logits
print(json.dumps([kinds, acts, gradient, same, loud, bool(out.isnan().all())]))
"""
    kinds, acts, gradient, same, loud, nan = run(body, root / "gpt2", tmp_path / "again")
    assert kinds == ["torch.float32"] and acts == 2 and all(gradient) and same and nan
    assert all("orthoact" in text and text != "LOADED" for text in loud), loud
    loaded = tf.AutoModelForCausalLM.from_pretrained(tmp_path / "again")  # and with orthoact, plainly
    with torch.no_grad(), engine.using("torch"):
        out = loaded(input_ids=torch.arange(5, 17)[None]).logits
    assert torch.equal(out, load_file(f"{tmp_path / 'again'}.out")["out"])


def test_with_orthoact_it_loads_plainly_and_with_the_code(saved):
    root, made = saved
    for name, auto in AUTO.items():
        cls = getattr(tf, auto)
        for options in ({}, {"trust_remote_code": True}):
            loaded = cls.from_pretrained(root / name, **options).eval()
            assert torch.equal(tiny.outputs(loaded), tiny.outputs(made[name])), (name, options)
            assert sum(isinstance(m, Activation) for m in loaded.modules()) == tiny.HF[name][1]
    net = timm.create_model(f"local-dir:{root / 'timm'}", pretrained=True).eval()
    assert torch.equal(tiny.outputs(net), tiny.outputs(made["timm"]))


def test_the_four_ways_of_loading_are_one(saved, tmp_path):
    """Plain, as an adapter, merged and standalone: the same logits to the last bit, those of the model in memory."""
    from peft import PeftModel

    _, made = saved
    found = {}
    for name, auto in FORMS.items():
        wanted, model = tiny.outputs(made[name]), made[name]
        save(model, tmp_path / f"{name}-full")
        save(model, tmp_path / f"{name}-adapter", form="adapter")
        build = (lambda: tiny.timm_model("vit")) if name == "timm" else (lambda name=name: tiny.hf(name))
        applied = PeftModel.from_pretrained(build(), str(tmp_path / f"{name}-adapter")).eval()
        ways = {"adapter": tiny.outputs(applied.base_model.model)}
        with applied.disable_adapter():
            assert torch.equal(tiny.outputs(applied.base_model.model), tiny.outputs(build())), name
        merged = applied.merge_and_unload()
        ways["merged"] = tiny.outputs(merged)
        save(merged, tmp_path / f"{name}-merged")
        for form in ("full", "merged"):
            folder = tmp_path / f"{name}-{form}"
            if name == "timm":
                plain = timm.create_model(f"local-dir:{folder}", pretrained=True)
                x = probe_batch(model, seed=0)
                wrapped = tf.AutoModelForImageClassification.from_pretrained(folder).eval()
                with torch.no_grad():
                    ways[f"{form} in TimmWrapper"] = wrapped(x["x"]).logits
            else:
                plain = getattr(tf, auto).from_pretrained(folder)
            ways[f"{form}, loaded"] = tiny.outputs(plain.eval())
        found |= {(name, way): torch.equal(out, wanted) for way, out in ways.items()}
    assert len(found) == 4 * len(FORMS) + 2 and all(found.values()), [k for k, same in found.items() if not same]


def test_timm_itself_by_importing_the_code(saved):
    root, _ = saved
    body = """
root = sys.argv[1]
import timm
try:
    timm.create_model(f"local-dir:{root}/timm", pretrained=True)
    said = "LOADED"
except Exception as error:
    said = str(error)
sys.path.insert(0, f"{root}/timm")
import modeling_orthoact
model = timm.create_model(f"local-dir:{root}/timm", pretrained=True).eval()
with torch.no_grad():
    out = model(**load_file(f"{root}/timm.in"))
print(json.dumps([said, torch.equal(out, load_file(f"{root}/timm.out")["out"])]))
"""
    said, equal = run(body, root)
    assert "orthoact" in said and said != "LOADED" and equal


ROUTES = {
    "gpt2": ("transformer.h.1.mlp.act", ["AutoModelForCausalLM", "AutoModel", "AutoModelForSequenceClassification"]),
    "bert-classifier": (
        "bert.encoder.layer.0.intermediate.intermediate_act_fn",
        ["AutoModelForSequenceClassification"],
    ),
    "timm": ("blocks.1.mlp.act", ["AutoModelForImageClassification", "AutoModel", "timm"]),
}
"""Folder -> the activation that is damaged, and by what it is loaded."""


def test_missing_numbers_are_refused_without_orthoact(saved, tmp_path):
    """By every route: a number that the file lacks would be whatever was in memory."""
    root, _ = saved
    made = {}
    for name, (site, _) in ROUTES.items():
        tensors = load_file(root / name / "model.safetensors")
        for key in ("theta", "start", "hi"):
            at = f"{site}.{key}"
            damaged = {
                "lacks": {k: v for k, v in tensors.items() if k != at},
                "NaN": tensors | {at: tensors[at] * torch.nan},
                "size": tensors | {at: tensors[at].repeat(2)},
            }
            for what, changed in damaged.items():
                folder = shutil.copytree(root / name, tmp_path / f"{name}-{key}-{what}")
                save_file(changed, folder / "model.safetensors", {"format": "pt"})
                made[folder.name] = name
    body = """
import timm
folders, routes, found = json.loads(sys.argv[2]), json.loads(sys.argv[3]), {}
for folder, name in folders.items():
    for route in routes[name][1]:
        for options in ({}, {"ignore_mismatched_sizes": True}):
            try:
                if route == "timm":
                    sys.path.insert(0, f"{sys.argv[1]}/{folder}")
                    import modeling_orthoact
                    timm.create_model(f"local-dir:{sys.argv[1]}/{folder}", pretrained=True)
                else:
                    cls = getattr(transformers, route)
                    cls.from_pretrained(f"{sys.argv[1]}/{folder}", trust_remote_code=True, **options)
                found[f"{folder} {route} {options}"] = "LOADED"
            except Exception as error:
                found[f"{folder} {route} {options}"] = str(error)
print(json.dumps(found))
"""
    found = run(body, tmp_path, json.dumps(made), json.dumps(ROUTES))
    assert len(found) == 9 * 2 * (3 + 1 + 3)
    assert "LOADED" not in found.values(), {k: v for k, v in found.items() if v == "LOADED"}
    for case, said in found.items():
        words = {"lacks": ("lacks", "Missing key"), "NaN": ("NaN",), "size": ("lacks", "mismatch")}
        assert any(word in said for word in words[case.split()[0].rpartition("-")[2]]), (case, said)


def test_the_code_is_small_and_is_the_package_s(saved):
    root, _ = saved
    for name in ("gpt2", "timm"):
        text = (root / name / "modeling_orthoact.py").read_text()
        assert len(text) < 40_000
        names = {n.module for n in ast.walk(ast.parse(text)) if isinstance(n, ast.ImportFrom)} | {
            a.name for n in ast.walk(ast.parse(text)) if isinstance(n, ast.Import) for a in n.names
        }
        assert not {m for m in names if m and m.split(".")[0] in ("orthoact", "scipy", "peft", "sympy")}
        assert "exec(" not in text and "eval(" not in text.replace(".eval(", "")
    for families in ({"hermite"}, {"rational", "tropical"}, set(orthoact.FAMILIES)):
        for roots in (TRANSFORMERS, TIMM):
            text = code(roots, families)
            assert text == code(roots, families)
            compile(text, "code", "exec")


def test_what_cannot_stand_alone_is_refused(tmp_path):
    model = tiny.hf("gpt2")
    with pytest.raises(OrthoactError, match="not converted"):
        save(model, tmp_path / "a", form="standalone")
    orthoact.convert_(model)
    model.config.auto_map = {"AutoConfig": "x.Y"}
    with pytest.raises(OrthoactError, match="code of its own"):
        save(model, tmp_path / "a", form="standalone")
    assert not list(tmp_path.iterdir())
