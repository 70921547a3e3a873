"""Every shipped recipe runs: by its offline substitute, a few steps, through the front door."""

import json
from pathlib import Path

import pytest
import real_models
from click.testing import CliRunner

from orthoact.cli import main
from orthoact.finetune.recipe import listing, read

FEW = ["train.max_steps=2", "train.batch_size=2", "data.train_limit=6", "data.validation_limit=4", "data.test_limit=4"]
NAMES = [recipe.name for recipe in listing()]


def needs(name):
    recipe = read(name, offline=True)
    return [p.rpartition("/")[2] for p in (recipe.model, recipe.data.path) if p.startswith("~")]


def novels(tmp_path):
    text = (Path(__file__).parents[2] / "convert" / "demo" / "heldout.txt").read_text()
    rows = [part for part in text.split("\n\n") if part.strip()]
    path = tmp_path / "novels.jsonl"
    path.write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    return path


def mails(tmp_path):
    path = tmp_path / "mails.csv"
    path.write_text("text,label\n" + "".join(f"{'buy now' if i % 2 else 'dear all'} {i},{i % 2}\n" for i in range(60)))
    return path


def clothes(tmp_path):
    import numpy as np
    from PIL import Image

    for i in range(60):
        path = tmp_path / "clothes" / f"class{i % 3}" / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.random.default_rng(i).integers(0, 255, (28, 28), dtype=np.uint8)).save(path)
    return tmp_path / "clothes"


STANDS_IN = {"austen": novels, "spam": mails, "fashion-splits": clothes}
"""Where the cache lacks the data of a substitute, the same form of data stands in; a model is never replaced."""


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_runs(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    recipe = read(name, offline=True)
    overrides = FEW + (["data.length=64"] if recipe.task == "causal-lm" else [])
    for item in needs(name):
        if item not in STANDS_IN:
            real_models.require(item)
        elif real_models.available(item) is None:
            overrides.append(f"data.path={STANDS_IN[item](tmp_path)}")
    result = CliRunner().invoke(main, ["finetune", name, "--offline", "--json", *overrides])
    assert result.exit_code == 0, f"{result.output} {result.exception!r}"
    facts = json.loads(result.stdout)
    assert facts["step"] == 2 and facts["recipe"]["model"] == recipe.model
    assert facts["trainable"] == sum(facts["trainable_by"].values()) > 0
    lines = (tmp_path / name / "metrics.jsonl").read_text().splitlines()
    assert json.loads(lines[-1])["step"] == 2 and (tmp_path / name / "config.json").is_file()


@pytest.mark.parametrize("family", ["hermite", "fourier", "tropical"])
@pytest.mark.parametrize("name", ["scratch-gpt2", "scratch-convnext"])
def test_from_scratch_every_family_keeps_the_variance(name, family, tmp_path):
    """At the start the mean square of what the activations give is one, at every depth."""
    import torch

    from orthoact import Activation
    from orthoact.finetune.data import make_examples, read_rows
    from orthoact.finetune.models import make_model

    stand_in = (novels if name == "scratch-gpt2" else clothes)(tmp_path)
    recipe = read(name, [f"convert.family={family}", f"data.path={stand_in}"], offline=True)
    rows = read_rows(recipe)
    source, record = make_model(recipe, rows)
    examples = make_examples(rows, source, recipe)
    squares = []
    for act in source.model.modules():
        if isinstance(act, Activation):
            act.register_forward_hook(lambda m, a, out: squares.append(out.square().mean().item()))
    with torch.no_grad():
        batch = examples.collate([examples.train[i] for i in range(8)])
        source.model(**{k: v for k, v in batch.items() if k != "labels"})
    assert len(squares) == len(record["sites"]) >= 4
    assert all(0.5 < square < 2 for square in squares), squares


def call(*args, code=0):
    result = CliRunner().invoke(main, [str(a) for a in args])
    assert result.exit_code == code, f"{result.exit_code}: {result.output} {result.exception!r}"
    return result


def test_the_commands_of_recipes(tmp_path):
    assert [row["name"] for row in json.loads(call("recipes", "--json").stdout)["recipes"]] == sorted(NAMES)
    assert all(name in call("recipes").stderr for name in NAMES)
    text = call("recipes", "demo-smoke").stdout
    (tmp_path / "mine.yaml").write_text(text)
    assert read(tmp_path / "mine.yaml").train == read("demo-smoke").train, "what is printed can be edited and run"
    assert "near: demo-smoke" in call("recipes", "demo-smokes", code=1).stderr


def test_wrong_usage_is_told(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert "near: max_steps" in call("finetune", "demo-smoke", "train.max_stps=2", code=1).stderr
    assert "--resume, --overwrite" in call("finetune", "demo-smoke", "--resume", "--overwrite", code=2).stderr
    assert "positive whole number" in call("finetune", "demo-smoke", "--num-processes", "0", code=1).stderr
    assert list(tmp_path.iterdir()) == []
