"""Sites are found by what modules compute, on every tiny model; what stays is named with a reason."""

import pytest
import tiny_models as tiny
import torch
import torch.nn.functional as F
from torch import nn

import orthoact
from orthoact.convert.audit import audit, probe_batch
from orthoact.convert.sites import survey


@pytest.mark.parametrize("name", tiny.HF)
def test_transformers_sites(name):
    sites = orthoact.find_sites(tiny.hf(name))
    assert len(sites) == tiny.HF[name][1], [s.name for s in sites]
    assert {s.target.name for s in sites} == {tiny.HF[name][2]}


@pytest.mark.parametrize("name", tiny.TIMM)
def test_timm_sites(name):
    *_, count, target = tiny.TIMM[name]
    sites = orthoact.find_sites(tiny.timm_model(name))
    found = [s.target.name for s in sites]
    assert len(found) == count, [(s.name, s.target.name) for s in sites]
    assert max(set(found), key=found.count) == target


@pytest.mark.parametrize(
    ("name", "channel"), [("vit", -1), ("convnext", -1), ("mobilenet", 1), ("gpt2", -1), ("t5-gated", -1)]
)
def test_channel_axis_of_transformers(name, channel):
    sites, _ = orthoact.inspect_model(tiny.hf(name))
    assert {s.channel for s in sites} == {channel}


@pytest.mark.parametrize(("name", "channel"), [("vit", -1), ("convnext", 1), ("mobilenet", 1)])
def test_channel_axis_of_timm(name, channel):
    sites, _ = orthoact.inspect_model(tiny.timm_model(name))
    assert {s.channel for s in sites} == {channel}


class Swishlike(nn.Module):
    """A class that no list knows."""

    def forward(self, x):
        return x * torch.sigmoid(x)


class Unknown(nn.Module):
    def forward(self, x):
        return x * torch.exp(-F.softplus(-2 * x))


class Odd(nn.Module):
    """Takes more than one tensor: no activation."""

    def forward(self, x, y):
        return x + y


def net(*layers):
    return nn.Sequential(nn.Linear(4, 4), *layers)


@pytest.mark.parametrize(
    ("layer", "target"),
    [
        (nn.GELU(), "gelu"),
        (nn.GELU(approximate="tanh"), "gelu_tanh"),
        (nn.ReLU(inplace=True), "relu"),
        (nn.LeakyReLU(0.3), "leaky_relu(0.3)"),
        (nn.ELU(0.5), "elu(0.5)"),
        (nn.Hardtanh(-2, 2), None),
        (Swishlike(), "silu"),
        (Unknown(), "Unknown"),
        (nn.Tanh(), None),
        (nn.Sigmoid(), None),
        (nn.Dropout(0.5), None),
        (nn.Identity(), None),
        (nn.Softmax(-1), None),
        (nn.LayerNorm(4, elementwise_affine=False), None),
        (nn.MaxPool1d(2), None),
        (nn.GLU(), None),
        (nn.PReLU(), None),
        (Odd(), None),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else str(value),
)
def test_leaves_are_recognised_by_what_they_compute(layer, target):
    assert [s.target.name for s in orthoact.find_sites(net(layer))] == ([target] if target else [])


class Overflowing(nn.Module):
    """Whose slope autograd loses far out."""

    def forward(self, x):
        return x / (1 + torch.exp(-1.5 * x))


class Growing(nn.Module):
    def forward(self, x):
        return torch.exp(x) - x


def test_an_activation_that_no_copy_can_be_made_of_is_named():
    net = nn.Sequential(nn.Linear(2, 4), Overflowing(), nn.Linear(4, 4), Growing(), nn.Linear(4, 1))
    sites, left = orthoact.inspect_model(net)
    assert [site.name for site in sites] == ["1"]
    assert [(i.where, i.function) for i in left if i.where] == [("3", "Growing")]
    assert any("not finite on" in i.reason for i in left)


def test_a_softplus_with_a_threshold_is_copied_with_it():
    net = nn.Sequential(nn.Linear(2, 4), nn.Softplus(1, 0.5), nn.Linear(4, 1))
    (site,) = orthoact.find_sites(net, include=["1"])
    x = torch.linspace(-4, 4, 101, dtype=torch.float64)
    assert torch.allclose(site.target.function(x), net[1](x))


def test_include_names_gates_and_exclude_removes():
    model = net(nn.GELU(), nn.Tanh())
    assert [s.name for s in orthoact.find_sites(model, include=["2"])] == ["2"]
    assert [s.name for s in orthoact.find_sites(model, exclude=["1"])] == []
    reasons = {s.name: s.left for s in survey(model)}
    assert reasons["1"] == "" and "--include" in reasons["2"]


def test_heads_are_left_unless_asked_for():
    model = tiny.hf("bert-masked")
    extra = {s.name for s in orthoact.find_sites(model, include_heads=True)} - {
        s.name for s in orthoact.find_sites(model)
    }
    assert extra == {"cls.predictions.transform.transform_act_fn"}


def test_one_object_at_several_paths_gives_a_site_each():
    act = nn.GELU()
    model = nn.ModuleList([net(act), net(act)])
    assert [s.name for s in orthoact.find_sites(model)] == ["0.1", "1.1"]
    orthoact.convert_(model)
    assert model[0][1] is not model[1][1], "each path gets an activation of its own"


def test_a_shared_parent_has_its_slot_once():
    block = net(nn.GELU())
    assert [s.name for s in orthoact.find_sites(nn.ModuleList([block, block]))] == ["0.1"]


def test_the_survey_leaves_the_model_as_it_was():
    model = net(nn.GELU(), nn.Dropout(0.5)).train()
    model[2].eval()
    orthoact.find_sites(model)
    assert [m.training for m in model] == [True, True, False]
    torch.manual_seed(1)
    before = torch.rand(1)
    torch.manual_seed(1)
    orthoact.inspect_model(tiny.hf("gpt2"))
    assert torch.equal(torch.rand(1), before), "inspecting must not use the global random state"


class Functional(nn.Module):
    """One activation as a module, two as functions, one gate."""

    main_input_name = "pixel_values"

    def __init__(self):
        super().__init__()
        self.proj, self.act = nn.Conv2d(3, 4, 1), nn.GELU()
        self.pretrained_cfg = {"input_size": (3, 8, 8), "architecture": "none"}

    def forward(self, x):
        return torch.sigmoid(F.relu(F.gelu(self.act(self.proj(x)))).tanh())


def test_the_audit_names_every_call_outside_the_sites():
    model = Functional()
    seen = audit(model, survey(model))
    assert {(i.function, i.calls, i.proper) for i in seen.left} == {
        ("gelu", 1, True),
        ("relu", 1, True),
        ("tanh", 1, False),
        ("sigmoid", 1, False),
    }
    assert seen.calls == {"act": 1} and seen.channels == {"act": 1}


def test_an_audit_that_cannot_run_says_so():
    seen = audit(net(nn.GELU()), [])
    assert len(seen.left) == 1 and seen.left[0].proper and "not audited" in seen.left[0].reason


def test_the_audit_restores_the_mode_and_its_hooks():
    model = tiny.hf("gpt2").train()
    audit(model, survey(model))
    assert all(m.training for m in model.modules())
    assert not torch.nn.modules.module._global_forward_pre_hooks and not torch.nn.modules.module._global_forward_hooks


@pytest.mark.parametrize("name", tiny.HF)
def test_probe_batches_are_seeded(name):
    model = tiny.hf(name)
    first, second = probe_batch(model, seed=3), probe_batch(model, seed=3)
    assert all(torch.equal(first[k], second[k]) for k in first)
    other = probe_batch(model, seed=4)
    assert any(not torch.equal(first[k], other[k]) for k in first)


def test_a_soft_cap_is_left():
    class LogitSoftcap(nn.Module):
        def forward(self, x):
            return 30 * torch.tanh(x / 30)

    model = nn.Sequential(nn.Linear(4, 4), nn.GELU(), nn.Linear(4, 4), LogitSoftcap())
    sites, left = orthoact.inspect_model(model)
    assert [s.name for s in sites] == ["1"] and "3" in [i.where for i in left if "soft cap" in i.reason]
    assert [s.name for s in orthoact.find_sites(model, include=["3"])] == ["3"]
