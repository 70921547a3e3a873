"""The polynomial view: explicit maps against the network's own output, and what is refused."""

from itertools import pairwise
from math import comb

import numpy as np
import pytest
import torch
from torch import nn

import orthoact
from orthoact.convert.polynomial import HermiteMap, MaxPlus, TropicalMap, polynomial
from orthoact.interp import Activation, OrthoactError, fit


def mlp(family, degree, *widths, groups=None):
    layers = []
    for i, (a, b) in enumerate(pairwise(widths)):
        layers.append(nn.Linear(a, b))
        if i < len(widths) - 2:
            act = Activation.variance_preserving(family, degree, groups=groups)
            nn.init.normal_(act.theta, std=0.05)
            layers.append(act)
    return nn.Sequential(*layers)


# -- Hermite -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("degree", "widths", "bound"),
    [(2, (1, 3, 1), 2), (3, (2, 4, 2), 3), (3, (2, 4, 4, 1), 9), (4, (3, 5, 2), 4), (2, (2, 3, 3, 3, 1), 8)],
)
def test_a_hermite_network_is_a_polynomial(degree, widths, bound):
    view = polynomial(mlp("hermite", degree, *widths))
    assert isinstance(view, HermiteMap) and view.degree == bound
    assert (view.inputs, view.outputs) == (widths[0], widths[-1])
    assert view.monomials == comb(widths[0] + bound, bound)
    assert len(view.polynomials) == widths[-1]
    for p in view.polynomials:
        assert p.total_degree() == bound and len(p.terms()) <= view.monomials
    assert view.difference(2 * torch.randn(200, widths[0])) < 1e-12


def test_the_coefficients_by_hand():
    """h_2 = (z^2 - 1) / sqrt(2) of z = 3 x0 - x1, twice."""
    net = nn.Sequential(nn.Linear(2, 1), Activation("hermite", 2, tails="none"), nn.Linear(1, 1, bias=False))
    with torch.no_grad():
        net[0].weight.copy_(torch.tensor([[3.0, -1.0]]))
        net[0].bias.zero_()
        net[1].start.copy_(torch.tensor([0.0, 0.0, 1.0]))
        net[2].weight.fill_(2.0)
    (p,) = polynomial(net).polynomials
    root = 2 / 2**0.5
    wanted = {(2, 0): 9 * root, (1, 1): -6 * root, (0, 2): root, (0, 0): -root}
    assert {k: float(v) for k, v in p.terms()} == pytest.approx(wanted)
    assert abs(p.coeff_monomial("x0**2") ** 2 - 162) < 1e-45, "fifty digits"


def test_a_converted_network():
    net = nn.Sequential(nn.Flatten(), nn.Linear(4, 6), nn.GELU(), nn.Dropout(0.5), nn.Linear(6, 2))
    orthoact.convert_(net, degree=4, tails="none")
    view = polynomial(net)
    x = torch.randn(50, 2, 2)
    assert view.degree == 4 and view.difference(x) < 1e-9
    assert torch.allclose(view(x).float(), net.eval()(x), atol=1e-4)


def test_nested_groups_and_half():
    net = nn.Sequential(mlp("hermite", 3, 2, 4, 4, groups=2), nn.Identity(), nn.Linear(4, 1)).half()
    assert polynomial(net).difference(torch.randn(20, 2)) < 1e-12


def test_the_bound_comes_without_the_expansion():
    view = polynomial(mlp("hermite", 8, 20, 16, 16, 4))
    assert view.degree == 64 and view.monomials == comb(84, 20)
    with pytest.raises(OrthoactError, match=r"degree up to 64 in 20 inputs.*at most 1,000"):
        view(torch.randn(2, 20))
    small = mlp("hermite", 3, 2, 3, 1)
    with pytest.raises(OrthoactError, match="up to 10 monomials: expected at most 9"):
        _ = polynomial(small, limit=9).polynomials
    assert len(polynomial(small, limit=10).polynomials) == 1


# -- tropical ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "degree", "widths"),
    [
        ("tropical", 1, (2, 5, 1)),
        ("tropical", 3, (2, 5, 2)),
        ("tropical", 2, (2, 4, 4, 1)),
        ("tropical", 2, (1, 6, 6, 6, 1)),
        ("tropical-rational", 3, (2, 4, 2)),
        ("tropical-rational", 2, (3, 4, 1)),
        ("tropical-rational", 2, (2, 3, 3, 1)),
        ("tropical-rational", 2, (20, 2, 3, 1)),
    ],
)
def test_a_tropical_network_is_a_difference_of_maxima(family, degree, widths):
    view = polynomial(mlp(family, degree, *widths))
    assert isinstance(view, TropicalMap)
    assert view.degree == degree ** (len(widths) - 2)
    assert view.difference(3 * torch.randn(500, widths[0])) < 1e-12
    for p, q in view.pairs:
        assert p.shape[1] == q.shape[1] == widths[0] + 1


@pytest.mark.parametrize("target", ["relu", "relu6", "leaky_relu"])
def test_a_converted_relu_network(target):
    net = nn.Sequential(nn.Linear(2, 4), {"relu": nn.ReLU, "relu6": nn.ReLU6, "leaky_relu": nn.LeakyReLU}[target]())
    net.append(nn.Linear(4, 1))
    original = net[1]
    net[1] = Activation.from_fit(fit(target, family="tropical-rational", degree=3, tails="none"))
    view = polynomial(net)
    x = torch.randn(300, 2)
    assert view.difference(x) < 1e-9
    wanted = net[2](original(net[0](x)))
    assert torch.allclose(view(x).float(), wanted, atol=1e-5)


def test_relu_by_hand():
    """2 max(x0, 0) - 3 max(-x0, 0): one kink in P, one in Q."""
    net = nn.Sequential(nn.Linear(1, 2, bias=False), Activation("tropical", 1, tails="none"), nn.Linear(2, 1))
    with torch.no_grad():
        net[0].weight.copy_(torch.tensor([[1.0], [-1.0]]))
        net[1].start.copy_(torch.tensor([0.0, 0.0, 0.0, 1.0]))
        net[2].weight.copy_(torch.tensor([[2.0, -3.0]]))
        net[2].bias.fill_(0.5)
    ((p, q),) = polynomial(net).pairs
    assert sorted(map(tuple, p.tolist())) == [(0.0, 0.5), (2.0, 0.5)]
    assert sorted(map(tuple, q.tolist())) == [(-3.0, 0.0), (0.0, 0.0)]


def test_pruning_keeps_the_function():
    rng = np.random.default_rng(0)
    x = np.column_stack([10 * rng.normal(size=(5000, 2)), np.ones(5000)])
    pieces = rng.normal(size=(400, 3))
    pieces = np.concatenate([pieces, pieces])
    kept = MaxPlus(1000, "test").prune(pieces)
    np.testing.assert_allclose((x @ kept.T).max(axis=1), (x @ pieces.T).max(axis=1), rtol=0, atol=1e-12)
    assert len(kept) < 100, "pieces that are nowhere the largest go"
    line = np.column_stack([rng.normal(size=(50, 1)) * [1.0, 2.0], rng.normal(size=50)])  # slopes in one direction
    kept = MaxPlus(1000, "test").prune(line)
    np.testing.assert_allclose((x @ kept.T).max(axis=1), (x @ line.T).max(axis=1), rtol=0, atol=1e-12)
    assert len(kept) < 20


@pytest.mark.parametrize("scale", [None, 0.0, 1e-13, 1e-9])
@pytest.mark.parametrize("widths", [(3, 4, 4, 2), (2, 4, 3, 1), (1, 5, 3, 1)])
@pytest.mark.parametrize("family", ["tropical", "tropical-rational"])
def test_without_biases_all_pieces_lie_in_one_plane(family, widths, scale):
    layers = []
    for a, b in pairwise(widths):
        layers += [nn.Linear(a, b, bias=scale is not None), nn.ReLU()]
        if scale is not None:
            nn.init.normal_(layers[-2].bias, std=scale)
    net = nn.Sequential(*layers[:-1])
    orthoact.convert_(net, family=family, degree=1, tails="none")
    view = polynomial(net)
    assert view.difference(10 * torch.randn(1000, widths[0])) < 1e-12
    assert isinstance(view, TropicalMap) and max(map(sum, view.pieces)) < 100


def test_the_map_is_that_of_the_moment():
    net = mlp("hermite", 2, 2, 3, 1)
    view, x = polynomial(net), torch.randn(50, 2)
    before = net.double()(x.double()).detach()
    net[0].weight.data.mul_(2)  # as training goes on
    assert view.difference(x) < 1e-9 and torch.allclose(view(x), before)


@pytest.mark.parametrize("x", [torch.zeros(0, 2), torch.zeros(3), torch.zeros(3, 3), torch.zeros(4, 2, 2)])
@pytest.mark.parametrize("family", ["hermite", "tropical"])
def test_points_of_another_shape(family, x):
    view = polynomial(mlp(family, 2, 2, 3, 1))
    for ask in (view, view.difference):
        with pytest.raises(OrthoactError, match=r"points of shape .*expected \(batch, 2\)"):
            ask(x)


def test_too_many_pieces():
    with pytest.raises(OrthoactError, match=r"layer \d \(Linear\): a max-plus polynomial of [\d,]+ pieces.*at most 50"):
        polynomial(mlp("tropical", 3, 2, 8, 8, 1), limit=50)


# -- what is refused ---------------------------------------------------------------------------------------------------


def with_activation(act):
    return nn.Sequential(nn.Linear(2, 4), act, nn.Linear(4, 1))


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (lambda: with_activation(Activation.from_fit(fit("gelu"))), "1 has tails linear.*--tails none"),
        (lambda: mlp("fourier", 2, 2, 4, 1), "1 is fourier, which is no polynomial.*hermite, tropical"),
        (lambda: mlp("rational", 2, 2, 4, 1), "1 is rational, which is no polynomial"),
        (lambda: with_activation(nn.GELU()), "1 is a GELU: expected an nn.Sequential of Linear"),
        (lambda: nn.Sequential(mlp("hermite", 2, 2, 4, 4), nn.LayerNorm(4)), "1 is a LayerNorm"),
        (lambda: nn.Bilinear(2, 2, 1), "the model is a Bilinear"),
        (lambda: nn.Sequential(nn.Identity()), "no Linear layer"),
        (lambda: nn.Sequential(nn.Linear(2, 3), nn.Linear(4, 1)), "1 takes 4 inputs: expected 3"),
        (
            lambda: nn.Sequential(mlp("hermite", 2, 2, 4, 4), mlp("tropical", 2, 4, 4, 1)),
            "mixes hermite and tropical",
        ),
        (
            lambda: with_activation(Activation.variance_preserving("hermite", 2, groups=3)),
            "groups 3.*divisor of 4 channels",
        ),
    ],
)
def test_what_is_no_polynomial(model, message):
    with pytest.raises(OrthoactError, match=message):
        _ = polynomial(model()).polynomials  # pyright: ignore[reportAttributeAccessIssue]


def test_a_network_that_runs_its_originals():
    net = with_activation(nn.GELU())
    orthoact.convert_(net, degree=4, tails="none")
    with orthoact.original(net), pytest.raises(OrthoactError, match="runs its original"):
        polynomial(net)


def test_linear_layers_alone():
    view = polynomial(nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 1)))
    assert view.degree == 1 and view.difference(torch.randn(5, 3)) < 1e-12
