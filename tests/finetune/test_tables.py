"""The committed tables of training: made from their cells by the scripts beside them, and fair."""

from dataclasses import replace
from pathlib import Path

import downstream
import pytest
import recovery
import scratch
from cells import Table

BENCHMARKS = Path(downstream.__file__).parent


@pytest.mark.parametrize("script", [downstream, recovery, scratch], ids=lambda module: module.__name__)
def test_the_table_is_what_its_cells_say(script):
    written = (BENCHMARKS / f"{script.__name__}.md").read_text(encoding="utf-8")
    assert written == script.markdown(BENCHMARKS), f"run benchmarks/{script.__name__}.py"


@pytest.mark.parametrize("task", ["dinov2", "minilm", "gpt2"])
def test_rows_have_the_same_budget(task):
    """All rates with the first seed, the best with three; groups are as many numbers as LoRA with r=1."""
    table = downstream.table_of(task, BENCHMARKS, None)
    chosen = dict(table.chosen(table.cells()))
    numbers = {row: cells[0]["trainable_by"] for row, cells in chosen.items()}
    few = f"activations, {downstream.TASKS[task].groups} groups"
    assert numbers[few]["activations"] == pytest.approx(numbers["LoRA r=1"]["lora"], rel=0.1)
    assert numbers["activations, per channel"]["activations"] == pytest.approx(numbers["LoRA r=8"]["lora"], rel=0.1)
    for row in downstream.rows(replace(downstream.TASKS[task], extra=False)):
        assert sorted(cell["seed"] for cell in chosen[row]) == [0, 1, 2], row
        assert {cell["step"] for cell in chosen[row]} == {downstream.recipe_of(task).train.max_steps}, row


def test_the_first_seed_chooses_the_rate(tmp_path):
    table = Table(tmp_path / "t.json", ("a", "b"), (1.0, 2.0), (5, 6), run=dict, worth=lambda cell: cell["v"])
    assert table.todo([]) == [("a", 1.0, 5), ("a", 2.0, 5), ("b", 1.0, 5), ("b", 2.0, 5)]
    cells = [{"row": "a", "rate": 1.0, "seed": 5, "v": 3}, {"row": "a", "rate": 2.0, "seed": 5, "failed": "it did"}]
    assert table.todo(cells) == [("a", 1.0, 6), ("b", 1.0, 5), ("b", 2.0, 5)]
    assert [row for row, _ in table.chosen(cells)] == ["a"]
    own = replace(table, own={"b": (3.0,)})
    assert own.todo(cells) == [("a", 1.0, 6), ("b", 3.0, 5)]
