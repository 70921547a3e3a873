"""The table of a recipe: every row alike, chosen on validation data, resumable, reported whole."""

import json
import math

import pytest
from click.testing import CliRunner
from tiny_training import short

from orthoact import OrthoactError
from orthoact.cli import main
from orthoact.finetune.compare import compare, summary
from orthoact.finetune.recipe import read
from orthoact.finetune.run import train

SHORT = ["data.length=32", "train.max_steps=3", "train.batch_size=2", "data.validation_limit=2", "data.test_limit=2"]
SHORT += ["train.evaluate_every=null", "compare.learning_rates=[1e-3,1e-2]", "compare.seeds=[0,1]"]


def test_the_table_is_whole_and_resumes_row_by_row(tmp_path, monkeypatch):
    from orthoact.finetune import compare as module

    recipe, out = read("demo-smoke", SHORT), tmp_path / "table"
    ran, inner = [], module.run

    def interrupted(variant, *args, **options):
        ran.append((variant.train.what, variant.train.learning_rate, variant.seed))
        if len(ran) == 4:
            raise KeyboardInterrupt
        return inner(variant, *args, **options)

    monkeypatch.setattr(module, "run", interrupted)
    with pytest.raises(KeyboardInterrupt):
        compare(recipe, out)
    assert len(json.loads((out / "comparison.json").read_text())["cells"]) == 3
    held = compare(recipe, out, resume=True)
    assert len(ran) == 1 + 8 and len(set(ran)) == 8, "the one that was interrupted runs again, no other does"

    assert [row["row"] for row in held["rows"]] == ["activations", "norms"]
    assert {(c["row"], c["learning_rate"], c["seed"]) for c in held["cells"]} == {
        (row, rate, seed) for row in ("activations", "norms") for rate in (1e-3, 1e-2) for seed in (0, 1)
    }
    for row in held["rows"]:
        mine = [c for c in held["cells"] if c["row"] == row["row"]]
        by_rate = {c["learning_rate"]: 0.0 for c in mine}
        for cell in mine:
            by_rate[cell["learning_rate"]] += cell["validation"]["loss"] / 2
        assert row["learning_rate"] == min(by_rate, key=by_rate.__getitem__), "chosen on the validation split"
        tests = [c["test"]["perplexity"] for c in mine if c["learning_rate"] == row["learning_rate"]]
        assert row["test"]["perplexity"]["mean"] == pytest.approx(sum(tests) / 2)
        assert row["test"]["perplexity"]["std"] == pytest.approx(abs(tests[0] - tests[1]) / math.sqrt(2))
        assert {"zero_step", "trainable", "seconds", "peak_memory"} <= set(row)
    trainable = {row["row"]: row["trainable"] for row in held["rows"]}
    assert trainable == {"activations": 30, "norms": 13 * 2 * 128}
    assert {p.name for p in out.iterdir()} == {"comparison.json", "comparison.md", "comparison.png", "orthoact.json"}
    table = (out / "comparison.md").read_text()
    assert table.count(" ± ") == 2 * 4 and "| norms | 3,328 |" in table
    assert (out / "comparison.png").read_bytes()[:4] == b"\x89PNG"
    assert compare(recipe, out, resume=True)["cells"] == held["cells"], "what is there is not run again"
    with pytest.raises(OrthoactError, match=r"another recipe \(train\.max_steps was 3, is 4\)"):
        compare(read("demo-smoke", [*SHORT, "train.max_steps=4"]), out, resume=True)


def test_what_is_no_comparison_is_not_resumed(tmp_path):
    train(short("train.max_steps=1"), tmp_path / "model")
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "model").rglob("*")}
    with pytest.raises(OrthoactError, match="is not the folder of a comparison"):
        compare(read("demo-smoke", SHORT), tmp_path / "model", resume=True)
    with pytest.raises(OrthoactError, match="there is no file or folder"):
        compare(read("demo-smoke", [*SHORT, "data.path=/nowhere.txt"]), tmp_path / "model", overwrite=True)
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "model").rglob("*")} == before


def test_the_table_has_what_the_recipe_has_now(tmp_path):
    few = [*SHORT, "train.max_steps=1", "compare.seeds=[0]"]
    rows = "compare.rows={a: {}, 'b [/x]': {train.what: norms}}"
    compare(read("demo-smoke", [*few, rows, "compare.learning_rates=[1e-3, 1e-2]"]), tmp_path / "out", quiet=False)
    fewer = [*few, "compare.rows={a: {}}", "compare.learning_rates=[1e-3]"]
    held = compare(read("demo-smoke", fewer), tmp_path / "out", resume=True)
    assert len(held["cells"]) == 4 and [list(row["rates"]) for row in held["rows"]] == [["0.001"]]
    assert "b [/x]" not in held["table"]


def test_a_row_that_diverges_is_the_worst_and_says_so(tmp_path):
    options = [*SHORT, "train.warmup=0", "train.clip=null", "train.schedule=constant", "compare.seeds=[0]"]
    options += ["compare.rows={activations: {}}", "compare.learning_rates=[1e-3,1e30]"]
    held = compare(read("demo-smoke", options), tmp_path / "o")
    assert held["rows"][0]["learning_rate"] == 1e-3
    assert "not finite" in held["cells"][1]["diverged"] and "not finite" in held["rows"][0]["rates"]["1e+30"][0]


def test_ties_of_accuracy_are_broken_by_the_loss():
    recipe = read("text-minilm")
    figures = lambda accuracy, loss: {"accuracy": accuracy, "loss": loss, "f1": accuracy}  # noqa: E731
    cells = [
        {"row": "a", "learning_rate": rate, "seed": 0, "trainable": 1, "seconds": 1.0, "peak_memory": 1}
        | {"zero_step": figures(0.5, 0.7), "validation": figures(0.9, loss), "test": figures(0.8, 0.5)}
        for rate, loss in ((1e-3, 0.4), (1e-2, 0.3), (1e-1, 0.6))
    ]
    (row,) = summary(cells, recipe)
    assert row["learning_rate"] == 1e-2


def test_the_command_prints_the_table(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    options = [*SHORT[:6], "compare.rows={activations: {}}", "compare.learning_rates=[1e-2]", "compare.seeds=[0]"]
    result = CliRunner().invoke(main, ["finetune", "demo-smoke", "--compare", "--json", *options])
    assert result.exit_code == 0, f"{result.output} {result.exception!r}"
    assert json.loads(result.stdout)["output"] == "demo-smoke-comparison"
    assert (tmp_path / "demo-smoke-comparison" / "comparison.md").is_file()


def test_a_recipe_without_rows():
    with pytest.raises(OrthoactError, match=r"the recipe has no compare\.rows"):
        compare(read("demo-train"))
