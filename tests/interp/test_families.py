"""Laws of every family; Hermite's against a table written by hand and numpy; and what a new family needs."""

import json
from itertools import chain, combinations, product
from math import factorial, sqrt

import numpy as np
import pytest
import tiny_models as tiny
import torch
import transformers as tf
from click.testing import CliRunner
from numpy.polynomial import hermite_e
from scipy.optimize import minimize

import orthoact
from orthoact.cli import main
from orthoact.interp import FAMILIES, Activation, Family, OrthoactError, fit, get_family
from orthoact.interp.domains import Gaussian, Uniform
from orthoact.interp.family import Linear, Piecewise, Separable
from orthoact.interp.problem import Problem
from orthoact.interp.race import Race
from orthoact.interp.shapes import _starts
from orthoact.interp.targets import get_target
from orthoact.interp.variance import balance

# He_0 .. He_9, lowest power first
TABLE = [
    [1],
    [0, 1],
    [-1, 0, 1],
    [0, -3, 0, 1],
    [3, 0, -6, 0, 1],
    [0, 15, 0, -10, 0, 1],
    [-15, 0, 45, 0, -15, 0, 1],
    [0, -105, 0, 105, 0, -21, 0, 1],
    [105, 0, -420, 0, 210, 0, -28, 0, 1],
    [0, 945, 0, -1260, 0, 378, 0, -36, 0, 1],
]


def over(kind: type = Family, *more: int):
    """A parametrisation over the families of a kind, each at its lowest, its highest and some degrees between."""
    cases = [
        pytest.param(family, degree, id=f"{name}-{degree}")
        for name, family in FAMILIES.items()
        if isinstance(family, kind)
        for degree in sorted({family.degrees[0], 2, 5, 8, 13, family.degrees[-1], *more} & set(family.degrees))
    ]
    return pytest.mark.parametrize(("family", "degree"), cases)


def core(family: Family, degree: int, points: int = 60) -> np.ndarray:
    """Points of the core; an even number of them, for some families have a kink at zero."""
    reach = 3.0 if isinstance(family, Piecewise) else family.reach(degree)  # pyright: ignore[reportAttributeAccessIssue]
    return np.linspace(-1, 1, points) * reach


def numbers(family: Family, degree: int, *shape: int) -> np.ndarray:
    """Learnable numbers as training could leave them: random; shape (size, *shape)."""
    return np.random.default_rng(degree).normal(size=(family.size(degree), *shape))


def tensors(values: np.ndarray) -> list[torch.Tensor]:
    return list(torch.from_numpy(values))


def smooth(family: Family, p: list, z: np.ndarray, distance: float = 1e-3) -> np.ndarray:
    """The points of z within whose distance neither S' nor its own slope jumps."""
    h = distance
    at = np.stack([family.slope(p, z + step) for step in (-h, -h / 2, 0, h / 2, h)])
    bend = np.abs(np.diff(at, 2, axis=0)).max(axis=0)  # of order h where S' jumps in the derivative, 1 where it jumps
    return bend < 20 * h**1.5 * (1 + np.abs(at).max())


def close(got, wanted, bound, message: str = ""):
    np.testing.assert_allclose(np.asarray(got), np.asarray(wanted), rtol=0, atol=bound, err_msg=message)


# -- every family ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FAMILIES)
def test_registry(name):
    family = get_family(name)
    assert family is FAMILIES[name] and family.name == name
    for field in ("formula", "numbers", "smoothness", "cost", "reference"):
        assert isinstance(getattr(family, field), str) and getattr(family, field), f"{name}: {field} is empty"
    assert len(family.degrees) > 1 and family.degrees[0] >= 1
    assert isinstance(family, Linear | Separable | Piecewise), "of a kind that the solver knows"


@pytest.mark.parametrize("name", ["chebyshev", "", "Hermite", "hermit"])
def test_unknown_family_lists_the_known(name):
    with pytest.raises(OrthoactError, match="unknown family") as error:
        get_family(name)
    assert repr(name) in str(error.value)
    assert all(known in str(error.value) for known in FAMILIES)


@pytest.mark.parametrize("name", FAMILIES)
def test_the_stated_count_of_numbers_is_their_size(name):
    """`numbers` begins with a formula of n, as in 2n + 2."""
    family = FAMILIES[name]
    count, _, listed = family.numbers.partition(":")
    assert listed.strip()
    for n in family.degrees:
        assert family.size(n) == eval(count.replace("n", "*n").lstrip("*"), {"n": n})
    assert [family.size(n) for n in family.degrees] == sorted({family.size(n) for n in family.degrees}), "it grows"


@over()
def test_size_and_shape(family, degree):
    size = family.size(degree)
    for z in (np.zeros(()), np.ones((2, 3)), torch.zeros(2, 3), torch.zeros(0), torch.zeros(())):
        p = numbers(family, degree)
        p = list(torch.from_numpy(p).to(z.dtype)) if torch.is_tensor(z) else list(p)
        values, slopes = family.jacobian(p, z)
        assert len(values) == len(slopes) == size
        for part in (*values, *slopes, family.evaluate(p, z), family.slope(p, z)):
            assert tuple(part.shape) == tuple(z.shape)
            assert isinstance(part, type(z) | np.float64), "numpy in, numpy out; torch in, torch out"
            assert part.dtype == z.dtype


@over()
def test_numpy_and_torch_agree(family, degree):
    z, p = core(family, degree), numbers(family, degree)
    ours, theirs = (list(p), z), (tensors(p), torch.from_numpy(z))
    for method in (family.evaluate, family.slope):
        wanted, got = method(*ours), method(*theirs)
        assert got.dtype == torch.float64
        close(got, wanted, 1e-12 * (1 + np.abs(wanted).max()), method.__name__)
    for wanted, got in zip(chain(*family.jacobian(*ours)), chain(*family.jacobian(*theirs)), strict=True):
        close(got, wanted, 1e-12 * (1 + np.abs(wanted).max()))


@over()
def test_slope_is_the_derivative_by_autograd(family, degree):
    z, p = torch.from_numpy(core(family, degree)).requires_grad_(), tensors(numbers(family, degree))
    (wanted,) = torch.autograd.grad(family.evaluate(p, z).sum(), z)
    close(family.slope(p, z.detach()), wanted, 1e-11 * (1 + wanted.abs().max()))


@over()
def test_slope_is_the_derivative_by_differences(family, degree):
    p, h = list(numbers(family, degree)), 1e-6
    z = core(family, degree, 400)
    z = z[smooth(family, p, z)]
    assert len(z) > 100
    wanted = (family.evaluate(p, z + h) - family.evaluate(p, z - h)) / (2 * h)
    close(family.slope(p, z), wanted, 1e-6 * (1 + np.abs(wanted).max()))


@over()
def test_jacobian_is_the_derivative_by_each_number(family, degree):
    """By autograd of `evaluate` and of `slope`; random numbers put no point on a kink."""
    z = torch.from_numpy(core(family, degree, 24))
    p = [number.requires_grad_() for number in tensors(numbers(family, degree, 1).repeat(24, axis=1))]
    for method, parts in zip((family.evaluate, family.slope), family.jacobian(p, z), strict=True):
        wanted = torch.autograd.grad(method(p, z).sum(), p, materialize_grads=True, allow_unused=True)
        for k, (part, by) in enumerate(zip(parts, wanted, strict=True)):
            close(part.detach(), by, 1e-10 * (1 + by.abs().max()), f"{method.__name__} by number {k}")


@over(Family, 4)
def test_float32_is_float64_rounded(family, degree):
    """The error is of the size of rounding the numbers and the point."""
    p, z = numbers(family, degree).astype(np.float32), core(family, degree, 200).astype(np.float32)
    exact, at = list(p.astype(np.float64)), z.astype(np.float64)
    keep = smooth(family, exact, at)
    for method, parts in zip((family.evaluate, family.slope), family.jacobian(exact, at), strict=True):
        wanted, bend = method(exact, at), np.abs(method(exact, at + 1e-6) - method(exact, at - 1e-6)) / 2e-6
        terms = sum(np.abs(number * part) for number, part in zip(exact, parts, strict=True))
        for kind in ("numpy", "torch"):
            got = method(list(p), z) if kind == "numpy" else method(tensors(p), torch.from_numpy(z))
            assert str(got.dtype).endswith("float32"), kind
            error = np.abs(np.asarray(got, dtype=np.float64) - wanted) / (terms + np.abs(at) * bend + 1e-3)
            assert error[keep].max() < 1e-5, f"{kind}, {method.__name__}: {error[keep].max():.1e} of its terms"


@over()
def test_numbers_broadcast(family, degree):
    """Groups: each channel with numbers of its own, for values, slopes and their derivatives; and one point for all."""
    z, p = torch.from_numpy(core(family, degree, 8)).reshape(4, 2), torch.from_numpy(numbers(family, degree, 2))
    wanted = [(list(p[:, i]), z[:, i]) for i in range(2)]
    for method in (family.evaluate, family.slope):
        torch.testing.assert_close(method(list(p), z), torch.stack([method(*each) for each in wanted], dim=1))
        at = z[1, 0]
        torch.testing.assert_close(method(list(p), at), torch.stack([method(list(p[:, i]), at) for i in range(2)]))
    got = chain(*family.jacobian(list(p), z))
    for a, b, both in zip(*(chain(*family.jacobian(*each)) for each in wanted), got, strict=True):
        torch.testing.assert_close(both, torch.stack([a, b], dim=1))


# -- the kinds ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name, family in FAMILIES.items() if not isinstance(family, Piecewise)])
def test_reach_does_not_shrink(name):
    family = FAMILIES[name]
    reaches = [family.reach(degree) for degree in family.degrees]  # pyright: ignore[reportAttributeAccessIssue]
    assert reaches[0] > 0 and reaches == sorted(reaches)


@over(Linear)
@pytest.mark.parametrize(("kind", "dtype"), list(product(["numpy", "torch"], ["float64", "float32"])))
def test_evaluate_is_basis_times_coefficients(family, degree, kind, dtype):
    z, c = core(family, degree).astype(dtype), numbers(family, degree).astype(dtype)
    basis = np.stack(family.basis(z.astype(np.float64), degree), axis=-1)
    wanted, size = basis @ c.astype(np.float64), np.abs(basis) @ np.abs(c)
    got = family.evaluate(list(c), z) if kind == "numpy" else family.evaluate(tensors(c), torch.from_numpy(z))
    assert str(got.dtype).removeprefix("torch.") == dtype
    error = np.abs(np.asarray(got) - wanted) / size
    assert error.max() < {"float64": 1e-13, "float32": 1e-5}[dtype], f"relative to the terms: {error.max():.1e}"


@over(Linear)
def test_unit_coefficients_give_the_basis(family, degree):
    z = core(family, degree)
    for k, (value, slope) in enumerate(zip(family.basis(z, degree), family.slopes(z, degree), strict=True)):
        unit = [float(i == k) for i in range(family.size(degree))]
        close(family.evaluate(unit, z), value, 1e-12 * (1 + np.abs(value).max()), f"k={k}")
        close(family.slope(unit, z), slope, 1e-12 * (1 + np.abs(slope).max()), f"slope, k={k}")


@over(Separable)
def test_linear_in_all_but_the_shape(family, degree):
    """S = sum_k p_k dS/dp_k over the numbers that are not the shape, and those derivatives do not depend on p."""
    z, p = core(family, degree), numbers(family, degree)
    linear = family.size(degree) - family.shape(degree)
    assert 0 < linear < family.size(degree)
    for method, parts, bare in zip(
        (family.evaluate, family.slope),
        family.jacobian(list(p), z),
        family.jacobian([0.0] * linear + list(p[linear:]), z),
        strict=True,
    ):
        wanted = method(list(p), z)
        close(np.tensordot(p[:linear], np.array(parts[:linear]), 1), wanted, 1e-11 * (1 + np.abs(wanted).max()))
        for part, other in zip(parts[:linear], bare[:linear], strict=True):
            np.testing.assert_array_equal(part, other)


@over(Separable)
def test_starts_are_shapes_and_always_the_same(family, degree):
    z = core(family, degree, 200)
    w, f = np.exp(-(z**2)) / np.exp(-(z**2)).sum(), np.tanh(2 * z)
    both = [np.stack([part, part]) for part in (z, w, f)]
    starts = family.starts(degree, *both)
    assert starts.shape[0] == 2 and starts.shape[1] and starts.shape[2] == family.shape(degree)
    assert np.isfinite(starts).all()
    np.testing.assert_array_equal(starts, family.starts(degree, *both))
    np.testing.assert_array_equal(starts[0], family.starts(degree, *(part[:1] for part in both))[0])


@over(Separable)
def test_what_the_search_calls_equals_the_jacobian(family, degree):
    """For several shapes at once, by the fast way of the family; and a smoother family that holds its members."""
    linear, z = family.size(degree) - family.shape(degree), core(family, degree)
    p = np.abs(numbers(family, degree, 3).T)
    for one in (family, family.relaxed()):
        if one is None:
            continue
        at = np.tile(z, (3, 1))
        basis = one.columns(p[:, linear:], at, linear)
        turns = one.turns(*np.split(p, [linear], 1), at, *basis)
        for row, of_p in enumerate(p):
            for got, also, parts in zip(basis, turns, one.jacobian(of_p.tolist(), z), strict=True):
                wanted = np.stack(np.broadcast_arrays(*parts), axis=-1)
                bound = 1e-10 * (1 + np.abs(wanted).max())
                close(got[row], wanted[:, :linear], bound)
                close(also[row], wanted[:, linear:], bound)


@pytest.mark.parametrize("degree", [2, 3, 5, 8])
def test_a_quotient_without_a_pole_is_a_rational(degree):
    """Seen from where its denominator is least, wherever that is: 1 + |Q| is then 1 + Q, up to a factor."""
    family, lo, hi = get_family("rational"), -3.0, 5.0
    quotient = family.relaxed()
    x = np.linspace(lo, hi, 400)
    for seed in range(20):
        random = np.random.default_rng(seed)
        shape = random.normal(size=degree - 1) * 0.7
        d = quotient.denominator(shape.tolist(), (x - 1) / 4)[0]
        if d.min() < 0.05:
            continue
        new, location, scale, left, right = family.settle(shape.tolist(), 1.0, 4.0, lo, hi)[0]
        assert (left, right) == (lo, hi)
        got = 1 + np.abs(np.polynomial.polynomial.polyval((x - location) / scale, [0.0, *new]))
        assert got.min() >= 1 and np.abs((x - location) / scale).max() <= 1 + 1e-6
        close(got / got.mean(), d / d.mean(), 1e-5 * (d / d.mean()).max())


@pytest.mark.parametrize("degree", [3, 8])
def test_a_core_ends_where_a_denominator_turns(degree):
    """Seen from a place where D is not the least the copy holds up to where D is as small again."""
    family, d = get_family("rational"), np.polynomial.Polynomial([1.0, 0.0, -0.9])  # most in the middle
    shape = np.pad(d.coef[1:], (0, degree - len(d.coef)))
    found = family.settle(shape.tolist(), 0.0, 1.0, -1.0, 0.5)
    assert len(found) == 3
    for new, location, scale, lo, hi in found:
        x = np.linspace(lo, hi, 200)
        got = 1 + np.abs(np.polynomial.polynomial.polyval((x - location) / scale, [0.0, *new]))
        close(got / got[0], d(x) / d(x)[0], 1e-2)
    assert max(hi - lo for *_, lo, hi in found) == 1.5


@over(Separable)
def test_the_value_of_a_start_is_that_of_its_state(family, degree):
    """The best of them; where the numbers of the series would be large the scan is rough."""
    p = Problem(get_target("mish"), family, degree, Gaussian(), "linear", 0.01)
    try:
        race = Race(p, family, p.choose_sides()[0], 64)
        frame, alpha, kind = _starts(p, race)
    except OrthoactError:
        return
    assert len(frame) == len(alpha) == len(kind)
    values = race.values(frame, alpha)
    state = race.evaluate(frame, alpha)
    finite = np.isfinite(values)
    assert finite.any() and (finite == np.isfinite(state.value)).all()
    best = np.argsort(state.value)[:4]
    np.testing.assert_allclose(values[best], state.value[best], rtol=1e-2, atol=1e-12)
    assert (values >= 0.5 * state.value - 1e-9)[finite].all()


@pytest.mark.parametrize("degree", [1, 3, 8, 16])
@pytest.mark.parametrize("alike", [False, True])
def test_normal_equations_of_waves_are_those_of_their_columns(degree, alike):
    """From moments; and with the same nodes for all, of which many starts have the same shape."""
    family, random, linear = get_family("fourier"), np.random.default_rng(degree), 2 * degree + 1
    z = np.tile(np.linspace(-3, 2, 60), (6, 1)) + (0 if alike else random.normal(size=(6, 1)))
    shape = np.array([0.8, 0.3, 0.8, 0.5, 0.3, 0.8])[:, None]
    w, f, d = random.uniform(size=(6, 58)), np.tanh(z[:, 2:]), np.cos(z[:, 2:])
    got = family.normal(shape, z, w, f, d, np.full((6, 1), 0.3), linear)
    wanted = Separable.normal(family, shape, z, w, f, d, np.full((6, 1), 0.3), linear)
    for mine, other in zip([*got[:3], *got[3]], [*wanted[:3], *wanted[3]], strict=True):
        close(mine, other, 1e-10 * np.abs(other).max())
    numbers = random.normal(size=(6, linear))
    for mine, other in zip(got[4](numbers), wanted[4](numbers), strict=True):
        close(mine, other, 1e-6 * np.abs(other).max())


@pytest.mark.parametrize(("name", "degree"), [("fourier", 2), ("fourier", 5)])
@pytest.mark.parametrize("target", ["mish", "xielu", "softsign", "elu"])
def test_the_gradient_is_that_of_j(name, degree, target):
    """By differences; xielu and softsign have tails that turn with a joint, elu one joint on its kink.

    To some per cent: the tails are sums over the law's cells. Low frequencies, whose numbers are large, are left out:
    that the rows which keep these small move with the shape is no part of it.
    """
    p = Problem(get_target(target), get_family(name), degree, Gaussian(), "linear", 0.01)
    race = Race(p, p.family, p.choose_sides()[0], 64)
    frame, alpha, _ = _starts(p, race)
    value, gradient = race.gradient(frame, alpha)
    inside = (np.abs(race.joints(alpha)) < 8.9).all(axis=1) & (alpha[:, : race.shapes].min(axis=1) > 0.2)
    rows = np.flatnonzero(np.isfinite(value) & inside & (value > 1e-6))[:40]
    assert len(rows) > 5
    for k in range(alpha.shape[1]):
        step = 1e-4 * np.eye(alpha.shape[1])[k]
        there, here = (race.gradient(frame[rows], alpha[rows] + sign * step)[0] for sign in (1, -1))
        wanted = (there - here) / 2e-4
        error = np.abs(wanted - gradient[rows, k]) / (np.abs(gradient[rows]).max(axis=1) + value[rows])
        assert np.median(error) < 0.01 and np.quantile(error, 0.9) < 0.05, f"number {k}: {error.max():.1e}"


@pytest.mark.parametrize("target", ["gelu", "tanh", "softplus", "quick_gelu"])
@pytest.mark.parametrize(
    "law", [Gaussian(-0.5, 0.7), Gaussian(1, 2), Uniform(-3, 3)], ids=["narrow", "wide", "uniform"]
)
def test_one_frequency_is_the_best_under_any_law(target, law):
    """No frequency of a grid, with joints from a grid, is better."""
    p = Problem(get_target(target), get_family("fourier"), 4, law, "linear", 0.01)
    race = Race(p, p.family, p.choose_sides()[0], 64)
    centre, spread = p.bend()
    lo, hi, w = (g.ravel() for g in np.meshgrid(*[np.geomspace(1, 6, 12)] * 2, np.linspace(0.05, 0.95, 19)))
    joints = np.stack([centre - spread * lo, centre + spread * hi], axis=1).clip(*p.ends)
    frame = np.stack([joints.mean(axis=1), np.ptp(joints, axis=1) / (2 * np.pi)], axis=1)
    copy = fit(target, family="fourier", degree=4, domain=law)
    race.rounding = 1e-3 * copy.objective**0.5  # numbers that cancel each other count, as in the search
    ends = np.clip([copy.lo, copy.hi], *p.ends)  # they are rounded to float32
    mine = race.values(np.array([[copy.location, copy.scale]]), np.array([[copy.coefficients[-1], *ends]]))
    assert mine.item() < 1.05 * race.values(frame, np.concatenate([w[:, None], joints], axis=1)).min()


SIZES = [1e-4, 0.05, 30.0, 200.0]


def test_a_wave_through_two_joints_has_the_values_and_slopes_asked():
    family, draw = get_family("fourier"), np.random.default_rng(0)
    assert isinstance(family, Separable)
    values, slopes = draw.normal(size=(2, 1000, 2))
    values[:100, 0] = values[:100, 1]  # no rise
    slopes[100:200, 0], slopes[200:300] = slopes[100:200, 1], 0.0
    found = family.through(1, values, slopes)
    assert found is not None
    columns = family.columns(found[0], np.tile([-np.pi, np.pi], (1000, 1)), 3)
    for part, asked in zip(columns, (values, slopes), strict=True):
        np.testing.assert_allclose((part @ found[1][..., None])[..., 0], asked, atol=1e-13 * np.abs(found[1]).max())
    assert family.through(2, values, slopes) is None


@pytest.mark.parametrize("target", ["gelu", "silu", "tanh", "tanhshrink"])
def test_one_wave_is_the_best_that_meets_both_asymptotes(target):
    """Four equalities, three linear numbers: against a constrained search by scipy from many starts."""
    found, (left, right) = fit(target, family="fourier", degree=1), (get_target(target).left, get_target(target).right)
    x, w = found.domain.nodes()
    f, d = get_target(target)(x)

    def wave(p, at):
        return p[0] + p[1] * np.cos(p[3] * at) + p[2] * np.sin(p[3] * at)

    def slope(p, at):
        return p[3] * (p[2] * np.cos(p[3] * at) - p[1] * np.sin(p[3] * at))

    def missed(p):
        return [wave(p, at) - line[0] * at - line[1] for at, line in ((p[4], left), (p[5], right))] + [
            slope(p, at) - line[0] for at, line in ((p[4], left), (p[5], right))
        ]

    def objective(p):
        core = np.clip(x, p[4], p[5])
        value, turned = wave(p, core), slope(p, core)
        value += np.minimum(x - p[4], 0) * left[0] + np.maximum(x - p[5], 0) * right[0]
        return w @ ((value - f) ** 2 + 0.01 * (turned - d) ** 2)

    draw, least = np.random.default_rng(0), np.inf
    for _ in range(20):
        start = [*draw.normal(size=3), draw.uniform(0.3, 2), -draw.uniform(0.5, 4), draw.uniform(0.5, 4)]
        tried = minimize(objective, start, method="SLSQP", constraints={"type": "eq", "fun": missed})
        if tried.success and np.abs(missed(tried.x)).max() < 1e-6 and tried.x[5] > tried.x[4]:
            least = min(least, tried.fun)
    assert np.isfinite(least)
    assert found.objective <= 1.001 * least


@pytest.mark.parametrize("law", [*(Gaussian(0.0, std) for std in SIZES), Gaussian(-5, 0.3), Uniform(0.5, 300)], ids=str)
@pytest.mark.parametrize("target", ["gelu", "elu", "hardtanh"])
@pytest.mark.parametrize("name", FAMILIES)
def test_a_law_of_another_size_than_the_target(name, target, law):
    """It is copied all the same, and nothing is reported that a dense grid does not confirm."""
    if name == "tropical" and target == "hardtanh":
        with pytest.raises(OrthoactError, match="convex"):
            fit(target, family=name, degree=4, domain=law)
        return
    copy, known = fit(target, family=name, degree=4, domain=law), get_target(target)
    x, w = law.nodes()
    finer = np.linspace(-0.5, 0.5, 4001)[:-1] * (x[1] - x[0])
    value, wanted = (f((x[:, None] + finer).ravel())[0].reshape(len(x), -1) for f in (copy, known))
    rms = sqrt(w @ ((value - wanted) ** 2).mean(axis=1))
    assert copy.value_rms == pytest.approx(rms, rel=0.1, abs=2e-8)
    if name != "tropical":  # which cannot have GELU's dip
        assert copy.share < 0.02 or copy.value_rms < {"tropical-rational": 3e-3}.get(name, 1e-4), "it is a copy"


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_a_law_that_no_search_ends_for_is_refused_in_a_sentence():
    with pytest.raises(OrthoactError, match=r"no fourier copy of relu2 .* std 1e\+06: choose another"):
        fit("relu2", family="fourier", degree=4, domain=Gaussian(0.0, 1e6))


def lines(start, kinks, jumps) -> list[tuple[float, float]]:
    """(slope, intercept) of each piece of start + sum_i jump_i max(z - kink_i, 0), from left to right."""
    found = [tuple(start)]
    for kink, jump in sorted(zip(kinks, jumps, strict=True)):
        slope, intercept = found[-1]
        found.append((slope + jump, intercept - jump * kink))
    return found


def highest(pieces, z: np.ndarray) -> np.ndarray:
    return np.max([slope * z + intercept for slope, intercept in pieces], axis=0)


@over(Piecewise)
@pytest.mark.parametrize("seed", range(3))
def test_from_kinks_gives_the_function(family, degree, seed):
    random = np.random.default_rng([degree, seed])
    start, kinks, jumps = random.normal(size=2), np.sort(random.normal(size=degree)), random.normal(size=degree)
    jumps = np.abs(jumps) if family.convex else jumps
    p = family.from_kinks(tuple(start), kinks, jumps)
    assert len(p) == family.size(degree)
    z = np.linspace(-9, 9, 1000)
    wanted = start[0] * z + start[1] + np.maximum(z[:, None] - kinks, 0) @ jumps
    close(family.evaluate(p, z), wanted, 1e-11 * (1 + np.abs(wanted).max()))
    close(family.slope(p, z), start[0] + (z[:, None] > kinks) @ jumps, 1e-11 * (1 + np.abs(jumps).sum()))


@pytest.mark.parametrize("seed", range(4))
@over(Piecewise)
def test_convex_whatever_its_numbers(family, degree, seed):
    z = np.linspace(-8, 8, 801)
    p = np.random.default_rng([degree, seed]).normal(size=family.size(degree))
    bend = np.diff(family.evaluate(list(p), z), 2)
    if family.convex:
        assert bend.min() > -1e-12
    elif degree > 5:
        assert bend.min() < -1e-3 and bend.max() > 1e-3, "the others bend both ways"


@over(Piecewise)
def test_tropical_rational_is_a_difference_of_two_maxima(family, degree):
    if family.convex:
        pytest.skip("one maximum")
    z, p = np.linspace(-6, 6, 500), numbers(family, degree)
    level, slope, c, k = p[0], p[1], p[2 : degree + 2], p[degree + 2 :]
    up, down = c > 0, c < 0
    wanted = highest(lines((slope, level), k[up], c[up]), z) - highest(lines((0.0, 0.0), k[down], -c[down]), z)
    close(family.evaluate(list(p), z), wanted, 1e-11 * (1 + np.abs(wanted).max()))


@pytest.mark.parametrize("seed", range(5))
def test_a_difference_of_two_maxima_is_tropical_rational(seed):
    """The other way round, with the corners of two random maxima of affine pieces."""
    random, z = np.random.default_rng(seed), np.linspace(-40, 40, 4001)
    kinks, jumps, start = [], [], np.zeros(2)
    pieces = [random.normal(size=(n, 2)) for n in (4, 5)]
    for sign, of in zip((1, -1), pieces, strict=True):
        start += sign * of[of[:, 0].argmin()]
        for one, other in combinations(of, 2):
            at = (other[1] - one[1]) / (one[0] - other[0])
            if highest(of, np.array([at]))[0] <= one @ [at, 1] + 1e-12:  # the two cross on the maximum
                kinks, jumps = [*kinks, at], [*jumps, sign * abs(one[0] - other[0])]
    p = FAMILIES["tropical-rational"].from_kinks(tuple(start), np.array(kinks), np.array(jumps))  # pyright: ignore
    wanted = highest(pieces[0], z) - highest(pieces[1], z)
    close(FAMILIES["tropical-rational"].evaluate(p, z), wanted, 1e-10 * (1 + np.abs(wanted).max()))


# -- Hermite -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("k", range(len(TABLE)))
def test_hermite_equals_the_table(k):
    z = np.linspace(-4, 4, 33)
    wanted = sum(c * z**power for power, c in enumerate(TABLE[k]))
    for degree in range(max(k, 1), len(TABLE)):
        got = FAMILIES["hermite"].basis(z, degree)[k] * sqrt(factorial(k))
        np.testing.assert_allclose(got, wanted, rtol=1e-12, atol=1e-9, err_msg=f"He_{k} at degree {degree}")


@pytest.mark.parametrize("k", range(25))
def test_hermite_equals_numpy(k):
    z, unit = np.linspace(-6, 6, 49), np.eye(25)[k]
    basis, slopes = FAMILIES["hermite"].basis(z, 24)[k], FAMILIES["hermite"].slopes(z, 24)[k]
    norm = sqrt(factorial(k))
    wanted = hermite_e.hermeval(z, unit) / norm
    np.testing.assert_allclose(basis, wanted, rtol=1e-10, atol=1e-10 * np.abs(wanted).max(), err_msg=f"h_{k}")
    wanted = hermite_e.hermeval(z, hermite_e.hermeder(unit)) / norm
    np.testing.assert_allclose(slopes, wanted, rtol=1e-10, atol=1e-10 * np.abs(wanted).max(), err_msg=f"h_{k}'")


def test_hermite_is_orthonormal_under_the_standard_normal_law():
    z, w = hermite_e.hermegauss(40)  # exact for polynomials up to degree 79
    degree = FAMILIES["hermite"].degrees[-1]
    basis = np.stack(FAMILIES["hermite"].basis(z, degree))
    gram = (basis * w / w.sum()) @ basis.T
    np.testing.assert_allclose(gram, np.eye(degree + 1), atol=1e-10)


# -- the others, against their formulas --------------------------------------------------------------------------------


@over(Separable)
def test_separable_equals_its_formula(family, degree):
    """The value by the formula that the registry prints, written the long way."""
    z, p = core(family, degree), numbers(family, degree)
    n = degree
    if family.name.startswith("fourier"):
        w = p[-1] * np.arange(1, n + 1) if family.name == "fourier" else p[2 * n + 1 :]
        wanted = p[0] + sum(p[k] * np.cos(w[k - 1] * z) + p[n + k] * np.sin(w[k - 1] * z) for k in range(1, n + 1))
    else:
        q = p[n + 1 :]
        above = sum(p[k] * z**k for k in range(n + 1))
        if family.name == "rational":
            wanted = above / (1 + abs(sum(q[j - 1] * z**j for j in range(1, n))))
        else:
            wanted = above / (1 + sum(abs(q[j - 1]) * abs(z) ** j for j in range(1, n)))
    close(family.evaluate(list(p), z), wanted, 1e-11 * (1 + np.abs(wanted).max()))


@over(Piecewise)
def test_piecewise_equals_its_formula(family, degree):
    z, p = core(family, degree), numbers(family, degree)
    if family.convex:
        offsets, slopes = p[: degree + 1], p[degree + 1 :]
        wanted = np.max(slopes[:, None] * z + offsets[:, None], axis=0)
    else:
        wanted = p[0] + p[1] * z + sum(p[2 + i] * np.maximum(z - p[degree + 2 + i], 0) for i in range(degree))
    close(family.evaluate(list(p), z), wanted, 1e-12 * (1 + np.abs(wanted).max()))


# -- a new family ------------------------------------------------------------------------------------------------------


class Chebyshev(Linear):
    """Polynomials in another basis: its copies must be Hermite's."""

    name = "chebyshev"
    formula, numbers = "sum_k c_k T_k(z), k = 0..n", "n + 1: c_0..c_n"
    smoothness, cost, reference = "polynomial", "2n multiply-adds", "a textbook"
    degrees = range(1, 17)

    def size(self, degree):
        return degree + 1

    def reach(self, degree):
        return 1.0

    def basis(self, z, degree):
        values = [z * 0 + 1, z]
        for _ in range(1, degree):
            values.append(2 * z * values[-1] - values[-2])
        return values[: degree + 1]

    def variance_preserving(self, degree):
        return balance(self, [0.0, 1.0, *[0.3] * (degree - 1)], slice(1), slice(None))

    def slopes(self, z, degree):
        second = [z * 0 + 1, 2 * z]  # T_k' = k U_(k-1)
        for _ in range(1, degree):
            second.append(2 * z * second[-1] - second[-2])
        return [z * 0] + [k * second[k - 1] for k in range(1, degree + 1)]


class Bumps(Separable):
    """A line and Gaussian bumps with learnable centres."""

    name = "bumps"
    formula, numbers = "a + b z + sum_k c_k exp(-(z - q_k)^2), k = 1..n", "2n + 2: a, b, c_1..c_n, q_1..q_n"
    smoothness, cost, reference = "analytic", "n exponentials, 3n multiply-adds", "a textbook"
    degrees = range(1, 9)

    def size(self, degree):
        return 2 * degree + 2

    def shape(self, degree):
        return degree

    def reach(self, degree):
        return 3.0

    def variance_preserving(self, degree):
        return balance(self, [0.0, 1.0, *[0.5] * degree, *np.linspace(-1, 1, degree)], slice(1), slice(degree + 2))

    def starts(self, degree, z, w, f):
        return np.tile([np.linspace(-2, 2, degree), np.linspace(-1, 1, degree)], (len(z), 1, 1))

    def parts(self, p, z):
        n = len(p) // 2 - 1
        lib = torch if torch.is_tensor(p[-1] * z) else np
        return p[2 : n + 2], [(z - q, lib.exp(-((z - q) ** 2))) for q in p[n + 2 :]]

    def evaluate(self, parameters, z):
        heights, bumps = self.parts(parameters, z)
        return sum((c * e for c, (_, e) in zip(heights, bumps, strict=True)), parameters[0] + parameters[1] * z)

    def slope(self, parameters, z):
        heights, bumps = self.parts(parameters, z)
        return sum((-2 * c * t * e for c, (t, e) in zip(heights, bumps, strict=True)), parameters[1] + z * 0)

    def jacobian(self, parameters, z):
        heights, bumps = self.parts(parameters, z)
        pairs = list(zip(heights, bumps, strict=True))
        values = [z * 0 + 1, z, *(e for _, e in bumps), *(2 * c * t * e for c, (t, e) in pairs)]
        slopes = [z * 0, z * 0 + 1, *(-2 * t * e for t, e in bumps)]
        return values, [*slopes, *(c * (2 - 4 * t * t) * e for c, (t, e) in pairs)]


@pytest.fixture(params=[Chebyshev(), Bumps()], ids=lambda family: family.name)
def stranger(request, monkeypatch):
    """A family that the package does not know, as one file and one entry of the registry."""
    monkeypatch.setitem(FAMILIES, request.param.name, request.param)
    return request.param


def test_a_new_family_fits_and_learns(stranger):
    for target, most in (("tanh", 3e-2), ("relu6", 2e-2), ("gelu", 2e-2)):
        result = fit(target, family=stranger.name, degree=6)
        assert result.value_rms < most and result.parameters == stranger.size(6), f"{target}: {result.value_rms:.1e}"
        x = np.linspace(-9, 9, 200)
        act = Activation.from_fit(result, groups=2)
        close(act(torch.tensor(x).reshape(-1, 2)).detach().flatten(), result(x)[0], 1e-4)
    assert fit("gelu", family=stranger.name, degree=6, tails="none").lo == -np.inf
    inputs, losses = torch.randn(64, 2), []
    for _ in range(20):
        act.theta.grad = None
        losses.append((act(inputs) - inputs.tanh()).square().mean())
        losses[-1].backward()
        with torch.no_grad():  # down the gradient, by what would take off a twentieth were the loss straight
            act.theta -= 0.05 * losses[-1] * act.theta.grad / act.theta.grad.square().sum()
    assert losses[-1] < 0.9 * losses[0]


def test_another_polynomial_basis_gives_the_same_copy(monkeypatch):
    monkeypatch.setitem(FAMILIES, "chebyshev", Chebyshev())
    x = np.linspace(-12, 12, 401)
    for target in ("gelu", "mish", "selu", "tanhshrink"):
        for degree in (4, 8):
            ours, theirs = (fit(target, family=name, degree=degree) for name in ("chebyshev", "hermite"))
            close(ours(x)[0], theirs(x)[0], 2e-4, f"{target}, degree {degree}")
            assert ours.objective == pytest.approx(theirs.objective, rel=1e-3, abs=1e-13)


def test_a_new_family_lives_in_models_files_and_commands(stranger, tmp_path):
    model = tiny.hf("gpt2")
    wanted = tiny.outputs(model)
    made = orthoact.convert_(model, family=stranger.name, degree=6)
    assert {row["family"] for row in made.sites} == {stranger.name}
    assert (tiny.outputs(model) - wanted).abs().max() < 0.1 * wanted.abs().max()
    model(input_ids=torch.arange(8)[None], labels=torch.arange(8)[None]).loss.backward()
    activations = [m for m in model.modules() if isinstance(m, Activation)]
    assert len(activations) == 2 and all(act.theta.grad.abs().max() > 0 for act in activations)
    with torch.no_grad():
        for act in activations:
            act.theta -= 0.01 * act.theta.grad
    model.save_pretrained(tmp_path)
    loaded = tf.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(tiny.outputs(loaded), tiny.outputs(model))
    rows = json.loads(CliRunner().invoke(main, ["families", "--json"]).stdout)["families"]
    assert rows[-1]["name"] == stranger.name and rows[-1]["parameters"] == stranger.size(8)
