"""What self-distillation gives back after a coarse conversion: activations alone first, then with norms.

    python tests/real_models.py                         # fetch the models and data (third parties' uploads)
    python benchmarks/recovery.py --models demo         # writes benchmarks/recovery-demo.json and recovery.md
    python benchmarks/recovery.py --jobs 16             # all of it; a GPU is taken where there is one; resumable

Each cell is `orthoact convert --degree N [--calibrate mails] --recover mails` in Python, by the package's own loop: the
converted model learns from its own original activations on mails (SpamAssassin's ham, no label is used), and is
measured on Jane Austen, the demo on its held-out chapters, SmolLM2 on Persuasion. The rate is chosen by the divergence
on mails that are held out; `least squares alone` takes no step (`--steps 0`), and all rows but controls begin with it.
Rows that are not calibrated leave out what the command does by itself: it fits each site to the mails of --recover.
Controls learn the next token of the same mails: the original's norms, and the same norms and activations after a
conversion.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import tempfile
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from cells import Cell, Table, device, spread

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent / "tests"))

import real_models  # noqa: E402

from orthoact import convert_, evaluate  # noqa: E402
from orthoact.convert.calibrate import calibrate_on  # noqa: E402
from orthoact.convert.sites import find_sites  # noqa: E402
from orthoact.convert.sources import load_source  # noqa: E402
from orthoact.finetune.launch import make_accelerator  # noqa: E402
from orthoact.finetune.memory import Peak  # noqa: E402
from orthoact.finetune.recipe import read  # noqa: E402
from orthoact.finetune.recover import SOLVED, recover  # noqa: E402
from orthoact.finetune.run import run as run_recipe  # noqa: E402
from orthoact.finetune.state import States  # noqa: E402

MODELS = {  # title, model, what it is measured on
    "demo": ("demo GPT-2 (6 sites)", "demo", None),
    "smollm2": ("SmolLM2-135M (30 sites)", "smollm2", "english.txt"),
}
STEPS, BATCH, LENGTH = 86, 8, 256  # 176,128 tokens, and a tenth that is held out: below 200,000
FEW = 8  # steps of SmolLM2: on one core each takes half a minute
RATES = (1e-3, 3e-3)
CONTROLS = {"demo": (3e-3, 1e-2, 3e-2), "smollm2": (1e-2,)}  # the second takes what served the first
NORMS = {"demo": 3e-4, "smollm2": 1e-4}  # the rate of norms and weights in the recovery
SEEDS = (0, 1, 2)
EVALUATE = 8192
KEYS = ("loss_base", "loss", "perplexity_base", "perplexity", "change", "kl", "top1_agreement")


def rows(name: str) -> dict[str, dict[str, Any]]:
    """The rows of a model by name: how it converts, what trains."""
    found: dict[str, dict[str, Any]] = {}

    def add(what: str, degree: int, calibrated: bool, groups: str | None = None, **more: Any) -> None:
        title = f"degree {degree}{', calibrated' if calibrated else ''}{', per channel' if groups else ''}"
        trained = "least squares alone" if more.get("steps") == 0 else what
        row = {"degree": degree, "calibrated": calibrated, "what": what, "groups": groups, **more}
        found[f"{title}: {trained}"] = row

    kinds = [(degree, calibrated) for degree in (3, 4, 6) for calibrated in (False, True)]
    for groups in (None, "per-channel"):
        for kind in kinds:
            add("activations", *kind, groups, steps=0, rates=RATES[-1:])
    if name == "smollm2":
        for kind in kinds:
            add("activations+norms", *kind, steps=FEW, rates=(3e-4,))
    if name == "demo":
        for what in ("activations", "activations+norms"):
            for kind in kinds:
                add(what, *kind)
            for calibrated in (False, True):
                add(what, 3, calibrated, "per-channel")
        for what, swap in (("activations", "blend"), ("activations+norms", "blend"), ("all", None), ("all", "blend")):
            title = f"degree 4, calibrated, no tails: {what}{', blended in' if swap else ''}"
            found[title] = {"degree": 4, "calibrated": True, "what": what, "tails": "none", "swap": swap}
    for title, keys in (
        ("original, next token: norms", {"convert.family": "none", "train.what": "norms"}),
        ("degree 4, next token: activations", {"convert.degree": 4, "train.what": "activations"}),
        ("degree 4, next token: activations+norms", {"convert.degree": 4, "train.what": "activations+norms"}),
    ):
        found[f"control, {title}"] = {"control": keys, "rates": CONTROLS[name]}
    return found


def mails() -> list[str]:
    """The ham of the mails that a classifier would train on."""
    path = real_models.available("spam")
    if path is None:
        raise SystemExit("spam is not available: run python tests/real_models.py")
    lines = map(json.loads, (path / "train.jsonl").read_text().splitlines())
    return [line["text"] for line in lines if line["label"] == "ham"]


def model_of(name: str, where: str) -> Any:
    item = MODELS[name][1]
    return load_source(item if item == "demo" else str(real_models.available(item)), dtype="float32", device=where)


def run(name: str, steps: int, row: str, rate: float, seed: int) -> Cell:
    """A conversion, measured before and after its recovery."""
    made = rows(name)[row]
    where = "cuda" if torch.cuda.is_available() else "cpu"
    base = model_of(name, where)
    data = MODELS[name][2]
    texts = mails()
    options: dict[str, Any] = {"data": data and real_models.available(data), "limit": EVALUATE, "against": base}
    with tempfile.TemporaryDirectory() as work, Peak() as peak:
        folder = Path(work)
        (folder / "calibrate.txt").write_text("\n\n".join(texts[:100]))
        if "control" in made:
            return controlled(name, made["control"], texts[100:], rate, seed, steps, folder, options, peak)
        (folder / "train.txt").write_text("\n\n".join(texts[100:]))
        source = model_of(name, where)
        laws = {}
        if made["calibrated"]:
            laws = calibrate_on(source, find_sites(source.model), folder / "calibrate.txt")
        how = {key: made[key] for key in ("tails", "groups") if key in made}
        convert_(source.model, degree=made["degree"], domains=laws, **how)
        before = exactly(source, options)
        swap = {"swap": made["swap"]} if "swap" in made else {}
        learnt = {"what": made["what"], "rate": rate, "weight_rate": NORMS[name], "seed": seed, **swap}
        found = recover(source, folder / "train.txt", steps=made.get("steps", steps), batch_size=BATCH, **learnt)
        found.pop("data")
        after = exactly(source, options)
    return {**found, "before": before, "after": after, "peak_memory": peak.bytes}


def controlled(
    name: str, keys: dict, texts: list[str], rate: float, seed: int, steps: int, folder: Path, options: dict, peak: Peak
) -> Cell:
    """The same steps on the same mails, but to predict their next token."""
    text = folder / "text"
    text.mkdir()
    last = len(texts) // 10
    for split, part in (
        ("train", texts[: -2 * last]),
        ("validation", texts[-2 * last : -last]),
        ("test", texts[-last:]),
    ):
        (text / f"{split}.txt").write_text("\n\n".join(part))
    item = MODELS[name][1]
    recipe = read("lm-smollm2", offline=True).override(
        {
            "model": item if item == "demo" else str(real_models.available(item)),
            "data.path": str(text),
            "data.length": LENGTH,
            "data.train_limit": math.ceil(STEPS * BATCH / 0.9),
            "data.validation_limit": 64,
            "data.test_limit": 8,
            "train.loss": "task",
            "train.max_steps": steps,
            "train.batch_size": BATCH,
            "train.warmup": 0.0,
            "train.learning_rate": 0.03 * rate,
            "train.activation_learning_rate": rate,
            "seed": seed,
            **keys,
        }
    )
    states = States(folder / "state", keep=1)
    facts, source, trainable, _ = run_recipe(
        recipe, make_accelerator(recipe, None, None), states, log=dict, show=_quiet
    )
    before, after = facts["zero_step"]["loss"], facts["validation"]["loss"]
    found = {"steps": steps, "trained": trainable.total, "divergence_before": before, "divergence": after}
    return {**found, "seconds": facts["seconds"], "after": exactly(source, options), "peak_memory": peak.now}


def _quiet(*_: object) -> None:
    pass


def exactly(source: Any, options: dict[str, Any]) -> dict[str, float]:
    """Measured in full float32."""
    how = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    found = evaluate(source, **options)
    torch.set_float32_matmul_precision(how)
    return {key: found[key] for key in KEYS}


def worth(cell: Cell) -> float:
    """The divergence on the mails that are held out; of a control, its loss there."""
    return -cell["divergence"] if math.isfinite(cell["divergence"]) else -math.inf


def table_of(name: str, folder: Path, steps: int = STEPS) -> Table:
    own = {row: made["rates"] for row, made in rows(name).items() if "rates" in made}
    file = folder / f"recovery-{name}.json"
    return Table(file, tuple(rows(name)), RATES, SEEDS, partial(run, name, steps), worth, own)


def markdown(folder: Path) -> str:
    """The tables of what is there."""
    lines = ["# Recovery by self-distillation", "", *(__doc__ or "").split("\n\n")[-1].strip().split("\n")]
    lines += [
        f"{STEPS} steps of {BATCH} windows of {LENGTH} tokens are {STEPS * BATCH * LENGTH:,} tokens; the least squares",
        f"take {SOLVED * LENGTH:,}. Norms and weights learn at {NORMS['demo']:g} in the recovery of the demo, at",
        f"{NORMS['smollm2']:g} in that of SmolLM2, at 0.03 of the rate of the activations in controls. Change of the",
        f"perplexity in per cent, KL to the original per token in nats, on {EVALUATE:,} tokens at most; ± is the",
        "deviation over the seeds. The original itself, taught in the same way, is its own teacher and does not move.",
        "Seconds are those of a shared machine.",
    ]
    for name, (title, *_) in MODELS.items():
        table = table_of(name, folder)
        cells = table.cells()
        if not cells:
            continue
        ran = ", ".join(sorted({c["device"] for c in cells}))
        lines += ["", f"### {title}", "", f"Ran on {ran}; `--models {name}`.", ""]
        head = "| conversion: what trains | numbers | steps | rate | seeds | before, % | KL before | **after, %**"
        lines += [f"{head} | KL after | s | MB |"]
        lines += ["|---|---|---|---|---|---|---|---|---|---|---|"]
        for row, found in table.chosen(cells):
            good = [c for c in found if "failed" not in c]
            if not good:
                lines.append(f"| {row} | | | | | failed at every rate | | | | | |")
                continue
            parts = []
            for part in ("before", "after"):
                have = part in good[0]
                parts.append(change([c[part]["change"] for c in good]) if have else "0")
                parts.append(short([c[part]["kl"] for c in good]) if have else "0")
            cost = (
                f"{sum(c['seconds'] for c in good) / len(good):.0f} | {max(c['peak_memory'] for c in good) / 1e6:.0f}"
            )
            steps = good[0]["steps"]
            how = f"{good[0]['trained']:,} | {steps} | {format(good[0]['rate'], 'g') if steps else ''}"
            lines.append(f"| {row} | {how} | {len(good)} | {' | '.join(parts)} | {cost} |")
        lines += ["", "Change after, in per cent, at every rate, first seed:", ""]
        for row in (row for row in table.rows if len(table.tried(row)) > 1):
            tried = sorted((c for c in cells if c["row"] == row and c["seed"] == 0 and "failed" not in c), key=rated)
            told = [f"{c['rate']:g}: {c['after']['change']:+.2f}" for c in tried]
            lines += [f"- {row}: {', '.join(told)}"] if told else []
    return "\n".join(lines) + "\n"


def rated(cell: Cell) -> float:
    return cell["rate"]


def change(values: list[float]) -> str:
    """Per cent; the conversion itself is the same for every seed, to rounding."""
    if max(values) - min(values) <= 1e-3 * max(map(abs, values)):
        return f"{values[0]:+.2f}"
    return f"{'+' if sum(values) > 0 else ''}{spread(values, 2)}"


def short(values: list[float]) -> str:
    middle = mean(values)
    if max(values) - min(values) <= 1e-3 * middle:
        return f"{middle:.1e}"
    return f"{middle:.1e} ± {stdev(values):.0e}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--rows", default="", help="only rows with this in their name")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    parser.add_argument("--steps", type=int, default=STEPS, help="fewer, to try it")
    parser.add_argument("--output", type=Path, default=HERE, help="folder")
    args = parser.parse_args()
    print(f"on {device()}")
    for name in args.models:
        table = table_of(name, args.output, args.steps)
        replace(table, rows=tuple(row for row in table.rows if args.rows in row)).fill(args.jobs)
    (args.output / "recovery.md").write_text(markdown(args.output))
    print((args.output / "recovery.md").read_text())


if __name__ == "__main__":
    main()
