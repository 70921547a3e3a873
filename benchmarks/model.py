"""What a converted model costs, beside the same model with its own activations.

    python benchmarks/model.py                    # GPT-2 and ViT of their usual sizes: writes benchmarks/model.md
    python benchmarks/model.py --model gpt2 --rounds 10 --dry

The models have the sizes of `gpt2` and `vit_base_patch16_224` and random weights, which cost as much as trained ones.
Both copies of each run in turn in one process, two threads, another order each round; medians over the rounds, as
ratios to the original run in the same way, and the original a second time for the noise. `eager` is as one loads them;
`compiled` is `torch.compile(model)`, by which the activations are inlined; the first step is without what was compiled
before. Peak memory is of a process of its own for each copy.
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import torch
from activation import keep_memory, machine, spread
from torch import nn
from torch._inductor.utils import fresh_cache

import orthoact

HERE = Path(__file__).parent
FILE = HERE / "model.json"
BARS = {"training step, compiled": 1.03, "generation": 1.05}
"""The most that a converted GPT-2 may take of the original's time."""
TOKENS = 16


def gpt2() -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(GPT2Config(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0))


def vit() -> nn.Module:
    import timm

    return timm.create_model("vit_base_patch16_224", pretrained=False)


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Any]]] = {
    "gpt2": (gpt2, lambda: torch.randint(0, 50257, (1, 256))),
    "vit": (vit, lambda: torch.randn(2, 3, 224, 224)),
}


def copies(name: str) -> dict[str, nn.Module]:
    """The original, itself again, and the converted model, with the same weights."""
    torch.manual_seed(0)
    original = MODELS[name][0]()
    converted = MODELS[name][0]()
    converted.load_state_dict(original.state_dict())
    orthoact.convert_(converted, family="hermite", degree=8)
    return {"original": original, "again": original, "converted": converted}


def loss(model: Any, inputs: torch.Tensor) -> torch.Tensor:
    return model(inputs, labels=inputs).loss if inputs.dtype == torch.long else model(inputs).square().mean()


def step(model: nn.Module, inputs: torch.Tensor) -> None:
    model.train()
    loss(model, inputs).backward()
    for parameter in model.parameters():
        parameter.grad = None


def infer(model: nn.Module, inputs: torch.Tensor) -> None:
    model.eval()
    with torch.inference_mode():
        model(inputs)


def generate(model: Any, inputs: torch.Tensor) -> None:
    """Token by token after a short text, with the cache of keys and values."""
    model.eval()
    with torch.inference_mode():
        model.generate(inputs[:, :16], max_new_tokens=TOKENS, min_new_tokens=TOKENS, do_sample=False, pad_token_id=0)


JOBS: dict[str, dict[str, Callable]] = {
    "gpt2": {"training step": step, "inference": infer, "generation": generate},
    "vit": {"training step": step, "inference": infer},
}


def timed(jobs: dict[str, Callable[[], None]], rounds: int) -> dict[str, list[float]]:
    shuffle, found = random.Random(0), {name: [] for name in jobs}
    for job in jobs.values():
        job()
    for _ in range(rounds):
        for name in shuffle.sample(list(jobs), len(jobs)):
            start = perf_counter()
            jobs[name]()
            found[name].append(perf_counter() - start)
    return found


def row(what: str, times: dict[str, list[float]], **more: float) -> dict[str, Any]:
    base = median(times["original"])
    return {
        "what": what,
        "ms": 1e3 * base,
        "ratio": median(times["converted"]) / base,
        "again": median(times["again"]) / base,
        "spread": spread(times["converted"]),
        **more,
    }


def measure(name: str, rounds: int, what: str) -> list[dict[str, Any]]:
    """The rows whose name begins with `what`."""
    models, inputs, found = copies(name), MODELS[name][1](), []

    def compare(title: str, of: Callable, models: dict[str, nn.Module], **more: float) -> None:
        if title.startswith(what):
            jobs = {k: lambda m=m: of(m, inputs) for k, m in models.items()}
            found.append(row(title, timed(jobs, rounds), **more))
            print(json.dumps(found[-1]), flush=True)

    for title, of in JOBS[name].items():
        compare(title, of, models)
    if "training step, compiled".startswith(what) or "inference, compiled".startswith(what):
        compiled, seconds = {}, {}
        for key in ("original", "converted"):
            compiled[key] = torch.compile(models[key])
            with fresh_cache():
                start = perf_counter()
                step(compiled[key], inputs)
                seconds[key] = perf_counter() - start
        compiled["again"] = compiled["original"]
        more = {"compile_original": seconds["original"], "compile_converted": seconds["converted"]}
        compare("training step, compiled", step, compiled, **more)
        compare("inference, compiled", infer, compiled)
    return found


def peak(name: str, which: str) -> float:
    """MB of a process that takes training steps."""
    command = [sys.executable, __file__, "--peak", name, which]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[-1])


def markdown(stored: dict[str, Any]) -> str:
    lines = [
        f"{stored['threads']} threads, {stored['machine']}, torch {stored['torch']}; hermite, degree 8. Time of the",
        "converted model as a ratio to the original's in the same rounds; medians; `again`: the original once more.",
        "",
        "| model | | original, ms | converted | again | bar |",
        "|---|---|---|---|---|---|",
    ]
    for name, rows in stored["models"].items():
        for each in rows["times"]:
            bar = BARS.get(each["what"], "") if name == "gpt2" else ""
            ratio = f"{each['ratio']:.3f} ± {each['ratio'] * each['spread']:.3f}"
            lines.append(f"| {name} | {each['what']} | {each['ms']:.0f} | {ratio} | {each['again']:.3f} | {bar} |")
    for name, rows in stored["models"].items():
        memory = ", ".join(f"{key} {value:,.0f} MB" for key, value in rows["peak"].items())
        lines += ["", f"{name}: peak memory of a process that trains: {memory}."]
        for made in (each for each in rows["times"] if "compile_original" in each):
            pair = f"{made['compile_original']:.0f} s, converted {made['compile_converted']:.0f} s"
            lines[-1] += f" The first compiled step: {pair}."
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", nargs="+", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--what", default="", help="only the rows whose name begins so")
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--dry", action="store_true", help="write nothing")
    parser.add_argument("--peak", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    keep_memory()
    if args.peak:
        name, which = args.peak
        model, inputs = copies(name)[which], MODELS[name][1]()
        for _ in range(3):
            step(model, inputs)
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
        return
    stored = json.loads(FILE.read_text()) if FILE.exists() else {"models": {}}
    stored |= {"machine": machine(), "threads": args.threads, "torch": torch.__version__.split("+")[0]}
    for name in args.model:
        kept = stored["models"].setdefault(name, {"times": [], "peak": {}})
        if not args.what:
            kept["peak"] = {which: peak(name, which) for which in ("original", "converted")}
            print(name, kept["peak"], flush=True)
        new = {each["what"]: each for each in measure(name, args.rounds, args.what)}
        kept["times"] = [each for each in kept["times"] if each["what"] not in new] + list(new.values())
        if not args.dry:
            FILE.write_text(json.dumps(stored, indent=1) + "\n")
            FILE.with_suffix(".md").write_text(markdown(stored))


if __name__ == "__main__":
    main()
