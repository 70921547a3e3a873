"""The module equals the float64 reference, keeps its numbers in float32, and learns in its own coordinates."""

import copy as copying
from dataclasses import replace
from functools import cache
from itertools import pairwise

import numpy as np
import pytest
import torch
from numpy.polynomial import hermite_e
from torch import nn

from orthoact.interp import FAMILIES, Activation, Fit, Gaussian, OrthoactError, fit, original
from orthoact.interp.activation import TENSORS
from orthoact.interp.coordinates import HEAVY, SLOPE_WEIGHT
from orthoact.interp.formula import plain

TARGETS = ["gelu", "silu", "mish", "tanh", "relu", "relu6", "hardswish", "leaky_relu(0.2)", "softplus", "relu2"]
X = np.linspace(-30, 30, 2401)


@cache
def reference(target: str = "gelu", degree: int = 8, **options) -> Fit:
    return fit(target, degree=degree, **options)


def activation(target: str = "gelu", degree: int = 8, *, moved: float = 0.0, **options) -> Activation:
    """The module of a fit; `moved` shifts theta away from the start, as training would."""
    act = Activation.from_fit(reference(target, degree), **options)
    with torch.no_grad():
        act.theta += moved * torch.randn_like(act.theta)
    return act


def moved_reference(act: Activation, start: Fit, theta: np.ndarray | None = None) -> Fit:
    """The float64 reference with the module's coefficients a_0 + W theta."""
    theta = act.theta.detach().double().numpy() if theta is None else theta
    a = np.array(start.coefficients) + act.transform.double().numpy() @ theta
    return replace(start, coefficients=tuple(a))


def off_joints(x: np.ndarray, result: Fit, distance: float = 1e-3) -> np.ndarray:
    return x[(np.abs(x - result.lo) > distance) & (np.abs(x - result.hi) > distance)]


# -- values ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("degree", [4, 8, 12, 16])
@pytest.mark.parametrize("target", TARGETS)
def test_equals_the_reference(target, degree):
    result = reference(target, degree)
    act = activation(target, degree)
    for dtype in (torch.float32, torch.float64):
        x = torch.tensor(X, dtype=dtype)
        got = act(x)
        assert got.dtype == dtype and got.shape == x.shape
        wanted = result(x.double().numpy())[0]
        error = np.abs(got.detach().double().numpy() - wanted)
        tolerance = 2e-5 * max(1, np.abs(wanted).max() / 30)  # relu2 is as large as 450 here
        assert error.max() < tolerance, f"{dtype}: {error.max():.1e} at {X[error.argmax()]:.3f}"


@pytest.mark.parametrize("domain", [Gaussian(-0.5, 0.7), Gaussian(1.0, 2.0)], ids=str)
def test_equals_the_reference_under_another_law(domain):
    result = fit("silu", domain=domain)
    act = Activation.from_fit(result)
    np.testing.assert_allclose(act(torch.tensor(X)).detach().numpy(), result(X)[0], rtol=0, atol=2e-5)


def test_equals_the_reference_without_tails():
    result = reference("gelu", 8, tails="none")
    act, x = Activation.from_fit(result), np.linspace(-4, 4, 401)
    np.testing.assert_allclose(act(torch.tensor(x)).detach().numpy(), result(x)[0], rtol=0, atol=2e-5)
    far = torch.tensor([-20.0, 20.0], dtype=torch.float64)  # a polynomial: nothing bounds it
    np.testing.assert_allclose(act(far).detach().numpy(), result(far.numpy())[0], rtol=1e-4)


@pytest.mark.parametrize("target", ["gelu", "relu6", "mish"])
def test_moved_activation_equals_the_moved_reference(target):
    act = activation(target, moved=0.1)
    wanted = moved_reference(act, reference(target))(X)[0]
    error = np.abs(act(torch.tensor(X)).detach().numpy() - wanted)
    assert (error < 1e-5 + 3e-6 * np.abs(X)).all(), f"{error.max():.1e}: a tail's slope is rounded to float32"
    assert np.abs(wanted - reference(target)(X)[0]).max() > 0.01, "it has moved"


@pytest.mark.parametrize(
    ("target", "slopes"), [("gelu", (0, 1)), ("relu6", (0, 0)), ("tanh", (0, 0)), ("leaky_relu(0.2)", (0.2, 1))]
)
def test_far_inputs_follow_the_asymptotes(target, slopes):
    act = activation(target)
    level = {"relu6": (0, 6), "tanh": (-1, 1)}.get(target, (0, 0))
    for far in (1e2, 1e4):
        got = act(torch.tensor([-far, far]))
        for value, slope, intercept, x in zip(got.tolist(), slopes, level, (-far, far), strict=True):
            assert value == pytest.approx(slope * x + intercept, rel=0, abs=2e-6 * far + 1e-5), f"at {x}"


def test_shapes():
    act = activation()
    for shape in ((), (1,), (0,), (2, 0, 3), (2, 3), (2, 3, 4, 5)):
        x = torch.randn(shape)
        assert act(x).shape == x.shape
        torch.testing.assert_close(act(x).flatten(), act(x.flatten()))


def test_layout_and_input_are_left_alone():
    act, x = activation(), torch.randn(6, 5, 4)
    before = x.clone()
    wanted = act(x)
    assert torch.equal(x, before)
    torch.testing.assert_close(act(x.transpose(0, 2)), wanted.transpose(0, 2), rtol=0, atol=0)
    torch.testing.assert_close(act(x[::2, :, ::2]), wanted[::2, :, ::2], rtol=0, atol=0)


def test_nan_stays_where_it_is():
    x = torch.tensor([0.5, torch.nan, -0.5])
    for act in (activation(), activation("relu"), Activation.from_fit(reference("gelu", 4, tails="none"))):
        assert act(x).isnan().tolist() == [False, True, False]


# -- dtypes ------------------------------------------------------------------------------------------------------------

LOW = [torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", LOW)
@pytest.mark.parametrize("options", [{}, {"groups": 2}], ids=["one", "groups"])
def test_low_precision_is_float32_rounded(dtype, options):
    act = activation(moved=0.05, **options)
    x = torch.tensor(X[:-1]).reshape(-1, 4).to(dtype)
    assert act(x).dtype == dtype
    assert torch.equal(act(x), act(x.float()).to(dtype))


CASTS = {
    "half": lambda m: m.half(),
    "bfloat16": lambda m: m.bfloat16(),
    "double": lambda m: m.double(),
    "to(float16)": lambda m: m.to(torch.float16),
    "to(cpu, bfloat16)": lambda m: m.to("cpu", torch.bfloat16),
    "to(dtype=float64)": lambda m: m.to(dtype=torch.float64),
    "type(float16)": lambda m: m.type(torch.float16),
    "half and back": lambda m: m.half().float(),
}


@pytest.mark.parametrize("cast", CASTS)
def test_tensors_stay_float32(cast):
    model = nn.Sequential(nn.Linear(4, 4), activation(moved=0.05, groups=2))
    before = {name: t.clone() for name, t in model[1].state_dict().items()}
    wanted = model[1](torch.tensor(X[:-1]).reshape(-1, 4))
    CASTS[cast](model)
    for name, tensor in model[1].state_dict().items():
        assert tensor.dtype == torch.float32 and torch.equal(tensor, before[name]), name
    assert isinstance(model[1].theta, nn.Parameter) and model[1].theta.requires_grad
    if cast != "half and back":
        assert model[0].weight.dtype != torch.float32, "the rest of the model is cast"
    assert torch.equal(model[1](torch.tensor(X[:-1]).reshape(-1, 4)), wanted)


@pytest.mark.parametrize("dtype", [*LOW, torch.float64])
def test_made_in_float32_under_any_default_dtype(dtype):
    """`from_pretrained(dtype=...)` builds a model under that default."""
    wanted = activation().state_dict()
    result = reference()
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        act = Activation.from_fit(result)
    finally:
        torch.set_default_dtype(before)
    for name, tensor in act.state_dict().items():
        assert tensor.dtype == torch.float32, name
        assert torch.equal(tensor, wanted[name]), f"{name} was rounded to {dtype}"


def test_meta_and_back():
    with torch.device("meta"):
        act = Activation("hermite", 8, groups=2)
    assert {t.device.type for t in act.state_dict().values()} == {"meta"}
    act = act.to(torch.bfloat16).to_empty(device="cpu")
    full = activation(groups=2, moved=0.05)
    act.load_state_dict(full.state_dict())
    assert {(t.device.type, t.dtype) for t in act.state_dict().values()} == {("cpu", torch.float32)}
    x = torch.randn(5, 4)
    assert torch.equal(act(x), full(x))
    assert {t.device.type for t in full.to("meta").state_dict().values()} == {"meta"}


@pytest.mark.parametrize("options", [{}, {"groups": 2}], ids=["one", "groups"])
def test_autocast_changes_nothing(options):
    act = activation(moved=0.1, **options)
    x = torch.randn(16, 4) * 3
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.bfloat16, "autocast is on"
        coefficients, got = act.coefficients, act(x)
        low = act(x.bfloat16())
    assert coefficients.dtype == torch.float32 and torch.equal(coefficients, act.coefficients)
    assert got.dtype == torch.float32 and torch.equal(got, act(x))
    assert torch.equal(low, act(x.bfloat16()))


# -- gradients ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("degree", [4, 8, 12])
@pytest.mark.parametrize("target", TARGETS)
def test_gradient_of_the_input(target, degree):
    result, h = reference(target, degree), 1e-5
    at = off_joints(X, result)
    x = torch.tensor(at, requires_grad=True)
    activation(target, degree)(x).sum().backward()
    wanted = (result(at + h)[0] - result(at - h)[0]) / (2 * h)
    np.testing.assert_allclose(x.grad.numpy(), wanted, rtol=2e-5, atol=5e-5)
    np.testing.assert_allclose(x.grad.numpy(), result(at)[1], rtol=2e-5, atol=5e-5)


@pytest.mark.parametrize("dtype", [torch.float32, *LOW])
def test_gradient_of_the_input_in_any_dtype(dtype):
    at = torch.tensor(off_joints(X, reference(), 0.05), dtype=dtype)
    x = at.clone().requires_grad_()
    activation()(x).sum().backward()
    assert x.grad.dtype == dtype
    wanted = reference()(at.double().numpy())[1]
    np.testing.assert_allclose(x.grad.double().numpy(), wanted, atol={torch.float32: 5e-5}.get(dtype, 1e-2))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("way", ["module", "plain"])
@pytest.mark.parametrize("target", ["gelu", "mish", "tanh", "relu", "relu6", "hardswish"])
def test_gradient_of_the_input_at_the_joints(target, way, dtype):
    """There only the core's slope counts, as in the reference; also by the operations that compilers take."""
    result, act = reference(target), activation(target)
    x = torch.tensor([result.lo, result.hi], dtype=dtype, requires_grad=True)
    value = act(x) if way == "module" else plain(x, *act.numbers(dtype), act.family, None, -1)
    value.sum().backward()
    np.testing.assert_allclose(x.grad.double().numpy(), result(x.detach().double().numpy())[1], atol=5e-5)


@pytest.mark.parametrize("options", [{}, {"tails": "none"}], ids=["linear", "none"])
@pytest.mark.parametrize("target", ["gelu", "relu6", "mish"])
def test_gradient_of_theta(target, options):
    """Against central differences of the float64 reference, tails included."""
    start = reference(target, 8, **options)
    act = Activation.from_fit(start)
    with torch.no_grad():
        act.theta += 0.05 * torch.randn_like(act.theta)
    x = np.linspace(-12, 12, 97) if act.tails == "linear" else np.linspace(-4, 4, 97)
    weights = np.random.default_rng(0).normal(size=x.shape)
    (act(torch.tensor(x)) * torch.tensor(weights)).sum().backward()
    theta, h = act.theta.detach().double().numpy(), 1e-4
    wanted = np.zeros_like(theta)
    for k in range(len(theta)):
        step = h * np.eye(len(theta))[k]
        ahead, behind = (moved_reference(act, start, theta + s * step)(x)[0] for s in (1, -1))
        wanted[k] = weights @ (ahead - behind) / (2 * h)
    assert act.theta.grad.dtype == torch.float32
    np.testing.assert_allclose(act.theta.grad.numpy(), wanted, atol=2e-5 * np.abs(wanted).max())


def test_gradients_are_right_by_gradcheck():
    act = activation(groups=2, moved=0.05)
    x = torch.tensor(off_joints(np.linspace(-6, 6, 24), reference(), 1e-2)[:20], dtype=torch.float64).reshape(5, 4)
    assert torch.autograd.gradcheck(act, x.requires_grad_(), atol=1e-4)


def test_every_group_learns_from_its_channels_alone():
    act = activation(groups=3)
    act(torch.randn(5, 6))[:, 2:4].sum().backward()
    assert act.theta.grad[1].abs().max() > 0
    assert act.theta.grad[0].abs().max() == act.theta.grad[2].abs().max() == 0


# -- coordinates -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"groups": 3}], ids=["one", "groups"])
def test_theta_moves_the_coefficients_by_the_transform(options):
    act = activation(**options)
    wanted = torch.tensor(reference().coefficients).expand(act.theta.shape)
    assert torch.equal(act.theta, torch.zeros_like(act.theta))
    assert torch.equal(act.coefficients, wanted), "at the beginning they are the fit's"
    with torch.no_grad():
        act.theta.copy_(torch.randn_like(act.theta))
    moved = act.coefficients - act.start
    torch.testing.assert_close(moved, act.theta @ act.transform.T, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("degree", [3, 4, 8, 12])
@pytest.mark.parametrize("domain", [Gaussian(), Gaussian(-0.5, 0.7)], ids=str)
def test_transform_whitens_the_gram_matrix(degree, domain):
    """With features and law computed here: one step of theta is one step in function space."""
    result = reference("silu", degree, domain=domain)
    w = Activation.from_fit(result).transform.double().numpy()
    z = np.linspace(-16, 16, 4001)
    law = sum(p * np.exp(-(((z - m) / s) ** 2) / 2) / s for p, m, s in HEAVY)
    x, law = domain.mean + domain.std * z, law / law.sum()
    basis = np.diag([1 / np.sqrt(float(np.prod(np.arange(1, k + 1)))) for k in range(degree + 1)])

    def feature(k: int) -> tuple[np.ndarray, np.ndarray]:
        core = np.clip(x, result.lo, result.hi)
        u = (core - result.location) / result.scale
        slope = hermite_e.hermeval(u, hermite_e.hermeder(basis[k])) / result.scale
        return hermite_e.hermeval(u, basis[k]) + slope * (x - core), slope

    values, slopes = (np.stack(part, axis=1) for part in zip(*map(feature, range(degree + 1)), strict=True))
    gram = (values.T * law) @ values + SLOPE_WEIGHT * (slopes.T * law) @ slopes
    np.testing.assert_allclose(w.T @ gram @ w, np.eye(degree + 1), atol=5e-3)
    np.testing.assert_allclose(w, w.T, atol=1e-5 * np.abs(w).max(), err_msg="the symmetric root")


@pytest.mark.parametrize("degree", [2, 8, 12])
def test_transform_is_invertible(degree):
    for options in ({}, {"tails": "none"}):
        w = Activation.from_fit(reference("gelu", degree, **options)).transform
        assert torch.isfinite(w).all()
        assert np.linalg.matrix_rank(w.double().numpy(), tol=1e-7) == degree + 1, options


# -- groups ------------------------------------------------------------------------------------------------------------


def single(act: Activation, group: int) -> Activation:
    """An activation of its own with one group's coefficients."""
    one = Activation.from_fit(reference())
    with torch.no_grad():
        one.theta.copy_(act.theta[group])
    return one


@pytest.mark.parametrize("groups", [1, 2, 3, 6])
@pytest.mark.parametrize(
    ("channel", "shape"),
    [(-1, (6,)), (-1, (2, 5, 6)), (1, (2, 6, 3, 4)), (-3, (2, 6, 3, 4)), (0, (6, 2))],
)
def test_groups_act_on_their_slices(groups, channel, shape):
    act = activation(groups=groups, channel=channel, moved=0.2)
    x = 4 * torch.randn(shape)
    got = act(x)
    for g, (part, slice_) in enumerate(zip(got.chunk(groups, channel), x.chunk(groups, channel), strict=True)):
        torch.testing.assert_close(part, single(act, g)(slice_), rtol=1e-6, atol=1e-6, msg=lambda m, g=g: f"{g}: {m}")
    if groups > 1:
        assert not torch.allclose(got, single(act, 0)(x)), "the groups differ"


@pytest.mark.parametrize("groups", [1, 2, 6])
def test_groups_start_as_the_fit(groups):
    x = torch.randn(3, 6)
    torch.testing.assert_close(activation(groups=groups)(x), activation()(x), rtol=0, atol=1e-6)


def test_empty_batch_with_groups():
    assert activation(groups=2)(torch.zeros(0, 6)).shape == (0, 6)


@pytest.mark.parametrize(("groups", "channel", "shape"), [(4, -1, (2, 6)), (12, -1, (2, 6)), (4, 1, (2, 6, 4, 4))])
def test_groups_that_do_not_divide(groups, channel, shape):
    with pytest.raises(OrthoactError, match=f"groups {groups}.*divisor of the 6 channels"):
        activation(groups=groups, channel=channel)(torch.zeros(shape))


# -- state -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"groups": 3}, {"tails": "none"}], ids=["one", "groups", "none"])
def test_state_round_trip(options):
    tails = {"tails": options.pop("tails")} if "tails" in options else {}
    full = Activation.from_fit(reference("silu", 6, **tails), original=nn.PReLU(), **options)
    with torch.no_grad():
        full.theta += 0.1 * torch.randn_like(full.theta)
    state = {name: t.clone() for name, t in full.state_dict().items()}
    assert set(state) == set(TENSORS), "and none of the original's"
    fresh = Activation("hermite", 6, **options, **tails)
    x = 5 * torch.randn(4, 6)
    assert not torch.equal(fresh(x), full(x))
    fresh.load_state_dict(state, strict=True)
    assert torch.equal(fresh(x), full(x))


def test_the_original_is_not_part_of_the_module():
    before = nn.PReLU()
    act = activation(original=before)
    assert act.original is before
    assert [name for name, _ in act.named_parameters()] == ["theta"]
    assert list(act.children()) == []


def test_only_theta_learns():
    for act in (activation(), activation(groups=1), activation(groups=4)):
        learnable = {name: p for name, p in act.named_parameters() if p.requires_grad}
        assert set(learnable) == {"theta"}
        assert all(p.dim() >= 1 for p in learnable.values()), "FSDP2 refuses 0-D"
        assert act.theta.shape == ((9,) if act.groups is None else (act.groups, 9))


def test_load_fit_starts_afresh():
    act = activation("gelu", moved=0.3)
    act.load_fit(reference("silu"))
    x = torch.tensor(X)
    assert torch.equal(act(x), activation("silu")(x))


def test_deepcopy_is_independent():
    act = activation(moved=0.1, original=nn.GELU())
    twin, x = copying.deepcopy(act), torch.randn(20)
    assert torch.equal(twin(x), act(x)) and twin.extra_repr() == act.extra_repr()
    with torch.no_grad():
        twin.theta += 1
    assert not torch.equal(twin(x), act(x))
    with original(twin):
        assert torch.equal(twin(x), nn.GELU()(x))
        assert not act.bypass


def test_learning_moves_the_copy_to_another_target():
    """Some steps of plain Adam on theta turn GELU into tanh as far as the degree allows."""
    act, x = activation("gelu", 12), torch.linspace(-2.5, 2.5, 201)
    optimiser = torch.optim.Adam(act.parameters(), lr=0.02)
    losses = []
    for _ in range(200):
        loss = (act(x) - x.tanh()).square().mean()
        losses.append(loss.item())
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    assert losses[-1] < 1e-3 * losses[0], losses[:: len(losses) // 5]


# -- original ----------------------------------------------------------------------------------------------------------


def net(first=None, second=None) -> nn.Module:
    first, second = (activation("gelu", 4, original=o) for o in (first or nn.GELU(), second or nn.SiLU()))
    return nn.Sequential(nn.Linear(4, 8), first, nn.Sequential(nn.Linear(8, 4), second))


def test_original_toggles_and_restores():
    model, x = net(), torch.randn(3, 4)
    wanted = nn.SiLU()(model[2][0](nn.GELU()(model[0](x))))
    converted = model(x)
    with original(model) as same:
        assert same is model
        assert torch.equal(model(x), wanted)
        with original(model):
            assert torch.equal(model(x), wanted)
        assert torch.equal(model(x), wanted), "the inner one restores what it found"
    assert torch.equal(model(x), converted) and not torch.equal(converted, wanted)


def test_original_restores_after_an_exception():
    model, x = net(), torch.randn(3, 4)
    converted = model(x)
    with pytest.raises(ZeroDivisionError), original(model):
        1 / 0  # noqa: B018
    assert torch.equal(model(x), converted)


def test_original_keeps_what_was_bypassed():
    model = net()
    model[1].bypass = True
    with original(model):
        assert model[2][1].bypass
    assert model[1].bypass and not model[2][1].bypass


def test_an_unknown_original_is_an_error():
    model, x = nn.Sequential(net(), activation("gelu", 4)), torch.randn(3, 4)
    converted = model(x)
    with pytest.raises(OrthoactError, match="original of 1 activation"), original(model):
        pytest.fail("the body must not run")
    assert torch.equal(model(x), converted), "nothing is toggled"


# -- construction ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"family": "chebyshev"}, "unknown family 'chebyshev'.*hermite"),
        ({"degree": 0}, "degree 0.*1 to 24"),
        ({"degree": 25}, "degree 25.*1 to 24"),
        ({"degree": 8.0}, "degree 8.0"),
        ({"tails": "cubic"}, "tails 'cubic'.*linear, none"),
        ({"groups": 0}, "groups 0"),
        ({"groups": -2}, "groups -2"),
        ({"groups": 1.5}, "groups 1.5"),
    ],
    ids=str,
)
def test_bad_arguments(arguments, message):
    with pytest.raises(OrthoactError, match=message):
        Activation(**arguments)


def test_repr_says_what_it_is():
    text = repr(activation("leaky_relu(0.2)", 6))
    for part in ("leaky_relu(0.2)", "hermite", "degree=6", "tails=linear"):
        assert part in text
    assert "groups" not in text
    assert "groups=4, channel=1" in repr(activation("gelu", 8, groups=4, channel=1))


# -- compiled ----------------------------------------------------------------------------------------------------------


@pytest.mark.long
@pytest.mark.parametrize("options", [{}, {"groups": 2}], ids=["one", "groups"])
def test_compiles_into_one_graph(options):
    act = activation(moved=0.05, **options)
    compiled = torch.compile(act, fullgraph=True)
    for dtype in (torch.float32, torch.bfloat16):
        x = 4 * torch.randn(16, 4, dtype=dtype)
        torch.testing.assert_close(compiled(x), act(x), rtol=1e-5 if dtype == torch.float32 else 1e-2, atol=1e-5)
    grads = []
    for module in (act, compiled):
        x = torch.linspace(-6, 6, 64).reshape(16, 4).requires_grad_()
        act.theta.grad = None
        module(x).sum().backward()
        grads.append((x.grad, act.theta.grad.clone()))
    for eager, graph in pairwise(grads):
        torch.testing.assert_close(graph, eager, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("groups", "shape"), [(None, (5, 8)), (4, (5, 8)), (8, (2, 3, 3, 8))])
@pytest.mark.parametrize("turned", [False, True])
def test_what_follows_may_work_in_place(family, groups, shape, turned):
    """As Dropout(inplace=True) behind torch's own activations."""
    act = Activation.from_fit(fit("relu", family=family, degree=3), groups=groups, channel=-1)
    x = torch.randn(shape[::-1]).permute(*reversed(range(len(shape)))) if turned else torch.randn(shape)
    x.requires_grad_()
    found = []
    for inplace in (False, True):
        act.theta.grad = x.grad = None
        y = act(x)
        y = y.mul_(2).add_(1) if inplace else y * 2 + 1
        y.square().sum().backward()
        found.append((y.detach(), x.grad, act.theta.grad))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_inputs_that_it_cannot_take():
    act = Activation.from_fit(fit("gelu", degree=4), groups=2, channel=3)
    for x, said in (
        (torch.randn(2, 4), "channel 3: expected an axis"),
        (torch.randn(2, 4, 4, 0), "groups 2: expected a divisor of the 0 channels"),
        (torch.ones(2, 4, 4, 2, dtype=torch.int64), r"floating point numbers, got torch\.int64"),
    ):
        with pytest.raises(OrthoactError, match=said):
            act(x)
