"""Variance-preserving starts: their moments by other means, what fifty layers do to them, and that they learn."""

from math import e, erf, exp, factorial, pi, sqrt

import numpy as np
import pytest
import torch
from scipy.integrate import quad
from torch import nn

from orthoact.interp import (
    FAMILIES,
    Activation,
    Gaussian,
    Moments,
    OrthoactError,
    fit,
    get_target,
    moments,
    variance_preserving,
)
from orthoact.interp.variance import balance

NAMES = ("mean", "square", "slope_square", "chi")


def cases():
    for name, family in FAMILIES.items():
        for degree in sorted({family.degrees[0], 3, 8, family.degrees[-1]} & set(family.degrees)):
            yield pytest.param(family, degree, id=f"{name}-{degree}")


each = pytest.mark.parametrize(("family", "degree"), list(cases()))
every = pytest.mark.parametrize("family", FAMILIES.values(), ids=list(FAMILIES))


def by_trapezoids(family, numbers, q=1.0):
    """E[F^2], E[F'^2] and E[F(sqrt(q) x)^2] by a fine trapezoid rule."""
    z = np.linspace(-16, 16, 200_001)
    w = np.exp(-(z**2) / 2) / sqrt(2 * pi) * (z[1] - z[0])
    return w @ family.evaluate(numbers, sqrt(q) * z) ** 2, w @ family.slope(numbers, z) ** 2


# -- moments -----------------------------------------------------------------------------------------------------------


@each
def test_both_second_moments_are_one(family, degree):
    numbers = family.variance_preserving(degree)
    assert len(numbers) == family.size(degree) and np.isfinite(numbers).all()
    found = family.moments(numbers)
    assert found.square == pytest.approx(1, abs=1e-12) and found.slope_square == pytest.approx(1, abs=1e-12)
    assert found.forward == pytest.approx(1, abs=1e-12) and found.backward == pytest.approx(1, abs=1e-12)


@each
def test_by_another_quadrature(family, degree):
    numbers = family.variance_preserving(degree)
    square, slope_square = by_trapezoids(family, numbers)
    # the step is 1.6e-4: at a kink F^2 is off by its square, at a jump F'^2 by half of it
    straight = "tropical" in family.name
    assert square == pytest.approx(1, abs=1e-7 if straight else 1e-8)
    assert slope_square == pytest.approx(1, abs=1e-3 if straight else 1e-8)


@each
def test_chi_is_the_slope_of_the_variance_map(family, degree):
    numbers, h = family.variance_preserving(degree), 1e-3
    ahead, behind = (by_trapezoids(family, numbers, 1 + side * h)[0] for side in (1, -1))
    assert family.moments(numbers).chi == pytest.approx((ahead - behind) / (2 * h), abs=2e-5)


@each
def test_closed_forms_are_the_quadrature(family, degree):
    rng = np.random.default_rng(degree)
    for numbers in (family.variance_preserving(degree), list(0.5 * rng.normal(size=family.size(degree)))):
        ours, theirs = family.moments(numbers), moments(family.curve(numbers))
        for name in NAMES:
            assert getattr(ours, name) == pytest.approx(getattr(theirs, name), rel=1e-10, abs=1e-10), name


@pytest.mark.parametrize("degree", [1, 3, 8])
def test_piecewise_straight_moments_are_truncated_gaussian_ones(degree):
    """Each piece s z + t on (a, b) has its moments from Phi and phi."""
    family = FAMILIES["tropical"]
    numbers = family.variance_preserving(degree)
    t, s = np.array(numbers[: degree + 1]), np.array(numbers[degree + 1 :])
    edges = np.r_[-40, -np.diff(t) / np.diff(s), 40]
    phi = [exp(-(a**2) / 2) / sqrt(2 * pi) for a in edges]
    cdf = [(1 + erf(a / sqrt(2))) / 2 for a in edges]
    m0, m1 = np.diff(cdf), -np.diff(phi)
    m2 = m0 - np.diff(edges * np.array(phi))
    found = family.moments(numbers)
    assert found.mean == pytest.approx(s @ m1 + t @ m0, abs=1e-12)
    assert found.square == pytest.approx(s**2 @ m2 + 2 * s * t @ m1 + t**2 @ m0, abs=1e-12)
    assert found.slope_square == pytest.approx(s**2 @ m0, abs=1e-12)
    value = s[1:] * edges[1:-1] + t[1:]
    assert found.chi == pytest.approx(found.slope_square + (np.diff(s) * value) @ phi[1:-1], abs=1e-12)


def test_known_moments():
    relu, gelu = moments(get_target("relu")), moments(get_target("gelu"))
    assert [getattr(relu, n) for n in NAMES] == pytest.approx([1 / sqrt(2 * pi), 0.5, 0.5, 0.5], abs=1e-13)
    assert [gelu.mean, gelu.square, gelu.slope_square] == pytest.approx([0.5 / sqrt(pi), 0.4252, 0.4559], abs=1e-4)
    assert relu.forward == pytest.approx(2) and relu.backward == pytest.approx(2)


def test_moments_under_other_laws():
    law = Gaussian(0.3, 1.7, tail=0.2)
    found = moments(get_target("silu"), law)

    def density(x):
        parts = ((0.8, 1.7), (0.2, 3.4))
        return sum(p * exp(-(((x - 0.3) / s) ** 2) / 2) / (s * sqrt(2 * pi)) for p, s in parts)

    def at(x):
        value, slope = get_target("silu")(np.array([x]))
        return float(value[0]), float(slope[0])

    wanted = [quad(lambda x: at(x)[0] ** 2 * density(x), -40, 40, limit=400, epsabs=1e-10)[0]]
    wanted += [quad(lambda x: at(x)[1] ** 2 * density(x), -40, 40, limit=400, epsabs=1e-10)[0]]
    assert [found.square, found.slope_square] == pytest.approx(wanted, abs=1e-8)
    assert found.variance == pytest.approx(0.8 * 1.7**2 + 0.2 * 3.4**2)
    assert found.forward == pytest.approx(found.variance / found.square)

    class Flat:  # any law with nodes
        mean = 0.0

        def nodes(self):
            return pi * (2 * (np.arange(512) + 0.5) / 512 - 1), np.full(512, 1 / 512)

    found = moments(FAMILIES["fourier"].curve([0.0, 1.0, 1.0, 1.0]), Flat())  # cos x + sin x
    assert (found.square, found.slope_square) == pytest.approx((1, 1), abs=1e-13)
    assert found.variance == pytest.approx(pi**2 / 3, rel=1e-4)


@every
def test_monte_carlo(family):
    act = Activation.variance_preserving(family.name, 3)
    x = torch.randn(200_000, generator=torch.Generator().manual_seed(1))
    assert float((act(x).detach().double() ** 2).mean()) == pytest.approx(1, abs=0.01)
    _, slopes = act.curve(x.double().numpy())
    assert (slopes**2).mean() == pytest.approx(1, abs=0.01)
    assert moments(act.curve).square == pytest.approx(1, abs=1e-6), "float32 coefficients"


# -- the starts --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("degree", range(1, 25))
def test_hermite_has_the_magnitudes_of_the_paper(degree):
    c = 1 / sqrt(sum(1 / factorial(k) for k in range(degree)))
    wanted = [c * sqrt(1 - 1 / factorial(degree)), *(c / sqrt(factorial(k)) for k in range(1, degree + 1))]
    numbers = FAMILIES["hermite"].variance_preserving(degree)
    np.testing.assert_allclose(np.abs(numbers), wanted, atol=1e-7 if degree == 1 else 1e-13)
    assert [v > 0 for v in numbers[1:]] == [k % 4 in (0, 1) for k in range(1, degree + 1)]


def test_hermite_tends_to_a_sum_of_waves():
    z = np.linspace(-3, 3, 31)
    value = FAMILIES["hermite"].evaluate(FAMILIES["hermite"].variance_preserving(24), z)
    np.testing.assert_allclose(value, np.cos(z) + np.sin(z), atol=1e-6)


def paper(degree):
    """The paper's own Hermite start, all signs +."""
    a = [sqrt(1 - 1 / factorial(degree)), *[1.0] * degree]
    return [v / sqrt(e * factorial(k)) for k, v in enumerate(a)]


@pytest.mark.parametrize(("degree", "square", "chi"), [(2, 0.7358, 1.3536), (3, 0.9197, 1.7651), (5, 0.9963, 1.9831)])
def test_the_moments_of_the_paper_s_own_start(degree, square, chi):
    found = FAMILIES["hermite"].moments(paper(degree))
    assert found.square == pytest.approx(found.slope_square, abs=1e-14) and found.square == pytest.approx(
        square, abs=1e-4
    )
    assert found.square == pytest.approx(sum(1 / factorial(k) for k in range(degree)) / e, abs=1e-14)
    assert found.chi / found.square == pytest.approx(chi, abs=1e-4)


@each
def test_every_piece_is_alive(family, degree):
    """No learnable number is without a gradient on a batch from N(0, 1)."""
    numbers = family.variance_preserving(degree)
    x = np.random.default_rng(0).normal(size=4096)
    values, _ = family.jacobian(numbers, x)
    assert min(np.abs(np.broadcast_to(v, x.shape)).max() for v in values) > 0


@each
def test_starts_are_deterministic(family, degree):
    assert family.variance_preserving(degree) == family.variance_preserving(degree)


def test_too_few_numbers_are_an_error():
    class Constant(type(FAMILIES["hermite"])):
        def variance_preserving(self, degree):
            return balance(self, [1.0, *[0.0] * degree], slice(1), slice(None))

    with pytest.raises(OrthoactError, match="take another degree"):
        Constant().variance_preserving(2)


@pytest.mark.parametrize(
    ("options", "message"),
    [(("hermite", 25), "--degree 25.*1 to 24"), (("rational", 1), "2 to 12"), (("relu", 2), "unknown family 'relu'")],
)
def test_wrong_options(options, message):
    for start in (variance_preserving, Activation.variance_preserving):
        with pytest.raises(OrthoactError, match=message):
            start(*options)


def test_the_activation():
    act = Activation.variance_preserving("tropical-rational", 4, groups=2, channel=1)
    assert act.tails == "none" and act.groups == 2 and act.theta.shape == (2, 10)
    assert act(torch.randn(3, 4, 5)).shape == (3, 4, 5)
    with pytest.raises(OrthoactError, match=r"groups 2.*without groups"):
        act.curve(np.zeros(3))
    again = Activation("tropical-rational", 4, tails="none", groups=2, channel=1)
    again.load_state_dict(act.state_dict())
    x = torch.randn(3, 4, 5)
    assert torch.equal(again(x), act(x))
    start = variance_preserving("tropical-rational", 4)
    assert start.coefficients == tuple(FAMILIES["tropical-rational"].variance_preserving(4))
    assert isinstance(start.to_dict()["coefficients"], tuple | list) and fit("gelu").tails == "linear"
    assert isinstance(moments(start), Moments) and moments(start).square == pytest.approx(1, abs=1e-12)


# -- depth -------------------------------------------------------------------------------------------------------------


def descend(family, numbers, seed=0, normed=False, gain=1.0, depth=50, width=256, batch=32):
    """Mean squares of each layer's inputs, and of the gradient at the bottom over that at the top."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, width, generator=generator, requires_grad=True)
    h, squares = x, []
    for _ in range(depth):
        weight = torch.randn(width, width, generator=generator) * sqrt(gain / width)
        h = family.evaluate(numbers, nn.functional.layer_norm(h, (width,)) if normed else h) @ weight
        squares.append(float((h.detach().double() ** 2).mean()))
    end = torch.randn(batch, width, generator=generator)
    (gradient,) = torch.autograd.grad((h * end).sum(), x)
    return np.array(squares), float((gradient.double() ** 2).mean() / (end.double() ** 2).mean())


@every
@pytest.mark.parametrize("normed", [False, True], ids=["plain", "layernorm"])
def test_fifty_layers_hold(family, normed):
    runs = [descend(family, family.variance_preserving(3), seed, normed) for seed in range(3)]
    squares = np.median([run[0] for run in runs], axis=0)
    assert 0.5 < squares.min() and squares.max() < 2, "activations"
    assert 0.1 < np.median([run[1] for run in runs]) < 10, "gradients"


@pytest.mark.parametrize(("degree", "layer"), [(2, 30), (3, 15), (5, 10)])
def test_the_paper_s_signs_do_not(degree, layer):
    """Even with weights that correct the gain: chi / E[F^2] is above one."""
    family, numbers = FAMILIES["hermite"], paper(degree)
    for seed in range(3):
        squares, _ = descend(family, numbers, seed, gain=family.moments(numbers).forward)
        assert not squares[layer - 1] < 1e6
    squares, _ = descend(family, numbers, normed=True, gain=family.moments(numbers).forward)
    assert 0.5 < squares.min() and squares.max() < 2, "LayerNorm saves them"


# -- learning ----------------------------------------------------------------------------------------------------------


@every
@pytest.mark.parametrize("groups", [None, 4])
def test_training_from_scratch(family, groups):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(512, 4, generator=generator)
    y = (x[:, :1] * x[:, 1:2] + torch.sin(2 * x[:, 2:3])).detach()

    def layer(inputs, outputs):
        made = nn.Linear(inputs, outputs)
        with torch.no_grad():
            made.weight.copy_(torch.randn(outputs, inputs, generator=generator) / sqrt(inputs))
            made.bias.zero_()
        return made

    acts = [Activation.variance_preserving(family.name, 3, groups=groups) for _ in range(3)]
    net = nn.Sequential(layer(4, 32), acts[0], layer(32, 32), acts[1], layer(32, 32), acts[2], layer(32, 1))
    optimiser = torch.optim.Adam(net.parameters(), lr=3e-3)
    losses = []
    for _ in range(150):
        loss = ((net(x) - y) ** 2).mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(float(loss.detach()))
    assert np.isfinite(losses).all() and losses[-1] < 0.3 * float(y.var()), f"{losses[0]:.3g} to {losses[-1]:.3g}"
    assert all(float(act.theta.detach().abs().max()) > 1e-3 for act in acts), "the activations learn too"
