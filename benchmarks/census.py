"""The census: every model type of transformers and every architecture of timm, audited, converted and reloaded.

    python benchmarks/census.py run [--only GLOB] [--again TEXT] [--jobs N]   # resumable: appends to census.jsonl
    python benchmarks/census.py table    # moves the rows into census.json, writes census.md, exits 1 below a bar

Of each model type of transformers the class with the most in it and the base model are built, of timm every
architecture. For each model the audit tells the sites (with `--include-heads`), what is left and why. Every model that
fits into memory and takes a made-up input also makes the round trip: convert, save, reload bit-equal, see the output
change when each site is perturbed, fail where orthoact is absent. Of timm, the smallest architecture of each source
file does.
A second pass, which sees the operators themselves below every Python function, checks that none is missing; it needs
an input that the whole model takes, and a model for which none could be made is counted as not checked.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import fnmatch
import gc
import itertools
import json
import logging
import multiprocessing
import multiprocessing.connection
import os
import re
import signal
import tempfile
import time
import traceback
import warnings
from pathlib import Path
from typing import Any

from roundtrip import told, trip

HERE = Path(__file__).parent
JOURNAL, ROWS, TABLE = HERE / "census.jsonl", HERE / "census.json", HERE / "census.md"
LIMIT = 60_000_000
"""Numbers of a model that is built in memory; larger ones stay on the meta device."""
SECONDS = 1500
"""Of processor time for one row."""
STUCK = 3000
"""Seconds after which a row that does nothing is given up."""
BATCH = 50
"""Rows that one process does."""


# -- what there is -----------------------------------------------------------------------------------------------------


def transformers_names() -> list[str]:
    """`transformers:type/Class`, the class of a model type that holds most of it, and `base:type/Class`, its trunk."""
    from transformers.models.auto import modeling_auto
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    maps = {
        n: getattr(modeling_auto, n)
        for n in dir(modeling_auto)
        if n.endswith("_MAPPING_NAMES") and n.startswith("MODEL")
    }
    first = (
        "PRETRAINING",
        "CAUSAL_LM",
        "MULTIMODAL_LM",
        "MASKED_LM",
        "SEQ_TO_SEQ_CAUSAL_LM",
        "SEQUENCE_CLASSIFICATION",
    )
    order = [f"MODEL_FOR_{k}_MAPPING_NAMES" for k in first]
    order = [k for k in order if k in maps] + sorted(maps.keys() - {*order, "MODEL_MAPPING_NAMES"})
    order.append("MODEL_MAPPING_NAMES")
    rows, trunks, taken = [], [], set()
    for kind in CONFIG_MAPPING_NAMES:
        classes: list[str] = []
        for key in order:
            named = maps[key].get(kind, ())
            classes += [named] if isinstance(named, str) else named
        last = classes[-1:]
        classes = [c for c in dict.fromkeys(classes) if c not in taken] or classes[:1] or part_classes(kind)
        taken.update(classes)
        classes = [WHOLE[kind]] if kind in WHOLE else classes
        rows.append(f"transformers:{kind}/{(classes or ['?'])[0]}")
        trunks += [
            f"base:{kind}/{c}" for c in last if c in maps["MODEL_MAPPING_NAMES"].get(kind, ()) and c != classes[0]
        ]
    return rows + trunks


WHOLE = {
    "emu3": "Emu3ForConditionalGeneration",
    "qwen3_5": "Qwen3_5ForConditionalGeneration",
    "qwen3_5_moe": "Qwen3_5MoeForConditionalGeneration",
    "qwen4_exp": "Qwen4ExpForConditionalGeneration",
    "llama4": "Llama4ForConditionalGeneration",
    "musicgen": "MusicgenForConditionalGeneration",
    "musicgen_melody": "MusicgenMelodyForConditionalGeneration",
    "dots3_note": "Dots3NoteForConditionalGeneration",
}
"""The class that takes the config of a type, where the first one known takes only a part of it."""


def part_classes(kind: str) -> list[str]:
    """The classes of a model type that no Auto class knows: a part of another model."""
    import importlib
    import inspect

    from transformers import CONFIG_MAPPING, PreTrainedModel

    try:
        config = CONFIG_MAPPING[kind]
        module = importlib.import_module(config.__module__.replace("configuration_", "modeling_"))
    except Exception:
        return []
    return [
        name
        for name, cls in vars(module).items()
        if inspect.isclass(cls)
        and issubclass(cls, PreTrainedModel)
        and not name.endswith("PreTrainedModel")
        and cls.__module__ == module.__name__
        and cls.config_class is config
    ][:1]


def timm_names() -> list[str]:
    import timm

    return [name for name in timm.list_models() if name != "orthoact"]  # ours


# -- one row -----------------------------------------------------------------------------------------------------------


def transformers_row(name: str, library: str) -> dict[str, Any]:
    import shrink

    kind, _, cls = name.partition("/")
    row: dict[str, Any] = {"library": library, "name": name}
    if cls == "?":
        return row | {"built": None, "why": "no model class takes this config"}
    kept, best = "", None
    for size in shrink.LADDER:
        try:
            model_class = find_class(kind, cls)
            model = shrink.build(lambda: model_class(shrink.small_config(kind, size)), LIMIT)  # noqa: B023
        except Exception as error:
            kept = told(error)
            continue
        found = audited(model)
        if best is None or (found["ran"] and not best[1]["ran"]):
            best = (size, found, model)
        if found["ran"]:
            break
    if best is None:
        return row | {"built": None, "why": kept}
    size, found, model = best
    row |= {"built": size, "meta": next(model.parameters()).is_meta} | found
    if not row["meta"] and found["ran"] and found["sites"]:
        row["trip"] = trip(model, lambda folder: type(model).from_pretrained(folder).eval())
    return row


def find_class(kind: str, name: str) -> Any:
    import importlib

    import transformers
    from transformers import CONFIG_MAPPING

    if hasattr(transformers, name):
        return getattr(transformers, name)
    config = CONFIG_MAPPING[kind]
    return getattr(importlib.import_module(config.__module__.replace("configuration_", "modeling_")), name)


def timm_row(name: str, smallest: bool = False) -> dict[str, Any]:
    import timm
    import torch

    row: dict[str, Any] = {"library": "timm", "name": name}
    try:
        with torch.device("meta"), uninitialised():
            model: Any = timm.create_model(name).eval()
    except Exception as first:
        try:
            model = timm.create_model(name).eval()
        except Exception:
            return row | {"built": None, "why": told(first)}
    key = likeness(model)
    found = _seen.get(key) or audited(model)
    _seen[key] = found
    if not found["ran"] and sum(p.numel() for p in model.parameters()) < LIMIT:
        model = timm.create_model(name).eval()
        found = audited(model)
    row |= {"file": type(model).__module__.rpartition(".")[2], "size": sum(p.numel() for p in model.parameters())}
    row |= {"built": "default", "meta": next(model.parameters()).is_meta} | found
    return row


_seen: dict[Any, dict[str, Any]] = {}
"""What was found in models of the same modules, one by one; only their sizes differ."""


def likeness(model: Any) -> tuple:
    """The names, classes, functions and settings of a model's modules: equal for variants of one architecture."""
    return tuple(
        (name, type(m), "" if m._modules or m._parameters else repr(m), *functions(m))
        for name, m in model.named_modules(remove_duplicate=False)
    )


def functions(module: Any) -> list[tuple[str, str]]:
    return [(k, getattr(v, "__name__", repr(v))) for k, v in vars(module).items() if callable(v)]


@contextlib.contextmanager
def uninitialised():
    """Without the initial values of weights, which on the meta device are none."""
    import torch

    names = [n for n in vars(torch.nn.init) if n.endswith("_") and not n.startswith("_")]
    kept = {n: getattr(torch.nn.init, n) for n in names}
    try:
        for n in names:
            setattr(torch.nn.init, n, lambda tensor, *_, **__: tensor)
        yield
    finally:
        for n, function in kept.items():
            setattr(torch.nn.init, n, function)


def timm_trip(name: str) -> dict[str, Any]:
    """The round trip of one architecture, on the smallest image that it takes."""
    import timm
    import torch

    torch.manual_seed(0)
    for size in (64, 128, None):
        for fixed in (True, False) if size else (False,):
            try:
                model: Any = timm.create_model(name, **({"img_size": size} if fixed else {})).eval()
                if size and not fixed:
                    model.pretrained_cfg = {**model.pretrained_cfg, "input_size": (3, size, size)}
                with torch.no_grad():
                    model(
                        torch.randn(
                            1,
                            *model.pretrained_cfg["input_size"][:1],
                            *(size or s for s in model.pretrained_cfg["input_size"][1:]),
                        )
                    )
            except Exception:
                continue
            return trip(model, lambda folder: timm.create_model(f"local-dir:{folder}", pretrained=True).eval())
    return {"why": "takes no made-up image"}


PROPER = ("gelu", "gelu_tanh", "gelu_10", "silu", "scaled_silu", "quick_gelu", "swish", "erf", "mish", "hardswish")
RELUS = ("relu", "relu2", "relu6", "leaky_relu", "prelu", "rrelu", "elu", "celu", "selu")
FAMILY = re.compile(f"({'|'.join(PROPER + RELUS)})_?(\\(|$)")
"""Names of activations proper: GELU, SiLU and quick GELU, ReLU and its kin."""


def audited(model: Any) -> dict[str, Any]:
    """What `orthoact inspect --include-heads` says, as counts."""
    from orthoact.convert.sites import _is_head, _trunk
    from orthoact.convert.surgeon import examine

    sites, left, seen = examine(model, include_heads=True)
    trunk = _trunk(model)
    kinds = collections.Counter(s.target.name for s in sites)
    rows: collections.Counter[str] = collections.Counter()
    for item in left:
        what = (
            "blind"
            if item.function == "?"
            else "proper"
            if item.proper
            else "never"
            if "never" in item.reason
            else "gate"
        )
        if "parameters of its own" in item.reason:
            what = "trained"
        where = owner_of(model, item.where) if what in ("blind", "proper", "trained") else ""
        rows[f"{what}: {where}{' ' if where else ''}{item.function if what != 'blind' else item.reason[:160]}"] += 1
    left_calls = collections.Counter()
    for item in left:
        if FAMILY.match(item.function):
            left_calls[item.function] += item.calls
    missing = unnamed(model, sites, left) if seen.ran else None
    return {
        "ran": seen.ran,
        "sites": len(sites),
        "heads": sum(_is_head(s.name, trunk) for s in sites),
        "targets": dict(kinds),
        "left": dict(rows),
        "calls": sum(max(1, seen.calls.get(s.name, 0)) for s in sites if FAMILY.match(s.target.name)),
        "left_calls": {k: n for k, n in left_calls.items() if n},
        "unnamed": missing or {},
        "checked": missing is not None,
    }


OPERATORS = {
    **{"gelu": "gelu", "silu": "silu", "relu": "relu", "hardtanh": "relu6", "hardswish": "hardswish", "mish": "mish"},
    **{"elu": "elu", "leaky_relu": "leaky_relu", "_prelu_kernel": "prelu", "rrelu_with_noise": "rrelu", "glu": "glu"},
    **{"tanh": "tanh", "sigmoid": "sigmoid", "hardsigmoid": "hardsigmoid", "softplus": "softplus", "erf": "erf"},
    **{"log_sigmoid_forward": "logsigmoid", "_transformer_encoder_layer_fwd": "fused", "threshold": "relu"},
}
"""Operators of torch's dispatcher that are activations, with the function that they come from."""
ALSO = {
    "relu6": ("relu6", "hardtanh"),
    "elu": ("elu", "celu", "selu"),
    "sigmoid": ("sigmoid", "silu", "quick_gelu", "scaled_silu"),
    "logsigmoid": ("logsigmoid", "log_sigmoid"),
    "silu": ("silu", "swish"),
}


def unnamed(model: Any, sites: list[Any], left: list[Any]) -> dict[str, int] | None:
    """Operators that ran outside the sites more often than `left` says: by the dispatcher, not by names in Python.

    None where no made-up input runs, so that nothing was checked.
    """
    import torch
    from torch import Tensor  # noqa: F401
    from torch.utils._python_dispatch import TorchDispatchMode

    from orthoact.convert.audit import probe_batches
    from orthoact.convert.calls import exposed

    depth, ran = [0], collections.Counter()

    class Operators(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            name = func.overloadpacket.__name__.removesuffix("_") if hasattr(func, "overloadpacket") else ""
            if not depth[0] and name in OPERATORS:
                ran[OPERATORS[name]] += 1
            return func(*args, **(kwargs or {}))

    named: collections.Counter[str] = collections.Counter()
    for item in left:
        named[item.function.split("(")[0].removesuffix("_")] += item.calls
    with exposed(model), torch.no_grad(), contextlib.ExitStack() as stack:
        holders = {id(m): m for m in (model.get_submodule(s.name) for s in sites)}
        holders |= {id(m): m for m in (there(model, i.where) for i in left) if m is not None and not len(m._modules)}
        for module in holders.values():
            stack.callback(module.register_forward_pre_hook(lambda *_: depth.__setitem__(0, depth[0] + 1)).remove)
            hook = module.register_forward_hook(lambda *_: depth.__setitem__(0, depth[0] - 1), always_call=True)
            stack.callback(hook.remove)
        for config in [m.__dict__["config"] for m in model.modules() if m.__dict__.get("config") is not None]:
            if getattr(config, "_experts_implementation", None) is not None and next(model.parameters()).is_meta:
                config._experts_implementation = "batched_mm"  # no router can branch where nothing can be read
        for batch in probe_batches(model):
            ran.clear()
            try:
                with Operators():
                    model(**batch)
            except Exception:
                depth[0] = 0
                continue
            break
        else:
            return None
    return {
        op: n - sum(named[f] for f in ALSO.get(op, (op,)))
        for op, n in ran.items()
        if n > sum(named[f] for f in ALSO.get(op, (op,)))
    }


def there(model: Any, where: str) -> Any:
    try:
        return model.get_submodule(where) if where else None
    except AttributeError:
        return None


def owner_of(model: Any, where: str) -> str:
    try:
        return type(model.get_submodule(where)).__name__
    except AttributeError:
        return type(model.get_submodule(where.rpartition(".")[0])).__name__ if "." in where else type(model).__name__


# -- the run -----------------------------------------------------------------------------------------------------------


def prepare() -> None:
    """Import all that is needed, once: every worker is a fork of this process."""
    warnings.simplefilter("ignore")
    os.environ["HF_HUB_OFFLINE"] = "1"
    import timm
    import torch
    import transformers

    import orthoact

    orthoact.find_sites(torch.nn.Sequential(torch.nn.GELU()))
    timm.create_model("resnet10t")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    logging.getLogger("orthoact").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    gc.collect()
    gc.freeze()


class Late(BaseException):
    """A row took too long; nothing that catches what a model may raise catches it."""


def work(names: list[str], mark: Path) -> None:
    """In a process of its own: one row for each name, appended as it is made."""
    quiet = os.open(os.devnull, os.O_WRONLY)
    os.dup2(quiet, 1)
    os.dup2(quiet, 2)

    def late(*_):
        raise Late(f"more than {SECONDS} s")

    signal.signal(signal.SIGPROF, late)
    for name in names:
        clock = time.process_time()
        mark.write_text(name)
        signal.setitimer(signal.ITIMER_PROF, SECONDS)  # of the processor: others may use it too
        library, _, rest = name.partition(":")
        try:
            if library in ("transformers", "base"):
                row = transformers_row(rest, library)
            elif library == "timm":
                row = timm_row(rest)
            else:
                row = {"library": "trip", "name": rest, "trip": timm_trip(rest)}
        except BaseException as error:  # the census goes on
            row = {"library": library, "name": rest, "built": None, "crash": told(error)}
            row["at"] = [f"{f.name}:{f.lineno}" for f in traceback.extract_tb(error.__traceback__)][-4:]
        signal.setitimer(signal.ITIMER_PROF, 0)
        row["seconds"] = round(time.process_time() - clock, 1)
        write(row)


def write(row: dict[str, Any]) -> None:
    with JOURNAL.open("a") as file:
        file.write(json.dumps(row) + "\n")


def read() -> dict[str, dict[str, Any]]:
    """The rows by `library:name`: those of the table, then those made since."""
    rows = json.loads(ROWS.read_text()) if ROWS.exists() else {}
    for key, row in rows.items():
        row["library"], _, row["name"] = key.partition(":")
    for line in JOURNAL.read_text().splitlines() if JOURNAL.exists() else []:
        row = json.loads(line)
        rows[f"{row['library']}:{row['name']}"] = row
    return rows


def is_open(row: dict[str, Any]) -> bool:
    """Whether anything about a row is not as it should be."""
    trip = row.get("trip", {})
    left = " ".join(row.get("left", {}))
    return bool(
        (not row.get("built") and "trip" not in row)
        or "blind" in left
        or "proper" in left
        or row.get("unnamed")
        or trip.get("silent")
        or trip.get("reached", 0) < trip.get("sites", 0)
        or (trip and not (trip.get("equal") and trip.get("loud") and trip.get("original", True)))
    )


def smallest() -> list[str]:
    """The smallest architecture of each source file of timm that the audit could build."""
    best: dict[str, tuple[int, str]] = {}
    for row in read().values():
        if row["library"] == "timm" and row.get("sites") and row.get("size"):
            best[row["file"]] = min(best.get(row["file"], (10**12, "")), (row["size"], row["name"]))
    return sorted(f"trip:{name}" for _, name in best.values())


def run(only: str, again: str, most: int, jobs: int) -> None:
    prepare()
    names = transformers_names()
    first = [n for n in names if n.startswith("transformers")], [f"timm:{n}" for n in timm_names()]
    for stage in (first, None, ([n for n in names if n.startswith("base")],)):
        stage = stage or (smallest(),)
        known = read()
        redo = {n for n, row in known.items() if again and (again in json.dumps(row) or again == "all")}
        redo |= {n for n, row in known.items() if again == "open" and is_open(row)}
        queues = []
        for part in stage:
            todo = [n for n in part if fnmatch.fnmatch(n, only) and (n not in known or n in redo)][:most]
            print(len(part), "models,", len(todo), "to do", flush=True)
            queues.append([todo[i : i + BATCH] for i in range(0, len(todo), BATCH)])
        batches = [b for pair in itertools.zip_longest(*queues) for b in pair if b]
        with tempfile.TemporaryDirectory() as folder:
            spread(batches, jobs, Path(folder))


def spread(batches: list[list[str]], jobs: int, folder: Path) -> None:
    """Do the batches in so many processes; a row that ends its process is written down and the rest goes on."""
    fork, serial = multiprocessing.get_context("fork"), itertools.count()
    running: dict[Any, tuple[Any, list[str], Path]] = {}
    while batches or running:
        while batches and len(running) < jobs:
            mark = folder / str(next(serial))
            process = fork.Process(target=work, args=(batches[0], mark))
            process.start()
            running[process.sentinel] = process, batches.pop(0), mark
        for sentinel in multiprocessing.connection.wait(list(running), timeout=30):
            process, batch, mark = running.pop(sentinel)
            process.join()
            if process.exitcode:
                last = mark.read_text()
                library, _, name = last.partition(":")
                write({"library": library, "name": name, "built": None, "crash": f"ended with {process.exitcode}"})
                if rest := batch[batch.index(last) + 1 :]:
                    batches.insert(0, rest)
            print(len(batches), "batches left", time.strftime("%H:%M:%S"), flush=True)
        for process, _, mark in running.values():
            if mark.exists() and time.time() - mark.stat().st_mtime > STUCK:
                process.kill()


# -- the table ---------------------------------------------------------------------------------------------------------


def table() -> bool:
    """Write the rows and their summary; whether every bar is met."""
    import timm
    import torch
    import transformers

    known = {*transformers_names(), *(f"timm:{name}" for name in timm_names())}
    rows = {k: row for k, row in sorted(read().items()) if row["library"] == "trip" or k in known}
    kept = [json.dumps(key) + ": " + json.dumps(plain(row), separators=(",", ":")) for key, row in rows.items()]
    ROWS.write_text("{\n" + ",\n".join(kept) + "\n}\n")
    JOURNAL.unlink(missing_ok=True)
    kinds = {
        "transformers": "transformers, the class with most in it",
        "base": "transformers, the trunk",
        "timm": "timm, every architecture",
    }
    lines = ["# The census", "", "<!-- --8<-- [start:summary] -->", __doc__.split("\n\n", 2)[2].strip(), ""]
    lines += [f"transformers {transformers.__version__}, timm {timm.__version__}, torch {torch.__version__}.", ""]
    family = "calls of GELU, SiLU, ReLU and their kin"
    lines += [f"| | models | built | sites | {family} | converted | operators checked | neither converted nor named |"]
    lines += ["|---|---|---|---|---|---|---|---|"]
    total: collections.Counter[str] = collections.Counter()
    for kind, title in kinds.items():
        mine = [r for r in rows.values() if r["library"] == kind]
        n = counted(mine)
        total += n
        lines.append(f"| {title} | {len(mine)} | {cells(n)} |")
    lines += [f"| all | {sum(r['library'] in kinds for r in rows.values())} | {cells(total)} |", ""]
    trips = {key: row["trip"] for key, row in rows.items() if row.get("trip")}
    made = {key: t for key, t in trips.items() if "equal" in t}
    whole = sum(t["reached"] == t["sites"] for t in made.values())
    fails = {k: t for k, t in made.items() if t["silent"] or not (t["equal"] and t["loud"] and t["original"])}
    reached, sites = (sum(t[k] for t in made.values()) for k in ("reached", "sites"))
    unused = sum(len(t.get("unused", ())) for t in made.values())
    lines += [
        f"Round trips: {len(made)}; {sum(t['equal'] for t in made.values())} reload bit-equal, "
        f"{sum(t['loud'] for t in made.values())} fail where orthoact is absent and say so, "
        f"{sum(t['original'] for t in made.values())} give the old output back with `orthoact.original`. "
        f"{reached} of their {sites} sites were run (in {whole} models all) and perturbed one by one: "
        f"{sum(len(t['silent']) for t in made.values())} did nothing though the original's output depends on them, "
        f"{unused} did nothing and do nothing in the original either (a number added to what they give).",
        "",
    ]
    crashes = {key: row for key, row in rows.items() if row.get("crash")}
    share = total["calls"] / max(1, total["calls"] + total["left"])
    bars = {
        f"activations neither converted nor named: {total['unnamed']} (bar 0), in the {total['checked']} models whose "
        f"operators could be checked": not total["unnamed"],
        f"calls of GELU, SiLU, ReLU and their kin converted: {share:.2%} (bar 98 %)": share >= 0.98,
        f"crashes: {len(crashes)} (bar 0)": not crashes,
        f"round trips that fail: {len(fails)} of {len(made)} (bar 0)": not fails,
    }
    lines += [f"- {'met' if met else 'MISSED'}: {text}" for text, met in bars.items()] + [""]
    lines += ["<!-- --8<-- [end:summary] -->", ""]
    for title, found in {
        "Crashes": {k: row["crash"] for k, row in crashes.items()},
        "Round trips that fail": {k: json.dumps(t) for k, t in fails.items()},
        "No round trip": {k: t["why"] for k, t in trips.items() if "equal" not in t},
        "Operators not named": {k: json.dumps(row["unnamed"]) for k, row in rows.items() if row.get("unnamed")},
        "Operators not checked": {
            k: "no made-up input runs the whole model"
            for k, row in rows.items()
            if row.get("built") and not row.get("checked") and not row.get("crash")
        },
        "Not built": {k: row["why"] for k, row in rows.items() if row.get("why") and not row.get("built")},
    }.items():
        if found:
            lines += [f"## {title}", "", *(f"- `{key}`: {text[:200]}" for key, text in found.items()), ""]
    lines += ["## What is left", "", "| what | in models | places |", "|---|---|---|"]
    left: dict[str, list[int]] = {}
    for row in rows.values():
        for text, n in row.get("left", {}).items():
            what, _, rest = text.partition(": ")
            if what == "blind":
                parts = "audited part by part" in rest
                text = (
                    "the whole model not run, each of its parts run"
                    if parts
                    else "a part that no made-up input reaches"
                )
            elif what == "gate":
                text = f"{rest}: a gate, pooler, head or soft cap"
            elif what == "never":
                text = f"{rest}: never called in a forward pass"
            elif what == "trained":
                text = f"{rest.rpartition(' ')[2]}: has parameters of its own"
            else:
                text = f"{rest}: cannot be replaced"
            seen = left.setdefault(text, [0, 0])
            seen[0], seen[1] = seen[0] + 1, seen[1] + n
    lines += [f"| {text} | {a} | {b} |" for text, (a, b) in sorted(left.items(), key=lambda i: -i[1][0])] + [""]
    lines += ["## transformers", "", "| type/class | sites | targets | left | round trip |", "|---|---|---|---|---|"]
    for row in rows.values():
        if row["library"] == "transformers" and row.get("built"):
            lines.append(
                f"| {row['name']} | {row.get('sites', 0)} | {listed(row)} | {remains(row)} | {told_trip(row)} |"
            )
    lines += ["", "## timm, by source file", ""]
    lines += ["| file | architectures | sites | targets | left | round trip of |", "|---|---|---|---|---|---|"]
    files: dict[str, list[dict[str, Any]]] = {}
    for row in rows.values():
        if row["library"] == "timm" and row.get("built"):
            files.setdefault(row["file"], []).append(row)
    for file, group in sorted(files.items()):
        counts = [r.get("sites", 0) for r in group]
        targets = {t for r in group for t in r.get("targets", {})}
        remaining = {remains(r) for r in group} - {""}
        tried = next((k for r in group if (k := f"trip:{r['name']}") in rows), "")
        shown = f"{tried.partition(':')[2]}: {told_trip(rows[tried])}" if tried else ""
        lines.append(
            f"| {file} | {len(group)} | {min(counts)} to {max(counts)} | {', '.join(sorted(targets))} | "
            f"{'; '.join(sorted(remaining))[:200]} | {shown} |"
        )
    TABLE.write_text("\n".join(lines) + "\n")
    print("\n".join(f"{'met' if met else 'MISSED'}: {text}" for text, met in bars.items()))
    return all(bars.values())


def plain(row: dict[str, Any]) -> dict[str, Any]:
    """A row without what is empty, known from its key, or of one run only."""
    return {k: v for k, v in row.items() if v not in ({}, [], None, "", 0, False) and k not in DROPPED}


DROPPED = ("library", "name", "seconds")


def counted(rows: list[dict[str, Any]]) -> collections.Counter[str]:
    n: collections.Counter[str] = collections.Counter()
    for row in rows:
        n["built"] += bool(row.get("built"))
        n["checked"] += bool(row.get("built") and row.get("checked"))
        n["sites"] += row.get("sites", 0)
        n["calls"] += row.get("calls", 0)
        n["left"] += sum(row.get("left_calls", {}).values())
        n["unnamed"] += sum(row.get("unnamed", {}).values())
    return n


def cells(n: collections.Counter[str]) -> str:
    calls = n["calls"] + n["left"]
    share = f"{n['calls'] / max(1, calls):.2%}"
    return f"{n['built']} | {n['sites']} | {calls} | {share} | {n['checked']} | {n['unnamed']}"


def listed(row: dict[str, Any]) -> str:
    return ", ".join(f"{t} {n}" for t, n in row.get("targets", {}).items())


def remains(row: dict[str, Any]) -> str:
    """What is left of a model, in a few words."""
    words = [text.partition(": ")[2].rpartition(" ")[2] for text in row.get("left", {}) if not text.startswith("blind")]
    return ", ".join(dict.fromkeys(words)) + (" (not all run)" if "blind" in " ".join(row.get("left", {})) else "")


def told_trip(row: dict[str, Any]) -> str:
    trip = row.get("trip") or {}
    if "equal" not in trip:
        return trip.get("why", "")
    good = trip["equal"] and trip["loud"] and trip["original"] and not trip["silent"]
    return f"{'equal' if good else 'FAILS'}, {trip['reached']} of {trip['sites']} sites run"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("job", choices=["run", "table"])
    parser.add_argument("--only", default="*")
    parser.add_argument("--most", type=int, default=10**9, help="at most so many rows of each kind in this run")
    parser.add_argument("--again", default="", help="also rows that hold this text; 'open'; 'all'")
    parser.add_argument("--jobs", type=int, default=2)
    arguments = parser.parse_args()
    if arguments.job == "table":
        raise SystemExit(not table())
    else:
        run(arguments.only, arguments.again, arguments.most, arguments.jobs)
