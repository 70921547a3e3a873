"""Folders of somebody who means harm: refused in one sentence, in bounded memory, and nothing of theirs is run."""

import json
import warnings
from functools import partial

import hostile
import pytest
import timm
import tiny_models as tiny
import torch
import transformers as tf
from peft import PeftModel
from safetensors.torch import load_file, save_file

import orthoact
from orthoact import OrthoactError
from orthoact.cli import main
from orthoact.convert.checkpoint import save
from orthoact.convert.folder import read_activations
from orthoact.convert.sources import Source, load_source
from orthoact.convert.verify import verify


def test_damage_of_every_kind_is_refused_or_computes(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ways = hostile.run(tmp_path, 300, whole=30)
    assert ways["refused"] > 100 and ways["sound"] > 5 and ways["loaded whole: refused"] > 3
    assert ways["different sentences"] > 20


@pytest.fixture
def folders(tmp_path):
    """A base, a full checkpoint and an adapter of it, beside each other."""
    tiny.hf("gpt2").save_pretrained(tmp_path / "base")
    for form in ("full", "adapter", "standalone"):
        source = load_source(str(tmp_path / "base"))
        orthoact.convert_(source.model, degree=4)
        save(source.model, tmp_path / form, source=source, form=form)
    return tmp_path


def edited(folder, change, file="config.json"):
    config = json.loads((folder / file).read_text())
    change(config)
    (folder / file).write_text(json.dumps(config))
    return folder


def first(config):
    return next(iter(config["orthoact"]["sites"].values()))


RECORDS = {
    "a path outside": (lambda c: c["orthoact"]["sites"].update({"../../etc": first(c)}), "dotted path of a module"),
    "an absurd degree": (lambda c: first(c).update(degree=10**9), "degree 1000000000: expected a whole number from 1"),
    "absurd groups": (lambda c: first(c).update(groups=10**12), "groups 1000000000000: expected"),
    "a sum that is absurd": (
        lambda c: c["orthoact"]["sites"].update({f"a.{i}": first(c) | {"groups": 2**20} for i in range(99)}),
        "learnable numbers: expected at most",
    ),
    "one that shares itself": (lambda c: first(c).update(shared=next(iter(c["orthoact"]["sites"]))), "shares that of"),
    "nan": (lambda c: first(c).update(derivative_weight=float("nan")), "derivative_weight nan: expected a finite"),
}


@pytest.mark.parametrize("what", RECORDS)
def test_records(folders, what):
    change, message = RECORDS[what]
    for form, file, routes in (
        ("full", "config.json", [tf.AutoModelForCausalLM.from_pretrained, orthoact.load, read_activations]),
        ("adapter", "adapter_config.json", [orthoact.load, read_activations]),
    ):
        folder = edited(folders / form, change, file)
        for route in routes:
            with pytest.raises(OrthoactError, match=message) as error:
                route(folder)
            assert "\n" not in str(error.value)


def test_names_that_are_there_twice(folders):
    text = (folders / "full" / "config.json").read_text()
    sites = json.dumps(json.loads(text)["orthoact"]["sites"])
    name = next(iter(json.loads(sites)))
    doubled = json.dumps(json.loads(text)).replace(sites, sites[:-1] + f', "{name}": {{}}}}')
    (folders / "full" / "config.json").write_text(doubled)
    for route in (orthoact.load, read_activations, tf.AutoModelForCausalLM.from_pretrained):
        with pytest.raises(OrthoactError, match=f"names '{name}' twice"):
            route(folders / "full")


def test_one_module_by_two_names(folders):
    folder = edited(
        folders / "full", lambda c: c["orthoact"]["sites"].update({"h.0.mlp.act": first(c)})
    )  # also transformer.h.0.mlp.act
    with pytest.raises(OrthoactError, match="site already"):
        tf.AutoModelForCausalLM.from_pretrained(folder)


def test_files_beyond_all_bounds(folders):
    with open(folders / "full" / "model.safetensors", "r+b") as file:
        file.write((10 * 2**30).to_bytes(8, "little"))
        file.truncate(11 * 2**30)  # sparse
    for route in (orthoact.load, read_activations):
        with pytest.raises(OrthoactError, match="header too large"):
            route(folders / "full")
    plain, applied = tf.AutoModelForCausalLM.from_pretrained, partial(PeftModel.from_pretrained, tiny.hf("gpt2"))
    with open(folders / "standalone" / "model.safetensors.index.json", "wb") as file:
        file.truncate(10 * 2**30)
    with pytest.raises(OrthoactError, match="expected a file of at most"):
        plain(folders / "standalone")
    net = tiny.timm_model("vit")
    orthoact.convert_(net)
    save(net, folders / "timm")
    for form, name, routes in (
        ("full", "config.json", [orthoact.load, plain, tf.AutoConfig.from_pretrained]),
        ("adapter", "adapter_config.json", [orthoact.load, plain, applied]),
        ("timm", "config.json", [orthoact.load, plain, lambda f: timm.create_model(f"local-dir:{f}", pretrained=True)]),
    ):
        with open(folders / form / name, "r+b") as file:
            file.truncate(10 * 2**30)
        for route in routes:
            with pytest.raises(OrthoactError, match=r"expected a (file of at most|checkpoint folder)"):
                route(folders / form)


@pytest.mark.parametrize("place", ["../../../etc/passwd", "/etc/passwd", "a/../../b.safetensors"])
def test_weights_elsewhere(folders, place):
    full = folders / "full"
    (full / "model.safetensors").unlink()
    (full / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": {"x": place}}))
    with pytest.raises(OrthoactError, match="expected one beside it"):
        read_activations(full)
    with pytest.raises(OrthoactError):
        orthoact.load(full)


@pytest.mark.parametrize("base", ["adapter", ".", "..", "../full", "/etc", "full"])
def test_an_adapter_whose_base_is_no_base(folders, base):
    folder = edited(folders / "adapter", lambda c: c.update(base_model_name_or_path=base), "adapter_config.json")
    with pytest.raises(OrthoactError, match=r"base model|is converted already|adapter or no model"):
        orthoact.load(folder)


def test_a_folder_that_is_its_own_base(folders):
    edited(folders / "full", lambda c: c["orthoact"]["base"].update(model=str(folders / "full")))
    with pytest.raises(OrthoactError, match="is a converted model itself"):
        verify(folders / "full")


class Harm:
    """What a pickle may do."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def test_nothing_of_theirs_is_run(folders, tmp_path):
    """Neither pickles in the place of weights nor code files, without --trust-remote-code."""
    marker = tmp_path / "ran"
    for form, weights in (("full", "model.safetensors"), ("adapter", "adapter_model.safetensors")):
        (folders / form / weights).unlink()
        for name in (weights.replace(".safetensors", ".bin"), "pytorch_model.bin"):
            torch.save({"transformer.h.0.mlp.act.theta": Harm(marker)}, folders / form / name)
        with pytest.raises(OrthoactError):
            orthoact.load(folders / form)
        with pytest.raises(OrthoactError):
            read_activations(folders / form)
    with pytest.raises(Exception, match=r"weights_only|WeightsUnpickler|safe"):
        PeftModel.from_pretrained(tiny.hf("gpt2"), str(folders / "adapter"))
    code = folders / "standalone" / "modeling_orthoact.py"
    code.write_text(f"{code.read_text()}\nwith open({str(marker)!r}, 'w'):\n    pass\n")
    model = orthoact.load(folders / "standalone")
    assert sum(isinstance(m, orthoact.Activation) for m in model.modules()) == 2
    tf.AutoModelForCausalLM.from_pretrained(folders / "standalone")
    main(["evaluate", str(folders / "standalone"), "--quiet"], standalone_mode=False)
    assert not marker.exists()
    tf.AutoModelForCausalLM.from_pretrained(folders / "standalone", trust_remote_code=True)
    assert marker.exists(), "the mark would have been made"


def test_activations_that_share_are_there_in_any_order(tmp_path):
    """A record whose file names the sharing site first: transformers sorts the keys of what it writes."""
    model = tiny.hf("gpt2")
    model.transformer.h[0].mlp.act = model.transformer.h[1].mlp.act
    orthoact.convert_(model, share=True)
    with torch.no_grad():
        model.transformer.h[0].mlp.act.theta += 0.3
    out = tiny.outputs(model)
    source = Source(model, "base", "transformers", None)
    for form, file in (("full", "config.json"), ("adapter", "adapter_config.json")):
        save(model, tmp_path / form, source=source, form=form)

        def swap(config):
            (a, own), (b, other) = config["orthoact"]["sites"].items()
            assert "shared" in other and "shared" not in own
            config["orthoact"]["sites"] = {b: other, a: own}

        edited(tmp_path / form, swap, file)
    loaded = tf.AutoModelForCausalLM.from_pretrained(tmp_path / "full")
    assert torch.equal(tiny.outputs(loaded), out)
    base = tiny.hf("gpt2")
    base.transformer.h[0].mlp.act = base.transformer.h[1].mlp.act
    applied = PeftModel.from_pretrained(base, str(tmp_path / "adapter"))
    assert torch.equal(tiny.outputs(applied), out)
    assert torch.equal(tiny.outputs(applied.merge_and_unload()), out)


@pytest.mark.parametrize("kind", [torch.float16, torch.float64, torch.int64])
def test_numbers_of_another_type(folders, kind):
    weights = folders / "full" / "model.safetensors"
    tensors = load_file(weights)
    key = next(k for k in tensors if k.endswith("theta"))
    save_file(tensors | {key: tensors[key].to(kind)}, weights, {"format": "pt"})
    with pytest.raises(OrthoactError, match="expected F32"):
        read_activations(folders / "full")
