"""Recipes: typed, checked, overridden by key=value; those that are shipped are listed and valid."""

import pytest

from orthoact import OrthoactError
from orthoact.finetune.recipe import Recipe, listing, read, source_of
from orthoact.finetune.sections import Compare, Data, Train


def test_overrides_are_typed():
    recipe = read("demo-smoke", ["train.learning_rate=1e-3", "train.max_steps=7", "seed=3", "model=some/where"])
    assert (recipe.train.learning_rate, recipe.train.max_steps, recipe.seed) == (1e-3, 7, 3)
    assert recipe.model == "some/where" and recipe.name == "demo-smoke"
    listed = read("demo-smoke", ["convert.include=['*.mlp.act']", "train.clip=null", "convert.groups=per-channel"])
    assert listed.convert.include == ("*.mlp.act",) and listed.train.clip is None
    assert listed.convert.groups == "per-channel"


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("train.wat=lora", r"train\.wat: no such key in a recipe \(near: what"),
        ("trian.what=lora", r"trian: no such key in a recipe \(near: train\)"),
        ("sed=1", r"sed: no such key in a recipe \(near: seed\)"),
        ("train.what.x=1", r"train\.what: no such key"),
        ("train.what=lor", r"train\.what: expected one of activations, .* got 'lor'"),
        ("train.max_steps=-1", r"train\.max_steps: expected a positive number, got -1"),
        ("train.max_steps=2.5", r"train\.max_steps: expected a whole number, got 2\.5"),
        ("train.max_steps=true", r"train\.max_steps: expected a whole number, got True"),
        ("train.learning_rate=.nan", r"train\.learning_rate: expected a number, got nan"),
        ("train.learning_rate=fast", r"train\.learning_rate: expected a number, got 'fast'"),
        ("train=3", r"train: expected a section with keys, got 3"),
        ("model=[1]", r"model: expected a name, got \[1\]"),
        ("data.holdout=0.7", r"data\.holdout: expected a share between 0 and 0\.5"),
        ("train.what", r"'train\.what': expected key=value"),
        ("train.what=[", r"train\.what: '\[' is not a YAML value"),
        ("config.n_layer=2", r"config: n_layer is for untrained weights; give scratch: true"),
        ("convert.start=variance-preserving", r"convert\.start: .* give scratch: true"),
        ("train.patience=2", r"train\.patience: expected train\.evaluate_every"),
        ("compare.rows={a: {train.wat: 1}}", r"train\.wat: no such key"),
        ("compare.rows={a: {seed: 1}}", r"compare\.rows\.a: seed is the same for all rows"),
        ("compare.seeds=[]", r"compare\.seeds: expected at least one seed"),
    ],
)
def test_a_wrong_key_or_value_is_told_by_name(override, said):
    extra = ["train.evaluate_every=null"] if "patience" in override else []
    with pytest.raises(OrthoactError, match=said):
        read("demo-smoke", [*extra, override])


def test_files_that_are_missing_or_no_recipe(tmp_path):
    with pytest.raises(OrthoactError, match=r"near: demo-smoke.*\); `orthoact recipes` lists them"):
        read("demo-smok")
    with pytest.raises(OrthoactError, match="there is no such recipe file"):
        read(tmp_path / "none.yaml")
    for text, said in (("a: [", "not YAML"), ("3", "expected a mapping"), ("modle: x", r"modle: no such key .*model")):
        (tmp_path / "bad.yaml").write_text(text)
        with pytest.raises(OrthoactError, match=said):
            read(tmp_path / "bad.yaml")


def test_a_recipe_survives_yaml(tmp_path):
    import yaml

    recipe = read("text-minilm", ["seed=5"])
    (tmp_path / "text-minilm.yaml").write_text(yaml.safe_dump(recipe.to_dict()))
    assert read(tmp_path / "text-minilm.yaml") == recipe


def test_the_shipped_recipes_are_commented_and_whole():
    found = {recipe.name: recipe for recipe in listing()}
    assert len(found) >= 9 and {"demo-smoke", "demo-train"} <= set(found)
    assert {r.task for r in found.values()} == {"causal-lm", "sequence-classification", "image-classification"}
    for name, recipe in found.items():
        text = source_of(name)
        assert text.startswith("# ") and f"orthoact finetune {name}" in text and recipe.about, name
        offline = read(name, offline=True)
        local = (offline.model == "demo" or offline.scratch or offline.model.startswith("~")) and (
            offline.data.path == "demo" or offline.data.path.startswith("~")
        )
        assert local, f"{name}: its substitute needs a network"
    scratch = [r for r in found.values() if r.scratch and r.convert.start == "variance-preserving"]
    assert {row for r in scratch for row in r.compare.rows} >= {"GELU", "hermite", "fourier", "tropical"}


def test_every_default_is_a_valid_recipe():
    assert Recipe().train == Train() and Recipe().data == Data() and Recipe().compare == Compare()
