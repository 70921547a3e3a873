"""The reload matrix: every route gives the same model with orthoact, and fails loudly without it."""

import copy
import json
import os
import subprocess
import sys

import pytest
import tiny_models as tiny
import torch
import transformers as tf
from safetensors.torch import load_file, save_file

import orthoact
from orthoact import Activation, OrthoactError


def auto_class(model):
    name = type(model).__name__
    for ending, auto in (
        ("ForCausalLM", tf.AutoModelForCausalLM),
        ("LMHeadModel", tf.AutoModelForCausalLM),
        ("ForMaskedLM", tf.AutoModelForMaskedLM),
        ("SequenceClassification", tf.AutoModelForSequenceClassification),
        ("ImageClassification", tf.AutoModelForImageClassification),
        ("ConditionalGeneration", tf.AutoModelForSeq2SeqLM),
    ):
        if name.endswith(ending):
            return auto
    return tf.AutoModel


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Name -> (converted model, folder), made when first asked for."""
    made = {}

    def get(name):
        if name not in made:
            model = tiny.hf(name)
            orthoact.convert_(model, degree=6)
            with torch.no_grad():
                for m in model.modules():
                    if isinstance(m, Activation):  # as after training: the file, not the fit, must be what comes back
                        m.theta += 0.1 * torch.randn_like(m.theta)
            folder = tmp_path_factory.mktemp(name)
            model.save_pretrained(folder)
            made[name] = (model, folder)
        return made[name]

    return get


def same(a, b):
    return torch.equal(tiny.outputs(a), tiny.outputs(b))


@pytest.mark.parametrize("name", tiny.HF)
def test_float32_is_bit_equal(saved, name):
    model, folder = saved(name)
    assert same(auto_class(model).from_pretrained(folder), model)


@pytest.mark.parametrize("name", tiny.HF)
def test_bfloat16_is_bit_equal_to_the_cast_model(saved, name):
    model, folder = saved(name)
    loaded = auto_class(model).from_pretrained(folder, dtype=torch.bfloat16)
    kinds = {k: v.dtype for k, v in loaded.state_dict().items()}
    activations = [m for m in loaded.modules() if isinstance(m, Activation)]
    assert activations and all(t.dtype == torch.float32 for m in activations for t in m.state_dict().values())
    assert torch.bfloat16 in set(kinds.values())
    cast = copy.deepcopy(model)  # what a file holds is cast, computed buffers (rotary frequencies) are not
    for module in cast.modules():
        held = [
            t for name, t in module._buffers.items() if t is not None and name not in module._non_persistent_buffers_set
        ]
        for tensor in [] if isinstance(module, Activation) else [*module.parameters(recurse=False), *held]:
            if tensor.is_floating_point():
                tensor.data = tensor.data.to(torch.bfloat16)
    assert all(torch.equal(v, loaded.state_dict()[k]) for k, v in cast.state_dict().items())
    assert same(loaded, cast)


@pytest.mark.parametrize("device_map", ["cpu", "auto", {"": "cpu"}])
def test_device_map(saved, device_map):
    model, folder = saved("gpt2")
    assert same(tf.AutoModelForCausalLM.from_pretrained(folder, device_map=device_map), model)


def test_tied_weights_stay_tied(saved):
    for name in ("gpt2", "llama-silu"):
        model, folder = saved(name)
        loaded = tf.AutoModelForCausalLM.from_pretrained(folder)
        assert loaded.get_input_embeddings().weight is loaded.get_output_embeddings().weight
        assert same(loaded, model)


def test_the_trunk_of_a_causal_model(saved):
    for name in ("gpt2", "llama-silu", "bert-masked", "vit", "convnext", "bloom", "t5-gated"):
        model, folder = saved(name)
        trunk = tf.AutoModel.from_pretrained(folder)
        held = [m for m in trunk.modules() if isinstance(m, Activation)]
        assert len(held) == tiny.HF[name][1]
        mine = [m for m in model.modules() if isinstance(m, Activation)]
        assert all(torch.equal(a.coefficients, b.coefficients) for a, b in zip(held, mine, strict=True))


def test_another_head_on_the_same_trunk(saved):
    model, folder = saved("gpt2")
    other = tf.AutoModelForSequenceClassification.from_pretrained(folder, num_labels=3)
    ids = torch.randint(5, 90, (2, 9))
    with torch.no_grad():
        assert torch.equal(other.transformer(ids)[0], model.transformer(ids)[0])


def test_a_head_on_a_converted_trunk(saved):
    model, folder = saved("gpt2-base")
    causal = tf.AutoModelForCausalLM.from_pretrained(folder)
    ids = torch.randint(5, 90, (2, 9))
    with torch.no_grad():
        assert torch.equal(causal.transformer(ids)[0], model(ids)[0])


def test_save_again(saved, tmp_path):
    model, folder = saved("gpt2")
    tf.AutoModelForCausalLM.from_pretrained(folder).save_pretrained(tmp_path / "again")
    assert same(tf.AutoModelForCausalLM.from_pretrained(tmp_path / "again"), model)
    first, second = (json.loads((f / "config.json").read_text()) for f in (folder, tmp_path / "again"))
    assert first == second
    tf.AutoModelForCausalLM.from_pretrained(folder).save_pretrained(tmp_path / "shards", max_shard_size="20kB")
    assert same(tf.AutoModelForCausalLM.from_pretrained(tmp_path / "shards"), model)


def test_trainer_checkpoint(saved, tmp_path):
    _, folder = saved("gpt2")
    model = tf.AutoModelForCausalLM.from_pretrained(folder)
    start = model.transformer.h[0].mlp.act.theta.detach().clone()
    rows = [{"input_ids": torch.randint(5, 90, (12,))} for _ in range(8)]
    rows = [row | {"labels": row["input_ids"]} for row in rows]
    args = tf.TrainingArguments(
        str(tmp_path),
        max_steps=2,
        save_steps=2,
        per_device_train_batch_size=4,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
    )
    tf.Trainer(model=model, args=args, train_dataset=rows).train()
    again = tf.AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint-2")
    assert same(again, model.eval())
    assert not torch.equal(again.transformer.h[0].mlp.act.theta, start), "the coefficients must have been trained"


def test_from_config_starts_as_the_fit(saved):
    model, folder = saved("gpt2")
    config = tf.AutoConfig.from_pretrained(folder)
    assert config.activation_function == "gelu_new", "in memory the config names the original"
    fresh = tf.AutoModelForCausalLM.from_config(config)
    act, old = fresh.transformer.h[0].mlp.act, model.transformer.h[0].mlp.act
    assert torch.equal(act.start, old.start) and not act.theta.any()


def test_generation_and_pipeline(saved):
    model, folder = saved("gpt2")
    ids = torch.randint(5, 90, (1, 5))
    loaded = tf.AutoModelForCausalLM.from_pretrained(folder)
    options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(loaded.generate(ids, **options), model.generate(ids, **options))


def test_the_sentinel_is_in_the_file_only(saved):
    for name in tiny.HF:
        model, folder = saved(name)
        config = json.loads((folder / "config.json").read_text())
        assert config["orthoact"]["sites"].keys() == {n for n, m in model.named_modules() if isinstance(m, Activation)}
        keys = config["orthoact"]["activations"]
        assert all(config[key] == "orthoact" for key in keys)
        second = config.get("fusion_config")  # where no activation key is read at construction, as in bloom
        assert second == (None if keys else {"orthoact": False}), name
        assert all(getattr(model.config, key) == value for key, value in keys.items())


# -- what is broken must not load --------------------------------------------------------------------------------------


def copy_of(folder, target):
    import shutil

    shutil.copytree(folder, target)
    return target


def test_missing_coefficients_are_refused(saved, tmp_path):
    _, folder = saved("gpt2")
    broken = copy_of(folder, tmp_path / "broken")
    tensors = load_file(broken / "model.safetensors")
    for lost in ("transformer.h.1.mlp.act.theta", "transformer.h.0.mlp.act.lo"):
        save_file({k: v for k, v in tensors.items() if k != lost}, broken / "model.safetensors", {"format": "pt"})
        with pytest.raises(OrthoactError, match=rf"lacks {lost.rpartition('.')[2]} of the learnable activation"):
            tf.AutoModelForCausalLM.from_pretrained(broken)


def test_an_unknown_site_is_refused(saved, tmp_path):
    _, folder = saved("gpt2")
    broken = copy_of(folder, tmp_path / "broken")
    config = json.loads((broken / "config.json").read_text())
    sites = config["orthoact"]["sites"]
    sites["transformer.h.7.mlp.act"] = sites["transformer.h.0.mlp.act"]
    (broken / "config.json").write_text(json.dumps(config))
    with pytest.raises(OrthoactError, match=r"transformer\.h\.7\.mlp\.act.*GPT2LMHeadModel does not have"):
        tf.AutoModelForCausalLM.from_pretrained(broken)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda spec: spec.update(format=99), "record format 99"),
        (lambda spec: spec.update(sites={}), "no record of a conversion"),
        (lambda spec: next(iter(spec["sites"].values())).update(family="splines"), "unknown family 'splines'"),
        (lambda spec: next(iter(spec["sites"].values())).pop("degree"), "lacks 'degree'"),
    ],
)
def test_a_damaged_record_is_refused(saved, tmp_path, change, message):
    _, folder = saved("gpt2")
    broken = copy_of(folder, tmp_path / "broken")
    config = json.loads((broken / "config.json").read_text())
    change(config["orthoact"])
    (broken / "config.json").write_text(json.dumps(config))
    with pytest.raises(OrthoactError, match=message):
        tf.AutoModelForCausalLM.from_pretrained(broken)


def test_a_model_and_its_record_must_agree_on_saving(saved, tmp_path):
    model = tiny.hf("gpt2")
    orthoact.convert_(model)
    spec = model.config.orthoact
    del model.config.orthoact
    with pytest.raises(OrthoactError, match="no record of them"):
        model.save_pretrained(tmp_path)
    model.config.orthoact = spec
    model.transformer.h[0].mlp.act = model.transformer.h[0].mlp.act.original
    with pytest.raises(OrthoactError, match="records 2 learnable activations"):
        model.save_pretrained(tmp_path)
    with pytest.raises(OrthoactError, match="no record of them"):
        part = tiny.hf("t5-gated")
        orthoact.convert_(part)
        part.encoder.save_pretrained(tmp_path)


WITHOUT = """
import json, sys, warnings
warnings.simplefilter("ignore")
import transformers, torch
transformers.logging.set_verbosity_error()
out = {}
for folder, classes in json.loads(sys.argv[1]).items():
    for name in classes:
        cls = getattr(transformers, name)
        ways = {"plain": {}, "bf16": {"dtype": torch.bfloat16}, "device_map": {"device_map": "auto"}}
        for label, options in ways.items():
            try:
                cls.from_pretrained(folder, **options)
                out[f"{folder} {name} {label}"] = "LOADED"
            except Exception as error:
                out[f"{folder} {name} {label}"] = f"{type(error).__name__}: {error}"
assert "orthoact" not in sys.modules
print(json.dumps(out))
"""


def test_without_orthoact_every_route_fails_and_names_it(saved, tmp_path):
    routes = {}
    for name in tiny.HF:
        model, folder = saved(name)
        trunk = type(model.base_model).__name__
        routes[str(folder)] = sorted(
            {auto_class(model).__name__, type(model).__name__, "AutoModel", trunk} - {"T5Stack"}
        )
    _, folder = saved("gpt2")
    tf.AutoModelForCausalLM.from_pretrained(folder).save_pretrained(tmp_path / "again")
    routes[str(tmp_path / "again")] = ["AutoModelForCausalLM"]
    routes[str(folder)].append("AutoModelForSequenceClassification")
    env = {**os.environ, "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", WITHOUT, json.dumps(routes)]
    done = subprocess.run(command, capture_output=True, text=True, env=env, cwd=tmp_path, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    results = json.loads(done.stdout.splitlines()[-1])
    assert len(results) >= 3 * len(tiny.HF)
    silent = {route: message for route, message in results.items() if "orthoact" not in message.split(": ", 1)[-1]}
    assert not silent
