"""Calibration: what it sees is what was there, weighted by gradients computed the long way, and nothing is touched."""

import json

import numpy as np
import pytest
import tiny_models as tiny
import torch
import torch.nn.functional as F
from click.testing import CliRunner
from torch import nn

import orthoact
from orthoact import Gaussian, Measured, OrthoactError, calibrate, find_sites, plan
from orthoact.cli import main
from orthoact.convert.audit import probe_batch
from orthoact.convert.calibrate import calibrate_on
from orthoact.convert.sources import Source, load_source


def mlp(act=nn.GELU, shift=0.0):
    net = nn.Sequential(nn.Linear(6, 16), act(), nn.Linear(16, 16), act(), nn.Linear(16, 3))
    with torch.no_grad():
        net[0].bias += shift
        net[2].bias += shift
    return net


def rows(*sizes):
    return [{"input": torch.randn(size, 6)} for size in sizes]


def weighed(x, gradient):
    law = Measured()
    law.weigh(law.add(x), gradient)
    return law


def same(law, x, gradient):
    reference = weighed(x, gradient)
    np.testing.assert_array_equal(law.counts, reference.counts)
    np.testing.assert_allclose(law.squares, reference.squares, rtol=1e-3, atol=1e-9)


def test_sensitivity_is_the_squared_gradient():
    net, (batch,) = mlp(), rows(64)
    laws = calibrate(net, find_sites(net), [batch], seed=3)
    v = torch.randn(64, 3, generator=torch.Generator().manual_seed(3))
    inputs, outputs, x = [], [], batch["input"]
    for layer in net:
        if isinstance(layer, nn.GELU):
            inputs.append(x.detach())
        x = layer(x)
        if isinstance(layer, nn.GELU):
            outputs.append(x)
    gradients = torch.autograd.grad((v * F.normalize(x, dim=-1)).sum(), outputs)
    for law, before, gradient in zip(laws.values(), inputs, gradients, strict=True):
        same(law, before, gradient)
        assert law.rows == 64 and law.sensitivity == pytest.approx(float((gradient**2).sum()) / 64)


def test_its_mean_over_draws_is_the_jacobian():
    net, (batch,) = mlp(), rows(4)
    sites = find_sites(net)
    drawn = np.mean([calibrate(net, sites, [batch], seed=s)["3"].sensitivity for s in range(400)])
    hidden = net[:4](batch["input"])
    jacobian = torch.autograd.functional.jacobian(lambda a: F.normalize(net[4](a), dim=-1), hidden)
    assert drawn == pytest.approx(float((jacobian**2).sum()) / 4, rel=0.1)


@pytest.mark.parametrize("name", ["bert-classifier", "llama-silu"])
def test_with_logits_the_loss_is_that_of_sampled_labels(name):
    model = tiny.hf(name)
    batch = probe_batch(model, rows=3)
    sites = find_sites(model)
    laws = calibrate(model, sites, [batch], seed=5)
    seen = {}

    def keep(module, args, output):
        seen["x"], seen["a"] = args[0].detach(), output
        output.retain_grad()

    handle = model.get_submodule(sites[-1].name).register_forward_hook(keep)
    logits = model(**batch).logits
    handle.remove()
    logits = logits.flatten(0, -2)
    labels = torch.multinomial(logits.softmax(-1), 1, generator=torch.Generator().manual_seed(5)).flatten()
    F.cross_entropy(logits, labels, reduction="sum").backward()
    same(laws[sites[-1].name], seen["x"], seen["a"].grad)
    assert laws[sites[-1].name].rows == len(labels)


def test_half_the_sensitivity_times_a_squared_error_is_the_divergence():
    """What the budgets of other tools rest on: small independent errors at a site cost what it says."""
    model = tiny.hf("bert-classifier")
    batch = probe_batch(model, rows=64)
    (site, *_) = find_sites(model)
    cost = np.mean([calibrate(model, [site], [batch], seed=s)[site.name].sensitivity for s in range(20)]) / 2
    size, found = 0.01, []
    with torch.no_grad():
        base = model(**batch).logits.double().log_softmax(-1)
        module = model.get_submodule(site.name)
        handle = module.register_forward_hook(lambda m, args, out: out + size * torch.randn_like(out))
        for _ in range(20):
            new = model(**batch).logits.double().log_softmax(-1)
            found.append(float((base.exp() * (base - new)).sum(-1).mean()))
        handle.remove()
    assert np.mean(found) == pytest.approx(cost * size**2, rel=0.25)


def test_what_runs_without_gradients_has_a_law_and_no_sensitivity():
    class Frozen(nn.Sequential):
        @torch.no_grad()
        def forward(self, input):
            return super().forward(input)

    net = nn.Sequential(Frozen(nn.Linear(6, 4), nn.SiLU()), nn.Linear(4, 4), nn.GELU(), nn.Linear(4, 2))
    laws = calibrate(net, find_sites(net), rows(8))
    assert laws["0.1"].count == laws["2"].count > 0
    assert not laws["0.1"].squares.any() and laws["2"].squares.any()


def test_the_model_is_left_as_it_was():
    net = mlp().train()
    net[0].weight.requires_grad_(False)
    net[4].weight.grad = torch.ones_like(net[4].weight)
    before = {k: v.clone() for k, v in net.state_dict().items()}
    random = torch.random.get_rng_state()
    calibrate(net, find_sites(net), rows(8))
    with pytest.raises(OrthoactError, match="does not run on the data"):
        calibrate(net, find_sites(net), [{"input": torch.randn(2, 5)}])
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    assert [p.requires_grad for p in net.parameters()] == [False, True, True, True, True, True]
    assert [p.grad is None for p in net.parameters()] == [True, True, True, True, False, True]
    assert net.training and all(m.training for m in net.modules())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in net.modules())
    torch.random.set_rng_state(random)
    assert torch.is_grad_enabled()


def test_batches_add_up_and_density_needs_no_gradient():
    net, parts = mlp(), rows(8, 5, 19)
    sites = find_sites(net)
    laws = calibrate(net, sites, parts, sensitivity=False)
    whole = calibrate(net, sites, [{"input": torch.cat([p["input"] for p in parts])}], sensitivity=False)
    for name, law in laws.items():
        np.testing.assert_array_equal(law.counts, whole[name].counts)
        assert law.count == 32 * 16 and not law.squares.any()


def test_an_activation_in_place():
    plain, inplace = mlp(nn.ReLU), mlp(lambda: nn.ReLU(inplace=True))
    inplace.load_state_dict(plain.state_dict())
    batch = rows(64)
    laws = [calibrate(net, find_sites(net), batch) for net in (plain, inplace)]
    for name in laws[0]:
        assert laws[1][name].share_outside(-0.05, 1e3) > 0.2  # negative inputs were seen
        np.testing.assert_array_equal(laws[0][name].counts, laws[1][name].counts)
        np.testing.assert_allclose(laws[0][name].squares, laws[1][name].squares)


class Twice(nn.Module):
    """One activation, called at two places and known by two names; another that is never called."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(6, 8), nn.Linear(8, 8)
        self.act = self.again = nn.SiLU()
        self.dead = nn.SiLU()

    def forward(self, input):
        return self.act(self.second(self.act(self.first(input))).mul_(2))


def test_a_module_called_twice_and_one_never():
    net, (batch,) = Twice(), rows(32)
    laws = calibrate(net, find_sites(net), [batch])
    assert sorted(laws) == ["act", "again"] and laws["act"] is laws["again"]
    one = net.first(batch["input"])
    middle = net.act(one)
    two = net.second(middle) * 2
    out = net.act(two)
    v = torch.randn(32, 8, generator=torch.Generator().manual_seed(0))
    gradients = torch.autograd.grad((v * F.normalize(out, dim=-1)).sum(), [middle, out])
    same(laws["act"], torch.cat([one, two]), torch.cat(gradients))


def test_padding_is_not_counted():
    model = tiny.hf("bert-masked")
    batch = probe_batch(model, rows=2, length=10)
    batch["attention_mask"][1, 6:] = 0
    laws = calibrate(model, find_sites(model), [batch])
    assert all(law.count == 16 * 64 and law.rows == 16 for law in laws.values())


@pytest.mark.parametrize("build", [lambda: tiny.hf("gpt2"), lambda: tiny.hf("dinov2"), lambda: tiny.timm_model("vit")])
def test_a_bfloat16_model(build):
    model = build().bfloat16()
    laws = calibrate(model, find_sites(model), [probe_batch(model)])
    assert all(law.sensitivity > 0 for law in laws.values())
    assert all(row["value_rms"] < 0.05 for row in orthoact.convert_(model, domains=laws).sites)


def test_a_calibrated_copy_is_nearer():
    net, data = mlp(shift=-1.5), rows(512)
    x = torch.randn(2048, 6)
    laws = calibrate(net, find_sites(net), data)
    with torch.no_grad():
        base, errors = net(x), []
        for domains in ({}, laws):
            orthoact.convert_(net, degree=5, domains=domains)
            errors.append(float((net(x) - base).square().mean()))
            orthoact.revert_(net)
    assert errors[1] < errors[0] / 4


def test_one_fit_for_each_target_and_law():
    net = mlp()
    one = plan(net, domains={"1": Gaussian(0, 1, 0.2), "3": Gaussian(0, 1, 0.2)})
    assert one.fits[0] is one.fits[1] and one.fits[0].domain.tail == 0.2
    two = plan(net, domains={"3": Gaussian(1, 1)}, domain=Gaussian(2, 1))
    assert [f.domain.mean for f in two.fits] == [2, 1]
    with pytest.raises(OrthoactError, match="'5' is no site"):
        plan(net, domains={"5": Gaussian()})


def test_errors_name_the_site():
    net = mlp()
    with pytest.raises(OrthoactError, match=r"^1: a measured law: expected finite inputs"):
        calibrate(net, find_sites(net), [{"input": torch.full((2, 6), float("nan"))}])
    with torch.no_grad():
        net[2].weight.zero_()
        net[2].bias.fill_(0.5)
    with pytest.raises(OrthoactError, match=r"^3: a measured law: expected inputs that vary, all 128 are 0\.5"):
        plan(net, domains=calibrate(net, find_sites(net), rows(8)))


# -- the command -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "cal.txt"
    path.write_text("She had been forced into prudence in her youth; she learned romance as she grew older.\n" * 20)
    return path


def call(*args, code=0):
    result = CliRunner().invoke(main, [str(a) for a in args])
    assert result.exit_code == code, result.output
    return result


def test_convert_on_data(text, tmp_path):
    out = tmp_path / "out"
    command = ("convert", "demo", "-o", out, "--calibrate", text, "--limit", 200, "--degree", 6)
    report = json.loads(call(*command, "--json").stdout)
    assert report["seconds"]["calibrate"] > 0 and len({row["value_rms"] for row in report["sites"]}) == 6
    assert all(0 <= row["outside"] < 0.5 and row["std"] > 0 for row in report["sites"])
    saved = json.loads((out / "orthoact.json").read_text())
    assert sorted(saved["calibration"]) == [row["name"] for row in report["sites"]] == sorted(saved["fits"])
    site = load_source(str(out)).model.config.orthoact["sites"][report["sites"][0]["name"]]
    assert site["domain"]["kind"] == "measured" and site["domain"]["count"] == 200 * 512
    act = load_source(str(out)).model.get_submodule(report["sites"][0]["name"])
    written = saved["fits"][report["sites"][0]["name"]]["coefficients"]
    np.testing.assert_allclose(act.coefficients.detach(), written, rtol=1e-6, atol=1e-7)
    result = call(*command, "--dry-run", "--overwrite")
    assert "calibrating" in result.stderr and not result.stdout


def test_defaults_of_the_command(text):
    source = load_source("demo")
    steps = []
    laws = calibrate_on(source, find_sites(source.model), text, progress=lambda *step: steps.append(step))
    assert steps == [(1, 2), (2, 2)] and next(iter(laws.values())).rows > 300


def test_little_data_is_told(text, caplog):
    source = load_source("demo")
    calibrate_on(source, find_sites(source.model), text, limit=200)
    assert caplog.messages == ["--calibrate: 200 tokens say little of the inputs; give some 2048"]
    calibrate_on(source, find_sites(source.model), text)
    assert len(caplog.messages) == 1


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (("--calibrate", "nowhere.txt"), 1, "--calibrate nowhere.txt: there is no such file"),
        (("--limit", 5), 2, "--limit bounds the data of --calibrate"),
        (("--calibrate", "TEXT", "--limit", 0), 1, "--limit 0: expected a positive"),
        (("--calibrate", "TEXT", "--limit", 1), 1, "at least two tokens, --limit leaves 1"),
        (("--calibrate", ""), 1, "--calibrate : there is no such file"),
        (("--calibrate", "EMPTY"), 1, r"--calibrate"),
    ],
)
def test_bad_input(options, code, message, text, tmp_path):
    (tmp_path / "empty.txt").write_text(" \n")
    paths = {"TEXT": text, "EMPTY": tmp_path / "empty.txt"}
    options = [paths.get(o, o) for o in options]
    assert message in call("convert", "demo", "-o", tmp_path / "out", *options, code=code).stderr
    assert not (tmp_path / "out").exists()


def test_data_that_an_image_model_cannot_take(tmp_path):
    source = Source(tiny.timm_model("vit"), name="vit", kind="timm", folder=None)
    (tmp_path / "some.txt").write_text("a text")
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "a.png").write_bytes(b"no image")
    for data, message in (("some.txt", "a text, and this model takes images"), ("images", "repair that image")):
        with pytest.raises(OrthoactError, match=rf"--calibrate .*{data}: .*{message}"):
            calibrate_on(source, [], tmp_path / data)
