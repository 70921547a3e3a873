"""The report: what it shows is what the files hold, in any browser, of any model."""

import copy
import json
import re
from html.parser import HTMLParser

import browser
import numpy as np
import pytest
import real_models
import tiny_models as tiny
import torch
from click.testing import CliRunner
from markupsafe import escape

import orthoact
from orthoact.cli import main
from orthoact.convert.checkpoint import save
from orthoact.convert.report import PAGE, read, write_report
from orthoact.interp import FAMILIES, Measured
from orthoact.interp.activation import Activation
from orthoact.interp.targets import get_target

SMALLEST = {"tropical-rational": 3, "rational": 4, "rational-sum": 4, "fourier": 3, "fourier-free": 3}


class Page(HTMLParser):
    """What a page says: its numbers with their origin, its other words, its scripts."""

    void = frozenset({"meta", "link", "br", "path", "rect"})

    def __init__(self, text):
        super().__init__()
        self.numbers, self.words, self.tags, self.open, self.links = [], [], [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.tags.append((tag, attrs))
        self.links += [v for k, v in attrs.items() if k in ("src", "href", "action")]
        if tag not in self.void:
            self.open.append((tag, attrs))

    def handle_endtag(self, tag):
        if tag not in self.void:
            assert self.open and self.open.pop()[0] == tag, tag

    def handle_data(self, data):
        tag, attrs = self.open[-1] if self.open else ("", {})
        if tag == "data":
            self.numbers.append((attrs["data-from"], attrs["value"], data))
        elif not {t for t, _ in self.open} & {"script", "style", "svg", "code", "title"}:
            kinds = {a.get("class") for _, a in self.open}
            if not kinds & {"name", "why name", "tx", "ty", "origin"} and not any(
                t in ("h1", "figure") for t, _ in self.open
            ):
                self.words.append(data)


def resolve(roots, place):
    file, *path = place.split("/")
    value = roots[file]
    for step in path:
        step = step.replace("~1", "/").replace("~0", "~")
        value = value[int(step) if isinstance(value, list) else step]
    return value


def check(folder):
    """Every number of the page is that of the file it names, and nothing else on it is a number."""
    text = (folder / PAGE).read_text()
    page = Page(text)
    roots = {"orthoact.json": json.loads((folder / "orthoact.json").read_text())}
    if (folder / "comparison.json").is_file():
        roots["comparison.json"] = json.loads((folder / "comparison.json").read_text())
    assert not page.open and len(page.numbers) > 8
    for place, value, shown in page.numbers:
        held = resolve(roots, place)
        assert value == repr(held), place
        scale = 100 if shown.endswith("%") else 1
        read_off = float(shown.replace(",", "").removesuffix(" %"))
        assert read_off in {float(f"{scale * held:.{digits}g}") for digits in (2, 3, 4, 6, 7)}, (place, shown)
    words = " ".join(page.words)
    assert not re.search(r"\d", words), re.findall(r".{20}\d.{10}", words)
    for site in roots["orthoact.json"].get("sites", []):
        assert f'<td class="why name">{escape(site["reason"])}</td>' in text
    assert [v for v in page.links if not v.startswith(("data:", "https://arxiv.org/"))] == [], "nothing is fetched"
    assert not re.search(r"@import|url\(", text)
    return page, json.loads(re.search(r'id="numbers">(.*?)</script>', text, re.DOTALL)[1])


def inputs(site, seed=0):
    law = Measured()
    x = torch.randn(2000, generator=torch.Generator().manual_seed(seed)) - 0.5
    law.weigh(law.add(x), torch.cos(x))
    law.rows = 20
    return law


def converted(tmp_path, name="gpt2", calibrated=True, train=0.0, **options):
    """A converted folder with all that a record can hold, and its model."""
    model = tiny.timm_model("vit") if name == "timm" else tiny.hf(name)
    sites, _ = orthoact.inspect_model(model)
    laws = {s.name: inputs(s, i) for i, s in enumerate(sites)} if calibrated else {}
    done = orthoact.convert_(model, domains=laws, **options)
    acts = {n: m for n, m in model.named_modules() if isinstance(m, Activation)}
    with torch.no_grad():
        for act in acts.values():
            act.theta += train * torch.randn(act.theta.shape, generator=torch.Generator().manual_seed(1))
    record = {
        "sites": done.sites,
        "left": [{"where": "head", "function": "tanh", "calls": 2, "reason": "a head"}],
        "parameters": done.plan.parameters,
        "seconds": {"load": 0.25, "fit": 1.5},
        "fidelity": {"data": "file", "tokens": 1234, "loss_base": 3.1, "loss": 3.11, "perplexity_base": 22.2,
                     "perplexity": 22.4, "change": 1.0050, "kl": 4.6e-5, "top1_agreement": 0.9939},
        "calibration": {name: law.histogram() for name, law in laws.items()},
    }  # fmt: skip
    folder = tmp_path / "out"
    save(model, folder, report=record, page=True)
    return folder, acts


def test_every_number_is_that_of_the_files(tmp_path):
    folder, acts = converted(tmp_path)
    page, _ = check(folder)
    shown = {place for place, *_ in page.numbers}
    assert {f"orthoact.json/fidelity/{k}" for k in ("change", "kl", "top1_agreement", "tokens")} <= shown
    for key in ("degree", "parameters", "value_rms", "slope_rms", "value_max", "outside", "sensitivity"):
        assert {f"orthoact.json/sites/{i}/{key}" for i in range(len(acts))} <= shown


@pytest.mark.parametrize("groups", [None, 4, "per-channel"])
def test_the_curves_are_those_of_the_modules(tmp_path, groups):
    folder, acts = converted(tmp_path, groups=groups, train=0.05)
    _, held = check(folder)
    for site in held["sites"]:
        act = acts[site["name"]]
        x = torch.linspace(*site["x"], len(site["copy"]), dtype=torch.float64)
        wide = x if groups is None else x[:, None].expand(-1, len(act.theta))
        with torch.no_grad():
            learned = act(wide).reshape(len(x), -1)
            act.theta.zero_()
            start = act(wide).reshape(len(x), -1)
        assert np.allclose(site["target"], get_target("gelu_tanh")(x.numpy())[0], atol=1e-4)
        assert np.allclose(site["copy"], start[:, 0], atol=1e-4)
        if groups != "per-channel":  # of many groups an even choice is drawn
            assert np.allclose(site["learned"], learned.mean(1), atol=1e-4)
        assert not np.allclose(site["learned"], site["copy"], atol=1e-2)
        assert "learned-band" in (folder / PAGE).read_text() if groups else True
    assert "fine-tuned" in (folder / PAGE).read_text()


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family(tmp_path, family):
    folder, _ = converted(tmp_path, calibrated=False, family=family, degree=SMALLEST.get(family, 4))
    page, held = check(folder)
    assert all(np.isfinite(site["copy"]).all() for site in held["sites"])
    assert "sensitivity" not in {place.rpartition("/")[2] for place, *_ in page.numbers}


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("vit", {}),
        ("timm", {}),
        ("llama-relu", {}),
        ("gpt2", {"tails": "none", "degree": 4}),
        ("llama-silu", {"groups": 2}),
    ],
    ids=["renamed", "timm", "exact", "bare", "gated"],
)
def test_every_kind_of_model(tmp_path, name, options):
    folder, acts = converted(tmp_path, name, **options)
    page, held = check(folder)
    assert [site["name"] for site in held["sites"]] == list(acts)
    assert len([1 for tag, a in page.tags if a.get("class") == "tile"]) == len(acts)


def test_a_target_that_has_no_name(tmp_path):
    folder, _ = converted(tmp_path)
    config = json.loads((folder / "config.json").read_text())
    for entry in config["orthoact"]["sites"].values():
        entry["target"] = "<lambda>"
    (folder / "config.json").write_text(json.dumps(config))
    write_report(folder)
    _, held = check(folder)
    assert all(site["target"] is None and site["copy"] for site in held["sites"])


def test_training_and_comparison(tmp_path):
    folder, acts = converted(tmp_path, train=0.02)
    lines = [
        {"step": i, "loss": 3.0 / i, "learning_rate": 1e-3, "outside": dict.fromkeys(acts, 0.01 * i), "note": "x"}
        for i in range(1, 6)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    rows = [{"method": "activations", "parameters": 54, "accuracy": 0.8125}, {"method": "<i>bias</i>", "accuracy": 0.5}]
    (folder / "comparison.json").write_text(json.dumps({"rows": rows}))
    write_report(folder)
    page, held = check(folder)
    charts = held["charts"]
    assert charts["metric-loss"]["series"]["loss"] == [line["loss"] for line in lines]
    assert charts["metric-outside"]["series"]["outside"] == [0.01 * i for i in range(1, 6)] and "moved" in charts
    assert ("comparison.json/rows/0/accuracy", "0.8125", "0.8125") in page.numbers
    assert "<i>bias" not in (folder / PAGE).read_text()


def test_a_stranger_cannot_write_into_the_page(tmp_path):
    folder, _ = converted(tmp_path)
    evil = '"><script>alert(1)</script>'
    for name in ("orthoact.json", "config.json"):
        text = (folder / name).read_text()
        text = text.replace("transformer.h.0.mlp.act", json.dumps(f"t{evil}</script>")[1:-1]).replace(
            "gelu_tanh", "<b>"
        )
        (folder / name).write_text(text)
    before = [t for t, _ in Page((folder / PAGE).read_text()).tags if t in ("script", "b")]
    write_report(folder)
    tags = [t for t, _ in Page((folder / PAGE).read_text()).tags if t in ("script", "b")]
    assert tags == before


def test_bad_input(tmp_path):
    with pytest.raises(orthoact.OrthoactError, match=r"has no orthoact.json: expected a folder that orthoact"):
        write_report(tmp_path)
    folder, _ = converted(tmp_path)
    before = (folder / PAGE).read_text()
    (folder / "metrics.jsonl").write_text('{"step": 1')
    with pytest.raises(orthoact.OrthoactError, match=r"metrics.jsonl is damaged"):
        write_report(folder)
    (folder / "metrics.jsonl").unlink()
    (folder / "orthoact.json").write_text("[]")
    with pytest.raises(orthoact.OrthoactError, match="expected an object"):
        write_report(folder)
    assert (folder / PAGE).read_text() == before and not list(folder.glob(".*"))


def test_without_weights_there_are_numbers_and_no_curves(tmp_path):
    folder, _ = converted(tmp_path)
    (folder / "model.safetensors").unlink()
    write_report(folder)
    page, held = check(folder)
    assert held["sites"] == [None, None] and len(page.numbers) > 8


def test_it_opens_without_errors(tmp_path):
    folder, acts = converted(tmp_path, train=0.02, groups=4)
    name = list(acts)[1]
    document, console = browser.visit(f"{(folder / PAGE).as_uri()}#{name}", "--window-size=375,800")
    assert console == []
    dialog = re.search(r"<dialog[^>]*open.*?</dialog>", document, re.DOTALL)
    assert dialog and name in dialog[0] and "value rms" in dialog[0], "the address picks a site, which is enlarged"
    _, console = browser.visit("data:text/html,<script>nothing.there()</script>")
    assert console, "errors would have been seen"


def test_the_commands(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    runner = CliRunner()
    done = runner.invoke(main, ["convert", "demo", "--degree", "4"])
    assert done.exit_code == 0 and "demo-hermite/report.html" in done.stderr.replace("\n", "")
    check(tmp_path / "demo-hermite")
    assert json.loads((tmp_path / "demo-hermite" / "orthoact.json").read_text())["seconds"].keys() == {"load", "fit"}
    done = runner.invoke(main, ["report", "demo-hermite", "-o", "a/b.html", "--json"])
    assert done.exit_code == 0 and json.loads(done.stdout) == {
        "report": "a/b.html",
        "bytes": (tmp_path / "a/b.html").stat().st_size,
    }
    assert (tmp_path / "a" / "b.html").read_text() == (tmp_path / "demo-hermite" / PAGE).read_text(), "deterministic"
    done = runner.invoke(main, ["convert", "demo", "--degree", "4", "--no-report", "--overwrite", "--quiet"])
    assert done.exit_code == 0 and not done.output and not (tmp_path / "demo-hermite" / PAGE).exists()
    assert runner.invoke(main, ["report", "nothing"]).exit_code == 1


def test_thirty_sites_are_small(tmp_path):
    import transformers as tf

    config = tf.LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=30, num_attention_heads=2
    )
    model = tf.LlamaForCausalLM(config)
    sites, _ = orthoact.inspect_model(model)
    laws = {s.name: inputs(s, i) for i, s in enumerate(sites)}
    done = orthoact.convert_(model, domains=laws, degree=4)
    record = {"sites": done.sites, "calibration": {n: law.histogram() for n, law in laws.items()}, "parameters": 150}
    save(model, tmp_path / "out", report=record, page=True)
    assert len(read(tmp_path / "out").sites) == 30 and (tmp_path / "out" / PAGE).stat().st_size < 5e5


def test_smollm2(tmp_path):
    folder = real_models.require("smollm2")
    done = CliRunner().invoke(main, ["convert", str(folder), "-o", str(tmp_path / "out"), "--quiet"])
    assert done.exit_code == 0, done.output
    _, held = check(tmp_path / "out")
    assert (tmp_path / "out" / PAGE).stat().st_size < 1.5e6 and len(held["sites"]) == 30
    _, console = browser.visit((tmp_path / "out" / PAGE).as_uri())
    assert console == []


def test_reading_leaves_the_files_alone(tmp_path):
    folder, _ = converted(tmp_path)
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    files = read(folder)
    record = copy.deepcopy(files.record)
    write_report(folder)
    assert files.record == record and {p.name: p.read_bytes() for p in folder.iterdir()} == before
