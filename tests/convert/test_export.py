"""Exports: run in the runtime that they are for, at other sizes than they were traced with, against the model."""

import json
import subprocess
import sys

import numpy as np
import pytest
import tiny_models as tiny
import torch
import transformers as tf
from click.testing import CliRunner

import orthoact
from orthoact import FAMILIES, Activation, OrthoactError
from orthoact.cli import main
from orthoact.convert.audit import probe_batch
from orthoact.convert.checkpoint import save
from orthoact.convert.export import export, export_model
from orthoact.convert.fold import evaluate, fold
from orthoact.convert.folder import read_activations
from orthoact.convert.sources import load_source

onnxruntime = pytest.importorskip("onnxruntime", reason="pip install -e .[dev]")


def moved(model):
    """As if trained: no two activations alike."""
    with torch.no_grad():
        for m in model.modules():
            if isinstance(m, Activation):
                m.theta += 0.05 * torch.randn(m.theta.shape, generator=torch.Generator().manual_seed(m.theta.numel()))
    return model


MODELS = {
    "gpt2": ("hf", "hermite", {}),
    "bert-classifier": ("hf", "fourier", {}),
    "t5-gated": ("hf", "tropical-rational", {}),
    "vit": ("hf", "rational", {"groups": 2}),
    "convnext": ("timm", "rational-sum", {"groups": "per-channel"}),
    "mobilenet": ("timm", "tropical", {}),
}
LONG = ("bert-classifier", "vit", "t5-gated", "mobilenet")  # seconds of tracing


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.long] * (n in LONG)) for n in MODELS])
def test_onnx_is_the_model_at_every_batch(name, tmp_path):
    import onnx

    kind, family, options = MODELS[name]
    model = (tiny.hf if kind == "hf" else tiny.timm_model)(name)
    orthoact.convert_(model, family=family, degree=4, **options)
    moved(model)
    before = tiny.outputs(model)
    facts = export_model(model, tmp_path / "m.onnx")
    assert torch.equal(tiny.outputs(model), before), "the model is as it was"
    assert facts["difference"] <= 1e-5 and "batch" in facts["dynamic"]
    assert ("length" in facts["dynamic"]) == (name in ("gpt2", "bert-classifier", "t5-gated"))
    session = onnxruntime.InferenceSession(tmp_path / "m.onnx", providers=["CPUExecutionProvider"])
    for rows in (1, 2, 5):
        batch = probe_batch(model, rows=rows, length=16 if rows < 5 else 11, seed=10 + rows)
        found = session.run(None, {k: v.numpy() for k, v in batch.items()})[0]
        with torch.no_grad():
            out = model(**batch)
        wanted = (out if isinstance(out, torch.Tensor) else out["logits"]).numpy()
        assert found.shape == wanted.shape
        assert abs(found - wanted).max() <= 1e-5 * max(1, abs(wanted).max())
    written = onnx.load(tmp_path / "m.onnx")
    ops = {node.op_type for node in written.graph.node}
    assert onnx.TensorProto.DOUBLE not in {t.data_type for t in written.graph.initializer}
    if family in ("tropical", "tropical-rational", "hermite", "rational"):
        assert not ops & {"Erf", "Gelu", "HardSwish"}, "no activation of old is in the graph"


@pytest.mark.long
def test_onnx_of_more_than_two_gigabytes_has_its_weights_beside_it(tmp_path):
    """A protobuf holds no more than that: two files, which move together and know each other by name."""
    config = tf.GPT2Config(
        n_embd=64, n_layer=2, n_head=2, n_positions=32, vocab_size=8_700_000, bos_token_id=1, eos_token_id=2
    )
    model = tf.GPT2Model(config).eval()
    orthoact.convert_(model, degree=4)
    (tmp_path / "made").mkdir()
    facts = export_model(model, tmp_path / "made" / "m.onnx")
    assert facts["difference"] <= 1e-5 and facts["dynamic"] == ["batch", "length"]
    (tmp_path / "made").rename(tmp_path / "moved")
    one, two = (tmp_path / "moved" / name for name in ("m.onnx", "m.onnx.data"))
    assert one.stat().st_size < 2**20 and two.stat().st_size > 2**31
    batch = probe_batch(model, rows=4, length=7, seed=9)
    session = onnxruntime.InferenceSession(one, providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {k: v.numpy() for k, v in batch.items()})
    with torch.no_grad():
        wanted = model(**batch).last_hidden_state.numpy()
    assert abs(found - wanted).max() <= 1e-5 * abs(wanted).max()
    two.unlink()


def test_a_smaller_file_leaves_nothing_of_a_larger_one(tmp_path):
    model = tiny.hf("gpt2")
    orthoact.convert_(model, degree=4)
    save(model, tmp_path / "m")
    (tmp_path / "m.onnx.data").write_bytes(b"weights of another model")
    facts = export(tmp_path / "m", tmp_path / "m.onnx")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m", "m.onnx"]
    assert facts["bytes"] == (tmp_path / "m.onnx").stat().st_size


def test_the_old_activation_would_be_noticed(tmp_path, monkeypatch):
    """The check compares: a graph of other numbers is refused and nothing is left."""
    from orthoact.convert import export as module

    model = tiny.hf("gpt2")
    orthoact.convert_(model, degree=4)

    class Wrong(module.Settled):
        def forward(self, input):
            return torch.relu(input)

    monkeypatch.setattr(module, "Settled", Wrong)
    save(model, tmp_path / "m")
    with pytest.raises(OrthoactError, match=r"from the model, allowed are 1e-05: nothing was written"):
        export(tmp_path / "m", tmp_path / "m.onnx")
    assert [p.name for p in tmp_path.iterdir()] == ["m"]


def test_torch_export_in_a_process_without_orthoact(tmp_path):
    model = tiny.hf("gpt2")
    orthoact.convert_(model, family="rational", degree=4, groups=4)
    moved(model)
    facts = export_model(model, tmp_path / "m.pt2", format="torch")
    assert facts["dynamic"] == ["batch", "length"] and facts["difference"] <= 1e-5
    batch = probe_batch(model, rows=3, length=7, seed=5)
    with torch.no_grad():
        torch.save([batch, model(**batch).logits], tmp_path / "io.pt")
    code = """
import sys, torch
program = torch.export.load(sys.argv[1])
batch, wanted = torch.load(sys.argv[2], weights_only=True)
found = program.module()(**batch)["logits"]
assert "orthoact" not in sys.modules and "transformers" not in sys.modules
assert (found - wanted).abs().max() <= 1e-5, (found - wanted).abs().max()
"""
    command = [sys.executable, "-W", "ignore", "-c", code, str(tmp_path / "m.pt2"), str(tmp_path / "io.pt")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("groups", [None, 3])
def test_a_fold_is_the_activation(family, groups):
    for target, degree in (("gelu", 8), ("relu6", 4), ("silu", 12)):
        if family == "tropical" and target == "relu6":
            continue  # not convex
        degree = min(degree, FAMILIES[family].degrees[-1])
        act = Activation.from_fit(orthoact.fit(target, family=family, degree=degree), groups=groups)
        with torch.no_grad():
            act.theta += 0.1 * torch.randn(act.theta.shape, generator=torch.Generator().manual_seed(degree))
        made = json.loads(json.dumps(fold({"a": act}), allow_nan=False))["sites"]["a"]
        x = np.linspace(-40, 40, 4003)
        wide = torch.from_numpy(x)
        wanted = act(wide[:, None].expand(-1, 3)).detach().numpy().T if groups else act(wide).detach().numpy()[None]
        assert len(made["curves"]) == (groups or 1)
        size = max(1.0, abs(wanted).max())
        for curve, own in zip(made["curves"], wanted, strict=True):
            assert abs(evaluate(curve, x) - own).max() <= (1e-8 if "fourier" in family else 1e-10) * size
            assert len(curve["numerator"]) == len(curve["breaks"]) + 1
        assert made["max_error"] <= 1e-8


@pytest.mark.parametrize("family", ["hermite", "tropical", "tropical-rational", "rational", "rational-sum"])
def test_a_bare_series_folds(family):
    act = Activation.variance_preserving(family, 4)
    made = fold({"a": act})["sites"]["a"]
    x = np.linspace(-9, 9, 1001)
    assert made["curves"][0]["lo"] is None and made["curves"][0]["slope_hi"] == 0
    wanted = act(torch.from_numpy(x)).detach().numpy()
    assert abs(evaluate(made["curves"][0], x) - wanted).max() <= 1e-9 * abs(wanted).max()


def test_what_goes_on_for_ever_is_refused():
    with pytest.raises(OrthoactError, match="a: fourier without tails goes on for ever"):
        fold({"a": Activation.variance_preserving("fourier", 4)})


def test_relu_folds_to_two_pieces():
    act = Activation.from_fit(orthoact.fit("relu", family="tropical-rational", degree=1))
    (curve,) = fold({"a": act})["sites"]["a"]["curves"]
    assert [n[1] for n in curve["numerator"]] == pytest.approx([0, 1], abs=1e-15)
    assert curve["breaks"] == pytest.approx([0], abs=1e-15)
    assert (curve["slope_lo"], curve["slope_hi"]) == pytest.approx((0, 1), abs=1e-15)


@pytest.mark.parametrize("form", ["full", "adapter"])
def test_the_command_folds_what_any_form_holds(form, tmp_path):
    source = load_source("demo")
    orthoact.convert_(source.model, degree=6, share=False)
    save(moved(source.model), tmp_path / "m", source=source, form=form)
    arguments = ["export", str(tmp_path / "m"), "--format", "fold", "-o", str(tmp_path / "m.json"), "--json"]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 0, result.output
    facts, made = json.loads(result.stdout), json.loads((tmp_path / "m.json").read_text())
    acts = read_activations(tmp_path / "m")
    assert facts["sites"] == len(acts) == len(made["sites"]) and facts["bytes"] == (tmp_path / "m.json").stat().st_size
    assert made["base"]["model"].startswith("orthoact==")
    x = np.linspace(-9, 9, 101)
    for name, act in acts.items():
        wanted = act(torch.from_numpy(x)).detach().numpy()
        assert abs(evaluate(made["sites"][name]["curves"][0], x) - wanted).max() < 1e-12


def test_the_command_writes_onnx_of_an_adapter(tmp_path):
    source = load_source("demo")
    orthoact.convert_(source.model, share=True)
    save(source.model, tmp_path / "a", source=source, form="adapter")
    arguments = ["export", str(tmp_path / "a"), "-o", str(tmp_path / "new" / "m.onnx"), "--json"]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 0, result.output
    facts = json.loads(result.stdout)
    assert facts["inputs"]["input_ids"] == ["batch", "length"] and facts["outputs"] == ["logits"]
    assert facts["difference"] <= 1e-5 and len(facts["checked"]) == 3
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["m.onnx"]


def test_bad_input(tmp_path):
    with pytest.raises(OrthoactError, match="expected one of onnx, torch, fold"):
        export("demo", format="gguf")
    with pytest.raises(OrthoactError, match="is a folder: give a file"):
        export("demo", tmp_path)
    with pytest.raises(OrthoactError, match="half precision: export it with --dtype float32"):
        export_model(tiny.hf("gpt2").bfloat16(), tmp_path / "m.onnx")
    with pytest.raises(OrthoactError, match="no record of a conversion"):
        export("demo", tmp_path / "m.json", format="fold")
    assert not list(tmp_path.iterdir())
