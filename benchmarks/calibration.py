"""What calibration gains on real pretrained models, and which weighting of the measured inputs is best; no training.

    python tests/real_models.py          # fetch the models and data (third parties' uploads, for tests only)
    python benchmarks/calibration.py     # writes benchmarks/calibration.json and benchmarks/calibration.md

Every model is calibrated on other data than it is measured on: the last third of the English text (2,048 tokens of
it), the last 64 sentences, 128 other images. `weighting` is the share of sensitivity, the rest is density; 0 is the
density of the inputs alone, `data-free` the standard law. A cell is the divergence of the converted model from its
original: KL in nats for the language model, one minus the mean cosine for the encoders.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

from fidelity import HERE, MODELS, measure, real_models

from orthoact.convert.calibrate import calibrate_on
from orthoact.convert.sites import find_sites
from orthoact.convert.sources import load_source
from orthoact.interp import domains

MAIN = [(None, 0.01), (0.9, 0.01)]
"""(share of sensitivity, derivative weight) measured on everything that `fidelity.py` measures; None is data-free."""

SWEEP = [(None, 0.01), (0.0, 0.01), (0.5, 0.01), (0.9, 0.01), (1.0, 0.01), (0.9, 0.1), (0.9, 0.001)]
"""The same on a quarter of it."""

TABLES = {"main": (MAIN, 1, [4, 6, 8, 12]), "sweep": (SWEEP, 4, [8, 12])}
"""Choices, the part of the data, degrees."""


def data_for(item: str, work: Path) -> Path | None:
    """The data that a model measured on `item` is calibrated on."""
    if item == "fashion":
        return real_models.available("fashion-more")
    path = real_models.available(item)
    if path is None:
        return None
    text = path.read_text()
    rest = text[2 * len(text) // 3 :] if item == "english.txt" else "\n".join(text.splitlines()[128:])
    (work / item).write_text(rest)
    return work / item


def divergence(row: dict) -> float:
    return row["kl"] if "kl" in row else 1 - row["cosine_mean"]


def rows_of(name: str, choices: list[tuple], part: int, degrees: list[int]) -> list[dict]:
    """One row a choice: the divergence at each degree, on one `part`-th of the data."""
    model, item, limit, what = MODELS[name]
    folder = real_models.available(model)
    with tempfile.TemporaryDirectory() as work:
        data = data_for(item, Path(work))
        if folder is None or data is None:
            return []
        source = load_source(str(folder), dtype="float32")
        laws = calibrate_on(source, find_sites(source.model), data)
        del source
    rows = []
    for share, weight in choices:
        domains.SENSITIVITY = share
        options = {"domains": {} if share is None else laws, "derivative_weight": weight}
        found = measure(name, degrees, most=limit // part, **options)
        weighting = "data-free" if share is None else f"{share:g}"
        cells = {str(row["degree"]): divergence(row) for row in found}
        on = what.replace(f"{limit:,}", f"{limit // part:,}")
        rows.append({"model": name, "on": on, "weighting": weighting, "derivative weight": weight, **cells})
    return rows


def markdown(rows: list[dict], degrees: list[int]) -> str:
    columns = ["model", "on", "weighting", "derivative weight", *(f"degree {d}" for d in degrees)]
    lines = ["| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]
    for row in rows:
        cells = [f"{row[str(d)]:.2e}" for d in degrees]
        lines.append("| " + " | ".join([*(str(row[c]) for c in columns[:4]), *cells]) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [name for name in MODELS if name != "demo GPT-2"]
    parser.add_argument("--models", nargs="*", choices=names, default=names, help="measure these; keep the others")
    parser.add_argument("--tables", nargs="+", choices=list(TABLES), default=list(TABLES))
    parser.add_argument("--output", type=Path, default=HERE / "calibration")
    args = parser.parse_args()
    path = args.output.with_suffix(".json")
    tables = json.loads(path.read_text()) if path.exists() else {"main": [], "sweep": []}
    for name in args.models:
        for key in args.tables:
            if key == "sweep" and "timm" in name:
                continue
            new = rows_of(name, *TABLES[key])
            both = [row for row in tables[key] if row["model"] != name] + new
            tables[key] = sorted(both, key=lambda row: names.index(row["model"]))
            path.write_text(json.dumps(tables, indent=1) + "\n")
    main_table, sweep = (markdown(tables[key], TABLES[key][2]) for key in ("main", "sweep"))
    text = f"{main_table}\nThe choice of the weighting, on a quarter of the data:\n\n{sweep}"
    args.output.with_suffix(".md").write_text(text)
    print(args.output.with_suffix(".md").read_text())


if __name__ == "__main__":
    main()
