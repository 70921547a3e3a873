"""The escape monitor counts what it should, stays out of the way, and names where a loss was lost."""

import warnings

import tiny_models as tiny
import torch
from pytest import approx, mark
from torch import nn

from orthoact import Activation, convert_, original
from orthoact.convert.audit import probe_batch
from orthoact.finetune.monitor import SAMPLE, Monitor, core


def net(**options):
    model = nn.Sequential(nn.GELU(), nn.Linear(4, 4, bias=False), nn.SiLU())
    nn.init.eye_(model[1].weight)
    convert_(model, **{"degree": 4, **options})
    return model


def test_shares_and_ranges():
    model = net()
    lo, hi = float(model[0].lo), float(model[0].hi)
    x = torch.tensor([[lo - 1, lo + 0.01, 0.0, hi + 2]])
    with Monitor(model) as monitor:
        model(x)
        model(torch.zeros(3, 4))
        seen = monitor.step()
        assert seen["0"] == {"outside": approx(2 / 16), "least": approx(lo - 1), "greatest": approx(hi + 2)}
        assert set(seen) == {"0", "2"}
        assert monitor.step() == {}
        with original(model):
            model(x)
        assert monitor.step() == {}
    model(x)
    assert monitor.step() == {}


def test_the_sample_sees_all_channels_of_a_large_input():
    model = nn.Sequential(nn.GELU())
    convert_(model, degree=4)
    x = torch.zeros(64, SAMPLE)
    x[:, SAMPLE // 3 : SAMPLE // 2] = 50.0
    with Monitor(model) as monitor:
        model(x)
        assert monitor.step()["0"]["outside"] == approx(1 / 6, rel=0.05)


@mark.parametrize("tails", ["linear", "none"])
def test_the_penalty_draws_inputs_back(tails):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 32), nn.GELU())
    convert_(model, degree=4, tails=tails)
    middle, half = core(model[1])
    with torch.no_grad():
        model[0].weight *= 20
    x = torch.randn(64, 4)
    optimiser = torch.optim.SGD(model[0].parameters(), lr=3.0)
    with Monitor(model, penalise=True) as monitor:
        shares = []
        for _ in range(100):
            model(x)
            at = model[0](x)
            loss = monitor.penalty()
            assert loss.item() == approx((((at - middle).abs() / half - 1).relu() ** 2).mean().item(), rel=1e-4)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            shares.append(monitor.step()["1"]["outside"])
        assert shares[0] > 0.3 and shares[-1] < 0.7 * shares[0]
        assert monitor.penalty() is None
    with Monitor(model) as monitor:
        model(x)
        assert monitor.penalty() is None


def test_the_penalty_under_gradient_checkpointing():
    gradients = []
    for checkpointing in (False, True):
        model = tiny.hf("gpt2").train()
        model.config.use_cache = False
        convert_(model, degree=4)
        if checkpointing:
            with warnings.catch_warnings():  # the name changes in transformers 6
                warnings.simplefilter("ignore", FutureWarning)
                model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        for m in model.modules():
            if isinstance(m, nn.Dropout):
                m.p = 0.0
        with torch.no_grad():
            for m in model.modules():
                if isinstance(m, Activation):
                    m.lo.fill_(-0.1)
        with Monitor(model, penalise=True) as monitor:
            for _ in range(2):
                model.zero_grad()
                model(**probe_batch(model))
                loss = monitor.penalty()
                loss.backward()
            seen = monitor.step()
        gradients.append((loss.item(), model.transformer.h[0].mlp.c_fc.weight.grad.clone(), seen))
    assert gradients[0][0] == approx(gradients[1][0]) and gradients[0][0] > 0
    assert torch.allclose(gradients[0][1], gradients[1][1], atol=1e-6) and gradients[0][1].abs().max() > 0
    assert gradients[0][2] == gradients[1][2]


def test_the_first_broken_site_is_named():
    model = net()
    with Monitor(model) as monitor:
        model(torch.zeros(2, 4))
        assert monitor.broken() is None
        with torch.no_grad():
            model[1].weight[0, 0] = float("inf")
        model(torch.ones(2, 4))
        assert monitor.broken() == "2"
        model[0](torch.tensor([[0.0, float("nan")]]))
        model[2](torch.ones(1, 2))
        assert monitor.broken() == "0"


def test_it_changes_nothing():
    model = net()
    x = torch.randn(8, 4)
    before = model(x)
    with Monitor(model, penalise=True):
        assert torch.equal(model(x), before)
    assert not any(m._forward_pre_hooks for m in model.modules())
