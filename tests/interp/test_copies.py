"""Laws of the copies of every target by every family: the fit in float64, and the module that starts as it."""

from dataclasses import replace
from functools import cache
from itertools import pairwise, product
from math import inf, isfinite, sqrt

import numpy as np
import pytest
import torch

from orthoact.interp import FAMILIES, TARGETS, Activation, Fit, Gaussian, OrthoactError, Target, fit, get_target
from orthoact.interp.family import Linear, Piecewise, Separable

DEGREE = 5
SOME = ("gelu", "mish", "tanh", "relu6", "elu", "relu2", "hardshrink")
"""Targets with every kind of ends and kinks, for the quick run; the long one takes them all."""
BY_KINKS = [name for name, family in FAMILIES.items() if isinstance(family, Piecewise)]
BY_JOINTS = [name for name in FAMILIES if name not in BY_KINKS]
X = np.linspace(-30, 30, 2401)

each = pytest.mark.parametrize("family", FAMILIES)
each_pair = pytest.mark.parametrize(
    ("family", "target"),
    [
        pytest.param(family, target, marks=() if target in SOME else pytest.mark.long)
        for family, target in product(FAMILIES, TARGETS)
    ],
)


@cache
def copy(target: str, family: str, degree: int = DEGREE, **options) -> Fit:
    return fit(target, family=family, degree=degree, **options)


def copied(target: str, family: str, *degree: int) -> Fit:
    """The copy; a refusal, with its reason, skips the law: `test_what_is_refused` has them all."""
    try:
        return copy(target, family, *degree)
    except OrthoactError as refusal:
        pytest.skip(str(refusal))


def start(result: Fit, **options) -> Activation:
    return Activation.from_fit(result, **options)


def lines(result: Fit):
    """(joint, line, sign) at both ends."""
    known = get_target(result.target)
    return zip((result.lo, result.hi), (known.left, known.right), (-1, 1), strict=True)


def corners(result: Fit) -> np.ndarray:
    """Where the slope of the copy may jump: joints, and where its second difference on a fine grid says so."""
    x = np.linspace(-31, 31, 62001)
    bend = np.abs(np.diff(result(x)[1], 2))
    return np.r_[result.lo, result.hi, x[1:-1][bend > 1e-5]]


def off(x: np.ndarray, points: np.ndarray, distance: float = 2e-3) -> np.ndarray:
    return x[np.abs(x[:, None] - points[np.isfinite(points)]).min(axis=1, initial=inf) > distance]


# -- the fit -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", TARGETS)
def test_what_is_refused(target):
    """A maximum of lines is convex: it has no asymptotes whose slope falls, nor two that are parallel."""
    known = get_target(target)
    if known.left is None or known.right is None:
        concave = False
    else:
        turn = known.right[0] - known.left[0]
        concave = turn < 0 or (turn == 0 and known.left[1] != known.right[1])
    if concave:
        with pytest.raises(OrthoactError, match=f"tropical copy is convex.*{target}.*choose tropical-rational"):
            copy(target, "tropical")
    elif target in SOME:
        assert copy(target, "tropical").family == "tropical"


@each_pair
def test_ends_meet_the_target(family, target):
    result, known = copied(target, family), get_target(target)
    for (joint, line, sign), jump in zip(lines(result), result.jumps, strict=True):
        steps = sign * np.array([0.0, 1e-6, 1.0, 10.0, 100.0])
        values, slopes = result(joint + steps)
        wanted, steep = (float(part[0]) for part in known(np.array([joint])))
        if line is not None:
            wanted, steep = line[0] * joint + line[1], line[0]
        elif family in BY_KINKS:  # no line to have: straight all the same
            wanted, steep = values[0], slopes[-1]
        close = 1e-9 * (1 + abs(wanted) + abs(steep))
        np.testing.assert_allclose(values, wanted + steep * steps, rtol=0, atol=200 * close, err_msg="straight")
        assert values[0] == pytest.approx(wanted, rel=0, abs=close)
        np.testing.assert_allclose(slopes[1:], steep, rtol=0, atol=close, err_msg="slope of the tail")
        assert slopes[0] + jump == pytest.approx(steep, rel=0, abs=close), "C1 but for the jump"
        assert jump == 0 or joint in known.kinks, "a jump without a kink"


@each_pair
def test_slopes_are_the_derivative(family, target):
    result, h = copied(target, family), 1e-6
    x = off(np.linspace(-12, 12, 401), corners(result))
    wanted = (result(x + h)[0] - result(x - h)[0]) / (2 * h)
    assert len(x) > 200
    np.testing.assert_allclose(result(x)[1], wanted, rtol=1e-5, atol=2e-5)


@each_pair
def test_what_is_reported(family, target):
    result, known = copied(target, family), get_target(target)
    x, w = result.domain.nodes()
    w = w * np.all([np.abs(x - kink) > 1e-9 for kink in known.kinks] or [np.full(x.shape, True)], axis=0)
    value, slope = (got - wanted for got, wanted in zip(result(x), known(x), strict=True))
    square, slope_square = float(w @ value**2), float(w @ slope**2)
    assert result.value_rms == pytest.approx(sqrt(square), rel=1e-6, abs=1e-12)
    assert result.slope_rms == pytest.approx(sqrt(slope_square), rel=1e-6, abs=1e-12)
    assert result.objective == pytest.approx(square + result.derivative_weight * slope_square, rel=1e-6, abs=1e-18)
    assert result.parameters == FAMILIES[family].size(DEGREE) and np.isfinite(result.coefficients).all()
    assert all(float(np.float32(v)) == v for v in (result.lo, result.hi, result.location, result.scale))
    assert result.reason and result.condition >= 1


@each_pair
def test_better_than_a_straight_line(family, target):
    """By far; but for convex copies of what is not convex, and a jump."""
    result, known = copied(target, family), get_target(target)
    x, w = result.domain.nodes()
    f = known(x)[0]
    line = np.polynomial.Polynomial.fit(x, f, 1, w=np.sqrt(w))
    spread = sqrt(w @ (f - line(x)) ** 2)
    share = 1.02 if family == "tropical" else 0.8 if target == "hardshrink" else 0.2
    assert result.value_rms <= share * spread + 1e-6, f"{result.value_rms:.1e}; a line misses by {spread:.1e}"


@pytest.mark.parametrize(
    "target", [pytest.param(name, marks=() if name in SOME else pytest.mark.long) for name in TARGETS]
)
def test_a_difference_of_maxima_is_no_worse_than_one(target):
    for degree in (3, DEGREE):
        one, two = (copied(target, family, degree) for family in ("tropical", "tropical-rational"))
        assert two.objective <= 1.05 * one.objective + 1e-12, (
            f"degree {degree}: {two.objective:.3e}, {one.objective:.3e}"
        )


BARS = {
    **{("hermite", n): bar for n, bar in ((8, (9e-4, 4.2e-3)), (12, (7.5e-5, 4.4e-4)), (16, (7e-6, 4.6e-5)))},
    **{("fourier", 4): (5.8e-4, inf), ("fourier", 8): (2e-6, inf)},
    **{("tropical-rational", 8): (3.5e-3, inf), ("tropical-rational", 16): (1.4e-3, inf)},
    **{("rational", 5): (8e-4, inf), ("rational-sum", 5): (1.05e-3, inf)},
}
"""What sketches reached for GELU under N(0, 1): root mean squares of value and slope."""


@pytest.mark.parametrize(("family", "degree"), BARS)
def test_gelu_is_as_good_as_in_the_sketches(family, degree):
    result = fit("gelu", family=family, degree=degree, domain=Gaussian(tail=0.0))
    value, slope = BARS[family, degree]
    assert result.value_rms <= value, f"value {result.value_rms:.2e}"
    assert result.slope_rms <= slope, f"slope {result.slope_rms:.2e}"


@pytest.mark.parametrize("target", ["gelu", pytest.param("tanh", marks=pytest.mark.long)])
@each
def test_more_numbers_are_no_worse(family, target):
    values = [copied(target, family, degree).objective for degree in (3, 5, 8) if degree in FAMILIES[family].degrees]
    for lower, higher in pairwise(values):
        assert higher <= 1.05 * lower + 1e-12, f"J by degree: {values}"


@pytest.mark.parametrize("target", ["gelu", "tanh", "mish", "sigmoid"])
@each
def test_a_low_degree_fits_or_is_refused(family, target):
    """The rank of the equalities decides, and not their number: Hermite 2 can have GELU's four, Hermite 1 cannot."""
    for degree in [degree for degree in FAMILIES[family].degrees if degree < 4]:
        try:
            result = copy(target, family, degree)
        except OrthoactError as refusal:
            assert f"--degree {degree}" in str(refusal) or "convex" in str(refusal)
            assert target in str(refusal)
            continue
        for joint, line, _ in lines(result):
            assert line is not None
            assert result(np.array([joint]))[0][0] == pytest.approx(line[0] * joint + line[1], rel=0, abs=2e-6)
    if (family, target) == ("hermite", "gelu"):
        assert copy(target, family, 2).value_rms < 0.2
        with pytest.raises(OrthoactError, match="--degree 1"):
            copy(target, family, 1)


STRAIGHT = ["relu", "leaky_relu", "leaky_relu(0.2)", "threshold", "relu6", "hardtanh", "hardtanh(-2, 0.5)"]
STRAIGHT += ["hardsigmoid", "softshrink"]


@pytest.mark.parametrize("target", STRAIGHT)
@each
def test_straight_targets_start_exact(family, target):
    """With the target's own kinks; a trigonometric core is a line only as far as float32 can tell."""
    kinks = len(get_target(target).kinks)
    most = 1e-4 if family.startswith("fourier") else 1e-9
    for degree in (max(kinks, 2), DEGREE) if family in BY_KINKS else (DEGREE,):
        result = copied(target, family, degree)
        x = np.r_[np.linspace(-20, 20, 4001), get_target(target).kinks]
        assert np.abs(result(x)[0] - get_target(target)(x)[0]).max() < most
        assert result.value_rms < most / 10
        got = start(result)(torch.tensor(x, dtype=torch.float32)).detach().double().numpy()
        assert (np.abs(got - get_target(target)(x)[0]) < most + 1e-6 * (1 + np.abs(x))).all()


# -- laws of the inputs ------------------------------------------------------------------------------------------------


def moved(target: str, mean: float, std: float) -> Target:
    """f((x - mean) / std)."""
    known = get_target(target)
    ends = known.left, known.right
    bent = [None if line is None else (line[0] / std, line[1] - line[0] * mean / std) for line in ends]
    return Target(
        f"{target} moved",
        lambda x: known.function((x - mean) / std),
        *bent,
        tuple(mean + std * kink for kink in known.kinks),
    )


@pytest.mark.parametrize(
    "target", ["gelu", "tanh", *(pytest.param(name, marks=pytest.mark.long) for name in ("mish", "elu", "relu2"))]
)
@pytest.mark.parametrize(("mean", "std"), [(1.5, 0.3), (-40.0, 7.0)])
@each
def test_units_do_not_matter(family, target, mean, std):
    """f((x - m) / s) under N(m, s^2) is the same problem as f under N(0, 1); slopes are 1 / s as steep."""
    try:
        plain = copy(target, family, DEGREE, derivative_weight=0.01)
    except OrthoactError as refusal:
        pytest.skip(str(refusal))
    options = {"domain": Gaussian(mean, std), "derivative_weight": 0.01 * std**2}
    result = fit(moved(target, mean, std), family=family, degree=DEGREE, **options)
    same = 1.5 if family == "fourier-free" else 1.05  # whose search ends in another valley, it being symmetric or not
    assert max(result.objective, plain.objective) <= same * min(result.objective, plain.objective) + 1e-11
    x = np.linspace(-4, 4, 400)
    got, wanted = result(mean + std * x)[0], get_target(target)(x)[0]
    assert np.abs(got - wanted).max() < 1.5 * np.abs(plain(x)[0] - wanted).max() + 1e-6
    module = start(result)(torch.tensor(mean + std * x, dtype=torch.float32)).detach().double().numpy()
    np.testing.assert_allclose(module, got, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("target", ["gelu", *(pytest.param(name, marks=pytest.mark.long) for name in ("silu", "relu"))])
@each
def test_a_copy_of_the_target_itself_for_any_law(family, target):
    """GELU where the inputs of a site really are: beside its bend, or far from it."""
    for mean, std in ((1.5, 0.3), (-1.0, 0.5), (0.5, 3.0)):
        try:
            result = fit(target, family=family, degree=DEGREE, domain=Gaussian(mean, std))
        except OrthoactError as refusal:
            pytest.skip(str(refusal))
        x, w = result.domain.nodes()
        f = get_target(target)(x)[0]
        zero = sqrt(w @ (f - np.maximum(x, 0)) ** 2)  # ReLU, which has the same asymptotes
        assert result.value_rms <= zero + 1e-6, f"N({mean}, {std}^2): {result.value_rms:.1e}; ReLU misses {zero:.1e}"


# -- no tails ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", ["gelu", "tanh", "relu", "softplus"])
@each
def test_without_tails(family, target):
    result = copy(target, family, DEGREE, tails="none")
    assert (result.tails, result.lo, result.hi, result.jumps) == ("none", -inf, inf, (0.0, 0.0))
    assert np.isfinite(result.coefficients).all() and result.holds == (-4.0, 4.0)
    x = np.linspace(-4, 4, 801)
    w = np.exp(-(x**2) / 2) / np.exp(-(x**2) / 2).sum()
    error = result(x)[0] - get_target(target)(x)[0]
    bar = 0.2 if family == "tropical" else 0.07
    assert sqrt(w @ error**2) < bar, f"{sqrt(w @ error**2):.1e}"
    got = start(result)(torch.tensor(x, dtype=torch.float32)).detach().double().numpy()
    np.testing.assert_allclose(got, result(x.astype(np.float32).astype(np.float64))[0], rtol=0, atol=2e-5)
    h = 1e-6
    x = off(x, corners(replace(result, lo=-inf, hi=inf)))
    np.testing.assert_allclose(
        result(x)[1], (result(x + h)[0] - result(x - h)[0]) / (2 * h), rtol=1e-5, atol=5e-5, err_msg="slopes"
    )


@each
def test_tails_cost_little(family):
    """Under N(0, 1), which has hardly an input beyond the joints, ends that meet the target are nearly free."""
    domain = Gaussian(tail=0.0)
    with_tails, bare = (copy("gelu", family, 8, domain=domain, tails=tails) for tails in ("linear", "none"))
    floor = 0.13 if family == "tropical" else 5e-3
    assert with_tails.value_rms <= 1.5 * bare.value_rms + floor


# -- the derivative ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", [name for name in FAMILIES if name != "tropical"])
def test_the_weight_of_the_derivative_is_real(family):
    """With joints the problem is not diagonal: more weight on slopes makes them better, and values worse."""
    degree = 3 if family == "fourier-free" else DEGREE  # at 5 its J is 1e-11, and where the search ends counts for more
    light, heavy = (copy("gelu", family, degree, derivative_weight=weight) for weight in (0.0, 1.0))
    assert heavy.slope_rms < 0.995 * light.slope_rms, f"{light.slope_rms:.3e} to {heavy.slope_rms:.3e}"
    assert heavy.value_rms > 1.005 * light.value_rms, f"{light.value_rms:.3e} to {heavy.value_rms:.3e}"
    assert heavy.objective <= light.value_rms**2 + light.slope_rms**2
    assert light.objective <= heavy.value_rms**2


def test_the_weight_of_the_derivative_does_not_matter_where_theory_says_so():
    """Hermite under the pure Gaussian without joints: c_k = E[f h_k], whatever lambda is."""
    for target in ("gelu", "mish", "sigmoid"):
        fits = [fit(target, degree=9, tails="none", derivative_weight=weight) for weight in (0.0, 0.01, 1.0, 100.0)]
        for other in fits[1:]:
            np.testing.assert_allclose(other.coefficients, fits[0].coefficients, atol=1e-8, err_msg=target)
    under_another = [
        fit("gelu", degree=9, domain=Gaussian(tail=0.0), derivative_weight=weight) for weight in (0.0, 1.0)
    ]
    assert abs(under_another[0].value_rms / under_another[1].value_rms - 1) > 1e-3, "joints are what makes it matter"


# -- the module --------------------------------------------------------------------------------------------------------


@each_pair
def test_module_equals_the_fit(family, target):
    result = copied(target, family)
    act = start(result)
    for dtype in (torch.float32, torch.float64):
        x = torch.tensor(X, dtype=dtype)
        wanted = result(x.double().numpy())[0]
        # terms that cancel, as those of a frequency near zero, round as what they are
        scale = max(1, np.abs(wanted).max() / 30, np.abs(result.coefficients).sum() / 100)
        error = np.abs(act(x).detach().double().numpy() - wanted) / scale
        assert error.max() < 2e-5, f"{dtype}: {error.max():.1e} at {X[error.argmax()]:.3f}"


@each_pair
def test_far_inputs_follow_the_asymptotes(family, target):
    result, known = copied(target, family), get_target(target)
    for (_, line, sign), end in zip(lines(result), known.holds, strict=True):
        if line is None or isfinite(end):
            continue
        x = sign * np.array([1e2, 1e3, 1e4])
        wanted = line[0] * x + line[1]
        assert (np.abs(result(x)[0] - wanted) < 1e-9 * np.abs(x)).all()
        got = start(result)(torch.tensor(x, dtype=torch.float32)).detach().double().numpy()
        assert (np.abs(got - wanted) <= 1e-6 * np.abs(x)).all(), f"{np.abs(got - wanted)} at {x}"


@each_pair
def test_nothing_is_ever_nan(family, target):
    act = start(copied(target, family))
    ends = [act.lo.item(), act.hi.item(), act.location.item()]
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        x = torch.tensor([*ends, *X, 0.0, -0.0, 1e3, -1e3, 6e4, -6e4], dtype=dtype, requires_grad=True)
        act.theta.grad = None
        out = act(x)
        assert out.dtype == dtype and torch.isfinite(out[: len(X) + 5]).all() and not out.isnan().any()
        out[: len(X) + 5].float().mean().backward()
        assert torch.isfinite(x.grad).all() and torch.isfinite(act.theta.grad).all()
        if dtype != torch.float32:
            assert torch.equal(out, act(x.detach().float()).to(dtype))


@each_pair
def test_gradient_of_the_input(family, target):
    result = copied(target, family)
    at = off(np.linspace(-12, 12, 481), corners(result))
    x = torch.tensor(at, requires_grad=True)
    start(result)(x).sum().backward()
    np.testing.assert_allclose(x.grad.numpy(), result(at)[1], rtol=5e-5, atol=1e-4)


@pytest.mark.parametrize("target", ["gelu", "mish", "relu6"])
@each
def test_gradient_of_theta(family, target):
    """Against differences of the float64 reference at numbers that have moved, tails included."""
    result = copied(target, family)
    act = start(result)
    w, theta = act.transform.double().numpy(), 0.01 * np.random.default_rng(0).normal(size=result.parameters)
    theta = theta.astype(np.float32).astype(np.float64)
    with torch.no_grad():
        act.theta.copy_(torch.tensor(theta))
    x = np.random.default_rng(1).uniform(-12, 12, 97)
    weights = np.random.default_rng(2).normal(size=x.shape)
    (act(torch.tensor(x)) * torch.tensor(weights)).sum().backward()

    def total(step: np.ndarray) -> float:
        numbers = np.array(result.coefficients) + w @ (theta + step)
        return float(weights @ replace(result, coefficients=tuple(numbers))(x)[0])

    h = 1e-6
    wanted = np.array([(total(h * e) - total(-h * e)) / (2 * h) for e in np.eye(len(theta))])
    np.testing.assert_allclose(act.theta.grad.numpy(), wanted, rtol=0, atol=1e-4 * (1 + np.abs(wanted).max()))


@each
def test_groups(family):
    """Each acts on its channels as an activation of its own would, and learns from them alone."""
    result = copy("gelu", family)
    act, x = start(result, groups=3, channel=1), 3 * torch.randn(4, 6, 5)
    torch.testing.assert_close(act(x), start(result)(x), rtol=0, atol=1e-6)
    with torch.no_grad():
        act.theta += 0.02 * torch.randn_like(act.theta)
    for g, (got, part) in enumerate(zip(act(x).chunk(3, 1), x.chunk(3, 1), strict=True)):
        one = start(result)
        with torch.no_grad():
            one.theta.copy_(act.theta[g])
        torch.testing.assert_close(got, one(part), rtol=1e-5, atol=1e-5)
    act(x)[:, 2:4].square().sum().backward()
    assert act.theta.grad[1].abs().max() > 0 and act.theta.grad[[0, 2]].abs().max() == 0


@each
def test_files_hold_all_of_it(family):
    full = start(copy("silu", family), groups=2)
    with torch.no_grad():
        full.theta += 0.05 * torch.randn_like(full.theta)
    fresh, x = Activation(family, DEGREE, groups=2), 4 * torch.randn(9, 4)
    fresh.load_state_dict(full.state_dict(), strict=True)
    assert torch.equal(fresh(x), full(x))
    assert all(tensor.dtype == torch.float32 for tensor in fresh.bfloat16().state_dict().values())
    assert torch.equal(fresh(x), full(x))


@pytest.mark.parametrize("rate", [1e-2, pytest.param(1e-3, marks=pytest.mark.long)])
@each
def test_learning_is_steady(family, rate):
    """Adam on theta turns GELU towards tanh, with no step that ruins what was there."""
    act, x = start(copy("gelu", family)), torch.linspace(-2.5, 2.5, 201)
    optimiser, losses = torch.optim.Adam(act.parameters(), lr=rate), []
    for _ in range(100):
        loss = (act(x) - x.tanh()).square().mean()
        losses.append(loss.item())
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    assert max(losses) < 1.05 * losses[0], f"{max(losses):.1e} after {losses[0]:.1e}"
    assert losses[-1] < (0.9 if rate == 1e-3 else 0.2) * losses[0], f"{losses[0]:.1e} to {losses[-1]:.1e}"


@pytest.mark.long
@each
def test_compiles_into_one_graph(family):
    act, x = start(copy("gelu", family), groups=2), 4 * torch.randn(16, 4)
    torch.testing.assert_close(torch.compile(act, fullgraph=True)(x), act(x), rtol=1e-5, atol=1e-5)


# -- bad input ---------------------------------------------------------------------------------------------------------


def detached(x: torch.Tensor) -> torch.Tensor:
    return torch.from_numpy(np.tanh(x.detach().numpy()))


@pytest.mark.parametrize(
    ("target", "message"),
    [
        (lambda x: x.softmax(-1), "not elementwise"),
        (lambda x: x / (x - 0.5) * torch.nan, "not finite"),
        (lambda x: torch.where(x > 5, torch.nan, x), "not finite"),
        (detached, "differentiable"),
    ],
    ids=["softmax", "nan", "nan somewhere", "no autograd"],
)
@each
def test_functions_that_are_no_activation(family, target, message):
    with pytest.raises(OrthoactError, match=message) as error:
        fit(target, family=family, degree=DEGREE)
    assert "\n" not in str(error.value)


@each
def test_bad_degrees(family):
    for degree in (FAMILIES[family].degrees[0] - 1, FAMILIES[family].degrees[-1] + 1, 2.5):
        with pytest.raises(OrthoactError, match=f"--degree {degree}.*{family}"):
            fit("gelu", family=family, degree=degree)


@pytest.mark.parametrize("std", [0.0, -1.0])
def test_bad_deviations(std):
    with pytest.raises(OrthoactError, match=f"--std {std}"):
        Gaussian(0.0, std)


def test_every_kind_is_here():
    assert {kind for kind in (Linear, Separable, Piecewise) for f in FAMILIES.values() if isinstance(f, kind)} == {
        Linear,
        Separable,
        Piecewise,
    }
