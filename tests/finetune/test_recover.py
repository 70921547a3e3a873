"""Recovery in one go: `convert --recover`, for every kind of model, on the package's own loop."""

import json
from copy import deepcopy

import numpy as np
import tiny_models as tiny
import torch
from click.testing import CliRunner
from pytest import fixture, mark, raises
from torch import nn

from orthoact import FAMILIES, Activation, OrthoactError, convert_, evaluate, load
from orthoact.cli import main
from orthoact.convert.card import make_card
from orthoact.convert.sources import Source, demo_folder, load_source
from orthoact.finetune.distill import Distillation
from orthoact.finetune.recover import recover
from orthoact.finetune.solve import solve

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
    assert found["steps"] == 12 and found["trained"] == 18 and found["swap"] is None
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


@mark.parametrize("groups", [None, 4, "per-channel"])
@mark.parametrize("family", FAMILIES)
def test_the_start_is_solved_on_the_model_s_own_inputs(family, groups):
    """Nearer to the original on inputs that it has not seen, with no step taken: every family, every kind of groups."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 2048, 6, generator=generator) * torch.tensor([0.5, 1, 2, 4, 1, 1])
    net = nn.Sequential(nn.Linear(6, 16), nn.SiLU(), nn.Linear(16, 5)).requires_grad_(False)
    for p in net.parameters():
        p.copy_(torch.randn(p.shape, generator=generator))
    convert_(net, family=family, degree={"hermite": 3, "fourier": 2}.get(family, 4), groups=groups)
    taught = Distillation(net)
    before = taught.loss(net, {"input": x[1]})
    solve(net, taught, [{"input": part} for part in x[0].split(512)])
    after = taught.loss(net, {"input": x[1]})
    assert after < (0.7 if family == "hermite" else 1.0) * before
    count = {None: 1, 4: 4, "per-channel": 16}[groups]
    theta = numbers(net).view(count, -1)
    assert count == 1 or theta.std(0).gt(0).all(), "each group has its own"


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
    assert found["divergence"] == found["divergence_solved"] == found["divergence_before"]
    assert all(torch.equal(t, before[name]) for name, t in source.model.state_dict().items())


def test_what_does_not_train_is_not_solved(text):
    source = load_source("demo")
    convert_(source.model, degree=3)
    found = recover(source, text, steps=2, batch_size=2, what="norms")
    assert not numbers(source.model).any() and found["divergence_solved"] == found["divergence_before"]


def test_padding_is_no_input():
    """The ids under the mask do not matter."""
    ids, mask = torch.randint(5, 60, (4, 12), generator=torch.Generator().manual_seed(0)), torch.ones(4, 12).long()
    mask[:, 7:] = 0
    thetas = []
    for padding in (1, 3):
        model = tiny.hf("bert-classifier")
        convert_(model, degree=3)
        batch = {"input_ids": ids.masked_fill(mask == 0, padding), "attention_mask": mask}
        solve(model, Distillation(model), [batch])
        thetas.append(numbers(model))
    assert torch.allclose(*thetas, atol=1e-6) and thetas[0].any()


def test_the_solved_start_is_the_least_squares():
    """Against numpy's on the same inputs, weighted by the gradients, for a family that is linear, without a ridge."""
    x = 3 * torch.randn(4096, 1, generator=torch.Generator().manual_seed(1))
    last = nn.Linear(1, 3).requires_grad_(False)
    net = nn.Sequential(nn.Identity(), nn.SiLU(), last)
    convert_(net, degree=5)
    act, eye = net.get_submodule("1"), torch.eye(6)
    assert isinstance(act, Activation)
    solve(net, Distillation(net), [{"input": x}], ridge=0.0, seed=7)
    found = act.theta.detach().clone()

    out = nn.functional.silu(x).requires_grad_()
    noise = torch.randn(4096, 3, generator=torch.Generator().manual_seed(7))
    (root,) = torch.autograd.grad((nn.functional.normalize(last(out), dim=-1) * noise).sum(), out)
    root = root.double().flatten()

    def at(theta):
        act.theta.data.copy_(theta)
        return root * act(x.double()).flatten().detach()

    level = at(torch.zeros(6))
    columns = torch.stack([at(one) - level for one in eye], 1)
    wanted = np.linalg.lstsq(columns.numpy(), (root * nn.functional.silu(x.double()).flatten() - level).numpy())[0]
    assert np.allclose(found, wanted, rtol=1e-4, atol=1e-5)


def test_what_does_not_matter_is_not_solved():
    """A channel that the output does not see keeps its start; another does not care for that channel's inputs."""
    x = torch.randn(512, 2, generator=torch.Generator().manual_seed(0))
    net = nn.Sequential(nn.Identity(), nn.SiLU(), nn.Linear(2, 3)).requires_grad_(False)
    net.get_parameter("2.weight")[:, 1] = 0
    convert_(net, degree=3, groups="per-channel")
    act, start, states = net.get_submodule("1"), deepcopy(net.get_submodule("1").state_dict()), []
    for far in (1.0, 9.0):
        act.load_state_dict(start)
        solve(net, Distillation(net), [{"input": x * torch.tensor([1.0, far])}])
        states.append(deepcopy(act.state_dict()))
    assert all(torch.equal(states[0][name], states[1][name]) for name in start)
    assert states[0]["theta"][0].any() and not states[0]["theta"][1].any()


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
