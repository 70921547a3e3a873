"""The least squares that recovery starts with: against numpy's and scipy's, for all families and kinds of groups."""

from copy import deepcopy

import numpy as np
import tiny_models as tiny
import torch
from pytest import mark
from scipy.optimize import minimize
from torch import nn

from orthoact import FAMILIES, Activation, convert_, fit
from orthoact.finetune.distill import Distillation
from orthoact.finetune.laws import Law
from orthoact.finetune.solve import _least, _products, solve


def numbers(model):
    return torch.cat([m.theta.detach().flatten() for m in model.modules() if isinstance(m, Activation)])


@mark.parametrize("groups", [None, 4, "per-channel"])
@mark.parametrize("family", FAMILIES)
def test_the_start_is_solved_on_the_model_s_own_inputs(family, groups):
    """Nearer to the original on inputs that it has not seen, with no step taken: every family, every kind of groups."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 2048, 6, generator=generator) * torch.tensor([0.5, 1, 2, 4, 1, 1])
    net = nn.Sequential(nn.Linear(6, 16), nn.SiLU(), nn.Linear(16, 5)).requires_grad_(False)
    for p in net.parameters():
        p.copy_(torch.randn(p.shape, generator=generator))
    convert_(net, family=family, degree={"hermite": 3, "fourier": 2}.get(family, 4), groups=groups)
    taught = Distillation(net)
    before = taught.loss(net, {"input": x[1]})
    solve(net, taught, [{"input": part} for part in x[0].split(512)])
    after = taught.loss(net, {"input": x[1]})
    assert after < (0.7 if family == "hermite" else 1.0) * before
    count = {None: 1, 4: 4, "per-channel": 16}[groups]
    theta = numbers(net).view(count, -1)
    assert count == 1 or theta.std(0).gt(0).all(), "each group has its own"


@mark.parametrize("family", ["hermite", "rational", "tropical"])
def test_each_batch_is_met_once(family):
    net = nn.Sequential(nn.Linear(3, 4), nn.SiLU(), nn.Linear(4, 2)).requires_grad_(False)
    convert_(net, family=family, degree=4)
    passes, told = [], []
    net.register_forward_hook(lambda *_: passes.append(1))
    batches = [{"input": torch.randn(64, 3)} for _ in range(3)]
    solve(net, Distillation(net), batches, progress=lambda *done: told.append(done))
    assert len(passes) == 3 and told == [(i, 4) for i in range(1, 5)]


def test_padding_is_no_input():
    """The ids under the mask do not matter."""
    ids, mask = torch.randint(5, 60, (4, 12), generator=torch.Generator().manual_seed(0)), torch.ones(4, 12).long()
    mask[:, 7:] = 0
    thetas = []
    for padding in (1, 3):
        model = tiny.hf("bert-classifier")
        convert_(model, degree=3)
        batch = {"input_ids": ids.masked_fill(mask == 0, padding), "attention_mask": mask}
        solve(model, Distillation(model), [batch])
        thetas.append(numbers(model))
    assert torch.allclose(*thetas, atol=1e-6) and thetas[0].any()


def test_the_solved_start_is_the_least_squares():
    """Against numpy's on the same inputs, weighted by the gradients, for a family that is linear, without a ridge."""
    x = 3 * torch.randn(4096, 1, generator=torch.Generator().manual_seed(1))
    last = nn.Linear(1, 3).requires_grad_(False)
    net = nn.Sequential(nn.Identity(), nn.SiLU(), last)
    convert_(net, degree=5)
    act, eye = net.get_submodule("1"), torch.eye(6)
    assert isinstance(act, Activation)
    solve(net, Distillation(net), [{"input": x}], ridge=0.0, seed=7)
    found = act.theta.detach().clone()

    out = nn.functional.silu(x).requires_grad_()
    noise = torch.randn(4096, 3, generator=torch.Generator().manual_seed(7))
    (root,) = torch.autograd.grad((nn.functional.normalize(last(out), dim=-1) * noise).sum(), out)
    root = root.double().flatten()

    def at(theta):
        act.theta.data.copy_(theta)
        return root * act(x.double()).flatten().detach()

    level = at(torch.zeros(6))
    columns = torch.stack([at(one) - level for one in eye], 1)
    wanted = np.linalg.lstsq(columns.numpy(), (root * nn.functional.silu(x.double()).flatten() - level).numpy())[0]
    assert np.allclose(found, wanted, rtol=1e-4, atol=1e-5)


def test_what_does_not_matter_is_not_solved():
    """A channel that the output does not see keeps its start; another does not care for that channel's inputs."""
    x = torch.randn(512, 2, generator=torch.Generator().manual_seed(0))
    net = nn.Sequential(nn.Identity(), nn.SiLU(), nn.Linear(2, 3)).requires_grad_(False)
    net.get_parameter("2.weight")[:, 1] = 0
    convert_(net, degree=3, groups="per-channel")
    act, start, states = net.get_submodule("1"), deepcopy(net.get_submodule("1").state_dict()), []
    for far in (1.0, 9.0):
        act.load_state_dict(start)
        solve(net, Distillation(net), [{"input": x * torch.tensor([1.0, far])}])
        states.append(deepcopy(act.state_dict()))
    assert all(torch.equal(states[0][name], states[1][name]) for name in start)
    assert states[0]["theta"][0].any() and not states[0]["theta"][1].any()


@mark.parametrize("groups", [None, 2])
@mark.parametrize(
    ("family", "degree"), [("fourier-free", 2), ("rational", 3), ("rational-sum", 3), ("tropical-rational", 4)]
)
def test_families_that_are_not_linear_are_as_good_as_a_long_search(family, degree, groups):
    act = Activation.from_fit(fit("silu", family=family, degree=degree), groups=groups, original=nn.functional.silu)
    x = torch.randn(4000, 2, generator=torch.Generator().manual_seed(0)) * torch.tensor([0.5, 2.0])
    law = Law(act)
    law.add(x, torch.ones_like(x))

    def left(theta: torch.Tensor) -> torch.Tensor:
        return _products(law, theta, False).sum() + 1e-3 * theta.square().sum()

    def both(flat):
        theta = torch.tensor(flat).view(groups or 1, -1).requires_grad_()
        value = left(theta)
        return value.item(), torch.autograd.grad(value, theta)[0].flatten().numpy()

    with torch.no_grad():
        found, start = _least(law, 1e-3), left(torch.zeros(groups or 1, act.theta.shape[-1], dtype=torch.float64))
    long = minimize(both, np.zeros(found.numel()), jac=True, method="L-BFGS-B", options={"maxiter": 2000})
    assert long.fun < 0.9 * start and left(found) < 1.1 * long.fun


def test_few_inputs_are_no_proof():
    """With 20 inputs a curve stays near the fit, which is good everywhere; with 20,000 it does not."""
    moved = []
    for rows in (20, 20_000):
        net = nn.Sequential(nn.Linear(1, 4), nn.GELU(), nn.Linear(4, 2)).requires_grad_(False)
        for p in net.parameters():
            p.copy_(torch.linspace(-0.5, 1, p.numel()).view_as(p))
        convert_(net, degree=6, groups="per-channel")
        solve(net, Distillation(net), [{"input": torch.linspace(0, 0.2, rows)[:, None]}])
        x = torch.linspace(-6, 6, 101)[:, None].expand(-1, 4)
        act = net[1]
        moved.append(float((act(x) - act.original(x)).abs().max().detach()))  # pyright: ignore
    assert moved[0] < 0.5 * moved[1], moved
