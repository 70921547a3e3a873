"""What trains is what was asked for, nothing else moves, and what is saved is what was trained."""

import tiny_models as tiny
import torch
from pytest import mark, raises
from torch import nn
from transformers import AutoModelForCausalLM

from orthoact import Activation, OrthoactError, convert_
from orthoact.convert.audit import probe_batch
from orthoact.finetune.parameters import PARTS, WHAT, choose, fix_tails
from orthoact.finetune.sections import WHAT as RECIPE

MODELS = {
    "gpt2": lambda: tiny.hf("gpt2"),
    "llama": lambda: tiny.hf("llama-silu"),
    "bert-classifier": lambda: tiny.hf("bert-classifier"),
    "vit": lambda: tiny.hf("vit"),
    "convnext": lambda: tiny.hf("convnext"),
    "timm-vit": lambda: tiny.timm_model("vit"),
    "timm-convnext": lambda: tiny.timm_model("convnext"),
}
CLASSIFIERS = {"bert-classifier": "classifier", "vit": "classifier", "convnext": "classifier", "timm-vit": "head"}


def converted(name, **options):
    model = MODELS[name]()
    convert_(model, **options)
    return model


def loss_of(model):
    out = model(**probe_batch(model))
    out = out if isinstance(out, torch.Tensor) else out["logits"]
    return out.float().square().mean()


def test_the_recipe_knows_the_same_names():
    assert tuple(WHAT) == RECIPE


@mark.parametrize("what", WHAT)
@mark.parametrize("name", MODELS)
def test_a_step_moves_what_trains_and_nothing_else(name, what):
    model = converted(name, degree=4, groups=2)
    if what == "head" and name in ("gpt2", "llama"):
        with raises(OrthoactError, match="no classification head"):
            choose(model, what, learning_rate=0.1)
        return
    if what == "bias" and name == "llama":
        with raises(OrthoactError, match="no bias"):
            choose(model, what, learning_rate=0.1)
        return
    trainable = choose(model, what, learning_rate=0.1, weight_decay=0.5, lora_rank=2)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    chosen = {id(p) for g in trainable.groups for p in g["params"]}
    assert trainable.total == sum(p.numel() for g in trainable.groups for p in g["params"]) > 0
    optimiser = torch.optim.AdamW(trainable.groups)
    for _ in range(2):  # LoRA's second matrix starts at zero, so its first has no gradient at the first step
        optimiser.zero_grad()
        loss_of(model).backward()
        optimiser.step()
    for n, p in model.named_parameters():
        assert p.requires_grad == (id(p) in chosen), n
        if id(p) not in chosen:
            assert torch.equal(p, before[n]), n
        elif p.grad is not None and p.grad.any():
            assert not torch.equal(p, before[n]), n
    assert any(not torch.equal(p, before[n]) for n, p in model.named_parameters() if id(p) in chosen)


@mark.parametrize("name", CLASSIFIERS)
@mark.parametrize("what", WHAT)
def test_the_head_trains_in_every_classification_row(name, what):
    model = converted(name, degree=4)
    choose(model, what, learning_rate=0.1)
    head = [p for n, p in model.named_parameters() if n.startswith(CLASSIFIERS[name])]
    assert head and all(p.requires_grad for p in head)


def test_rates_and_decay_of_the_groups():
    model = converted("bert-classifier", degree=4)
    trainable = choose(
        model, "all", learning_rate=1e-4, activation_learning_rate=1e-2, head_learning_rate=1e-3, weight_decay=0.1
    )
    found = {(g["name"], p.dim() > 1): (g["lr"], g["weight_decay"]) for g in trainable.groups for p in g["params"]}
    assert found == {
        ("head", True): (1e-3, 0.1),
        ("head", False): (1e-3, 0.0),
        ("activations", False): (1e-2, 0.0),
        ("weights", True): (1e-4, 0.1),
        ("weights", False): (1e-4, 0.0),
    }
    grouped = choose(converted("vit", degree=4, groups=2), "activations", learning_rate=1e-2, weight_decay=0.1)
    assert [g["weight_decay"] for g in grouped.groups if g["name"] == "activations"] == [0.0]  # 2-D, still none


def test_parts_are_counted_by_hand():
    model = converted("gpt2", degree=8, groups=4)
    assert choose(model, "activations", learning_rate=1.0).count == {"activations": 2 * 4 * 9}
    assert choose(model, "norms", learning_rate=1.0).count == {"norms": 5 * 2 * 32}
    assert choose(model, "lora", learning_rate=1.0, lora_rank=3).count == {"lora": 2 * 3 * (32 + 96)}
    every = converted("gpt2", degree=8)
    assert choose(every, "all", learning_rate=1.0).total == sum(p.numel() for p in every.parameters())


def test_a_model_that_has_nothing_of_the_kind():
    net = nn.Sequential(nn.Linear(4, 8, bias=False), nn.GELU())
    with raises(OrthoactError, match="no learnable activation that could train; convert it first"):
        choose(net, "activations", learning_rate=1.0)
    with raises(OrthoactError, match="expected one of activations, activations"):
        choose(net, "adapters", learning_rate=1.0)
    with raises(OrthoactError, match=r"lora_targets: PEFT cannot put LoRA"):
        choose(tiny.hf("gpt2"), "lora", learning_rate=1.0, lora_targets=["nowhere"])


@mark.parametrize("name", ["gpt2", "timm-vit"])
def test_lora_is_merged_and_the_folder_loads(name, tmp_path):
    model = converted(name, degree=4)
    trainable = choose(model, "lora+activations", learning_rate=0.05, lora_rank=2)
    assert set(trainable.count) >= {"lora", "activations"} and trainable.model is model
    optimiser = torch.optim.AdamW(trainable.groups)
    for _ in range(3):
        optimiser.zero_grad()
        loss_of(model).backward()
        optimiser.step()
    trained = tiny.outputs(model)
    assert trainable.finish() is model and not PARTS["lora"](model)
    assert torch.allclose(tiny.outputs(model), trained, atol=1e-4)
    fresh = converted(name, degree=4)
    assert {n for n, _ in model.named_parameters()} == {n for n, _ in fresh.named_parameters()}
    if name == "gpt2":
        model.save_pretrained(tmp_path / "out")
        assert not (tmp_path / "out" / "adapter_config.json").exists()
        again = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
        assert torch.equal(tiny.outputs(again), tiny.outputs(model))


@mark.parametrize("groups", [None, 4])
def test_fixed_tails_stay_under_adam_with_large_steps(groups):
    model = converted("gpt2", degree=8, groups=groups)
    acts = [m for m in model.modules() if isinstance(m, Activation)]
    far = torch.cat([torch.linspace(-20, -6, 57), torch.linspace(6, 20, 57)])
    x = far[:, None].expand(-1, 128)
    trainable = choose(model, "activations", learning_rate=0.3, tails="fixed")
    start, middle = [act(x).detach() for act in acts], acts[0](torch.zeros(1, 128)).detach()
    assert trainable.count == {"activations": 2 * (groups or 1) * 5}  # 9 numbers, 4 equalities
    optimiser = torch.optim.Adam(trainable.groups)
    for _ in range(5):
        optimiser.zero_grad()
        loss_of(model).backward()
        optimiser.step()
    for act, was in zip(acts, start, strict=True):
        assert torch.allclose(act(x), was, atol=2e-4 * 20)
    assert (acts[0](torch.zeros(1, 128)) - middle).abs().max() > 0.05


def test_turning_the_coordinates_keeps_the_function():
    from orthoact import fit

    act = Activation.from_fit(fit("silu", degree=6))
    act.theta.data = torch.linspace(-0.2, 0.3, 7)
    x = torch.linspace(-9, 9, 200)
    before = act(x).detach()
    free = fix_tails(act)
    assert torch.allclose(act(x), before, atol=1e-5) and free.tolist() == [False] * 4 + [True] * 3
    with raises(OrthoactError, match="nothing is free at degree 3"):
        fix_tails(Activation.from_fit(fit("silu", degree=3)))
    with raises(OrthoactError, match="linear in its numbers"):
        fix_tails(Activation.from_fit(fit("silu", family="rational", degree=4)))
