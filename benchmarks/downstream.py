"""Learnable activations beside norms, biases and LoRA on a downstream task, every row treated alike.

    python tests/real_models.py          # fetch the models and data (third parties' uploads, for tests only)
    python benchmarks/downstream.py      # writes benchmarks/downstream.json and benchmarks/downstream.md; resumable

DINOv2 ViT-S (timm) on Fashion-MNIST. To fit a small machine only the last blocks train in any row, the full one too;
what comes before them is the same for all and is computed once for each image. A linear head on the CLS token trains in
every row, at its own fixed rate. Each row's rate is chosen on validation images of the first seed, among half decades
that go on until the best has worse on both sides; the other seeds take it. What downstream.json holds is not run again.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean, stdev
from time import perf_counter

import timm
import torch
import torch.nn.functional as F
from coordinates import HERE, fashion, prepare, real_models
from torch import Tensor, nn

from orthoact import convert_, revert_
from orthoact.finetune.parameters import choose

Options = dict[str, object]
GELU: Options = {}

ROWS: dict[str, tuple[Options, Options, int]] = {  # how it converts, what trains, where the search begins: half decades
    "head only": (GELU, {"what": "head"}, 0),
    "norms": (GELU, {"what": "norms"}, -5),
    "biases": (GELU, {"what": "bias"}, -5),
    "LoRA r=1 on qkv": (GELU, {"what": "lora", "lora_rank": 1}, -5),
    "LoRA r=8 on qkv": (GELU, {"what": "lora", "lora_rank": 8}, -5),
    "activations, per layer": ({"degree": 7}, {"what": "activations"}, -4),
    "activations, 16 groups": ({"degree": 7, "groups": 16}, {"what": "activations"}, -4),
    "activations, 192 groups": ({"degree": 7, "groups": 192}, {"what": "activations"}, -4),
    "activations, per channel": ({"degree": 7, "groups": 0}, {"what": "activations"}, -5),
    "LoRA r=1 + activations, 192 groups": (
        {"degree": 7, "groups": 192},
        {"what": "lora+activations", "lora_rank": 1},
        -4,
    ),
    "all of the blocks": (GELU, {"what": "all"}, -8),
    "activations, 192 groups, tails fixed": (
        {"degree": 7, "groups": 192},
        {"what": "activations", "tails": "fixed"},
        -4,
    ),
    "activations, 192 groups, degree 4": ({"degree": 4, "groups": 192}, {"what": "activations"}, -4),
    "activations, 192 groups, rational 4": (
        {"family": "rational", "degree": 4, "groups": 192},
        {"what": "activations"},
        -4,
    ),
}
"""A row by name; the rate of LoRA beside activations is the one that LoRA alone was given."""


@dataclass(frozen=True)
class Settings:
    """What is the same for every row."""

    pixels: int = 42
    blocks: int = 6
    train: int = 500
    validation: int = 300
    test: int = 1000
    epochs: int = 3
    batch: int = 16
    head_rate: float = 5e-3
    seeds: int = 3


Split = dict[str, tuple[Tensor, Tensor]]


class Tail(nn.Module):
    """The last blocks of a ViT with a head on the CLS token; takes what the blocks before them gave."""

    def __init__(self, vit: nn.Module, blocks: int):
        super().__init__()
        self.blocks, self.norm = nn.Sequential(*list(vit.blocks)[-blocks:]), vit.norm
        self.head = nn.Linear(vit.num_features, 10)

    def get_classifier(self) -> nn.Module:
        return self.head

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.blocks(x))[:, 0])


@torch.no_grad()
def front(vit: nn.Module, images: Tensor, blocks: int) -> Tensor:
    """The hidden states before the last blocks."""
    found = []
    for part in images.split(100):
        x = vit.norm_pre(vit.patch_drop(vit._pos_embed(vit.patch_embed(part))))
        found.append(vit.blocks[:-blocks](x))
    return torch.cat(found)


def make_data(vit: nn.Module, raw: dict, s: Settings, seed: int) -> Split:
    """Training images drawn by the seed; validation and test images the same for all."""
    drawn = torch.randperm(50_000, generator=torch.Generator().manual_seed(seed))[: s.train].numpy()
    chosen = {
        "train": ("train", drawn),
        "validation": ("train", range(50_000, 50_000 + s.validation)),
        "test": ("t10k", range(s.test)),
    }
    return {
        name: (
            front(vit, prepare(raw[f"{file}-images"][list(at)], s.pixels), s.blocks),
            torch.from_numpy(raw[f"{file}-labels"][list(at)].astype("int64")),
        )
        for name, (file, at) in chosen.items()
    }


@torch.no_grad()
def score(net: nn.Module, x: Tensor, labels: Tensor) -> dict[str, float | None]:
    """Accuracy and mean cross-entropy; None once it diverged."""
    logits = torch.cat([net(part) for part in x.split(200)])
    if not logits.isfinite().all():
        return {"accuracy": None, "loss": None}
    return {
        "accuracy": round((logits.argmax(-1) == labels).float().mean().item(), 4),
        "loss": round(F.cross_entropy(logits, labels).item(), 5),
    }


def train(vit: nn.Module, net: Tail, state: dict, data: Split, row: str, rate: float, s: Settings, seed: int) -> dict:
    """One run from the pretrained weights."""
    start = perf_counter()
    net.load_state_dict(state)
    converts, trains, _ = ROWS[row]
    if converts:
        convert_(vit, include=[f"blocks.{i}.*" for i in range(12 - s.blocks, 12)], **converts)
    torch.manual_seed(seed)
    trains = dict(trains)
    slow = 3e-3 if trains["what"] == "lora+activations" else None
    trainable = choose(
        net,
        learning_rate=slow or rate,
        activation_learning_rate=rate,
        head_learning_rate=s.head_rate,
        lora_targets=("attn.qkv",),
        **trains,
    )
    nn.init.zeros_(net.head.weight)
    nn.init.zeros_(net.head.bias)
    before = score(net, *data["validation"])
    optimiser = torch.optim.AdamW(trainable.groups)
    x, labels = data["train"]
    steps = s.epochs * math.ceil(len(labels) / s.batch)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda n: 0.5 * (1 + math.cos(math.pi * n / steps)))
    trained = [p for group in trainable.groups for p in group["params"]]
    net.train()
    for _ in range(s.epochs):
        for at in torch.randperm(len(labels)).split(s.batch):
            loss = F.cross_entropy(net(x[at]), labels[at])
            optimiser.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(trained, 1.0)
            optimiser.step()
            schedule.step()
    net.eval()
    count = {k: v for k, v in trainable.count.items() if k != "head"}
    found = {
        "rate": rate,
        "numbers": sum(count.values()),
        "before": before,
        "validation": score(net, *data["validation"]),
    }
    found |= {"test": score(net, *data["test"]), "train_loss": round(loss.item(), 4)}
    trainable.finish()
    if converts:
        revert_(vit)
    return found | {"seconds": round(perf_counter() - start, 1)}


def value(power: int) -> float:
    """A rate from its half decade."""
    return float(f"{10 ** (power / 2):.0e}")


def next_power(row: str, runs: dict[int, dict]) -> int | None:
    """The half decade that the search for a rate tries next; None when the best has worse on both sides."""
    if row == "head only":
        return None if runs else 0
    if not runs:
        return ROWS[row][2]
    best = min(runs, key=lambda p: runs[p]["validation"]["loss"] or math.inf)
    todo = [p for p in (best - 1, best + 1) if p not in runs]
    return todo[0] if todo and len(runs) < 6 else None


def markdown(made: dict) -> str:
    """The rows so far: the chosen rate's figures over the seeds, and every rate that was tried."""
    s, rows = Settings(**made["settings"]), made["rows"]
    seconds = sum(run["seconds"] for row in rows.values() for runs in row.values() for run in runs)
    lines = [
        "# Learnable activations on a downstream task",
        "",
        f"Made by `python benchmarks/downstream.py` in {seconds:.0f} s of one thread. DINOv2 ViT-S on Fashion-MNIST at"
        f" {s.pixels} px: {s.train:,} training, {s.validation:,} validation",
        f"and {s.test:,} test images, {s.epochs} epochs, batches of {s.batch}, AdamW without weight decay, cosine,"
        f" gradients clipped at 1. The last {s.blocks} of 12 blocks train",
        "(what is named, of these blocks alone), and a linear head at"
        f" {s.head_rate:g} in every row. Rates are chosen by the validation loss of seed 0.",
        f"The standard error of an accuracy of 0.8 on {s.test:,} images is {(0.16 / s.test) ** 0.5:.3f}; ± is the"
        " deviation over the seeds, which draw other training images.",
        "",
        "| what trains beside the head | numbers | rate | seeds | test accuracy | test loss |",
        "|---|---|---|---|---|---|",
    ]
    for row, seeds in rows.items():
        best = chosen(seeds["0"])
        runs = [next(r for r in seeds[k] if r["rate"] == best["rate"]) for k in seeds]
        figures = []
        for key, digits in (("accuracy", 3), ("loss", 3)):
            values = [r["test"][key] for r in runs if r["test"][key] is not None]
            spread = f" ± {stdev(values):.{digits}f}" if len(values) > 1 else ""
            figures.append(f"{mean(values):.{digits}f}{spread}" if values else "diverged")
        rate = "-" if row == "head only" else f"{best['rate']:g}"
        lines.append(f"| {row} | {best['numbers']:,} | {rate} | {len(runs)} | {figures[0]} | {figures[1]} |")
    lines += ["", "Validation loss (accuracy) at every rate tried, seed 0:", ""]
    for row, seeds in rows.items():
        tried = sorted(seeds["0"], key=lambda r: r["rate"])
        told = ", ".join(f"{r['rate']:g}: {r['validation']['loss']} ({r['validation']['accuracy']})" for r in tried)
        lines.append(f"- {row}: {told}")
    return "\n".join(lines) + "\n"


def chosen(runs: list[dict]) -> dict:
    """The run of the least validation loss."""
    return min(runs, key=lambda r: r["validation"]["loss"] or math.inf)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in asdict(Settings()).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(default), default=default)
    parser.add_argument("--rows", nargs="+", choices=list(ROWS), default=list(ROWS))
    parser.add_argument("--output", type=Path, default=HERE / "downstream")
    args = parser.parse_args()
    settings = Settings(**{name: getattr(args, name) for name in asdict(Settings())})
    file = args.output.with_suffix(".json")
    made = json.loads(file.read_text()) if file.exists() else {"settings": asdict(settings), "rows": {}}
    if made["settings"] != asdict(settings):
        parser.error(f"{file} has other settings: give another --output, or delete it")
    torch.set_num_threads(1)
    vit = timm.create_model(f"local-dir:{real_models.available('dinov2-timm')}", pretrained=True).eval()
    raw = fashion()
    net = Tail(vit, settings.blocks).eval()
    state = {k: v.clone() for k, v in net.state_dict().items()}
    for seed in range(settings.seeds):
        data = make_data(vit, raw, settings, seed) if any(pending(made, row, seed) for row in args.rows) else {}
        for row in args.rows:
            while (rate := pending(made, row, seed)) is not None:
                run = train(vit, net, state, data, row, rate, settings, seed)
                made["rows"].setdefault(row, {}).setdefault(str(seed), []).append(run)
                print(f"{row}, seed {seed}: {json.dumps(run)}", file=sys.stderr, flush=True)
                file.write_text(json.dumps(made, indent=1) + "\n")
                args.output.with_suffix(".md").write_text(markdown(made))
    print(markdown(made))


def pending(made: dict, row: str, seed: int) -> float | None:
    """The rate of the next run of a row, None where it is done."""
    done = made["rows"].get(row, {})
    if seed:
        return None if str(seed) in done else chosen(done["0"])["rate"]
    tried = {round(2 * math.log10(r["rate"])): r for r in done.get("0", [])}
    power = next_power(row, tried)
    return None if power is None else value(power)


if __name__ == "__main__":
    main()
