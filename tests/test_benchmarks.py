"""Today's fits against the figures that are stored: the brute-force references, and the tables of docs/targets.md."""

import json
import re
from pathlib import Path

import coordinates
import numpy as np
import pytest
import reference
import targets
import torch
from tiny_models import timm_model

from orthoact.interp import FAMILIES

ROWS = [row for row in json.loads(reference.FILE.read_text()) if "reference" in row]
NEAR = [row for row in ROWS if row["ratio"] <= 1.05]
SAMPLE = NEAR[:: max(len(NEAR) // 12, 1)][:12]
"""Rows at the bar when the references were made, spread over families and targets."""


def name(row):
    return f"{row['family']}-{row['degree']}-{row['target']}"


def check(row):
    today = reference.compare(row)
    assert today["ratio"] <= 1.05, f"J {today['fit']:.4e}, {row['reference']:.4e} at {row}"


@pytest.mark.parametrize("row", SAMPLE, ids=name)
def test_fits_are_as_good_as_brute_force(row):
    check(row)


@pytest.mark.long
@pytest.mark.parametrize("row", ROWS, ids=name)
def test_every_fit_is_as_good_as_brute_force(row):
    check(row)


def test_the_references_cover_every_family():
    assert {row["family"] for row in ROWS} == set(FAMILIES)
    assert "gelu" in {row["target"] for row in ROWS}


def figures(line: str) -> tuple[str, list[float]]:
    """A row without its figures, and these."""
    pattern = r"\d\.\de[+-]?\d+"
    return re.sub(pattern, "#", line), [float(figure) for figure in re.findall(pattern, line)]


@pytest.mark.parametrize(("target", "size"), [("relu6", 9), ("laplace", 9)])
def test_the_table_of_targets_is_true(target, size):
    text = Path(targets.FILE).read_text()
    start = text.index(f"## About {size} numbers")
    (stored,) = [line for line in text[start:].split("\n## ")[0].splitlines() if line.startswith(f"| {target} |")]
    words, wanted = figures(stored)
    again, got = figures(targets.row(target, size))
    assert again == words
    assert got == pytest.approx(wanted, rel=0.25, abs=1e-6), f"run benchmarks/targets.py: {target}"


def test_the_table_of_targets_has_every_target_and_family():
    text = Path(targets.FILE).read_text()
    assert targets.HEAD in text
    for size in targets.SIZES:
        rows = text[text.index(f"## About {size} numbers") :].split("\n## ")[0].splitlines()
        table = [line for line in rows if line.startswith("|")]
        assert [line.split("|")[1].strip() for line in table[2:]] == list(targets.TARGETS)
        assert [head.split()[0] for head in table[0].split("|")[2:-1]] == list(FAMILIES)


@pytest.mark.parametrize("kind", ["theta", "raw"])
def test_the_benchmark_of_coordinates_trains_from_the_copy_and_leaves_the_model(kind):
    settings = coordinates.Settings(pixels=32, train=12, validation=4, test=4, epochs=1, batch=4)
    rng = np.random.default_rng(0)
    raw = {
        f"{file}-{what}": rng.integers(0, top, (50_004, *shape), dtype=np.uint8)
        for file in ("train", "t10k")
        for what, top, shape in (("images", 256, (28, 28)), ("labels", 10, ()))
    }
    model, data = timm_model("vit-headless"), coordinates.split(raw, settings, 0)
    with torch.no_grad():
        before = model(data["test"][0])
    row = "hermite 8, 16 groups"
    found = coordinates.measure(model, data, settings, 0, row, kind)
    rates = [run["rate"] for run in found["runs"]]
    assert len(rates) >= 3 and rates == sorted(rates) and found["numbers"] == 2 * 16 * 9
    assert torch.equal(model(data["test"][0]), before)
    cells = {f"{row}, {kind}, seed 0": found | {"seconds": 1.0}}
    made = {"settings": coordinates.asdict(settings), "cells": cells}
    assert f"| {row} | 288 | {kind} |" in coordinates.markdown(made)
