"""The fused function: equal on every path, exact in its derivatives, frugal, and at home in torch's machinery."""

import copy
import io
import subprocess
import sys
import warnings
from functools import cache

import numpy as np
import pytest
import torch
from torch import nn
from torch.autograd import forward_ad, gradcheck, gradgradcheck, graph
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.utils.parametrize import register_parametrization
from torch.utils.checkpoint import checkpoint

from orthoact.interp import FAMILIES, Activation, OrthoactError, curve, engine, fit, fourier, halving, kernels, layout

NAMES = list(FAMILIES)
SHAPES = {
    "empty": (0, 6),
    "scalar": (),
    "short": (6,),
    "odd": (7, 11, 6),
    "image": (2, 6, 5, 3),
    "two blocks": (3, layout.BLOCK // 4 + 5, 6),
}


@cache
def start(family: str, target: str = "gelu", **options):
    low = min(FAMILIES[family].degrees, key=lambda n: abs(FAMILIES[family].size(n) - 9))
    return fit(target, family=family, degree=options.pop("degree", low), **options)


def activation(family: str = "hermite", moved: float = 0.02, target: str = "gelu", **options) -> Activation:
    kept = {name: options.pop(name) for name in ("groups", "channel", "original") if name in options}
    act = Activation.from_fit(start(family, target, **options), **kept)
    with torch.no_grad():
        act.theta += moved * torch.randn_like(act.theta)
    return act


def by_hand(act: Activation, x: torch.Tensor) -> torch.Tensor:
    """F in float64 by the contract of the families, for a module without groups."""
    a, wide = list(act.coefficients.double().unbind(-1)), x.double()
    lo, hi, location, scale = (getattr(act, name).double() for name in ("lo", "hi", "location", "scale"))
    if act.tails == "none":
        return act.family.evaluate(a, (wide - location) / scale)
    at = (torch.stack([lo, hi]) - location) / scale
    left, right = act.family.slope(a, at) / scale + act.jumps.double()
    inside = torch.where(wide < lo, lo, torch.where(wide > hi, hi, wide))
    core = act.family.evaluate(a, (inside - location) / scale)
    return core + left * (wide - lo).clamp(max=0) + right * (wide - hi).clamp(min=0)


def derivatives(act, x, weights):
    """F, and the gradients of its weighted sum by x and theta."""
    x = x.detach().clone().requires_grad_()
    act.theta.grad = None
    out = act(x)
    out.backward(weights)
    return out.detach(), x.grad, act.theta.grad


# -- values and gradients ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tails", ["linear", "none"])
@pytest.mark.parametrize("family", NAMES)
def test_equals_the_formula(family, tails):
    act = activation(family, tails=tails)
    x = torch.linspace(-9, 9, 5001) if tails == "linear" else torch.linspace(-3, 3, 5001)
    wanted, numbers = by_hand(act, x), list(act.coefficients.detach().double())
    inside = (x.double().clamp(act.lo, act.hi) if tails == "linear" else x.double()) - act.location
    by = act.family.jacobian(numbers, inside / act.scale)[0]
    terms = sum((a * part).abs() for a, part in zip(numbers, by, strict=True))
    scale = torch.maximum(wanted.abs(), terms).clamp(min=1)
    assert ((act(x).double() - wanted).abs() / scale).max() < 2e-6
    assert ((act(x.double()) - wanted).abs() / scale).max() < 4e-7, "the coefficients themselves are rounded"


@pytest.mark.parametrize("degree", [3, 4, 5, 8, 9, 10, 12, 16, 20, 24])
@pytest.mark.parametrize("target", ["gelu", "silu", "tanh", "mish"])
def test_hermite_is_accurate_on_its_core(target, degree):
    """2e-6 max(1, |F|) against float64, at every degree."""
    act = activation(moved=0, target=target, degree=degree)
    x = torch.linspace(act.lo.item(), act.hi.item(), 20_001)
    wanted = by_hand(act, x)
    assert ((act(x).double() - wanted).abs() / wanted.abs().clamp(min=1)).max() < 2e-6


@pytest.mark.parametrize("size", range(1, 26))
def test_halving_is_a_basis(size):
    """Function k has degree k, no more; evaluation is the sum over the basis; and Hermite's series converts exactly."""
    reach = 1.3 * size**0.5
    z = np.linspace(-reach, reach, 101)
    basis, numbers = np.stack(halving.basis(size, z, reach)), np.random.default_rng(size).normal(size=size)
    numbers /= np.abs(basis).max(axis=1)
    np.testing.assert_allclose(halving.evaluate(list(numbers), z, reach), numbers @ basis, atol=1e-12)
    for k, values in enumerate(basis):
        fitted = np.polynomial.Chebyshev.fit(z, values, min(k, 24))
        np.testing.assert_allclose(fitted(z), values, atol=1e-9 * np.abs(values).max())
        assert abs(fitted.coef[-1]) > 1e-6 * np.abs(values).max()


@pytest.mark.parametrize("family", NAMES)
def test_gradients_to_second_order(family):
    """By finite differences in float64, away from kinks: by x and by theta, of the function and of its gradient."""
    act = activation(family, groups=2)
    x = torch.tensor([[-5.1, 0.37], [-1.73, 1.13], [0.71, 4.9]], dtype=torch.float64, requires_grad=True)
    theta = act.theta.detach().double().requires_grad_()

    def of(x, theta):
        a = act.start.double() + (act.transform.double() * theta.unsqueeze(-2)).sum(-1)
        core = a if act._conversion is None else (act._conversion * a.unsqueeze(-2)).sum(-1)
        slopes = act.core_slopes(a) + act.jumps.double()
        numbers = torch.cat([core, -slopes[..., :1], slopes[..., 1:]], -1)
        return curve.Curve.apply(x, numbers, act.numbers(torch.float64)[1], None, act.family, 2, -1)

    torch.testing.assert_close(of(x, theta), act(x), rtol=1e-12, atol=1e-12)
    assert gradcheck(of, (x, theta), atol=1e-6, rtol=1e-4)
    if "tropical" not in family:
        assert gradgradcheck(of, (x, theta), atol=1e-5, rtol=1e-3)


@pytest.mark.parametrize("family", NAMES)
def test_second_derivatives_of_the_module_are_those_of_recorded_operations(family, monkeypatch):
    act = Activation.from_fit(fit("gelu", family=family, degree=FAMILIES[family].degrees[2]), groups=2)
    x, way = torch.randn(500, 4), torch.randn_like(act.theta)

    def curvature():
        (first,) = torch.autograd.grad((act(x) ** 3).mean(), act.theta, create_graph=True)
        return torch.autograd.grad((first * way).sum(), act.theta)[0]

    found = curvature()
    monkeypatch.setattr(curve, "is_whole", lambda x: True)
    torch.testing.assert_close(found, curvature(), rtol=1e-4, atol=1e-4)
    assert found.abs().max() > 1e-3


def test_one_activation_twice_in_a_row():
    """Its input follows from its own theta: with and without a graph the gradient is the same."""
    act, x = activation(), torch.randn(50)
    plain, recorded = (
        torch.autograd.grad((act(2 * act(x)) ** 2).sum(), act.theta, create_graph=graph)[0] for graph in (False, True)
    )
    torch.testing.assert_close(plain, recorded, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("tracer", ["jit", "fx"])
def test_traces_are_of_the_function_and_not_of_one_output(tracer):
    act, x, other = activation(), torch.randn(5), torch.randn(5)
    with torch.no_grad():
        if tracer == "jit":
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                traced = torch.jit.trace(act, x, check_trace=False)
        else:
            traced = make_fx(act)(x)
        torch.testing.assert_close(traced(other), act(other))


class Scaled(nn.Module):
    def __init__(self):
        super().__init__()
        self.by = nn.Parameter(torch.tensor(2.0))

    def forward(self, tensor):
        return self.by * tensor


def test_sine_and_cosine_of_kernels(monkeypatch):
    angle = torch.linspace(-4 * torch.pi, 4 * torch.pi, 100_001)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    with torch.no_grad():
        found = fourier.cos_sin(angle)
    for made, library, exact in zip(
        found, (torch.cos, torch.sin), fourier.cos_sin(angle.double().numpy()), strict=True
    ):
        assert not torch.equal(made, library(angle)), "by the polynomials"
        assert np.abs(made.double().numpy() - exact).max() < 1.5e-6


def test_theta_and_buffers_that_follow_from_others():
    act, x = activation(), torch.randn(50)
    act.register_buffer("other", torch.zeros(1))
    for name in ("theta", "start"):
        register_parametrization(act, name, Scaled())
        before = act(x)
        with torch.no_grad():
            act.parametrizations[name][0].by.fill_(-3.0)
        torch.testing.assert_close(act(x), curve.plain(x, *act.numbers(torch.float32), act.family, None, -1))
        assert (act(x) - before).abs().max() > 1e-3
    (grad,) = torch.autograd.grad(act(x).sum(), act.parametrizations["theta"].original)
    assert grad.abs().max() > 0
    assert torch.equal(copy.deepcopy(act)(x), act(x))


def test_tensors_that_change_by_other_means():
    """By `.data`, in place or not, and seen as another shape: the content decides."""
    act, x = activation(degree=4, groups=5), torch.randn(8, 5)
    act(x)
    act.theta.data = act.theta.data.t()
    act.start.data += 0.1
    act.hi.data = torch.tensor(2.0)
    torch.testing.assert_close(act(x), curve.plain(x, *act.numbers(torch.float32), act.family, 5, -1))


@pytest.mark.parametrize("options", [{}, {"groups": 3}, {"groups": 3, "channel": 1}], ids=["one", "last", "second"])
@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("path", ["eager", "torch"])
@pytest.mark.parametrize("family", NAMES)
def test_fused_equals_plain(family, path, name, options):
    """Blocks and their edges, any shape, groups on either axis: value and gradients are those of the whole tensor."""
    shape = SHAPES[name]
    axis = options.get("channel", -1)
    if options and (len(shape) <= max(axis, 0) or shape[axis] % 3):
        pytest.skip("no such axis")
    act = activation(family, **options)
    x, weights = 3 * torch.randn(shape, dtype=torch.float64), torch.randn(shape, dtype=torch.float64)
    with engine.using(path):
        got = derivatives(act, x, weights)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(curve, "is_whole", lambda x: True)
        wanted = derivatives(act, x, weights)
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7 * max(x.numel(), 1) ** 0.5 * 10)


LAYOUTS = {
    "transposed": lambda: torch.randn(6, 4, 5).transpose(0, 2),
    "every other": lambda: torch.randn(8, 5, 12)[::2, :, ::2],
    "channels last": lambda: torch.randn(2, 6, 4, 3).to(memory_format=torch.channels_last),
    "expanded": lambda: torch.randn(1, 6).expand(5, 6),
    "offset": lambda: torch.randn(31)[1:].reshape(5, 6),
}


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("groups", [None, 2])
@pytest.mark.parametrize("path", ["eager", "torch"])
def test_any_layout(name, groups, path):
    x = LAYOUTS[name]()
    channel = 1 if name == "channels last" else -1
    act = activation(groups=groups, channel=channel)
    weights = torch.randn(x.shape)
    with engine.using(path):
        got = derivatives(act, x, weights)
        wanted = derivatives(act, x.contiguous(), weights)
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    assert got[0].stride() == nn.GELU()(x).stride(), "as other activations leave it"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", NAMES)
def test_low_precision_accumulates_in_float32(family, dtype):
    act = activation(family)
    x = (2 * torch.randn(20_000)).to(dtype)
    weights = torch.ones_like(x)
    out, by_x, by_theta = derivatives(act, x, weights)
    exact, exact_by_x, exact_by_theta = derivatives(act, x.float(), weights.float())
    assert out.dtype == by_x.dtype == dtype and by_theta.dtype == torch.float32
    assert torch.equal(out, exact.to(dtype)) and torch.equal(by_x, exact_by_x.to(dtype))
    torch.testing.assert_close(by_theta, exact_by_theta, rtol=1e-4, atol=1e-2)  # a sum in bfloat16 has 2 digits


# -- memory ------------------------------------------------------------------------------------------------------------


def saved(act, x) -> int:
    """Bytes that are kept for backward, counted once each."""
    kept = {}

    def pack(tensor):
        kept[tensor.data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        act(x)
    return sum(kept.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", NAMES)
def test_backward_keeps_the_input_alone(family, dtype):
    x = torch.randn(2**17, dtype=dtype, requires_grad=True)
    few = saved(activation(family), x)
    assert x.nbytes <= few <= x.nbytes + 64_000, "and some numbers"


@pytest.mark.parametrize(("x_learns", "theta_learns"), [(True, True), (True, False), (False, True), (False, False)])
def test_only_what_is_asked_for(x_learns, theta_learns):
    act = activation()
    act.theta.requires_grad_(theta_learns)
    x = torch.randn(50, requires_grad=x_learns)
    out = act(x)
    assert out.requires_grad == (x_learns or theta_learns)
    if out.requires_grad:
        out.sum().backward()
    assert (x.grad is not None) == x_learns and (act.theta.grad is not None) == theta_learns


# -- torch's machinery -------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:FutureWarning", "ignore:.*torch.jit.*:DeprecationWarning")
@pytest.mark.parametrize("family", NAMES)
def test_transforms(family):
    """vmap, forward mode, and derivatives by torch.func."""
    act, x = activation(family), torch.tensor([-4.0, -0.9, 0.3, 1.1, 5.0])
    each = torch.stack([act(v) for v in x])
    torch.testing.assert_close(torch.func.vmap(act)(x), each)
    slopes = derivatives(act, x, torch.ones_like(x))[1]
    torch.testing.assert_close(torch.func.vmap(torch.func.grad(act))(x), slopes, rtol=1e-4, atol=1e-5)
    value, tangent = torch.func.jvp(act, (x,), (torch.ones_like(x),))
    torch.testing.assert_close(tangent, slopes, rtol=1e-4, atol=1e-5)
    with forward_ad.dual_level():
        value, tangent = forward_ad.unpack_dual(act(forward_ad.make_dual(x, torch.ones_like(x))))
    torch.testing.assert_close(value, each)
    torch.testing.assert_close(tangent, slopes, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("groups", [None, 2])
def test_checkpointing_inference_mode_and_meta(groups):
    act, x, weights = activation(groups=groups), torch.randn(5, 6), torch.randn(5, 6)
    wanted = derivatives(act, x, weights)
    at = x.clone().requires_grad_()
    act.theta.grad = None
    checkpoint(act, at, use_reentrant=False).backward(weights)
    assert torch.equal(at.grad, wanted[1]) and torch.equal(act.theta.grad, wanted[2])
    fresh = copy.deepcopy(act)
    fresh._rest = None
    with torch.inference_mode():
        assert torch.equal(act(x), wanted[0]) and torch.equal(fresh(x), wanted[0])
    assert torch.equal(derivatives(fresh, x, weights)[1], wanted[1]), "what is kept can be used for training"
    with torch.device("meta"):
        ghost = Activation("hermite", 8, groups=groups)
    assert ghost(x.to("meta")).shape == x.shape


@pytest.mark.parametrize("family", NAMES)
def test_copies_and_pickles(family):
    act, x = activation(family), torch.randn(20)
    stream = io.BytesIO()
    torch.save(act, stream)
    stream.seek(0)
    for twin in (copy.deepcopy(act), torch.load(stream, weights_only=False)):
        assert torch.equal(twin(x), act(x))


@pytest.mark.parametrize("options", [{}, {"groups": 2}], ids=["one", "groups"])
@pytest.mark.parametrize("family", NAMES)
def test_export_is_one_dynamic_graph(family, options):
    act, x = activation(family, **options).eval(), torch.randn(4, 6)
    rows = torch.export.Dim("rows", min=2, max=1000)
    program = torch.export.export(act, (x,), dynamic_shapes=({0: rows},))
    at = 3 * torch.randn(9, 6)
    terms = act.coefficients.detach().abs().sum(-1).max().clamp(min=100)  # those that cancel round as what they are
    torch.testing.assert_close(program.module()(at), act(at), rtol=1e-5, atol=1e-7 * terms.item())


# -- the choice of a path ----------------------------------------------------------------------------------------------


def test_the_path_is_chosen_and_shown(monkeypatch):
    monkeypatch.setattr(engine._State, "path", "")
    monkeypatch.setenv("ORTHOACT_PATH", "compiled")
    assert engine.get_path() == engine.describe() == "compiled"
    assert "path=compiled" in repr(activation())
    with engine.using("eager"):
        assert engine.get_path() == "eager"
    assert engine.get_path() == "compiled"
    monkeypatch.setattr(engine._State, "path", "")
    monkeypatch.setenv("ORTHOACT_PATH", "fast")
    with pytest.raises(OrthoactError, match="path 'fast': expected one of eager, compiled, torch"):
        engine.get_path()


def test_a_machine_without_a_compiler_computes_by_torch(tmp_path):
    """And one where there are no loops either, as on a GPU, says so once."""
    code = """
import warnings, torch
from orthoact.interp import Activation, engine, fit, loops
act, x = Activation.from_fit(fit("gelu")), torch.randn(5000, requires_grad=True)
engine.set_path("compiled")
act(x).sum().backward()
with engine.using("torch"):
    wanted = act(x)
assert torch.allclose(act(x), wanted, atol=1e-6) and not torch.equal(act(x), wanted) and not engine.broken()
loops.available = lambda: False
loops._loops.clear()
with warnings.catch_warnings(record=True) as told:
    warnings.simplefilter("always")
    assert torch.equal(act(x), wanted)
    act(x).sum().backward()
assert len([w for w in told if "torch's operations compute activations" in str(w.message)]) == 1
assert engine.get_path() == "eager" and "kernels cannot be made" in engine.describe()
"""
    env = {"PATH": "", "CXX": str(tmp_path / "no-compiler"), "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]


# -- kernels, as on a GPU: some seconds for each -----------------------------------------------------------------------


def test_options_that_a_torch_does_not_have_are_left_out(without_loops, monkeypatch):
    """torch 2.11 lacks some of 2.14's, and refuses what it does not know."""
    monkeypatch.setitem(kernels.OPTIONS, "realize_of_another_version", 1)
    monkeypatch.setitem(kernels.OPTIONS, "cpp.of_another_version", 1)
    act, x = activation("hermite", degree=3), torch.randn(5000)
    with torch.no_grad(), engine.using("compiled"):
        torch.testing.assert_close(act(x), by_hand(act, x).float(), rtol=0, atol=1e-5)
    assert not engine.broken() and any(name == "values" for name, *_ in kernels._kernels)


def test_a_kernel_of_values_takes_any_size(without_loops):
    act = activation("fourier", degree=2)
    with torch.no_grad(), engine.using("compiled"):
        for size in (1, 3, 4, 6, 4097, 50_001):
            x = 3 * torch.randn(size)
            torch.testing.assert_close(act(x), by_hand(act, x).float(), rtol=0, atol=1e-5)
    assert not engine.broken() and any(name == "values" for name, *_ in kernels._kernels)


@pytest.mark.long
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("options", [{}, {"groups": 3}, {"groups": 3, "channel": 1}], ids=["one", "last", "second"])
@pytest.mark.parametrize("family", NAMES)
def test_kernels_equal_torch_s_operations(without_loops, family, options, dtype):
    act = activation(family, **options)
    made = len(kernels._kernels)
    for shape in ((64, 6, 6), (1, 6, 6), (7, 6, 1) if options.get("channel") == 1 else (7, 1, 6), (501, 6, 12)):
        x, weights = (3 * torch.randn(shape)).to(dtype), torch.randn(shape).to(dtype)
        wanted = derivatives(act, x, weights)
        with engine.using("compiled"), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            got = derivatives(act, x, weights)
        exact = {torch.bfloat16: 1e-2, torch.float32: 2e-5, torch.float64: 2e-6}[dtype]
        for a, b in zip(got, wanted, strict=True):
            torch.testing.assert_close(a, b, rtol=exact, atol=exact * float(b.abs().max()))
        assert not engine.broken()
    assert len(kernels._kernels) - made <= 6, "few kernels for many sizes"


@pytest.mark.long
@pytest.mark.parametrize("family", NAMES)
def test_a_compiled_model_has_it_inline(family):
    act = activation(family)
    model = nn.Sequential(nn.Linear(6, 6), act, nn.Linear(6, 6))
    x = torch.randn(10, 6)
    model(x).square().sum().backward()
    wanted = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    torch.compile(model, fullgraph=True)(x).square().sum().backward()
    for p, grad in zip(model.parameters(), wanted, strict=True):
        torch.testing.assert_close(p.grad, grad, rtol=1e-3, atol=1e-3)
