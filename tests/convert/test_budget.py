"""Laws of budgets: a tolerance or a number of learnable numbers instead of a degree."""

from itertools import product

import pytest
import torch
from tiny_models import hf
from torch import nn

from orthoact import OrthoactError, convert_, plan
from orthoact.convert.budget import share
from orthoact.convert.calibrate import calibrate
from orthoact.interp import FAMILIES, Activation, fit, fit_to_tolerance, get_family, ladder


def net(width: int = 8) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(4, width), nn.GELU(), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width), nn.GELU()
    )


def data() -> list[dict]:
    return [{"input": 3 * torch.randn(64, 4, generator=torch.Generator().manual_seed(1))}]


# -- a tolerance -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["hermite", "fourier", "rational", "tropical-rational"])
def test_tolerance_takes_the_least_degree(family):
    chosen = fit_to_tolerance("gelu", 1e-2, family=family)
    assert chosen.objective**0.5 <= 1e-2
    lower = [f for f in ladder("gelu", family=family, most=chosen.parameters - 1) if f.objective**0.5 <= 1e-2]
    assert not lower, "a lower degree would have done"
    assert f"{chosen.parameters} numbers" in chosen.reason


@pytest.mark.parametrize("tolerance", [1e-2, 1e-3])
def test_auto_takes_the_fewest_numbers_of_all_families(tolerance):
    chosen = fit_to_tolerance("gelu", tolerance, family="auto")
    assert chosen.objective**0.5 <= tolerance
    for name in ("hermite", "fourier", "rational"):
        assert fit_to_tolerance("gelu", tolerance, family=name).parameters >= chosen.parameters


def test_a_missed_tolerance_is_reported():
    missed = fit_to_tolerance("mish", 1e-6)
    assert "misses the tolerance 1e-06" in missed.reason and missed.degree == get_family("hermite").degrees[-1]


def test_plan_shows_why():
    made = plan(net(), tolerance=1e-3)
    assert all("reach the tolerance 0.001" in row["reason"] for row in made.rows)


# -- a number of numbers -----------------------------------------------------------------------------------------------


def test_share_is_as_good_as_trying_everything():
    ladders = [ladder("gelu", most=9), ladder("silu", most=9), ladder("tanh", most=9)]
    weights, units = [1.0, 30.0, 0.02], [1, 2, 1]
    for total in (20, 25, 30, 36, 100):
        chosen = share(ladders, weights, units, total, "given")
        cost = sum(w * f.value_rms**2 for w, f in zip(weights, chosen, strict=True))
        assert sum(f.parameters * u for f, u in zip(chosen, units, strict=True)) <= total
        best = min(
            sum(w * f.value_rms**2 for w, f in zip(weights, choice, strict=True))
            for choice in product(*ladders)
            if sum(f.parameters * u for f, u in zip(choice, units, strict=True)) <= total
        )
        assert cost == pytest.approx(best, rel=1e-9)


def test_more_numbers_go_where_an_error_costs_more():
    model = net()
    laws = calibrate(model, plan(model).sites, data())
    laws["1"].squares *= 1e4  # as if the output hung on the first site
    made = plan(model, parameters=21, domains=laws)
    assert made.parameters <= 21
    sizes = {row["name"]: row["parameters"] for row in made.rows}
    assert sizes["1"] > max(sizes["3"], sizes["5"])
    assert all("of 21 numbers: sensitivity" in row["reason"] and "calibrated" in row["reason"] for row in made.rows)


def test_without_calibration_a_probe_batch_tells_the_sensitivity():
    model = hf("gpt2")
    made = plan(model, parameters=20)
    assert 0 < made.parameters <= 20 and all("on a probe batch" in row["reason"] for row in made.rows)
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("parameters", [1, 5])
def test_too_small_a_budget_names_the_least(parameters):
    with pytest.raises(OrthoactError, match=rf"--parameters {parameters}: the 3 sites need at least 9"):
        plan(net(), parameters=parameters)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"parameters": 20, "tolerance": 1e-2}, "give one of them"),
        ({"parameters": 0}, "positive whole number"),
        ({"tolerance": -1.0}, "positive number"),
        ({"family": "auto"}, "--tolerance or --parameters"),
        ({"family": "sine", "tolerance": 1e-2}, "unknown family"),
    ],
)
def test_bad_choices(options, words):
    with pytest.raises(OrthoactError, match=words):
        plan(net(), **options)


# -- groups ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("groups", [0, "per-channel"])
def test_per_channel_gives_each_channel_its_own_numbers(groups):
    model = hf("gpt2")
    conversion = convert_(model, groups=groups, degree=4)
    found = [m for m in model.modules() if isinstance(m, Activation)]
    width = model.transformer.h[0].mlp.c_fc.nf
    assert [m.groups for m in found] == [width] * len(found)
    assert conversion.plan.parameters == len(found) * width * 5 == sum(m.theta.numel() for m in found)
    x = torch.randn(2, 3, width)
    before = found[0](x)
    with torch.no_grad():
        found[0].theta[3] += 0.5
    changed = (found[0](x) != before).flatten(0, 1).any(dim=0)
    assert changed[3] and changed.sum() == 1, "one channel's numbers move one channel"


def test_budget_counts_every_group():
    made = plan(hf("gpt2"), parameters=100, groups=4)
    assert made.parameters <= 100 and all(row["parameters"] % 4 == 0 for row in made.rows)


@pytest.mark.parametrize(
    ("groups", "words"), [(7, "divisor of the"), (-2, "positive whole number"), ("each", "per-channel")]
)
def test_bad_groups(groups, words):
    with pytest.raises(OrthoactError, match=words):
        plan(hf("gpt2"), groups=groups)


def test_groups_need_to_know_the_channels():
    with pytest.raises(OrthoactError, match="channel axis of 0 is not known"):
        plan(nn.Sequential(nn.GELU()), groups=2)


def test_of_as_many_numbers_the_best_are_taken():
    found = fit_to_tolerance("tanh", 3e-3, family="auto")
    others = [f for f in FAMILIES.values() if f.name != "tropical"]  # which is convex
    alike = [fit("tanh", family=f.name, degree=n) for f in others for n in f.degrees if f.size(n) == 10]
    assert found.parameters == 10 and found.objective == min(f.objective for f in alike)
