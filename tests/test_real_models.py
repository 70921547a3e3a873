"""The bars of a conversion on real pretrained models, on little data. REAL_MODELS=1; see real_models.py.

`benchmarks/fidelity.py` and `benchmarks/calibration.py` measure them on all of it.
"""

import math

import pytest
import real_models
import torch

import orthoact
from orthoact.convert.calibrate import calibrate_on
from orthoact.convert.checkpoint import save
from orthoact.convert.fidelity import evaluate
from orthoact.convert.sources import load_source


def converted(item, degree):
    source = load_source(str(real_models.require(item)), dtype="float32")
    orthoact.convert_(source.model, degree=degree)
    return source


@pytest.mark.parametrize(("degree", "change", "kl"), [(8, 0.1, 4e-4), (12, 0.02, 5e-5)])
def test_smollm2(degree, change, kl):
    data = real_models.require("english.txt")
    source = converted("smollm2", degree)
    result = evaluate(source, data=data, limit=2048)
    assert result["tokens"] == 2048 and math.exp(result["loss_base"]) < 80
    assert abs(result["change"]) <= change and result["kl"] <= kl, result


@pytest.mark.parametrize(("degree", "mean", "least"), [(8, 0.9998, 0.9995), (12, 0.99999, 0.9999)])
def test_minilm(degree, mean, least):
    data = real_models.require("sentences.txt")
    result = evaluate(converted("minilm", degree), data=data, limit=128)
    assert result["texts"] == 128 and result["cosine_mean"] >= mean and result["cosine_min"] >= least, result


@pytest.mark.parametrize("item", ["dinov2-hf", "dinov2-timm"])
@pytest.mark.parametrize(("degree", "mean"), [(8, 0.9998), (12, 0.99999)])
def test_dinov2(item, degree, mean):
    data = real_models.require("fashion")
    result = evaluate(converted(item, degree), data=data, limit=64)
    assert result["images"] == 64 and result["cosine_mean"] >= mean, result


@pytest.mark.parametrize(("degree", "kl"), [(4, 1.8e-2), (6, 6e-3), (8, 1.8e-4), (12, 1.1e-5)])
def test_smollm2_calibrated(degree, kl, calibrated):
    source, laws = calibrated
    orthoact.convert_(source.model, degree=degree, domains=laws)
    result = evaluate(source, data=real_models.require("english.txt"), limit=512)
    orthoact.revert_(source.model)
    assert result["tokens"] == 512 and result["kl"] <= kl, result


@pytest.fixture(scope="module")
def calibrated(tmp_path_factory):
    """SmolLM2 and the laws of its sites on text that is not measured."""
    source = load_source(str(real_models.require("smollm2")), dtype="float32")
    text = real_models.require("english.txt").read_text()
    rest = tmp_path_factory.mktemp("calibration") / "rest.txt"
    rest.write_text(text[2 * len(text) // 3 :])
    return source, calibrate_on(source, orthoact.find_sites(source.model), rest)


@pytest.mark.parametrize("item", ["minilm", "smollm2", "dinov2-hf", "dinov2-timm"])
def test_round_trip(item, tmp_path):
    """Real checkpoints have key names of their own on disk: weights bit-equal, coefficients back, output the same."""
    source = converted(item, 8)
    again = load_source(str(save(source.model, tmp_path / item, source=source)))
    a, b = source.model.state_dict(), again.model.state_dict()
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    base = load_source(str(real_models.require(item)), dtype="float32").model.state_dict()
    assert all(torch.equal(b[k], v) for k, v in base.items())
    assert len(list((tmp_path / item).glob("tokenizer*"))) == len(list(real_models.require(item).glob("tokenizer*")))
