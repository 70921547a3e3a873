"""What the README shows runs, and its figures are those that the benchmarks wrote."""

import json
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


def test_the_table_of_fine_tuning_is_the_measured_one():
    rows = table("| what trains, beside a head |")
    measured = (ROOT / "benchmarks" / "downstream.md").read_text().splitlines()
    assert len(rows) > 6 and not [row for row in rows if row not in measured]


def test_the_table_of_recovery_is_the_measured_one():
    text = (ROOT / "benchmarks" / "recovery.md").read_text()
    sections = {part.split(" (")[0]: part for part in text.split("### ")[1:]}
    for row in table("| hermite, degree | 3 |")[2:]:
        name, *cells = (cell.strip() for cell in row.strip("|").split("|"))
        model = re.split("[,:]", name)[0]
        how = name.removeprefix(model)
        for degree, cell in zip((3, 4, 6), cells, strict=True):
            found = [line for line in sections[model].splitlines() if line.startswith(f"| degree {degree}{how} |")]
            quoted = "not measured"
            for line in found:
                _, _, _, _, _, before, _, after, *_ = (x.strip() for x in line.strip("|").split("|"))
                quoted = f"{before} % -> {after} %"
            assert cell == quoted, (row, found)


def test_the_coverage_is_the_measured_one():
    text = (ROOT / "benchmarks" / "census.md").read_text()
    found = {}
    for line in re.findall(r"^\| (?:all|transformers, the class).*$", text, re.MULTILINE):
        name, _, models, _, _, share, *_ = line.strip("| ").split(" | ")
        found[name[:3]] = f"{int(models):,}", share.rstrip("%")
    (models, every), (_, alone) = found["all"], found["tra"]
    quoted = (
        f"{every} % are converted in the {models} models that the census could build, {alone} % in those of "
        "transformers alone"
    )
    assert quoted in " ".join(README.split())


def test_the_hostile_folders_are_the_counted_ones():
    text = (ROOT / "benchmarks" / "hostile.md").read_text()
    found = {name: f"{int(number):,}" for name, number in re.findall(r"\| ([\w ]+) \| (\d+) \|", text)}
    cases, refused, sound = (found[name] for name in ("cases", "refused", "sound"))
    quoted = f"of {cases} damaged ones {refused} are refused in one sentence and {sound} still compute"
    assert quoted in " ".join(README.split())


def table(head):
    """The lines of the table that begins so."""
    lines = README[README.index(head) :].splitlines()
    return lines[: lines.index("")]


@pytest.mark.parametrize("target", ["demo", "test"])
def test_the_two_commands_exist(target):
    assert f"make {target}" in README and re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.MULTILINE)


def test_the_time_of_an_activation_is_the_measured_one():
    tables = json.loads((ROOT / "benchmarks" / "activation.json").read_text())["tables"].values()
    rows = [row for table in tables for row in table if row["name"] == "hermite 8" and row["path"] == "eager"]
    row = next(row for row in rows if row["dtype"] == "float32")
    assert "Hermite activation of degree 8 takes the time of torch's own GELU" in README
    assert max(row["forward"], row["both"]) <= 1.05
