"""The machine code of a CPU: what torch's operations compute, for values and shapes of every kind, on any threads."""

import copy
import math
import multiprocessing
import os
import pickle
import subprocess
import sys
import threading
from functools import cache

import numpy as np
import pytest
import torch

from orthoact.interp import FAMILIES, Activation, curve, engine, fit, loops, machine
from orthoact.interp.layout import Layout

NAMES = list(FAMILIES)
EXACT = {torch.bfloat16: 1e-2, torch.float16: 2e-3, torch.float32: 2e-5, torch.float64: 1e-6}
KINDS = {"one": {}, "last": {"groups": 3}, "second": {"groups": 3, "channel": 1}}


@cache
def start(family: str, degree: int | None = None):
    low = min(FAMILIES[family].degrees, key=lambda n: abs(FAMILIES[family].size(n) - 9))
    return fit("gelu", family=family, degree=degree or low)


def activation(family="hermite", degree=None, **options) -> Activation:
    act = Activation.from_fit(start(family, degree), **options)
    with torch.no_grad():
        act.theta += 0.02 * torch.randn_like(act.theta)
    return act


def derivatives(act, x, weights, path="eager"):
    """F, and the gradients of its weighted sum by x and theta."""
    x = x.detach().clone().requires_grad_()
    with engine.using(path):
        out = act(x)
        return out.detach(), *torch.autograd.grad(out, [x, act.theta], weights)


def equal(got, wanted, exact):
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=exact, atol=exact * max(1.0, float(b.abs().max())))


@pytest.fixture
def made(monkeypatch):
    """The loops that are made."""
    monkeypatch.setattr(loops, "_loops", {})
    monkeypatch.setattr(loops, "_refused", [])
    return loops._loops


@pytest.mark.parametrize("dtype", EXACT, ids=str)
@pytest.mark.parametrize("options", KINDS.values(), ids=KINDS)
@pytest.mark.parametrize("family", NAMES)
def test_equal_torch_s_operations(made, family, options, dtype):
    act = activation(family, **options)
    shape = (7, 6, 4501) if options.get("channel") else (4501, 7, 6)
    x, weights = (3 * torch.randn(shape)).to(dtype), torch.randn(shape).to(dtype)
    equal(derivatives(act, x, weights), derivatives(act, x, weights, "torch"), EXACT[dtype])
    assert len(made) == 2 and all(made.values()), "one for each direction"


@pytest.mark.parametrize("size", [1, 2, 3, 5, 16, 63, 64, 65, 4095, 4096, 4097, 16387, 65543])
@pytest.mark.parametrize("groups", [None, 1, "each"])
def test_any_size(size, groups):
    """Ends of vectors, of chunks, of threads."""
    act = activation(groups=size if groups == "each" else groups)
    for shape in ((size,), (3, size), (9, size)):
        x, weights = 3 * torch.randn(shape), torch.randn(shape)
        equal(derivatives(act, x, weights), derivatives(act, x, weights, "torch"), 2e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("family", NAMES)
def test_large_results_are_written_past_the_caches(family, dtype):
    """Whole lines of vectors, the rest one by one; also where groups begin in the midst of a line."""
    size, threads = machine.PAST + 5 * 16 + 3, torch.get_num_threads()
    x = 3 * torch.randn(size, dtype=dtype)
    x[7::1001], x[8::1001] = math.nan, math.inf
    rows = 3 * torch.randn(5, 3, machine.PAST // 15 + 40, dtype=dtype)  # some begin a line and some do not
    for some, options in ((x, {}), (x[1:], {}), (rows, {"groups": 3, "channel": 1}), (rows[:, :, :-1], {})):
        act = activation(family, **options)
        with torch.no_grad():
            with engine.using("torch"):
                wanted = act(some)
            for team in (1, 2, 3):
                torch.set_num_threads(team)
                got = act(some)
                torch.set_num_threads(threads)
                torch.testing.assert_close(got, wanted, rtol=EXACT[dtype], atol=3 * EXACT[dtype], equal_nan=True)


@pytest.mark.parametrize("width", [machine.WIDTH - 1, machine.WIDTH + 1, 2 * machine.WIDTH + 3])
def test_more_channels_than_a_block(width):
    act = activation(groups=width)
    x, weights = 3 * torch.randn(2 * machine.ROWS + 5, width), torch.randn(2 * machine.ROWS + 5, width)
    equal(derivatives(act, x, weights), derivatives(act, x, weights, "torch"), 5e-5)


@pytest.mark.parametrize("family", NAMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_no_number_stays_none_and_far_values_are_on_the_tails(family, dtype):
    act = activation(family)
    x = torch.tensor([math.nan, -1e30, -1e4, 0.0, 1e4, 1e30] * 20, dtype=dtype)
    got, wanted = derivatives(act, x, torch.ones_like(x)), derivatives(act, x, torch.ones_like(x), "torch")
    assert torch.isnan(got[0]).view(20, 6).all(0).tolist() == [True] + [False] * 5
    torch.testing.assert_close(got[0], wanted[0], rtol=EXACT[dtype], atol=EXACT[dtype], equal_nan=True)
    torch.testing.assert_close(got[1][1:], wanted[1][1:], rtol=EXACT[dtype], atol=EXACT[dtype], equal_nan=True)


@pytest.mark.parametrize("options", KINDS.values(), ids=KINDS)
def test_threads_share_the_values(options):
    """The result of any number of threads is the same, the sums to the last bits."""
    act, shape = activation(**options), (12, 6, 5001) if options.get("channel") else (5001, 12, 6)
    x, weights, before = torch.randn(shape), torch.randn(shape), torch.get_num_threads()
    found = []
    try:
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            found.append(derivatives(act, x, weights))
            again = derivatives(act, x, weights)
            assert all(torch.equal(a, b) for a, b in zip(found[-1], again, strict=True)), "it reproduces"
    finally:
        torch.set_num_threads(before)
    for each in found[1:]:
        assert torch.equal(each[0], found[0][0]) and torch.equal(each[1], found[0][1])
        torch.testing.assert_close(each[2], found[0][2], rtol=1e-5, atol=1e-5 * float(found[0][2].abs().max()))


def test_several_callers_at_once():
    acts, x = [activation() for _ in range(4)], torch.randn(300_000)
    wanted, got = [act(x) for act in acts], {}

    def call(k):
        for _ in range(20):
            got[k] = acts[k](x)

    threads = [threading.Thread(target=call, args=(k,)) for k in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(got[k], wanted[k]) for k in range(4))


def _in_a_child(pipe, act, x):
    torch.set_num_threads(1)  # as a worker of a DataLoader does
    pipe.send(act(x).sum().item())


@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="no fork here")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_fork_goes_on():
    act, x = activation().requires_grad_(False), torch.randn(300_000)
    wanted = act(x).sum().item()
    context = multiprocessing.get_context("fork")
    mine, its = context.Pipe()
    child = context.Process(target=_in_a_child, args=(its, act, x))
    child.start()
    assert mine.poll(60), "it hangs"
    assert mine.recv() == pytest.approx(wanted, rel=1e-5)
    child.join(10)


def test_sums_of_many_values_are_in_float64():
    """What a sum in float32 loses on ten million ones."""
    act = activation()
    x = torch.full((10_000_000,), 0.5)
    _, _, by_theta = derivatives(act, x, torch.ones_like(x))
    _, _, one = derivatives(act, x[:1].double(), torch.ones(1, dtype=torch.float64))
    torch.testing.assert_close(by_theta / len(x), one, rtol=0, atol=1e-4 * float(one.abs().max()))


@pytest.mark.parametrize(
    "limit", [{"OMP_THREAD_LIMIT": "1"}, {"OMP_THREAD_LIMIT": "2"}, {"OMP_DYNAMIC": "true"}], ids=str
)
def test_fewer_threads_than_asked_for_compute_all(limit):
    code = """
import torch
from orthoact.interp import Activation, engine, fit
torch.set_num_threads(4)
act, x = Activation.from_fit(fit("gelu")), torch.randn(400_000, requires_grad=True)
found = torch.autograd.grad(act(x).sum(), [x, act.theta])
with engine.using("torch"):
    wanted = torch.autograd.grad(act(x).sum(), [x, act.theta])
    assert torch.allclose(act(x), torch.nn.functional.gelu(x), atol=0.01)
assert torch.allclose(act(x), torch.nn.functional.gelu(x), atol=0.01)
assert torch.allclose(found[0], wanted[0], atol=1e-5) and torch.allclose(found[1], wanted[1], rtol=1e-3, atol=1.0)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=os.environ | limit)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.parametrize("target", ["sigmoid", "tanh", "gelu", "relu6"])
def test_far_values_do_not_leave_the_core(target):
    """Where neighbours in float32 are further apart than the joints; on every path."""
    act = Activation.from_fit(fit(target, degree=8))
    x = torch.tensor([-1e9, -3e7, 3e7, 1e8])
    wanted = act(x.clamp(-30, 30)).detach()
    if target == "gelu":
        wanted = x.clamp(min=0)
    with engine.using("torch"):
        by_torch = act(x)
    for found in (act(x), by_torch, curve.plain(x, *act.numbers(torch.float32), act.family, None, -1)):
        # a slope is exact to 1e-11
        torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-2)


@pytest.mark.parametrize("options", KINDS.values(), ids=KINDS)
def test_values_that_are_not_their_bytes(options):
    act, shape = activation(**options), (7, 6, 450)
    x, weights = torch.randn(shape), torch.randn(shape)
    wanted = derivatives(act, -x, -weights)
    found = derivatives(act, torch._neg_view(x), torch._neg_view(weights))
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))
    x.requires_grad_()
    (nothing,) = torch.autograd.grad(act(x), x, torch._efficientzerotensor(shape))
    assert not nothing.any()


def test_copies_share_the_loops(made):
    act, x = activation(), torch.randn(500)
    wanted = act(x)
    for other in (copy.deepcopy(act), pickle.loads(pickle.dumps(act))):
        assert torch.equal(other(x), wanted) and other.family is act.family
    assert len(made) == 1


def test_many_gradients_at_once():
    act, x = activation(), torch.randn(6, requires_grad=True)
    wanted = torch.diag(torch.autograd.grad(act(x).sum(), x)[0])
    (found,) = torch.autograd.grad(act(x), x, torch.eye(6), is_grads_batched=True)
    torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("broken", ["raise OSError('no such library')", "pass"], ids=["missing", "old"])
def test_an_llvmlite_that_does_not_work_is_as_none(tmp_path, broken):
    (tmp_path / "llvmlite" / "binding").mkdir(parents=True)
    (tmp_path / "llvmlite" / "__init__.py").write_text("")
    (tmp_path / "llvmlite" / "binding" / "__init__.py").write_text(broken)
    code = "import torch, orthoact; print(orthoact.Activation.from_fit(orthoact.fit('gelu'))(torch.ones(5)).tolist())"
    env = os.environ | {"PYTHONPATH": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)
    assert done.returncode == 0 and not done.stderr and "0.84" in done.stdout, done.stderr[-2000:]


@pytest.mark.parametrize(
    "value",
    [
        lambda z: torch.erf(z) if torch.is_tensor(z) else np.arctan(z),
        lambda z: 2.0**z,
        lambda z: z + z.dtype.itemsize,
        lambda z: z if (z > 0).all() else -z,
        lambda z: (z > 0) * z if torch.is_tensor(z) else (z if z > 0 else -z),
    ],
    ids=["unknown", "power", "attribute", "method", "branch"],
)
def test_what_has_no_instruction_is_left_to_torch(made, value):
    class Odd(type(FAMILIES["hermite"])):
        name = "odd"

        def value(self, numbers, z):
            return value(z)

    act, x = activation(), torch.randn(5000)
    act.family = Odd()
    with torch.no_grad():
        act.tails = "none"
        torch.testing.assert_close(act(x), value((x - act.location) / act.scale).float())
    assert list(made.values()) == [None]
    assert "a formula by torch's operations" in engine.describe()


def test_without_loops_torch_computes(without_loops):
    act, x = activation(), torch.randn(5000)
    assert "by torch's operations" in engine.describe()
    with engine.using("torch"):
        wanted = act(x)
    assert torch.equal(act(x), wanted)
    layout = Layout.of(x, None, None)
    numbers, frame = act.numbers(torch.float32)
    assert loops.loop_values(act.family, layout, x, layout.spread(numbers), frame) is None
