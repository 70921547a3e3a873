"""A conversion keeps the model, changes no weight, and can be taken back."""

import copy

import pytest
import tiny_models as tiny
import torch
from torch import nn

import orthoact
from orthoact import Activation, OrthoactError
from orthoact.interp.activation import TENSORS

ALL = [("hf", name) for name in tiny.HF] + [("timm", name) for name in tiny.TIMM]


def build(kind, name):
    return tiny.hf(name) if kind == "hf" else tiny.timm_model(name)


@pytest.mark.parametrize(("kind", "name"), ALL)
def test_convert_and_revert(kind, name):
    model = build(kind, name)
    base = {k: v.clone() for k, v in model.state_dict().items()}
    before = tiny.outputs(model)
    config = model.config.to_dict() if kind == "hf" else dict(model.pretrained_cfg)

    made = orthoact.convert_(model, degree=16)
    after = tiny.outputs(model)
    names = [s.name for s in made.plan.sites]
    assert all(isinstance(model.get_submodule(n), Activation) for n in names)
    assert [row["name"] for row in made.sites] == names
    assert made.plan.parameters == 17 * len(names)
    scale = before.pow(2).mean().sqrt()
    assert (after - before).pow(2).mean().sqrt() < 0.01 * scale, "the copy must be faithful"
    smooth = any(f.value_max > 1e-9 for f in made.plan.fits)
    assert not smooth or not torch.equal(after, before), "the copy, not the original, must be what runs"
    state = model.state_dict()
    added = {f"{n}.{t}" for n in names for t in TENSORS}
    assert set(state) - set(base) == added
    assert all(torch.equal(state[k], base[k]) for k in base), "no weight may change"
    with orthoact.original(model):
        assert torch.equal(tiny.outputs(model), before)

    orthoact.revert_(model)
    assert torch.equal(tiny.outputs(model), before)
    assert set(model.state_dict()) == set(base)
    assert (model.config.to_dict() if kind == "hf" else dict(model.pretrained_cfg)) == config


@pytest.mark.parametrize(("kind", "name"), ALL)
def test_every_converted_activation_is_the_one_that_runs(kind, name):
    model = build(kind, name)
    names = [s.name for s in orthoact.convert_(model).plan.sites]
    before = tiny.outputs(model)
    for site in names[:: max(1, len(names) // 6)]:
        act = model.get_submodule(site)
        with torch.no_grad():
            act.theta[0] += 0.5
        assert not torch.equal(tiny.outputs(model), before), f"{site} does not run"
        with torch.no_grad():
            act.theta[0] -= 0.5


@pytest.mark.parametrize("name", ["gpt2", "mobilenet", "t5-gated", "bert-masked"])
def test_gradients_reach_every_site_and_a_step_learns(name):
    model = tiny.hf(name)
    names = [s.name for s in orthoact.convert_(model, degree=4).plan.sites]
    from orthoact.convert.audit import probe_batch

    batch = probe_batch(model)
    out = model(**batch)["logits"]
    out.float().pow(2).mean().backward()
    for site in names:
        gradient = model.get_submodule(site).theta.grad
        assert gradient is not None and gradient.isfinite().all() and gradient.abs().max() > 0, site


@pytest.mark.parametrize("kind_name", [("hf", "gpt2"), ("hf", "mobilenet"), ("timm", "convnext")])
def test_groups(kind_name):
    model = build(*kind_name)
    before = tiny.outputs(model)
    made = orthoact.convert_(model, degree=12, groups=4)
    assert made.plan.parameters == 4 * 13 * len(made.plan.sites)
    assert (tiny.outputs(model) - before).pow(2).mean() < 1e-4 * before.pow(2).mean()
    shape = model.get_submodule(made.plan.sites[0].name).theta.shape
    assert shape == (4, 13)


def test_groups_need_a_known_channel_axis():
    with pytest.raises(OrthoactError, match="channel axis of 0 is not known"):
        orthoact.plan(nn.Sequential(nn.GELU()), groups=2)
    with pytest.raises(OrthoactError, match="groups"):
        orthoact.plan(tiny.hf("gpt2"), groups=-1)


def test_planning_touches_nothing():
    model = tiny.hf("gpt2")
    before = {k: v.clone() for k, v in model.state_dict().items()}
    modules = {n: type(m) for n, m in model.named_modules()}
    made = orthoact.plan(model)
    assert {n: type(m) for n, m in model.named_modules()} == modules
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert not hasattr(model.config, "orthoact")
    assert made.fits[0] is made.fits[1], "one fit serves sites with one target"


def test_tolerance_picks_a_degree_per_target():
    model = nn.Sequential(nn.Linear(4, 4), nn.GELU(), nn.Linear(4, 4), nn.ReLU())
    gelu, relu = orthoact.plan(model, tolerance=1e-2).fits
    assert gelu.objective**0.5 <= 1e-2 and gelu.degree > relu.degree
    assert orthoact.fit("gelu", degree=gelu.degree - 2).objective ** 0.5 > 1e-2


def bad_nan(model):
    with torch.no_grad():
        model.transformer.h[1].mlp.c_fc.weight[0, 0] = float("nan")
    return {}


@pytest.mark.parametrize(
    ("prepare", "message"),
    [
        (bad_nan, r"weight transformer\.h\.1\.mlp\.c_fc\.weight holds NaN"),
        (lambda m: {"family": "splines"}, "unknown family 'splines'.*hermite"),
        (lambda m: {"degree": 1}, "degree 1.*asymptotes"),
        (lambda m: {"degree": 99}, "degree 99.*1 to 24"),
        (lambda m: {"tails": "cubic"}, "tails 'cubic'.*linear, none"),
        (lambda m: {"derivative_weight": -1.0}, "derivative-weight"),
        (lambda m: {"tolerance": 0.0}, "tolerance"),
        (lambda m: {"exclude": ["*"]}, "nothing to convert in GPT2LMHeadModel: found transformer"),
        (lambda m: orthoact.convert_(m) and {}, "converted already"),
    ],
)
def test_a_failure_leaves_the_model_as_it_was(prepare, message):
    model = tiny.hf("gpt2")
    options = prepare(model)
    before = dict(model.named_modules())
    with pytest.raises(OrthoactError, match=message):
        orthoact.convert_(model, **options)
    assert dict(model.named_modules()) == before


def test_a_model_without_activations():
    with pytest.raises(OrthoactError, match="nothing to convert in Sequential"):
        orthoact.convert_(nn.Sequential(nn.Linear(2, 2), nn.Dropout()))
    with pytest.raises(OrthoactError, match="nothing to revert"):
        orthoact.revert_(nn.Sequential(nn.Linear(2, 2)))


@pytest.mark.parametrize("cast", ["half", "bfloat16"])
def test_coefficients_stay_float32(cast):
    model = tiny.hf("gpt2")
    orthoact.convert_(model)
    getattr(model, cast)()
    kinds = {name: t.dtype for name, t in model.state_dict().items()}
    assert {t for name, t in kinds.items() if ".act." in name} == {torch.float32}
    assert torch.float32 not in {t for name, t in kinds.items() if ".act." not in name}
    assert tiny.outputs(model).isfinite().all()


def test_a_copy_is_independent():
    model = tiny.hf("gpt2")
    orthoact.convert_(model)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        twin.transformer.h[0].mlp.act.theta += 1
    assert not torch.equal(tiny.outputs(twin), tiny.outputs(model))
    with orthoact.original(twin):
        pass
    assert not model.transformer.h[0].mlp.act.bypass


def test_compiled_model_matches():
    model = tiny.hf("gpt2")
    orthoact.convert_(model)
    expected = tiny.outputs(model)
    compiled = torch.compile(model, backend="aot_eager")
    assert torch.allclose(tiny.outputs(model, run=compiled), expected, atol=1e-5)


class Scaled(nn.Module):
    """Two of these compute different functions under one class name."""

    def __init__(self, scale):
        super().__init__()
        self.scale = scale

    def forward(self, x):
        return torch.atan(self.scale * x) * x


def test_unknown_activations_of_one_class_get_fits_of_their_own():
    model = nn.Sequential(Scaled(1.0), Scaled(3.0))
    x = torch.linspace(-2, 2, 50)[:, None]
    expected = [m(x) for m in model]
    first, second = orthoact.convert_(model, degree=16).plan.fits
    assert first.coefficients != second.coefficients
    assert all((m(x) - e).abs().max() < 0.05 for m, e in zip(model, expected, strict=True))


@pytest.mark.parametrize("act", [nn.GELU(), nn.ReLU()])
def test_the_fused_path_of_torch_does_not_run_the_old_activation(act):
    layer = nn.TransformerEncoderLayer(16, 2, 32, activation=act, batch_first=True).eval()
    x = torch.randn(2, 5, 16)
    with torch.no_grad():
        before = layer(x)
        orthoact.convert_(layer)
        layer.activation.theta[0] += 0.5
        assert not torch.allclose(layer(x), before, atol=1e-3), "the fused path ran the old activation"
        orthoact.revert_(layer)
        assert torch.equal(layer(x), before)


def test_a_plan_for_another_model_is_refused():
    made = orthoact.plan(tiny.hf("gpt2"))
    with pytest.raises(OrthoactError, match=r"names 'transformer\.h\.0\.mlp\.act', a gelu_tanh.*plan this model"):
        orthoact.convert_(tiny.hf("bert-masked"), made)
    model = tiny.hf("gpt2")
    orthoact.convert_(model, made)
    with pytest.raises(OrthoactError, match="converted already"):
        orthoact.convert_(model, made)


def test_a_plan_is_for_the_functions_it_saw():
    made = orthoact.plan(nn.Sequential(nn.Linear(4, 4), nn.GELU()))
    for other in (nn.Tanh(), nn.Linear(4, 4)):
        with pytest.raises(OrthoactError, match="plan this model"):
            orthoact.convert_(nn.Sequential(nn.Linear(4, 4), other), made)
    with pytest.raises(OrthoactError, match="options degree beside a plan"):
        orthoact.convert_(nn.Sequential(nn.Linear(4, 4), nn.GELU()), made, degree=4)


def test_an_activation_that_never_runs_is_left():
    import transformers as tf

    config = tf.MambaConfig(vocab_size=64, hidden_size=16, num_hidden_layers=2, state_size=4)
    sites, left = orthoact.inspect_model(tf.MambaForCausalLM(config).eval())
    kinds = ("fused", "silu")
    assert [s.name for s in sites] == [f"backbone.layers.{i}.mixer.functional_{k}" for i in range(2) for k in kinds]
    assert {i.reason for i in left if i.where.endswith("act")} == {"never called in a forward pass"}


def test_one_glob_may_be_a_string():
    assert len(orthoact.find_sites(tiny.hf("gpt2"), exclude="transformer.h.0.*")) == 1
    assert len(orthoact.find_sites(tiny.hf("gpt2"), include="*.1.mlp.act")) == 1


def test_softmin_is_not_elementwise():
    assert orthoact.find_sites(nn.Sequential(nn.Softmin(-1))) == []
