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


@pytest.mark.parametrize("target", ["demo", "test"])
def test_the_two_commands_exist(target):
    assert f"make {target}" in README and re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.MULTILINE)
