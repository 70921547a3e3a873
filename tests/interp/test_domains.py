"""Laws: their nodes have their moments, a measured one is the same in pieces, and a record of each is small."""

import json

import numpy as np
import pytest
import torch

from orthoact.interp import Gaussian, Measured, OrthoactError, Uniform, fit, get_target
from orthoact.interp.domains import BINS, law_from_dict


def measured(*parts: torch.Tensor, gradient=None) -> Measured:
    law = Measured()
    for part in parts:
        bins = law.add(part)
        if gradient is not None:
            law.weigh(bins, gradient(part))
    return law


def normal(count=20_000, mean=0.0, std=1.0) -> torch.Tensor:
    return mean + std * torch.randn(count, dtype=torch.float64)


@pytest.mark.parametrize(
    "law",
    [Gaussian(0.5, 2.0, 0.0), Uniform(-3, 1), measured(normal(), normal(3000, 0.5, 3.0))],
    ids=["gaussian", "uniform", "measured"],
)
def test_nodes_have_the_moments_of_the_law(law):
    x, w = law.nodes()
    assert w.sum() == pytest.approx(1) and (w >= 0).all()
    assert np.ptp(np.diff(x)) < 1e-9
    assert w @ x == pytest.approx(law.mean, abs=0.01 * law.std)
    assert (w @ (x - law.mean) ** 2) ** 0.5 == pytest.approx(law.std, rel=0.01)  # a measured one is smoothed


@pytest.mark.parametrize("std", [1e-3, 0.3, 100.0])
@pytest.mark.parametrize("mean", [0.0, -0.7])
def test_a_measured_law_resolves_every_scale(mean, std):
    x = normal(mean=mean * std, std=std)
    law = measured(x)
    assert law.mean == pytest.approx(float(x.mean())) and law.std == pytest.approx(float(x.std(correction=0)))
    nodes, w = law.nodes()
    exact = Gaussian(law.mean, law.std, 0.0)
    reference = np.interp(nodes, *exact.nodes())
    assert np.abs(np.cumsum(w) - np.cumsum(reference / reference.sum())).max() < 0.02
    assert np.abs(nodes / (nodes[1] - nodes[0]) % 1 - 0.5).max() < 1e-6  # zero, where kinks are, ends a cell


def test_pieces_are_as_good_as_all_at_once():
    x = normal(5000, 3.0, 0.5)
    whole, pieces = measured(x, gradient=torch.sin), measured(*x.split(700), gradient=torch.sin)
    np.testing.assert_array_equal(whole.counts, pieces.counts)
    np.testing.assert_allclose(whole.squares, pieces.squares)
    assert (whole.mean, whole.std, whole.count) == pytest.approx((pieces.mean, pieces.std, pieces.count), rel=1e-12)


def test_memory_does_not_grow():
    law = measured(*normal(200_000).split(10_000), gradient=torch.cos)
    sizes = {k: v.size for k, v in vars(law).items() if isinstance(v, np.ndarray)}
    assert sizes == {"counts": BINS + 2, "squares": BINS + 2} and len(vars(law)) == 6


def test_outliers_are_counted():
    law = measured(torch.cat([normal(998), torch.tensor([5e6, -2e6])]))
    record = law.to_dict()
    assert record["below"] == record["above"] == 1e-3 and record["count"] == 1000
    assert law.counts.sum() == 1000
    assert law.share_outside(-1500, 1500) == pytest.approx(0.002)
    assert law.nodes()[1].sum() == pytest.approx(1.0)
    assert measured(normal()).share_outside(-1, 1) == pytest.approx(0.317, abs=0.01)


def test_weights_follow_the_squared_gradients():
    x, w = measured(normal(), gradient=lambda x: (x > 0).double()).nodes()
    assert w[x > 0.2].sum() > 0.75 and 0 < w[x < -0.2].sum() < 0.1
    x, plain = measured(normal()).nodes()
    constant = measured(normal(), gradient=torch.ones_like)
    assert np.abs(constant.nodes()[1].sum() - plain.sum()) < 1e-12
    constant.rows = 1000
    assert constant.sensitivity == 20.0


def test_a_fit_under_a_measured_law_is_that_under_the_law_it_was_drawn_from():
    law, exact = measured(normal(400_000)), Gaussian(tail=0.0)
    copies = [fit("gelu", degree=8, domain=domain) for domain in (law, exact)]
    for copy in copies:
        x, w = exact.nodes()
        error = copy(x)[0] - torch.nn.functional.gelu(torch.from_numpy(x)).numpy()
        assert (w @ error**2) ** 0.5 == pytest.approx(copies[1].value_rms, rel=0.05)
    assert fit("gelu", degree=8, domain=law).coefficients == copies[0].coefficients


@pytest.mark.parametrize("target", ["gelu", "silu", "relu", "relu6", "relu2"])
@pytest.mark.parametrize("tails", ["linear", "none"])
@pytest.mark.parametrize("law", [Uniform(-4, 4), measured(normal(3000, -1.0, 0.5))], ids=["uniform", "measured"])
def test_every_law_can_be_fitted_under(target, tails, law):
    copy = fit(target, degree=8, domain=law, tails=tails)
    x, w = law.nodes()
    assert (w @ (copy(x)[0] - get_target(target)(x)[0]) ** 2) ** 0.5 < 0.06
    assert json.loads(json.dumps(copy.to_dict()))["domain"]["kind"] == law.kind


@pytest.mark.parametrize("law", [Gaussian(-0.5, 2.0, 0.2), Uniform(0, 1), measured(normal(1000))], ids=lambda v: v.kind)
def test_records_are_small_and_are_read_back(law):
    record = json.dumps(law.to_dict())
    assert len(record) < 200
    again = law_from_dict(json.loads(record))
    assert again == (law if law.kind != "measured" else Gaussian(law.mean, law.std))
    assert (again.mean, again.std) == (law.mean, law.std)


def test_a_record_of_before_is_a_gaussian():
    assert law_from_dict({"mean": 0.0, "std": 1.0, "tail": 0.1}) == Gaussian()


def test_the_narrow_law():
    assert Gaussian(1.0, 2.0).narrow() == Gaussian(1.0, 2.0, tail=0.0)
    assert Uniform().narrow() == Uniform()


def test_the_histogram_of_a_report_is_compact():
    shown = measured(normal(), gradient=torch.cos).histogram()
    assert len(shown["density"]) == len(shown["sensitivity"]) == 64 and len(json.dumps(shown)) < 2000
    assert sum(shown["density"]) == pytest.approx(1, abs=0.02) and shown["low"] < -3 < 3 < shown["high"]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_inputs_that_are_not_finite(bad):
    with pytest.raises(OrthoactError, match="expected finite inputs, got NaN or infinity"):
        measured(torch.tensor([1.0, bad]))


@pytest.mark.parametrize("ask", ["mean", "std"])
def test_nothing_seen(ask):
    with pytest.raises(OrthoactError, match="it has seen none"):
        getattr(Measured(), ask)


@pytest.mark.parametrize("value", [0.0, -3.7])
def test_inputs_that_do_not_vary(value):
    with pytest.raises(OrthoactError, match=r"expected inputs that vary, all 50 are"):
        fit("gelu", domain=measured(torch.full((50,), value)))


def test_inputs_beyond_the_histogram():
    with pytest.raises(OrthoactError, match=r"100 % of 100 inputs are beyond 1e\+06; exclude"):
        measured(5e6 + 100 * normal(100)).nodes()
    with pytest.raises(OrthoactError, match=r"a measured law: 2 % of 100 inputs are beyond"):
        measured(torch.cat([normal(98), torch.tensor([5e6, -2e6])])).nodes()


def test_large_inputs_are_no_outliers():
    """They count in every figure: nothing beyond 1,000 is dropped."""
    law = measured(torch.cat([normal(600), 3000 * normal(400).abs()]))
    copy = fit("relu2", degree=8, domain=law)
    x = torch.linspace(0, 9000, 20001, dtype=torch.float64).numpy()
    x_law, w = law.nodes()
    assert x_law[-1] > 9000 and w[x_law > 1000].sum() > 0.2
    error = (copy(x)[0] - get_target("relu2")(x)[0]) ** 2
    assert copy.value_rms > 0.1 * np.sqrt(error.mean())


@pytest.mark.parametrize(("low", "high"), [(1, 1), (2, -2), (0, float("inf")), (float("nan"), 1)])
def test_bad_ranges(low, high):
    with pytest.raises(OrthoactError, match="two finite numbers in order"):
        Uniform(low, high)


def test_an_unknown_kind():
    with pytest.raises(OrthoactError, match="'cauchy': expected one of gaussian, uniform, measured"):
        law_from_dict({"kind": "cauchy"})
