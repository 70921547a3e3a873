"""Recovery in one go: `convert --recover`, for every kind of model, on the package's own loop."""

import json
from copy import deepcopy

import tiny_models as tiny
import torch
from click.testing import CliRunner
from pytest import fixture, mark, raises

from orthoact import Activation, OrthoactError, convert_, evaluate, load
from orthoact.cli import main
from orthoact.convert.card import make_card
from orthoact.convert.sources import Source, demo_folder, load_source
from orthoact.finetune.recover import recover

TEXT = "It is not a matter of taste whether the server restarts: the log of the morning says that it did. "


@fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "mails.txt"
    path.write_text("\n\n".join(f"{i}. {TEXT}" for i in range(300)))
    return path


@fixture(scope="module")
def images(tmp_path_factory):
    from PIL import Image

    folder = tmp_path_factory.mktemp("images")
    pixels = torch.randint(0, 255, (24, 32, 32, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    for i, image in enumerate(pixels):
        Image.fromarray(image.numpy()).save(folder / f"{i}.png")
    return folder


def numbers(model):
    return torch.cat([m.theta.detach().flatten() for m in model.modules() if isinstance(m, Activation)])


def test_convert_with_recover_writes_a_better_folder(text, tmp_path):
    base = ["convert", "demo", "--degree", "2", "--json"]
    done = CliRunner().invoke(main, [*base, "-o", str(tmp_path / "plain")])
    assert done.exit_code == 0, done.output
    command = [*base, "--recover", str(text), "--steps", "12", "--batch-size", "2", "-o", str(tmp_path / "out")]
    taught = CliRunner().invoke(main, command)
    assert taught.exit_code == 0, taught.output
    before, after = json.loads(done.stdout), json.loads(taught.stdout)
    found = after["recovery"]
    assert found["steps"] == 12 and found["trained"] == 18 and found["swap"] is None and found["kept"] == "both"
    assert found["divergence"] < found["divergence_solved"] < found["divergence_before"] / 4
    assert after["fidelity"]["kl"] < before["fidelity"]["kl"] / 4
    record = (tmp_path / "out" / "orthoact.json").read_text()
    assert json.loads(record)["recovery"] == found and found["data"] == text.name
    assert str(text.parent) not in record, "no local path may be pushed"
    card, page = make_card(tmp_path / "out")["README.md"].decode(), (tmp_path / "out" / "report.html").read_text()
    assert f"{found['divergence_before']:.3g} before, {found['divergence']:.3g} after" in card
    assert repr(found["divergence"]) in page and "12</data> steps" in page
    model, original = load(tmp_path / "out"), load(demo_folder())
    again = evaluate(str(tmp_path / "out"))
    assert abs(again["kl"] - after["fidelity"]["kl"]) < 1e-6
    weights = dict(original.named_parameters())
    assert all(torch.equal(p, weights[n]) for n, p in model.named_parameters() if n in weights)
    assert all(m.theta.any() for m in model.modules() if isinstance(m, Activation))


@mark.parametrize("kind", ["timm", "transformers"])
def test_images_and_encoders_without_labels(kind, images, tmp_path):
    if kind == "timm":
        source = Source(tiny.timm_model("vit-headless"), "vit", "timm", None)
        source.model.pretrained_cfg = {**source.model.pretrained_cfg, "input_size": (3, 32, 32)}
    else:
        from transformers import ViTImageProcessor

        ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(tmp_path)
        source = Source(tiny.hf("vit"), "vit", "transformers", tmp_path)
    convert_(source.model, degree=3)
    untouched = {n: p.detach().clone() for n, p in source.model.named_parameters() if not n.endswith("theta")}
    found = recover(source, images, steps=10, batch_size=4, swap=None)
    assert found["divergence"] < found["divergence_before"]
    assert all(torch.equal(p, untouched[n]) for n, p in source.model.named_parameters() if n in untouched)
    assert not source.model.training


def test_the_start_is_kept_where_training_makes_it_worse(text):
    thetas = []
    for rate in (5.0, 7.0):
        source = load_source("demo")
        convert_(source.model, degree=8)
        found = recover(source, text, steps=2, batch_size=2, rate=rate, swap=None)
        assert found["divergence"] == found["divergence_solved"] <= found["divergence_before"]
        thetas.append(numbers(source.model))
    assert torch.equal(*thetas), "a step was left in"


@mark.parametrize("groups", ["per-channel", "4"])
def test_the_record_has_the_curves_of_the_folder(groups, text, tmp_path):
    """Joints and errors are those after the recovery; what is poor before it is no reason to refuse."""
    command = ["convert", "demo", "--degree", "3", "--recover", str(text), "--steps", "0", "--groups", groups]
    done = CliRunner().invoke(main, [*command, *["--strict"] * (groups == "4"), "-o", str(tmp_path / "out")])
    assert done.exit_code == 0, done.output
    record = json.loads((tmp_path / "out" / "orthoact.json").read_text())
    acts = {name: m for name, m in load(tmp_path / "out").named_modules() if isinstance(m, Activation)}
    for row in record["sites"]:
        act, made = acts[row["name"]], record["fits"][row["name"]]
        assert (made["lo"], made["hi"]) == (act.lo.item(), act.hi.item())
        assert row["reason"].startswith("least squares on its inputs") and row["value_rms"] == made["value_rms"]
        x = torch.linspace(-20, 20, 401)[:, None].expand(-1, act.groups)
        with torch.no_grad():
            far = (act(x) - torch.nn.functional.gelu(x, approximate="tanh")).abs().max()
        assert abs(far - row["value_max"]) < 1e-3 * far


def test_few_words_do_no_harm(tmp_path):
    """The recovery of a good copy on seventeen words, judged on other text."""
    tiny_text = tmp_path / "tiny.txt"
    tiny_text.write_text("She was not at all afraid of the weather, and walked to the village all the same.")
    kls = []
    for more in ([], ["--recover", str(tiny_text), "--steps", "0"]):
        calibrate = ["--calibrate", str(tiny_text)]
        done = CliRunner().invoke(
            main, ["convert", "demo", "--json", *calibrate, *more, "-o", str(tmp_path / f"out{len(kls)}")]
        )
        assert done.exit_code == 0, done.output
        kls.append(json.loads(done.stdout)["fidelity"]["kl"])
    assert kls[1] < 1.1 * kls[0]


def test_a_context_shorter_than_a_window(text):
    source = load_source("demo")
    model = source.model
    model.transformer.wpe = torch.nn.Embedding.from_pretrained(model.transformer.wpe.weight[:100])
    model.config.n_positions = 100
    convert_(model, degree=3)
    found = recover(source, text, steps=1, batch_size=2, limit=1000)
    assert found["divergence"] < found["divergence_before"]


def test_no_step_is_told_as_none(text, tmp_path):
    command = ["convert", "demo", "--degree", "3", "--recover", str(text), "--steps", "0", "--batch-size", "2"]
    done = CliRunner().invoke(main, [*command, "-o", str(tmp_path / "out")])
    assert done.exit_code == 0 and "recovered by least squares" in done.output, done.output
    card = make_card(tmp_path / "out")["README.md"].decode()
    for told in (card, (tmp_path / "out" / "report.html").read_text()):
        assert "set to the least squares on their inputs" in told and "0 steps" not in told


def test_without_other_data_the_sites_are_fitted_to_those_of_the_recovery(text, tmp_path):
    other = tmp_path / "other.txt"
    other.write_text("0123456789 " * 400)
    stds = []
    for more in (["--recover", str(text), "--steps", "0"], ["--calibrate", str(text)], ["--calibrate", str(other)]):
        command = ["convert", "demo", "--degree", "3", "--dry-run", "--json", *more]
        done = CliRunner().invoke(main, command)
        assert done.exit_code == 0, done.output
        stds.append([row["std"] for row in json.loads(done.stdout)["sites"]])
    assert stds[0] == stds[1] != stds[2]


def test_no_step_is_the_solved_start(text):
    source = load_source("demo")
    convert_(source.model, degree=3, groups="per-channel")
    found = recover(source, text, steps=0, batch_size=2)
    assert found["steps"] == 0 and found["swap"] is None
    assert found["divergence"] == found["divergence_solved"] < found["divergence_before"] / 5
    assert numbers(source.model).any()


def test_a_start_that_is_no_better_is_taken_back(text, monkeypatch):
    """Joints and frame too, not the numbers alone."""

    def spoil(model, *_, **__):
        for m in model.modules():
            if isinstance(m, Activation):
                m.lo.add_(-1), m.hi.mul_(0.1), m.start.add_(1), m.theta.data.add_(1)

    monkeypatch.setattr("orthoact.finetune.recover.solve", spoil)
    source = load_source("demo")
    convert_(source.model, degree=4)
    before = deepcopy(source.model.state_dict())
    found = recover(source, text, steps=0, batch_size=2)
    assert found["divergence"] == found["divergence_solved"] == found["divergence_before"] and found["kept"] == "fit"
    assert all(torch.equal(t, before[name]) for name, t in source.model.state_dict().items())


def test_what_does_not_train_is_not_solved(text):
    source = load_source("demo")
    convert_(source.model, degree=3)
    found = recover(source, text, steps=2, batch_size=2, what="norms")
    assert not numbers(source.model).any() and found["divergence_solved"] == found["divergence_before"]


def test_the_same_seed_gives_the_same_model(text):
    thetas = []
    for _ in range(2):
        source = load_source("demo")
        convert_(source.model, degree=4)
        recover(source, text, steps=3, batch_size=2, seed=3)
        thetas.append(numbers(source.model))
    assert torch.equal(*thetas)


def test_data_that_do_not_fit(text, tmp_path):
    source = load_source("demo")
    with raises(OrthoactError, match="has no learnable activation"):
        recover(source, text, steps=1)
    convert_(source.model, degree=4)
    with raises(OrthoactError, match=r"--recover .*there is no such file"):
        recover(source, tmp_path / "nothing.txt")
    with raises(OrthoactError, match="--steps -1: expected a whole number that is not negative"):
        recover(source, text, steps=-1)
    done = CliRunner().invoke(main, ["convert", "demo", "--steps", "3", "-o", str(tmp_path / "out")])
    assert done.exit_code == 2 and "--recover" in done.output
    done = CliRunner().invoke(main, ["convert", "demo", "--recover", "nowhere.txt", "-o", str(tmp_path / "out")])
    assert done.exit_code == 1 and "there is no such file" in done.output and not (tmp_path / "out").exists()
    for bad in (
        ["--recover", str(text), "--steps", "-1"],
        ["--recover", str(tmp_path / "no"), "--calibrate", str(text)],
    ):
        done = CliRunner().invoke(main, ["convert", "no-model", *bad])
        assert done.exit_code == 1 and "no-model" not in done.output, "said before a model is loaded"
