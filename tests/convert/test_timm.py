"""timm checkpoints: plain create_model with orthoact, transformers' TimmWrapper, and a loud failure without it."""

import json
import os
import subprocess
import sys

import pytest
import timm
import tiny_models as tiny
import torch
import transformers as tf
from safetensors.torch import load_file, save_file

import orthoact
from orthoact import Activation
from orthoact.convert.checkpoint import save


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    made = {}

    def get(name):
        if name not in made:
            model = tiny.timm_model(name)
            orthoact.convert_(model, degree=6)
            with torch.no_grad():
                for m in model.modules():
                    if isinstance(m, Activation):
                        m.theta += 0.1 * torch.randn_like(m.theta)
            folder = save(model, tmp_path_factory.mktemp("timm") / name)
            made[name] = (model, folder)
        return made[name]

    return get


@pytest.mark.parametrize("name", tiny.TIMM)
def test_create_model_is_bit_equal(saved, name):
    model, folder = saved(name)
    loaded = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    assert torch.equal(tiny.outputs(loaded), tiny.outputs(model))
    config = json.loads((folder / "config.json").read_text())
    assert config["architecture"] == "orthoact"
    assert config["model_args"]["base"] == tiny.TIMM[name][0]


@pytest.mark.parametrize("name", ["vit", "convnext"])
def test_saving_again_by_timm_itself(saved, name, tmp_path):
    model, folder = saved(name)
    loaded = timm.create_model(f"local-dir:{folder}", pretrained=True)
    timm.models.save_for_hf(loaded, str(tmp_path / "again"), safe_serialization=True)
    again = timm.create_model(f"local-dir:{tmp_path / 'again'}", pretrained=True).eval()
    assert torch.equal(tiny.outputs(again), tiny.outputs(model))


def test_a_model_converted_in_memory_saves_by_timm_itself(tmp_path):
    model = tiny.timm_model("vit")
    orthoact.convert_(model)
    timm.models.save_for_hf(model, str(tmp_path), safe_serialization=True)
    again = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    assert torch.equal(tiny.outputs(again), tiny.outputs(model))
    with orthoact.original(again):
        assert not torch.equal(tiny.outputs(again), tiny.outputs(model))


def test_another_number_of_classes(saved):
    _, folder = saved("vit")
    other = timm.create_model(f"local-dir:{folder}", pretrained=True, num_classes=7)
    assert other.head.out_features == 7
    assert sum(isinstance(m, Activation) for m in other.modules()) == 2


def test_without_weights_it_starts_as_the_fit(saved):
    _, folder = saved("vit")
    fresh = timm.create_model(f"local-dir:{folder}", pretrained=False)
    acts = [m for m in fresh.modules() if isinstance(m, Activation)]
    assert len(acts) == 2 and all(not a.theta.any() and a.start.any() for a in acts)


def test_through_the_transformers_wrapper(saved):
    model, folder = saved("vit")
    wrapped = tf.AutoModelForImageClassification.from_pretrained(folder).eval()
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.allclose(wrapped(x).logits, model(x), atol=1e-6)
    assert sum(isinstance(m, Activation) for m in wrapped.modules()) == 2


def test_missing_coefficients_are_refused(saved, tmp_path):
    import shutil

    _, folder = saved("vit")
    broken = shutil.copytree(folder, tmp_path / "broken")
    tensors = load_file(broken / "model.safetensors")
    save_file({k: v for k, v in tensors.items() if not k.endswith("theta")}, broken / "model.safetensors")
    with pytest.raises(RuntimeError, match="theta"):
        timm.create_model(f"local-dir:{broken}", pretrained=True)
    for cls in (tf.AutoModelForImageClassification, tf.AutoModel):
        with pytest.raises(orthoact.OrthoactError, match="lacks theta"):
            cls.from_pretrained(broken)


WITHOUT = """
import json, sys, warnings
warnings.simplefilter("ignore")
import timm, transformers
out = {}
for folder in sys.argv[1:]:
    for name, load in {
        "timm": lambda: timm.create_model(f"local-dir:{folder}", pretrained=True),
        "wrapper": lambda: transformers.AutoModelForImageClassification.from_pretrained(folder),
        "auto": lambda: transformers.AutoModel.from_pretrained(folder),
    }.items():
        try:
            load()
            out[f"{folder} {name}"] = "LOADED"
        except Exception as error:
            out[f"{folder} {name}"] = str(error)
assert "orthoact" not in sys.modules
print(json.dumps(out))
"""


def test_without_orthoact_every_route_fails_and_names_it(saved, tmp_path):
    folders = [str(saved(name)[1]) for name in ("vit", "convnext")]
    env = {**os.environ, "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", WITHOUT, *folders]
    done = subprocess.run(command, capture_output=True, text=True, env=env, cwd=tmp_path, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    results = json.loads(done.stdout.splitlines()[-1])
    assert len(results) == 6
    assert not {route: text for route, text in results.items() if "orthoact" not in text.replace(route.split()[0], "")}
