"""What the README shows runs, and its figures are those that the benchmarks wrote."""

import re
from pathlib import Path

import blocks
import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def test_every_block_runs(tmp_path, monkeypatch):
    """Hub models are replaced by the demo: the same architecture, no network."""
    monkeypatch.chdir(tmp_path)
    text = README.replace('from_pretrained("gpt2")', f'from_pretrained("{ROOT / "convert" / "demo"}")')
    text = text.replace("gpt2-hermite", "demo-hermite").replace(" gpt2 ", " demo ")
    assert blocks.run(text, "README.md", tmp_path) >= 12


def test_the_first_command_is_the_promise():
    first = next(code for language, _, code in blocks.blocks(README) if language == "bash")
    assert first.startswith("orthoact convert gpt2 --family hermite")


def test_the_table_is_the_measured_one():
    table = (ROOT / "benchmarks" / "fidelity.md").read_text().strip()
    assert table in README, "run benchmarks/fidelity.py and paste benchmarks/fidelity.md"


def test_the_table_of_families_is_the_measured_one():
    table = (ROOT / "benchmarks" / "families.md").read_text().split("\n\n")[0].strip()
    assert table in README, "run benchmarks/families.py and paste benchmarks/families.md"


def test_the_table_of_calibration_is_the_measured_one():
    lines = (ROOT / "benchmarks" / "calibration.md").read_text().split("\n\n")[0].splitlines()[2:]
    assert lines
    for line in lines:
        *_, weighting, _, a, b, c, d = (cell.strip() for cell in line.strip("|").split("|"))
        short = " | ".join(f"{float(cell):.1e}".replace("e-0", "e-") for cell in (a, b, c, d))
        name = "data-free" if weighting == "data-free" else "calibrated"
        assert f", {name} | {short} |" in README, f"paste from benchmarks/calibration.md: {line}"


@pytest.mark.parametrize("target", ["demo", "test"])
def test_the_two_commands_exist(target):
    assert f"make {target}" in README and re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.MULTILINE)
