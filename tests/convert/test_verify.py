"""`verify`: what it proves, and each thing that it must notice."""

import json

import pytest
import tiny_models as tiny
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

import orthoact
from orthoact import OrthoactError
from orthoact.cli import main
from orthoact.convert.checkpoint import save
from orthoact.convert.provenance import sha256
from orthoact.convert.sources import load_source
from orthoact.convert.verify import verify


def command(*arguments):
    result = CliRunner().invoke(main, ["verify", *map(str, arguments), "--json"])
    return result.exit_code, json.loads(result.stdout) if result.stdout.startswith("{") else result.output


@pytest.fixture
def folders(tmp_path, monkeypatch):
    """A base and what was made of it, in the current folder: a record names a local base by its last part."""
    monkeypatch.chdir(tmp_path)
    tiny.hf("bert-masked").save_pretrained("base")
    for form in ("full", "adapter", "standalone"):
        source = load_source("base")
        orthoact.convert_(source.model, degree=4)
        save(source.model, form, source=source, form=form, seed=3, command=["orthoact", "convert", "base"])
    return tmp_path


def changed(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize("form", ["full", "adapter", "standalone"])
@pytest.mark.parametrize("given", [False, True])
def test_what_was_converted_is_its_base(folders, form, given):
    code, result = command(form, *(["--base", "base"] if given else []))
    assert code == 0 and result["verified"] and result["base"] == "base"
    held = load_file(folders / "base" / "model.safetensors")
    assert result["tensors"] == (0 if form == "adapter" else len(held)) and result["activations"] == 2
    assert result["files"] == {"model.safetensors": "equal"}


def test_the_demo_is_its_own_base(tmp_path):
    result = CliRunner().invoke(main, ["convert", "demo", "-o", str(tmp_path / "m"), "--quiet"])
    assert result.exit_code == 0, result.output
    code, result = command(tmp_path / "m")
    assert code == 0 and result["verified"] and result["base"].endswith(":demo") and result["tensors"] > 50


def test_timm(tmp_path, monkeypatch):
    from timm.models import save_for_hf

    monkeypatch.chdir(tmp_path)
    save_for_hf(tiny.timm_model("vit"), "base", safe_serialization=True)
    source = load_source("base")
    orthoact.convert_(source.model)
    save(source.model, "out", source=source)
    assert command("out")[0] == 0
    changed(tmp_path / "out", lambda t: t["head.bias"].add_(1e-7))
    assert verify("out")["differ"] == ["head.bias"]


WEIGHT = "bert.encoder.layer.1.output.dense.weight"


def flip(tensors):
    tensors[WEIGHT].view(torch.int32)[3, 5] ^= 1


@pytest.mark.parametrize(
    ("change", "key", "named"),
    [
        (flip, "differ", WEIGHT),
        (lambda t: t.update({WEIGHT: t[WEIGHT].half()}), "differ", WEIGHT),
        (lambda t: t.update({WEIGHT: t[WEIGHT].T.contiguous()}), "differ", WEIGHT),
        (lambda t: t.update({"backdoor.weight": torch.zeros(1)}), "added", "backdoor.weight"),
        (lambda t: t.update({"x.theta": torch.zeros(1)}), "added", "x.theta"),
        (lambda t: t.pop("bert.embeddings.word_embeddings.weight"), "missing", "word_embeddings"),
    ],
    ids=["one-bit", "dtype", "shape", "added", "named-as-ours", "missing"],
)
def test_one_change_is_noticed(folders, change, key, named):
    changed(folders / "full", change)
    code, result = command("full")
    assert code == 1, result
    report = verify("full", "base")
    assert not report["verified"] and any(named in name for name in report[key]), report


def test_another_base_is_noticed(folders):
    other = tiny.hf("bert-masked")
    with torch.no_grad():
        other.bert.embeddings.LayerNorm.bias += 1
    other.save_pretrained("other")
    report = verify("full", "other")
    assert not report["verified"] and report["differ"] == ["bert.embeddings.LayerNorm.bias"]
    assert report["files"] == {"model.safetensors": "differs"}
    assert not verify("adapter", "other")["verified"], "an adapter has the hashes alone"
    result = CliRunner().invoke(main, ["verify", "full", "--base", "other"])
    assert result.exit_code == 1 and "bert.embeddings.LayerNorm.bias" in result.output


def test_the_record_says_what_it_was_made_of(folders):
    record = json.loads((folders / "full" / "config.json").read_text())["orthoact"]
    assert record["base"]["model"] == "base" and record["base"]["library"] == "transformers"
    assert record["base"]["files"] == {"model.safetensors": sha256(folders / "base" / "model.safetensors")}
    assert record["made"]["seed"] == 3 and record["made"]["command"] == "orthoact convert base"
    assert (
        record["made"]["versions"]["torch"] == torch.__version__.partition("+")[0]
        or record["made"]["versions"]["torch"]
    )


def test_what_cannot_be_verified(folders):
    with pytest.raises(OrthoactError, match="no record of a conversion"):
        verify("base")
    with pytest.raises(OrthoactError, match="is a converted model itself"):
        verify("full", "standalone")
    config = json.loads((folders / "full" / "config.json").read_text())
    del config["orthoact"]["base"]
    (folders / "full" / "config.json").write_text(json.dumps(config))
    with pytest.raises(OrthoactError, match="names no base: give it with --base"):
        verify("full")
    assert verify("full", "base")["verified"]
