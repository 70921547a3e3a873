"""Where recovery puts the joints: against brute force, for kinds of family, with kinks, groups and layouts."""

from copy import deepcopy

import numpy as np
import torch
from pytest import mark
from torch import nn

from orthoact import Activation, convert_, fit
from orthoact.finetune.distill import Distillation
from orthoact.finetune.joints import _Search, are_free, place
from orthoact.finetune.laws import Law
from orthoact.finetune.solve import solve
from orthoact.interp.domains import Gaussian

SILU = nn.functional.silu


def inputs(rows: int, groups: int = 3) -> torch.Tensor:
    """Normal, each group with a mean and a width of its own."""
    x = torch.randn(rows, groups, generator=torch.Generator().manual_seed(0))
    return x * torch.linspace(0.5, 2.0, groups) + torch.linspace(-1, 1, groups)


def met(act: Activation, x: torch.Tensor) -> Law:
    law = Law(act)
    law.add(x, torch.ones_like(x))
    return law


def error(act: Activation, x: torch.Tensor) -> float:
    with torch.no_grad():
        return float((act(x) - act.original(x)).square().mean())  # pyright: ignore[reportOptionalCall]


@mark.parametrize("shape", [(400, 6), (8, 50, 6), (8, 6, 5, 10), "channels last"], ids=str)
def test_a_law_has_the_sums_and_means_of_each_group(shape):
    axis = 1 if shape == "channels last" or len(shape) == 4 else -1
    x = torch.randn((8, 6, 5, 10) if shape == "channels last" else shape, generator=torch.Generator().manual_seed(0))
    g = torch.rand(x.shape, generator=torch.Generator().manual_seed(1))
    if shape == "channels last":
        x, g = (t.to(memory_format=torch.channels_last) for t in (x, g))
    law = Law(Activation.from_fit(fit("silu", degree=4), groups=3, channel=axis, original=SILU))
    law.add(x, g)
    x, g = (t.movedim(axis, 0).reshape(3, -1) for t in (x, g))
    torch.testing.assert_close(law.mass.sum(1), g.square().sum(1), rtol=1e-5, atol=0)
    torch.testing.assert_close(law.mass @ law.nodes, (g.square() * x).sum(1), rtol=1e-4, atol=1e-3)


def test_what_lies_far_out_counts_at_the_end():
    law = met(Activation.from_fit(fit("silu", degree=4), original=SILU), torch.tensor([-1e6, 1e6, 0.0]))
    assert law.mass[0, 0] == law.mass[0, -1] == 1 and law.mass.sum() == 3


@mark.parametrize("bad", [float("inf"), float("nan"), 1e30])
def test_what_is_not_finite_counts_for_nothing(bad):
    x, g = inputs(400), torch.ones(400, 3)
    law = met(Activation.from_fit(fit("silu", degree=4), original=SILU), x[2:])
    other = Law(law.act)
    x[0, 0], g[1, 2] = bad, bad  # the square of 1e30 is not finite in float32
    g[0, 1:], g[1, :2] = 0, 0
    if np.isfinite(bad):  # an input may be that far out
        g[0, 0] = 0
    other.add(x, g)
    assert torch.equal(other.mass, law.mass)


@mark.parametrize("size", [1e-12, 1.0, 1e12])
def test_the_size_of_a_loss_does_not_matter(size):
    acts = [Activation.from_fit(fit("silu", degree=3), original=SILU) for _ in range(2)]
    for act, by in zip(acts, (1.0, size), strict=True):
        law = Law(act)
        law.add(inputs(400), torch.full((400, 3), by))
        place(law, 1e-3)
    assert torch.allclose(acts[0].start, acts[1].start, rtol=1e-3) and torch.allclose(acts[0].hi, acts[1].hi, rtol=1e-3)


@mark.parametrize("degree", [3, 4, 5])
@mark.parametrize("target", ["gelu", "silu", "mish"])
def test_no_joints_are_better(target, degree):
    act = Activation.from_fit(fit(target, degree=degree), groups=3, original=getattr(nn.functional, target))
    law = met(act, inputs(4000))
    search = _Search(law, 1e-3)
    found = search.run()
    assert found is not None
    grid = np.linspace(-4, 4, 25)
    least = min(search.left(lo, hi) for lo in grid for hi in grid if hi > lo + 0.5)
    assert search.left(found.lo, found.hi) < 1.02 * least


@mark.parametrize("groups", [None, 3])
@mark.parametrize(("family", "degree", "share"), [("hermite", 3, 0.2), ("fourier", 2, 0.5), ("rational", 3, 0.9)])
def test_the_copy_is_nearer_where_the_inputs_are(family, degree, share, groups):
    """The start alone, on inputs that were not met."""
    act = Activation.from_fit(fit("gelu", family=family, degree=degree), groups=groups, original=nn.functional.gelu)
    x = inputs(8000)
    before = error(act, x[4000:])
    place(met(act, x[:4000]), 1e-3)
    assert error(act, x[4000:]) < share * before and not act.theta.any()


def test_a_joint_on_a_kink_stays():
    act = Activation.from_fit(fit("selu", degree=4), original=nn.functional.selu)
    kinks = act.jumps.abs() > 1e-3
    assert kinks.any() and not kinks.all()
    before = torch.stack([act.lo, act.hi])
    place(met(act, inputs(4000)), 1e-3)
    after = torch.stack([act.lo, act.hi])
    assert torch.equal(after[kinks], before[kinks]) and not torch.equal(after[~kinks], before[~kinks])


@mark.parametrize(
    ("target", "options", "free"),
    [
        ("silu", {}, True),
        ("silu", {"family": "rational"}, True),
        ("selu", {}, True),
        ("relu6", {}, False),
        ("silu", {"family": "tropical"}, False),
        ("silu", {"tails": "none"}, False),
    ],
)
def test_which_have_joints_to_choose(target, options, free):
    act = Activation.from_fit(fit(target, degree=4, **options), original=getattr(nn.functional, target))
    assert are_free(act) == free
    if not free:
        net, before = nn.Sequential(nn.Linear(3, 3), act).requires_grad_(False), deepcopy(act.state_dict())
        act.theta.requires_grad_()
        solve(net, Distillation(net), [{"input": inputs(400)}])
        assert all(torch.equal(t, before[name]) for name, t in act.state_dict().items() if name != "theta")


def test_an_exact_copy_stays():
    act = Activation.from_fit(fit("relu", degree=4), original=nn.functional.relu)
    before, law = deepcopy(act.state_dict()), Law(act)
    law.add(inputs(400), torch.ones(400, 3))
    place(law, 1e-3)
    assert are_free(act) and all(torch.equal(t, before[name]) for name, t in act.state_dict().items())


def test_an_original_that_works_in_place():
    acts = [Activation.from_fit(fit("silu", degree=4), original=original) for original in (SILU, nn.SiLU(inplace=True))]
    for act in acts:
        place(met(act, inputs(400)), 1e-3)
    assert all(torch.equal(t, acts[1].state_dict()[name]) for name, t in acts[0].state_dict().items())


def test_what_does_not_matter_does_not_move():
    net = nn.Sequential(nn.Linear(3, 3), nn.SiLU(), nn.Linear(3, 2)).requires_grad_(False)
    net.get_parameter("2.weight").zero_()
    convert_(net, degree=4)
    before = deepcopy(net.state_dict())
    solve(net, Distillation(net), [{"input": inputs(400)}])
    assert all(torch.equal(t, before[name]) for name, t in net.state_dict().items())


def test_where_no_input_lies_the_original_counts():
    """Inputs on the left alone: the right tail is the original's all the same, but for its curvature."""
    act = Activation.from_fit(fit("gelu", degree=4, domain=Gaussian(-1, 1)), original=nn.functional.gelu)
    x = inputs(4000) - 2
    place(met(act, x[x < 0]), 1e-3)
    at = torch.tensor([3.0, 6.0])
    assert (act(at) - at).abs().max() < 0.5
