"""Do activations learn better in the trained coordinates (a = a_0 + W theta) than by their plain coefficients?

    python tests/real_models.py          # fetch the models and data (third parties' uploads, for tests only)
    python benchmarks/coordinates.py     # writes benchmarks/coordinates.json and benchmarks/coordinates.md

DINOv2 ViT-S learns Fashion-MNIST: the trunk is frozen, a linear head on the CLS token and the activations of all layers
train. Each row is trained in both coordinates; "raw" puts the identity in the place of W. The rate of the activations
is chosen for each by the validation loss of the first seed, from half decades that go on until the best has worse on
both sides; the other seeds take that rate. What coordinates.json holds already is not run again.
"""

from __future__ import annotations

import argparse
import gzip
import json
import math
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean
from time import perf_counter

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent / "tests"))

import real_models  # noqa: E402

from orthoact import convert_, revert_  # noqa: E402
from orthoact.interp import Activation  # noqa: E402

ROWS = {  # options of convert_, and where the search for a rate begins in theta and raw (in half decades)
    "hermite 8, 16 groups": ({"family": "hermite", "degree": 8, "groups": 16}, -4, -6),
    "hermite 8, per channel": ({"family": "hermite", "degree": 8, "groups": 0}, -5, -7),
    "hermite 8, one per layer": ({"family": "hermite", "degree": 8}, -3, -5),
    "rational 4, 16 groups": ({"family": "rational", "degree": 4, "groups": 16}, -4, -6),
    "fourier 3, 16 groups": ({"family": "fourier", "degree": 3, "groups": 16}, -4, -6),
}
HEAD = "head alone"


@dataclass(frozen=True)
class Settings:
    """What is the same for every row."""

    pixels: int = 28
    train: int = 600
    validation: int = 300
    test: int = 500
    epochs: int = 2
    batch: int = 12
    head_rate: float = 5e-3
    seeds: int = 2


Split = dict[str, tuple[Tensor, Tensor]]


def fashion() -> dict[str, np.ndarray]:
    """Images and labels of Fashion-MNIST by the names of its files, fetched once."""
    folder = real_models.CACHE / "fashion-mnist"
    if not folder.exists():
        with tempfile.TemporaryDirectory(dir=real_models.CACHE, prefix=".work-") as work:
            package = real_models.from_debian("dataset-fashion-mnist", Path(work))
            (package / "usr/share/datasets/fashion-mnist").rename(folder)
    raw = {path.name.split("-idx")[0]: gzip.decompress(path.read_bytes()) for path in folder.glob("*.gz")}
    return {
        name: np.frombuffer(data, np.uint8, offset=16).reshape(-1, 28, 28)
        if name.endswith("images")
        else np.frombuffer(data, np.uint8, offset=8)
        for name, data in raw.items()
    }


def split(raw: dict[str, np.ndarray], settings: Settings, seed: int) -> Split:
    """Training images drawn by the seed; the same validation images (of the training file) and test images for all."""
    drawn = np.random.default_rng(seed).permutation(50_000)[: settings.train]
    chosen = {
        "train": ("train", drawn),
        "validation": ("train", np.arange(50_000, 50_000 + settings.validation)),
        "test": ("t10k", np.arange(settings.test)),
    }
    return {
        name: (
            prepare(raw[f"{file}-images"][at], settings.pixels),
            torch.from_numpy(raw[f"{file}-labels"][at].astype(np.int64)),
        )
        for name, (file, at) in chosen.items()
    }


def prepare(images: np.ndarray, pixels: int) -> Tensor:
    """The model's input: enlarged, in three equal channels, with ImageNet's mean and deviation."""
    x = torch.from_numpy(images.astype(np.float32) / 255)[:, None].expand(-1, 3, -1, -1)
    x = F.interpolate(x, (pixels, pixels), mode="bicubic", antialias=True)
    mean_, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    return (x - mean_[:, None, None]) / std[:, None, None]


@torch.no_grad()
def score(net: nn.Module, images: Tensor, labels: Tensor) -> tuple[float, float]:
    """Accuracy and mean cross-entropy; NaN once it diverged."""
    logits = torch.cat([net(part) for part in images.split(50)])
    if not logits.isfinite().all():
        return math.nan, math.nan
    return (logits.argmax(-1) == labels).float().mean().item(), F.cross_entropy(logits, labels).item()


def train(net: nn.Sequential, data: Split, rate: float, settings: Settings, seed: int) -> dict:
    """Train head and thetas of `net` (trunk, head) by Adam, both rates falling linearly to zero."""
    start = perf_counter()
    torch.manual_seed(seed)
    nn.init.zeros_(net[1].weight)
    nn.init.zeros_(net[1].bias)
    thetas = [m.theta for m in net.modules() if isinstance(m, Activation)]
    for theta in thetas:
        nn.init.zeros_(theta)
        theta.requires_grad_(True)
    kinds = [{"params": list(net[1].parameters()), "lr": settings.head_rate}, {"params": thetas, "lr": rate}]
    optimiser = torch.optim.Adam([kind for kind in kinds if kind["params"]])
    images, labels = data["train"]
    steps = settings.epochs * math.ceil(len(labels) / settings.batch)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: 1 - step / steps)
    losses = []
    for _ in range(settings.epochs):
        for at in torch.randperm(len(labels)).split(settings.batch):
            loss = F.cross_entropy(net(images[at]), labels[at])
            losses.append(loss.item())
            if not math.isfinite(losses[-1]):
                break
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            schedule.step()
    accuracy, loss = score(net, *data["validation"])
    late = mean(losses[-max(len(losses) // 4, 1) :])
    found = {"rate": rate, "accuracy": accuracy, "loss": loss, "train_loss": late, "worst_batch": max(losses)}
    found |= {"seconds": round(perf_counter() - start, 1)}
    print(f"    {json.dumps(found)}", file=sys.stderr, flush=True)
    return {key: None if isinstance(v, float) and not math.isfinite(v) else v for key, v in found.items()}


def cell(net: nn.Sequential, data: Split, first: int, settings: Settings, seed: int, rate: float | None) -> dict:
    """Runs at the rates that the search takes (or at `rate` alone), and the test figures of the best."""
    runs, states = {}, {}

    def run(power: int) -> None:
        value = rate or float(f"{10 ** (power / 2):.0e}")
        runs[power] = train(net, data, value, settings, seed)
        states[power] = {n: p.detach().clone() for n, p in net.named_parameters() if p.requires_grad}

    def best() -> int:
        return min(runs, key=lambda power: runs[power]["loss"] or math.inf)

    run(first)
    while rate is None and len(runs) < 8 and (todo := [p for p in (best() - 1, best() + 1) if p not in runs]):
        run(todo[0])
    net.load_state_dict(states[best()], strict=False)
    accuracy, loss = score(net, *data["test"])
    numbers = sum(p.numel() for n, p in net.named_parameters() if n.endswith("theta"))
    ordered = [runs[power] for power in sorted(runs)]
    return {"numbers": numbers, "rate": runs[best()]["rate"], "test": accuracy, "test_loss": loss, "runs": ordered}


@torch.no_grad()
def head_alone(net: nn.Sequential, data: Split, settings: Settings, seed: int) -> dict:
    """The head on features that are computed once."""
    features = {name: (torch.cat([net[0](part) for part in x.split(50)]), y) for name, (x, y) in data.items()}
    with torch.enable_grad():
        return cell(nn.Sequential(nn.Identity(), net[1]), features, 0, settings, seed, settings.head_rate)


def measure(model: nn.Module, data: Split, settings: Settings, seed: int, row: str, kind: str, rate=None) -> dict:
    """One row in one kind of coordinates; `model` is left as it was."""
    model.requires_grad_(False)
    net = nn.Sequential(model, nn.Linear(model.num_features, 10))
    if row == HEAD:
        return head_alone(net, data, settings, seed)
    options, theta, raw = ROWS[row]
    convert_(model, **options)
    if kind == "raw":
        for act in model.modules():
            if isinstance(act, Activation):
                act.transform.copy_(torch.eye(len(act.transform)))
    found = cell(net, data, theta if kind == "theta" else raw, settings, seed, rate)
    revert_(model)
    return found


def over(cells: list[dict], key: str) -> str:
    """Mean over the seeds, and each."""
    return f"{mean(c[key] for c in cells):.3f} ({', '.join(f'{c[key]:.3f}' for c in cells)})"


def conclusion(both: dict[str, tuple[list[dict], list[dict]]]) -> list[str]:
    """Two sentences on the rows that have both kinds: theta less raw, over the seeds that both have."""

    def less(key: str) -> dict[str, float]:
        return {row: mean(x[key] - y[key] for x, y in zip(a, b, strict=False)) for row, (a, b) in both.items()}

    loss, accuracy = less("test_loss"), less("test")
    worse = [row for row in both if loss[row] > 0]
    not_in = f" (raw has it for {'; '.join(worse)})" if worse else ""
    return [
        f"Each at its chosen rate, theta has the lower test loss in {len(both) - len(worse)} of {len(both)} rows"
        f"{not_in} and the higher test accuracy in {sum(v > 0 for v in accuracy.values())}.",
        f"Theta less raw is {min(loss.values()):+.3f} to {max(loss.values()):+.3f} in test loss and"
        f" {min(accuracy.values()):+.3f} to {max(accuracy.values()):+.3f} in test accuracy.",
    ]


def markdown(made: dict) -> str:
    """The table of what is there, what follows from it, and every rate that was tried."""
    s, cells = Settings(**made["settings"]), made["cells"]

    def of(row: str, kind: str) -> list[dict]:
        return [cells[key] for seed in range(s.seeds) if (key := f"{row}, {kind}, seed {seed}") in cells]

    seconds = sum(c["seconds"] for c in cells.values())
    lines = [
        "# Trained coordinates against plain coefficients",
        "",
        f"Made by `benchmarks/coordinates.py` in {seconds:.0f} s of one thread. DINOv2 ViT-S (timm) on Fashion-MNIST at"
        f" {s.pixels} px: {s.train} training,",
        f"{s.validation} validation and {s.test} test images, {s.epochs} epochs, batches of {s.batch}, Adam without"
        f" weight decay, rates falling linearly to zero,",
        f"{s.head_rate:g} for the head (fixed). Trunk frozen; the activations of all layers train. The rate of the"
        " activations has the least validation",
        "loss of the first seed; the other seeds take it. Means over the seeds, each in brackets; the standard error of"
        f" an accuracy of 0.7 is {(0.7 * 0.3 / s.test) ** 0.5:.3f}.",
        "",
        "| what trains beside the head | numbers | coordinates | rate | test accuracy | test loss |",
        "|---|---|---|---|---|---|",
    ]
    for row in (HEAD, *ROWS):
        for kind in ("theta", "raw"):
            if mine := of(row, kind):
                what = ("-", "-") if row == HEAD else (kind, f"{mine[0]['rate']:g}")
                figures = f"{over(mine, 'test')} | {over(mine, 'test_loss')}"
                lines.append(f"| {row} | {mine[0]['numbers']} | {what[0]} | {what[1]} | {figures} |")
    if both := {row: pair for row in ROWS if all(pair := (of(row, "theta"), of(row, "raw")))}:
        lines += ["", *conclusion(both)]
    lines += ["", "Validation accuracy (loss) at every rate tried, first seed:", ""]
    for row in ROWS:
        for kind in ("theta", "raw"):
            for found in of(row, kind)[:1]:
                tried = ", ".join(f"{run['rate']:g}: {told(run)}" for run in found["runs"])
                lines.append(f"- {row}, {kind}: {tried}")
    return "\n".join(lines) + "\n"


def told(run: dict) -> str:
    """Validation figures of a run."""
    return "diverged" if run["loss"] is None else f"{run['accuracy']:.3f} ({run['loss']:.3f})"


def main() -> None:
    import timm

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in asdict(Settings()).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(value), default=value)
    parser.add_argument("--rows", nargs="+", choices=list(ROWS), default=list(ROWS))
    parser.add_argument("--output", type=Path, default=HERE / "coordinates")
    args = parser.parse_args()
    settings = Settings(**{name: getattr(args, name) for name in asdict(Settings())})
    file = args.output.with_suffix(".json")
    made = json.loads(file.read_text()) if file.exists() else {"settings": asdict(settings), "cells": {}}
    if made["settings"] != asdict(settings):
        parser.error(f"{file} has other settings: give another --output, or delete it")
    folder = real_models.available("dinov2-timm")
    if folder is None:
        parser.error("dinov2-timm is not available: run python tests/real_models.py")
    torch.set_num_threads(1)
    model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    raw, cells = fashion(), made["cells"]
    for seed in range(settings.seeds):
        data = split(raw, settings, seed)
        for row in (HEAD, *args.rows):
            for kind in ("theta",) if row == HEAD else ("theta", "raw"):
                key = f"{row}, {kind}, seed {seed}"
                if key in cells:
                    continue
                start = perf_counter()
                rate = cells[f"{row}, {kind}, seed 0"]["rate"] if seed and row != HEAD else None
                print(key, file=sys.stderr, flush=True)
                cells[key] = measure(model, data, settings, seed, row, kind, rate)
                cells[key]["seconds"] = round(perf_counter() - start, 1)
                print(f"  {json.dumps(cells[key] | {'runs': len(cells[key]['runs'])})}", file=sys.stderr, flush=True)
                file.write_text(json.dumps(made, indent=1) + "\n")
                args.output.with_suffix(".md").write_text(markdown(made))
    print(markdown(made))


if __name__ == "__main__":
    main()
