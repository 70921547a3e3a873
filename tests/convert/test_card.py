"""The card: metadata that the Hub takes, and nothing on it that was not recorded or measured."""

import json
import sys

import loopback_hub
import pytest
import tiny_models as tiny
from click.testing import CliRunner
from huggingface_hub import ModelCard

import orthoact
from orthoact.cli import main
from orthoact.convert.card import MARK, make_card
from orthoact.convert.checkpoint import save
from orthoact.convert.sources import load_source

BASE_CARD = """---
license: other
license_name: a-licence
license_link: https://example.org/licence
language: [en, de]
pipeline_tag: text-generation
datasets: [somebody/elses]
---
# The base
"""


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("cards")


@pytest.fixture(scope="module")
def converted(root):
    """A conversion of a base with a card of its own, by the command line."""
    model, folder = load_source("demo"), root / "base"
    save(model.model, folder, source=model)
    (folder / "orthoact.json").unlink()
    (folder / "README.md").write_text(BASE_CARD)
    made = {}
    for form in ("", "--adapter", "--standalone"):
        out = root / f"out{form}"
        arguments = ["convert", str(folder), "-o", str(out), "--degree", "6", "--quiet", *([form] if form else [])]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", ["orthoact", *arguments])
            result = CliRunner().invoke(main, arguments)
        assert result.exit_code == 0, result.output
        made[form] = out
    return made


def card_of(folder, repo="you/m"):
    files = make_card(folder, repo)
    text = files["README.md"].decode()
    assert not loopback_hub.validate(text), loopback_hub.validate(text)
    assert files["activations.png"].startswith(b"\x89PNG") and len(files["activations.png"]) < 200_000
    assert "activations.png" in text and MARK in text
    return ModelCard(text), text


@pytest.mark.parametrize("form", ["", "--standalone"])
def test_the_licence_and_the_like_are_carried_over(converted, form):
    card, text = card_of(converted[form])
    data = card.data
    assert data.license == "other" and data["license_name"] == "a-licence"
    assert data["license_link"] == "https://example.org/licence" and data.language == ["en", "de"]
    assert data.pipeline_tag == "text-generation" and data.library_name == "transformers"
    assert data.datasets is None, "what the base was trained on is its own card's to say"
    assert {"orthoact", "hermite"} <= set(data.tags) and ("custom_code" in data.tags) == bool(form)
    assert ("trust_remote_code=True" in text) == bool(form)


def test_a_base_on_the_hub_is_linked_with_its_relation(root):
    for form, relation, library in (("full", "finetune", "transformers"), ("adapter", "adapter", "peft")):
        model = tiny.hf("gpt2")
        orthoact.convert_(model)
        model.config.orthoact["base"] = {
            "model": "owner/name",
            "revision": "0" * 40,
            "library": "transformers",
            "files": {},
        }
        save(model, root / f"linked-{form}", form=form)
        card, text = card_of(root / f"linked-{form}")
        assert card.data.base_model == "owner/name" and card.data["base_model_relation"] == relation
        assert card.data.library_name == library
        assert "[owner/name](https://huggingface.co/owner/name)" in text and "0" * 40 in text


def test_a_local_base_is_no_hub_model(converted):
    card, text = card_of(converted[""])
    assert card.data.base_model is None, "a folder's name may be anybody's on the Hub"
    assert "`base`" in text


def test_what_was_measured_is_an_eval_result_and_nothing_else(converted):
    folder = converted[""]
    report = json.loads((folder / "orthoact.json").read_text())
    card, text = card_of(folder)
    measured = report.get("fidelity") or {}
    results = {r.metric_type: r.metric_value for r in card.data.eval_results or []}
    assert bool(results) == bool(measured)
    report["fidelity"] = {"data": "demo", "tokens": 512, "kl": 1.25e-4, "top1_agreement": 0.998, "perplexity": 9.5}
    (folder / "orthoact.json").write_text(json.dumps(report))
    card, text = card_of(folder)
    results = {r.metric_type: r.metric_value for r in card.data.eval_results}
    assert results == {"kl": 1.25e-4, "top1-agreement": 0.998, "perplexity": 9.5}
    assert {r.task_type for r in card.data.eval_results} == {"text-generation"}
    assert "0.000125" in text and "512 tokens" in text
    del report["fidelity"]
    (folder / "orthoact.json").write_text(json.dumps(report))
    card, text = card_of(folder)
    assert card.data.eval_results is None and "not measured" in text


def test_sites_command_and_versions(converted):
    _, text = card_of(converted[""])
    record = json.loads((converted[""] / "config.json").read_text())["orthoact"]
    for name, entry in record["sites"].items():
        (row,) = [line for line in text.splitlines() if line.startswith(f"| `{name}`")]
        assert f"| {entry['target']} | {entry['family']} | {entry['degree']} |" in row
    assert record["made"]["command"].startswith("orthoact ") and record["made"]["command"] in text
    for name, version in record["made"]["versions"].items():
        assert f"{name} {version}" in text
    for digest in record["base"]["files"].values():
        assert digest in text
    assert "/tmp" not in text and str(converted[""].parent) not in text, "no path of this machine"


def test_how_to_load_it(converted, monkeypatch):
    """The blocks of the card run, where they stand, from the folder itself."""
    for form, ways in (("", 3), ("--standalone", 4), ("--adapter", 3)):
        monkeypatch.chdir(converted[form].parent)
        _, text = card_of(converted[form], converted[form].name)
        blocks = [part.split("```")[0] for part in text.split("```python\n")[1:]]
        assert len(blocks) >= ways, form
        for block in blocks:
            if "trust_remote_code" in block or "PeftModel" in block:
                continue  # of another process, and of the base that the reader has
            exec(compile(block, form, "exec"), {})


def test_timm(root):
    model = tiny.timm_model("vit")
    orthoact.convert_(model)
    save(model, root / "timm")
    card, text = card_of(root / "timm")
    assert card.data.library_name == "timm" and card.data.pipeline_tag == "image-classification"
    assert 'timm.create_model("hf-hub:you/m", pretrained=True)' in text
