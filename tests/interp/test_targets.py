"""Every target equals the module of torch or transformers that it stands for, and is what it declares."""

import inspect
from math import inf

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers.activations import ACT2CLS, ACT2FN, XIELUActivation

from orthoact.interp import ALIASES, TARGETS, OrthoactError, Target, fit, get_target

GRID = np.unique(np.concatenate([np.linspace(-30, 30, 4001), np.linspace(-4, 4, 3203), [-1e-3, 1e-3, 20.0, 20.1]]))

MODULES = [
    (nn.CELU(), "celu"),
    (nn.CELU(0.5), "celu(0.5)"),
    (nn.ELU(), "elu"),
    (nn.ELU(0.5), "elu(0.5)"),
    (nn.GELU(), "gelu"),
    (nn.GELU(approximate="tanh"), "gelu_tanh"),
    (nn.Hardshrink(), "hardshrink"),
    (nn.Hardshrink(1.25), "hardshrink(1.25)"),
    (nn.Hardsigmoid(), "hardsigmoid"),
    (nn.Hardswish(), "hardswish"),
    (nn.Hardtanh(), "hardtanh"),
    (nn.Hardtanh(-2, 0.5), "hardtanh(-2, 0.5)"),
    (nn.LeakyReLU(), "leaky_relu"),
    (nn.LeakyReLU(0.2), "leaky_relu(0.2)"),
    (nn.LogSigmoid(), "log_sigmoid"),
    (nn.Mish(), "mish"),
    (nn.PReLU(), "prelu"),
    (nn.PReLU(init=0.125), "leaky_relu(0.125)"),
    (nn.RReLU().eval(), "rrelu"),
    (nn.RReLU(0.1, 0.3).eval(), "leaky_relu(0.2)"),
    (nn.ReLU(), "relu"),
    (nn.ReLU6(), "relu6"),
    (nn.SELU(), "selu"),
    (nn.SiLU(), "silu"),
    (nn.SiLU(), "swish"),
    (nn.Sigmoid(), "sigmoid"),
    (nn.Softplus(), "softplus"),
    (nn.Softplus(beta=2), "softplus(2)"),
    (nn.Softplus(1.0, 0.5), "softplus(1.0, 0.5)"),
    (nn.Softplus(2.0, -1.0), "softplus(2.0, -1.0)"),
    (nn.Softshrink(), "softshrink"),
    (nn.Softshrink(1.25), "softshrink(1.25)"),
    (nn.Softsign(), "softsign"),
    (nn.Tanh(), "tanh"),
    (nn.Tanhshrink(), "tanhshrink"),
    (nn.Threshold(0, 0), "threshold"),
    (nn.Threshold(-0.5, 2), "threshold(-0.5, 2)"),
    (nn.Identity(), "identity"),
]

NOT_ONE_VARIABLE = {"GLU", "LogSoftmax", "MultiheadAttention", "Softmax", "Softmax2d", "Softmin"}
"""The classes of torch.nn.modules.activation that mix elements or take more than one input."""

NAMES = [
    *TARGETS,
    *ALIASES,
    *sorted({name for _, name in MODULES if "(" in name}),
    "xielu(0.5, 1.5, 0.25)",
    "leaky_relu(-0.5)",
]


def compare(module: nn.Module, name: str, *, atol: float = 1e-9):
    """Values everywhere and slopes off the kinks equal those of a module in float64."""
    target = get_target(name)
    x = torch.tensor(GRID, requires_grad=True)
    wanted = module.double()(x)
    (wanted_slopes,) = torch.autograd.grad(wanted.sum(), x)
    values, slopes = target(GRID)
    assert values.dtype == slopes.dtype == np.float64
    np.testing.assert_allclose(values, wanted.detach().numpy(), rtol=1e-12, atol=atol, err_msg=f"{name}: values")
    smooth = np.all([np.abs(GRID - kink) > 1e-9 for kink in target.kinks], axis=0) & np.isfinite(GRID)
    np.testing.assert_allclose(
        slopes[smooth], wanted_slopes.numpy()[smooth], rtol=1e-12, atol=atol, err_msg=f"{name}: slopes"
    )


# -- what they stand for -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("module", "name"), MODULES, ids=[f"{type(m).__name__}-{n}" for m, n in MODULES])
def test_torch_module(module, name):
    # Softplus goes over to the identity at beta x = 20, where 2.1e-9 / beta is missing; Hardsigmoid's backward
    # takes its 1/6 from float32
    compare(module, name, atol=6e-9 if isinstance(module, (nn.Softplus, nn.Hardsigmoid)) else 1e-9)


@pytest.mark.parametrize("key", sorted(set(ACT2CLS) - {"xielu"}))
def test_transformers_activation(key):
    # sqrtsoftplus holds a softplus that goes over to the identity at 20
    compare(ACT2FN[key].eval(), key, atol=3e-9 if key == "sqrtsoftplus" else 1e-9)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("alphas", [(0.8, 0.8), (0.3, 1.1)])
def test_transformers_xielu_at_its_present_parameters(alphas, dtype):
    module = XIELUActivation(*alphas, dtype=dtype).double()
    alpha_p, alpha_n, beta = F.softplus(module.alpha_p), module.beta + F.softplus(module.alpha_n), module.beta
    # its eps of -1e-6 is rounded to bfloat16 and shows in the value at 0
    compare(module, f"xielu({alpha_p.item()!r}, {alpha_n.item()!r}, {beta.item()!r})", atol=1e-8)
    if alphas == (0.8, 0.8) and dtype == torch.float64:
        compare(module, "xielu")


def test_every_transformers_name_resolves():
    for key in ACT2CLS:
        assert isinstance(get_target(key), Target), key


def test_every_torch_activation_is_covered_or_named():
    classes = {name for name in torch.nn.modules.activation.__all__ if inspect.isclass(getattr(nn, name))}
    covered = {type(module).__name__ for module, _ in MODULES}
    assert classes - covered == NOT_ONE_VARIABLE
    assert covered - classes == {"Identity"}


def test_every_target_is_covered():
    bases = {name.split("(")[0] for _, name in MODULES} | set(ACT2CLS)
    bases |= {ALIASES.get(base, base).split("(")[0] for base in bases}
    assert set(TARGETS) - bases == set(), "a target that no module of torch or transformers checks"
    assert set(ALIASES) - bases == set(), "an alias that no module of torch or transformers checks"


# -- names -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_recorded_name_gives_the_target_back(name):
    target = get_target(name)
    again = get_target(target.name)
    assert again.name == target.name
    assert (again.left, again.right, again.kinks, again.holds) == (
        target.left,
        target.right,
        target.kinks,
        target.holds,
    )
    for got, wanted in zip(again(GRID), target(GRID), strict=True):
        np.testing.assert_array_equal(got, wanted)


def test_target_passes_through():
    target = get_target("gelu")
    assert get_target(target) is target


def test_names_may_have_spaces():
    assert get_target(" hardtanh( -2 , 0.5 ) ").kinks == (-2.0, 0.5)


@pytest.mark.parametrize("name", ["gelo", "", "GELU", "gelu-tanh", "leaky_relu(0.2", "relu 6", "softmax"])
def test_unknown_name_lists_the_known(name):
    with pytest.raises(OrthoactError, match="unknown target") as error:
        get_target(name)
    assert repr(name) in str(error.value)
    assert all(known in str(error.value) for known in [*TARGETS, *ALIASES])


@pytest.mark.parametrize(
    "name",
    [
        "leaky_relu(a)",
        "leaky_relu(0.1, 0.2)",
        "leaky_relu(0.1 0.2)",
        "gelu(1)",
        "hardtanh(1, 2, 3)",
        "leaky_relu(nan)",
        "leaky_relu(inf)",
        "softplus(0)",
        "hardtanh(2, -2)",
    ],
)
def test_bad_parameters(name):
    with pytest.raises(OrthoactError) as error:
        get_target(name)
    assert name in str(error.value)


# -- what they declare -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_declared_asymptotes(name):
    """True at +-200, or as far as they are said to hold; wrong beyond that; and declared where there is one."""
    target = get_target(name)
    for line, end, sign in zip((target.left, target.right), target.holds, (-1, 1), strict=True):
        x = sign * min(200.0, abs(end) - 1e-3) * np.array([0.5, 0.75, 1.0])
        values, slopes = target(x)
        if line is None:
            bend = abs(values[2] - 2 * values[1] + values[0])
            assert bend > 1e-6 * (1 + np.abs(values).max()), f"straight at {x}: declare its line"
            continue
        np.testing.assert_allclose(values[-1], line[0] * x[-1] + line[1], rtol=1e-12, atol=1e-12, err_msg=f"at {x[-1]}")
        np.testing.assert_allclose(slopes[-1], line[0], atol=1e-12, err_msg=f"at {x[-1]}")
        if abs(end) < inf:
            x = end + sign * np.array([1.0, 5.0])
            assert np.abs(target(x)[0] - line[0] * x - line[1]).min() > 1e-3, f"it holds beyond {end}"
        else:
            assert end == sign * inf


@pytest.mark.parametrize("name", NAMES)
def test_kinks_are_where_it_is_not_smooth(name):
    target, h = get_target(name), 1e-3
    low, high = max(-12, target.holds[0] + 3 * h), min(12, target.holds[1] - 3 * h)
    x = np.arange(low, high, h) + h / np.pi  # no point on a kink
    values, slopes = target(x)
    bend = np.abs(np.diff(slopes, 2))  # of order h^2 where f'' is continuous, h where it jumps, 1 where f' jumps
    jump = np.abs(np.diff(values) - h * (slopes[1:] + slopes[:-1]) / 2)[1:]  # of order h^3 where it is smooth
    middle = x[1:-1]
    near = np.zeros(middle.shape, dtype=bool)
    for kink in target.kinks:
        at = np.abs(middle - kink) < 2 * h
        assert bend[at].max() > 2e-4 or jump[at].max() > 1e-4, f"{name} is smooth at {kink}"
        near |= at
    assert bend[~near].max() < 1e-4, f"{name} has a kink at {middle[~near][bend[~near].argmax()]:.3f}"
    assert jump[~near].max() < 1e-6, f"{name} jumps at {middle[~near][jump[~near].argmax()]:.3f}"


@pytest.mark.parametrize("name", [name for name in NAMES if get_target(name).kinks])
def test_slopes_at_kinks_lie_between_those_beside(name):
    target = get_target(name)
    kinks = np.array(target.kinks)
    below, at, above = (target(kinks + step)[1] for step in (-1e-9, 0, 1e-9))
    for kink, a, slope, b in zip(kinks, below, at, above, strict=True):
        assert min(a, b) - 1e-6 <= slope <= max(a, b) + 1e-6, f"at {kink} the slope is {slope}, beside {a} and {b}"


def test_kinks_are_in_order():
    for name in NAMES:
        kinks = get_target(name).kinks
        assert list(kinks) == sorted(set(kinks)), name


# -- callables ---------------------------------------------------------------------------------------------------------

CALLABLES = [
    (torch.erf, "erf", (0.0, -1.0), (0.0, 1.0)),
    (nn.GELU(), "GELU", (0.0, 0.0), (1.0, 0.0)),
    (torch.relu, "relu", (0.0, 0.0), (1.0, 0.0)),
    (F.softplus, "softplus", (0.0, 0.0), (1.0, 0.0)),
    (nn.SELU(), "SELU", (0.0, -1.758099340847), (1.050700987355, 0.0)),
    (lambda x: x * torch.sigmoid(3 * x), "<lambda>", (0.0, 0.0), (1.0, 0.0)),
    (lambda x: x * torch.sigmoid(x) - 0.25 * x + 2, "<lambda>", (-0.25, 2.0), (0.75, 2.0)),
    (lambda x: torch.sqrt(1 + x * x), "<lambda>", None, None),
    (lambda x: x / (1 + torch.exp(-1.5 * x)), "<lambda>", (0.0, 0.0), (1.0, 0.0)),  # by autograd inf / inf far out
    (lambda x: x * torch.tanh(torch.exp(x)), "<lambda>", (0.0, 0.0), (1.0, 0.0)),
    (lambda x: 1e-9 * F.gelu(x), "<lambda>", (0.0, 0.0), (1e-9, 0.0)),
    (lambda x: x.relu() ** 2, "<lambda>", (0.0, 0.0), None),
    (torch.atan, "atan", None, None),
    (torch.sin, "sin", None, None),
    (torch.ones_like, "ones_like", (0.0, 1.0), (0.0, 1.0)),
]


@pytest.mark.parametrize(("function", "name", "left", "right"), CALLABLES, ids=range(len(CALLABLES)))
def test_callable(function, name, left, right):
    target = get_target(function)
    assert target.name == name
    for got, wanted in ((target.left, left), (target.right, right)):
        assert (got is None) == (wanted is None), (got, wanted)
        if got is not None:
            np.testing.assert_allclose(got, wanted, atol=1e-6)
    x = torch.tensor(GRID, requires_grad=True)
    values, slopes = target(GRID)
    np.testing.assert_array_equal(values, function(x).detach().numpy())
    h = 1e-6
    ahead, behind = (function(torch.tensor(GRID + s * h)).numpy() for s in (1, -1))
    smooth = (np.abs(GRID) > 1e-4) & (np.abs(GRID - 20) > 1e-4)  # F.softplus goes over to the identity at 20
    np.testing.assert_allclose(slopes[smooth], ((ahead - behind) / (2 * h))[smooth], atol=1e-6)


def test_a_slope_that_autograd_loses_is_a_difference():
    slopes = get_target(lambda x: x / (1 + torch.exp(-1.5 * x)))(np.array([-900.0, -500.0, 0.0, 900.0]))[1]
    np.testing.assert_allclose(slopes, [0.0, 0.0, 0.5, 1.0], atol=1e-9)


@pytest.mark.parametrize("scale", [1e-3, 1e9])
def test_a_copy_is_as_good_in_any_unit_of_the_output(scale):
    assert fit(lambda x: scale * F.silu(x)).share < 3 * fit("silu").share


def test_a_callable_may_work_in_place():
    target, x = get_target(lambda x: x.mul_(2).relu_()), np.array([-1.0, 3.0])
    values, slopes = target(x)
    assert values.tolist() == [0.0, 6.0] and slopes.tolist() == [0.0, 2.0] and x.tolist() == [-1.0, 3.0]


@pytest.mark.parametrize("hole", [(10.1, 20.0), (0.76, 0.78)])
def test_a_hole_between_the_points_of_the_probe_is_named(hole):
    low, high = hole
    with pytest.raises(OrthoactError, match=rf"not finite at x = {low:.2g}"):
        fit(lambda x: torch.where((x > low) & (x < high), torch.nan, F.gelu(x)))


def test_gradient_mode_does_not_matter():
    wanted = get_target("gelu")(GRID)
    with torch.no_grad():
        got = get_target("gelu")(GRID)
    with torch.inference_mode():
        inference = get_target("gelu")(GRID)
    np.testing.assert_array_equal(got, wanted, err_msg="no_grad")
    np.testing.assert_array_equal(inference, wanted, err_msg="inference_mode")


def test_numbers_of_any_shape():
    target = get_target("tanh")
    x = np.array([[0.0, 1.0, 2.0]])
    np.testing.assert_allclose(target(x)[0], np.tanh(x), rtol=1e-14)
    np.testing.assert_allclose(target(np.float32(0.5))[1], 1 - np.tanh(0.5) ** 2, rtol=1e-14)
    np.testing.assert_allclose(target(np.array([1, 2]))[0], np.tanh([1.0, 2.0]), rtol=1e-14)


def stranger(x):
    raise RuntimeError("a stranger's error")


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda x: x.softmax(-1), "not elementwise"),
        (lambda x: x - x.mean(), "not elementwise"),
        (lambda x: x.cumsum(0), "not elementwise"),
        (nn.Dropout(0.5), "not elementwise"),
        (lambda x: x.sum(), "not elementwise"),
        (lambda x: x[:3], "not elementwise"),
        (lambda x: torch.stack([x, x]), "not elementwise"),
        (torch.log, "finite"),
        (torch.exp, "finite"),
        (torch.sqrt, "finite"),
        (stranger, "a stranger's error"),
        (lambda x: 1.0, "could not be evaluated"),
        (lambda x, y: x, "could not be evaluated"),
        (nn.Linear(3, 3), "could not be evaluated"),
        (3, "could not be evaluated"),
        (None, "could not be evaluated"),
    ],
    ids=range(16),
)
def test_callables_that_are_no_activation(function, message):
    with pytest.raises(OrthoactError, match=message):
        get_target(function)
