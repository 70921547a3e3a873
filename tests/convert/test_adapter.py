"""Adapters: a few kB that PEFT applies, switches off exactly, merges, and trains together with LoRA."""

import json
import os
import subprocess
import sys

import pytest
import tiny_models as tiny
import torch
import transformers as tf
from peft import AutoPeftModelForCausalLM, PeftModel
from safetensors.torch import load_file, save_file

import orthoact
from orthoact import Activation, OrthoactError
from orthoact.convert.adapter import PackedActivation, adapter_config, to_peft
from orthoact.convert.audit import probe_batch
from orthoact.convert.checkpoint import save
from orthoact.convert.sources import load_source

KINDS = {
    **{name: (tiny.hf, name) for name in ("gpt2", "bert-masked", "t5-gated", "vit", "convnext", "llama-silu")},
    **{f"timm-{name}": (tiny.timm_model, name) for name in ("vit", "convnext")},
}


def base(kind):
    build, name = KINDS[kind]
    return build(name)


def logits(model, like):
    with torch.no_grad():
        out = model(**probe_batch(like, seed=0))
    return out if isinstance(out, torch.Tensor) else out["logits"] if "logits" in out else out["last_hidden_state"]


def converted(kind, **options):
    model = base(kind)
    orthoact.convert_(model, **{"degree": 6, **options})
    with torch.no_grad():
        for m in model.modules():
            if isinstance(m, Activation):
                m.theta += 0.1 * torch.randn_like(m.theta)
    return model


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    made = {}

    def get(kind, **options):
        key = (kind, *sorted(options.items()))
        if key not in made:
            model = converted(kind, **options)
            made[key] = model, save(model, tmp_path_factory.mktemp("adapters") / kind, form="adapter")
        return made[key]

    return get


def test_packed_is_the_same_activation():
    for family in orthoact.FAMILIES:
        act = Activation.from_fit(orthoact.fit("gelu", family=family, degree=3), groups=2)
        with torch.no_grad():
            act.theta += 0.1 * torch.randn_like(act.theta)
        packed = PackedActivation.of(act)
        x = torch.randn(5, 6, requires_grad=True)
        assert len(packed.state_dict()) == 2 and torch.equal(packed(x), act(x))
        (g,) = torch.autograd.grad(packed(x).square().sum(), packed.theta)
        (h,) = torch.autograd.grad(act(x).square().sum(), act.theta)
        assert torch.equal(g, h)
        back = packed.unpacked()
        assert type(back) is Activation and all(
            torch.equal(v, act.state_dict()[k]) for k, v in back.state_dict().items()
        )


@pytest.mark.parametrize("kind", KINDS)
def test_applied_switched_off_and_merged(saved, kind, tmp_path):
    model, folder = saved(kind)
    plain = base(kind)
    expected, original = logits(model, plain), logits(plain, plain)
    wrapped = PeftModel.from_pretrained(base(kind), folder).eval()
    assert torch.equal(logits(wrapped, plain), expected)
    assert not [n for n, p in wrapped.named_parameters() if p.requires_grad]
    with wrapped.disable_adapter():
        assert torch.equal(logits(wrapped, plain), original)
    merged = wrapped.merge_and_unload()
    assert type(merged) is type(plain) and torch.equal(logits(merged, plain), expected)
    again = orthoact.load(save(merged, tmp_path / "merged"))
    assert torch.equal(logits(again, plain), expected)
    orthoact.revert_(again)
    assert torch.equal(logits(again, plain), original)


def test_unload_gives_the_base_back(saved):
    _, folder = saved("gpt2")
    plain = base("gpt2")
    bare = PeftModel.from_pretrained(base("gpt2"), folder).unload()
    assert torch.equal(logits(bare, plain), logits(plain, plain))
    assert bare.state_dict().keys() == plain.state_dict().keys()


def test_several_adapters_on_one_base(saved):
    (one, first), (two, second) = saved("gpt2"), saved("gpt2", family="tropical-rational", groups=4)
    plain = base("gpt2")
    wrapped = PeftModel.from_pretrained(base("gpt2"), first).eval()
    wrapped.load_adapter(second, "second")
    for name, model in (("default", one), ("second", two), ("default", one)):
        wrapped.set_adapter(name)
        assert torch.equal(logits(wrapped, plain), logits(model, plain))
    wrapped.base_model.set_adapter(["default", "second"])
    with pytest.raises(OrthoactError, match="set_adapter to one"):
        logits(wrapped, plain)
    wrapped.set_adapter("second")
    wrapped.merge_adapter()
    assert torch.equal(logits(wrapped, plain), logits(two, plain))
    with wrapped.disable_adapter():
        assert torch.equal(logits(wrapped, plain), logits(plain, plain))
    wrapped.unmerge_adapter()
    with pytest.warns(UserWarning, match="Setting active adapter to default"):
        wrapped.delete_adapter("second")
    wrapped.set_adapter("default")
    assert torch.equal(logits(wrapped, plain), logits(one, plain))


def test_together_with_lora_in_one_adapter(tmp_path):
    model, plain = converted("gpt2"), base("gpt2")
    before = logits(model, plain)
    wrapped = to_peft(model, r=4, target_modules=["c_attn"], fan_in_fan_out=True)
    assert torch.equal(logits(wrapped.eval(), plain), before), "LoRA starts as nothing"
    trained = {n for n, p in wrapped.named_parameters() if p.requires_grad}
    assert len(trained) == 2 + 4 and all("lora_" in n or n.endswith("theta") for n in trained)
    optimiser = torch.optim.Adam([p for p in wrapped.parameters() if p.requires_grad], 1e-2)
    ids = torch.randint(5, 90, (2, 12))
    for _ in range(3):
        optimiser.zero_grad()
        wrapped(input_ids=ids, labels=ids).loss.backward()
        optimiser.step()
    wrapped.eval().save_pretrained(tmp_path / "both")
    after = logits(wrapped, plain)
    assert not torch.equal(after, before)
    again = PeftModel.from_pretrained(base("gpt2"), tmp_path / "both").eval()
    assert torch.equal(logits(again, plain), after)
    with again.disable_adapter():
        assert torch.equal(logits(again, plain), logits(plain, plain))
    loaded = base("gpt2")
    loaded.load_adapter(str(tmp_path / "both"))
    assert torch.equal(logits(loaded, plain), after)
    merged = again.merge_and_unload()
    assert torch.allclose(logits(merged, plain), after, atol=1e-5)
    reloaded = tf.AutoModelForCausalLM.from_pretrained(save(merged, tmp_path / "merged"))
    assert torch.equal(logits(reloaded, plain), logits(merged, plain))


def test_a_fresh_adapter_starts_as_its_fit():
    from peft import get_peft_model

    model, plain = base("gpt2"), base("gpt2")
    orthoact.convert_(model)
    wrapped = get_peft_model(base("gpt2"), adapter_config(model))
    assert torch.equal(logits(wrapped.eval(), plain), logits(model, plain))
    assert [n for n, p in wrapped.named_parameters() if p.requires_grad] == [
        f"base_model.model.transformer.h.{i}.mlp.act.orthoact_act.default.theta" for i in range(2)
    ]


def test_plain_from_pretrained_of_an_adapter(saved, tmp_path, monkeypatch):
    model, folder = saved("gpt2")
    monkeypatch.chdir(tmp_path)
    base("gpt2").save_pretrained("the-base")
    config = json.loads((folder / "adapter_config.json").read_text())
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": "the-base"}))
    save_file(load_file(folder / "adapter_model.safetensors"), tmp_path / "a" / "adapter_model.safetensors")
    loaded = tf.AutoModelForCausalLM.from_pretrained("a")
    assert torch.equal(logits(loaded, model), logits(model, model))
    assert torch.equal(logits(orthoact.load("a"), model), logits(model, model))
    loaded.save_pretrained("again") if _saves() else None


def _saves():
    """Whether this transformers saves adapters with this PEFT: 5.24 asks for one that is not out yet."""
    from importlib.metadata import version

    from transformers.integrations.peft import MIN_PEFT_VERSION

    return tuple(map(int, version("peft").split("."))) >= tuple(map(int, MIN_PEFT_VERSION.split(".")))


def test_the_demo_is_named_by_package_and_version(tmp_path):
    source = load_source("demo")
    orthoact.convert_(source.model)
    folder = save(
        source.model, tmp_path / "a", source=source, form="adapter", command=["orthoact", "-o", str(tmp_path)]
    )
    text = (folder / "adapter_config.json").read_text()
    assert json.loads(text)["base_model_name_or_path"] == f"orthoact=={orthoact.__version__}:demo"
    assert str(tmp_path) not in text and os.sep + "convert" not in text
    for load in (tf.AutoModelForCausalLM.from_pretrained, AutoPeftModelForCausalLM.from_pretrained, orthoact.load):
        assert torch.equal(logits(load(str(folder)), source.model), logits(source.model, source.model))


def test_a_twelve_layer_gpt2_takes_at_most_sixteen_kilobytes(tmp_path):
    from orthoact import Measured

    for calibrated in (False, True):
        config = tf.GPT2Config(n_embd=16, n_head=2, n_layer=12, vocab_size=96, bos_token_id=1, eos_token_id=2)
        model = tf.GPT2LMHeadModel(config)
        laws = {}
        for i in range(12 * calibrated):
            laws[f"transformer.h.{i}.mlp.act"] = law = Measured()
            law.add(torch.randn(2000) * (1 + i / 7) - i / 3)
        orthoact.convert_(model, degree=8, domains=laws)
        spec = model.config.orthoact
        spec["base"] = {"model": "openai-community/gpt2", "revision": "0" * 40, "library": "transformers"}
        spec["base"]["files"] = {"model.safetensors": "0" * 64}
        spec["made"] = {"command": "orthoact convert openai-community/gpt2 --family hermite --degree 8 --adapter"}
        folder = save(model, tmp_path / f"a{calibrated}", form="adapter")
        assert {p.name for p in folder.iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}
        assert sum(p.stat().st_size for p in folder.iterdir()) <= 16_000


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (lambda: base("bert-masked"), "does not have"),
        (lambda: tf.GPT2LMHeadModel(tf.GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=96)), "is \\(32, 128\\)"),
        (lambda: tiny._gpt2(activation_function="relu"), "it is a relu"),
        (lambda: converted("gpt2"), "converted already"),
    ],
    ids=["names", "shapes", "activations", "converted"],
)
def test_a_base_that_does_not_match_is_refused_and_left_alone(saved, other, message):
    _, folder = saved("gpt2")
    model = other()
    before = {name: type(m) for name, m in model.named_modules()}
    trainable = {n: p.requires_grad for n, p in model.named_parameters()}
    with pytest.raises(OrthoactError, match=message):
        PeftModel.from_pretrained(model, folder)
    assert {name: type(m) for name, m in model.named_modules()} == before
    assert {n: p.requires_grad for n, p in model.named_parameters()} == trainable


def damaged(folder, target, change):
    target.mkdir()
    tensors = load_file(folder / "adapter_model.safetensors")
    change(tensors)
    save_file(tensors, target / "adapter_model.safetensors")
    (target / "adapter_config.json").write_bytes((folder / "adapter_config.json").read_bytes())
    return target


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t, k: t.pop(k), "lacks"),
        (lambda t, k: t.update({k: t[k].double()}), "float64"),
        (lambda t, k: t.update({k: t[k][:-1].clone()}), "shape"),
        (lambda t, k: t.update({k: t[k] * torch.nan}), "NaN"),
    ],
    ids=["missing", "dtype", "shape", "nan"],
)
def test_damaged_numbers_are_refused(saved, tmp_path, change, message):
    _, folder = saved("gpt2")
    for key in ("theta", "fixed"):
        at = f"base_model.model.transformer.h.1.mlp.act.orthoact_act.{key}"
        broken = damaged(folder, tmp_path / key, lambda t, at=at: change(t, at))
        with pytest.raises(OrthoactError, match=message):
            PeftModel.from_pretrained(base("gpt2"), broken)


def test_an_adapter_of_other_weights_or_of_an_adapter_is_refused(tmp_path):
    source = load_source("demo")
    orthoact.convert_(source.model)
    folder = save(source.model, tmp_path / "a", source=source, form="adapter")
    config = json.loads((folder / "adapter_config.json").read_text())

    def changed(**values):
        (folder / "adapter_config.json").write_text(json.dumps(config | values))

    config["orthoact"]["base"]["files"]["model.safetensors"] = "0" * 64
    changed()
    with pytest.raises(OrthoactError, match="are not those that the adapter was made of"):
        orthoact.load(folder)
    changed(base_model_name_or_path="a")  # itself
    with pytest.raises(OrthoactError, match="is an adapter"):
        orthoact.load(folder)
    for name in ("/etc", "../up", "~", None, "x/../../y"):
        changed(base_model_name_or_path=name)
        with pytest.raises(OrthoactError, match="load the base yourself"):
            orthoact.load(folder)


def test_without_orthoact_it_fails_and_names_it(saved, tmp_path):
    _, folder = saved("gpt2")
    base("gpt2").save_pretrained(tmp_path / "base")
    code = f"""
import sys
from transformers import AutoModelForCausalLM
from peft import PeftModel
try:
    PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained({str(tmp_path / "base")!r}), {str(folder)!r})
except Exception as error:
    assert "orthoact" not in sys.modules
    print(error)
"""
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, timeout=300)
    assert "ORTHOACT" in done.stdout, done.stderr[-2000:]
