"""What the README shows runs, and its figures are those that the benchmarks wrote."""

import re
import shlex
from pathlib import Path

import pytest
from click.testing import CliRunner

from orthoact.cli import main

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def offline(text):
    """Hub models are replaced by the demo: the same architecture, no network."""
    return text.replace("gpt2-hermite", "demo-hermite").replace("gpt2", "demo")


def test_python(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = blocks("python")
    assert found
    for code in found:
        text = code.replace('from_pretrained("gpt2")', f'from_pretrained("{ROOT / "convert" / "demo"}")')
        exec(compile(text, "README.md", "exec"), {})


def test_commands(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    lines = [line for block in blocks("bash") for line in block.splitlines() if line.startswith("orthoact ")]
    assert len(lines) >= 3 and lines[0].startswith("orthoact convert gpt2 --family hermite")
    for line in lines:
        args = shlex.split(offline(line), comments=True)[1:]
        result = CliRunner().invoke(main, args)
        assert result.exit_code == 0, f"{line}: {result.output}"


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
