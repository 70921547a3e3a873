"""The model card of a converted folder: what was done and measured, and how to load it; nothing else."""

from __future__ import annotations

import io
import re
from math import isfinite
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..interp.activation import Activation
from ..interp.errors import OrthoactError
from ..interp.plot import plot_curves
from ..interp.targets import get_target
from .folder import read_activations, read_json, read_record, read_report
from .names import DEMO_NAME, is_adapter, portable

MARK = "<!-- written by orthoact: a card without this line is left as it is -->"
"""What tells a card that may be replaced."""

PICTURE = "activations.png"
"""The picture of the curves beside the card."""

HUB_ID = re.compile(r"[\w][\w.-]{0,95}/[\w][\w.-]{0,95}|[\w][\w.-]{0,95}")

TRAINED = {
    "causal-lm": "text-generation",
    "sequence-classification": "text-classification",
    "image-classification": "image-classification",
}
"""The Hub's name of each task of a recipe."""

MEASURES = {
    "kl": ("kl", "KL divergence from the original, nats per position"),
    "top1_agreement": ("top1-agreement", "share of positions with the original's top-1"),
    "cosine_mean": ("cosine", "mean cosine of the outputs to the original's"),
    "cosine_min": ("cosine-least", "least cosine of the outputs to the original's"),
    "perplexity": ("perplexity", "perplexity"),
    "perplexity_base": ("perplexity-original", "perplexity of the original"),
    "loss": ("loss", "loss"),
    "loss_base": ("loss-original", "loss of the original"),
    "change": ("change", "change of the perplexity or loss, per cent"),
}
"""What `evaluate` measures: the type of the metric on the card, and its words."""

DATA = {
    "demo": ("the held-out text of the demo model", "text-generation"),
    "file": ("data given by the author", None),
    "probe": ("a seeded batch of random inputs (no real data)", None),
}


def make_card(folder: str | Path, repo: str = "") -> dict[str, bytes]:
    """The card of a converted folder or adapter and its picture, as files by name; `repo` is where it will be.

    Everything on it was recorded by the conversion or is read from the tensors. Raises `OrthoactError` for a folder
    that is damaged.
    """
    from huggingface_hub import ModelCard

    folder = Path(folder)
    record, report, acts = read_record(folder), read_report(folder), read_activations(folder)
    adapter = is_adapter(folder)
    config = {} if adapter else read_json(folder / "config.json")
    base, made = record.get("base") or report.get("base") or {}, record.get("made") or {}
    timm = base.get("library") == "timm" or "architecture" in config
    where = repo or folder.resolve().name
    title = where.rpartition("/")[2]
    data = _metadata(record, report, base, config, title, adapter=adapter, timm=timm)
    families = sorted({f"{entry['family']} {entry['degree']}" for entry in record["sites"].values()})
    numbers = sum(act.theta.numel() for act in acts.values())
    name = base.get("model")
    training = report.get("training") or {}
    what = (
        f"{_linked(name)} with its {len(acts)} fixed activations replaced by learnable ones of the "
        f"famil{'ies' if len(families) > 1 else 'y'} {', '.join(families)}, which start as faithful copies"
        + (f" and were fine-tuned with `{training['what']}`." if "what" in training else ".")
        + (" This is an adapter: it holds the activations alone." if adapter else "")
    )
    commands = [line for line in dict.fromkeys([made.get("command"), training.get("command")]) if line]
    facts = {
        "base model": f"{_linked(name)}{', revision `' + base['revision'] + '`' if base.get('revision') else ''}",
        "activations": str(len(acts)),
        "learnable numbers": str(numbers),
        "library": "timm" if timm else "transformers",
    }
    card = ModelCard.from_template(
        data,
        template_str=(Path(__file__).parent / "card.md").read_text(encoding="utf-8"),
        mark=MARK,
        title=title,
        what=what[0].upper() + what[1:],
        picture=f"![the activations and their errors]({PICTURE})",
        facts="\n".join(f"| {key} | {value} |" for key, value in facts.items()),
        loading=_loading(where, name, config, adapter=adapter, timm=timm),
        training=_training(training),
        fidelity=_fidelity(report.get("fidelity"), report.get("recovery"), trained=bool(training)),
        sites=_sites(record, report, acts),
        left=_left(report.get("left")),
        command="\n".join(commands) or f"# in Python: orthoact.convert_(model); the record names {', '.join(families)}",
        made=_made(record, made, base),
    )
    return {"README.md": card.content.encode(), PICTURE: picture(acts)}


def _metadata(record, report, base, config, title, *, adapter: bool, timm: bool) -> Any:
    from huggingface_hub import EvalResult, ModelCardData

    carried = report.get("base", {}).get("card", {})
    name = base.get("model") or ""
    known = bool(HUB_ID.fullmatch(name)) and "/" in name  # a bare name may be a folder of the author's
    tags = ["orthoact", "learnable-activations", *sorted({entry["family"] for entry in record["sites"].values()})]
    options: dict[str, Any] = {k: v for k, v in carried.items() if k != "pipeline_tag"}
    if known:
        options |= {"base_model": name, "base_model_relation": "adapter" if adapter else "finetune"}
    task = carried.get("pipeline_tag") or ("image-classification" if timm else None)
    results, fidelity = [], report.get("fidelity") or {}
    dataset, demo_task = DATA.get(fidelity.get("data", ""), (None, None))
    for key, (kind, words) in MEASURES.items():
        if dataset is not None and key in fidelity:
            results.append(
                EvalResult(
                    task_type=task or demo_task or "other",
                    dataset_type=fidelity["data"],
                    dataset_name=dataset,
                    metric_type=kind,
                    metric_name=words,
                    metric_value=fidelity[key],
                )
            )
    training = report.get("training") or {}
    split, figures = _measured(training)
    for key, value in figures.items():
        results.append(
            EvalResult(
                task_type=task or TRAINED.get(training["recipe"]["task"], "other"),
                dataset_type=portable(training["recipe"]["data"]["path"]) or "data",
                dataset_name=_dataset(training["recipe"]["data"]),
                dataset_split=split,
                metric_type=key,
                metric_name=f"{key}, {split}",
                metric_value=value,
            )
        )
    if "auto_map" in config:
        tags.append("custom_code")
    return ModelCardData(
        library_name="peft" if adapter else "timm" if timm else "transformers",
        pipeline_tag=task,
        tags=tags,
        model_name=title,
        eval_results=results or None,
        **options,
    )


def _linked(name: str | None) -> str:
    if not name:
        return "a model that the record does not name"
    if DEMO_NAME.fullmatch(name):
        return "the demo model of the package orthoact"
    return f"[{name}](https://huggingface.co/{name})" if HUB_ID.fullmatch(name) and "/" in name else f"`{name}`"


def _loading(where: str, base: str | None, config: dict[str, Any], *, adapter: bool, timm: bool) -> str:
    """The ways that this folder can be loaded in, as code."""
    blocks = []
    architecture = (config.get("architectures") or ["AutoModel"])[0]
    auto = _auto(architecture)
    if adapter:
        load_base = (
            f'base = timm.create_model("hf-hub:{base}", pretrained=True)'
            if timm
            else f'base = AutoModelForCausalLM.from_pretrained("{base}")  # or the class that suits it'
        )
        imports = "import timm" if timm else "from transformers import AutoModelForCausalLM"
        blocks += [
            (
                "with PEFT",
                f"import orthoact\n{imports}\nfrom peft import PeftModel\n\n{load_base}\n"
                f'model = PeftModel.from_pretrained(base, "{where}")',
            ),
            ("merged into the base", f'import orthoact\n\nmodel = orthoact.load("{where}")'),
        ]
    elif timm:
        blocks += [
            (
                "with timm",
                f'import orthoact\nimport timm\n\nmodel = timm.create_model("hf-hub:{where}", pretrained=True)',
            ),
            (
                "with transformers",
                "import orthoact\nfrom transformers import AutoModelForImageClassification\n\n"
                f'model = AutoModelForImageClassification.from_pretrained("{where}")',
            ),
        ]
    else:
        blocks.append(
            (
                "with transformers",
                f'import orthoact\nfrom transformers import {auto}\n\nmodel = {auto}.from_pretrained("{where}")',
            )
        )
    if not adapter:
        blocks.append(("with orthoact, of either library", f'import orthoact\n\nmodel = orthoact.load("{where}")'))
    blocks.append(
        (
            "its original activations, on the same weights",
            f'import orthoact\n\nmodel = orthoact.load("{where}")\nwith orthoact.original(model):\n    ...',
        )
    )
    if "auto_map" in config:
        auto = next((name for name in config["auto_map"] if name not in ("AutoConfig", "AutoModel")), "AutoModel")
        blocks.append(
            (
                "without orthoact, by the code that comes with it",
                f'from transformers import {auto}\n\nmodel = {auto}.from_pretrained("{where}", trust_remote_code=True)',
            )
        )
    shown = "\n\n".join(f"{words[0].upper()}{words[1:]}:\n\n```python\n{code}\n```" for words, code in blocks)
    loud = "`pip install orthoact`: without it the folder does not load, rather than run with other activations."
    return f"{loud}\n\n{shown}"


def _auto(architecture: str) -> str:
    endings = {
        ("LMHeadModel", "ForCausalLM"): "AutoModelForCausalLM",
        ("ForMaskedLM",): "AutoModelForMaskedLM",
        ("ForConditionalGeneration",): "AutoModelForSeq2SeqLM",
        ("ForSequenceClassification",): "AutoModelForSequenceClassification",
        ("ForTokenClassification",): "AutoModelForTokenClassification",
        ("ForQuestionAnswering",): "AutoModelForQuestionAnswering",
        ("ForImageClassification",): "AutoModelForImageClassification",
    }
    return next((auto for ending, auto in endings.items() if architecture.endswith(ending)), "AutoModel")


def _measured(training: dict[str, Any]) -> tuple[str, dict[str, float]]:
    """The split that fine-tuning was measured on last, and the figures on it that JSON has a number for."""
    split = next((name for name in ("test", "validation") if training.get(name)), "")
    return split, {k: v for k, v in training.get(split, {}).items() if isinstance(v, int | float) and isfinite(v)}


def _dataset(data: dict[str, Any]) -> str:
    where = DATA["demo"][0] if data["path"] == "demo" else portable(data["path"])
    return " ".join(part for part in (where, data.get("subset")) if part)


def _training(training: dict[str, Any]) -> str:
    """What fine-tuning changed, in the figures of its own splits."""
    figures = _measured(training)[1]
    if not figures:
        return ""
    columns = [("before, validation", "zero_step"), ("after, validation", "validation"), ("after, test", "test")]
    columns = [(words, key) for words, key in columns if training.get(key)]
    head = f"| | {' | '.join(words for words, _ in columns)} |\n|---|{'---|' * len(columns)}"
    cells = {name: [f"{training[key][name]:.6g}" for _, key in columns] for name in figures}
    rows = [f"| {name} | {' | '.join(row)} |" for name, row in cells.items()]
    return (
        f"## What fine-tuning gave\n\n{training['trainable']} numbers trained ({training['what']}) for "
        f"{training['step']} steps on {_dataset(training['recipe']['data'])}:\n\n" + "\n".join([head, *rows])
    )


def _fidelity(found: dict[str, Any] | None, recovery: dict[str, Any] | None, *, trained: bool) -> str:
    if not found:
        when = "after its fine-tuning" if trained else "at the conversion"
        return f"It was not measured {when}: `orthoact evaluate` does."
    unit = next((k for k in ("tokens", "texts", "images") if k in found), None)
    over = f"{found[unit]} {unit} of " if unit else ""
    words = DATA.get(found.get("data", ""), ("data", None))[0]
    rows = [f"| {words_} | {found[key]:.6g} |" for key, (_, words_) in MEASURES.items() if key in found]
    told = ""
    if recovery:
        solved = "set to the least squares on their inputs"
        taught = f"trained towards the original's output for {recovery['steps']} steps"
        done = {"solved": solved, "trained": taught, "both": f"{solved} and {taught}"}.get(str(recovery.get("kept")))
        how = f"The activations were then {done}" if done else "A recovery found nothing nearer to the original"
        told = (
            f"{how} on `{recovery['data']}`: divergence on its held-out part "
            f"{recovery['divergence_before']:.3g} before, {recovery['divergence']:.3g} after.\n\n"
        )
    return f"{told}Measured at the conversion on {over}{words}:\n\n| | |\n|---|---|\n" + "\n".join(rows)


def _sites(record: dict[str, Any], report: dict[str, Any], acts: dict[str, Activation]) -> str:
    measured = {row.get("name"): row for row in report.get("sites", []) if isinstance(row, dict)}
    errors = any("value_rms" in row for row in measured.values())
    when = "curves after the recovery" if report.get("recovery") else "fit, before any training"
    lines = [
        "| activation | original | family | degree | numbers |" + (" value error | slope error |" if errors else ""),
        "|---|---|---|---|---|" + ("---|---|" if errors else ""),
    ]
    for name, entry in record["sites"].items():
        row = measured.get(name, {})
        cells = [f"`{name}`", entry["target"], entry["family"], str(entry["degree"]), str(acts[name].theta.numel())]
        if errors:
            cells += [f"{row[key]:.2e}" if key in row else "" for key in ("value_rms", "slope_rms")]
        lines.append(f"| {' | '.join(cells)} |")
    note = (
        f"\n\nThe errors are root mean squares of the {when}, under the law that the fit was made for."
        if errors
        else ""
    )
    return "\n".join(lines) + note


def _left(left: list[dict[str, Any]] | None) -> str:
    if not left:
        return ""
    rows = "\n".join(f"- `{row['where'] or 'model'}` {row['function']}: {row['reason']}" for row in left)
    return f"Left as they were:\n\n{rows}"


def _made(record: dict[str, Any], made: dict[str, Any], base: dict[str, Any]) -> str:
    lines = []
    if made.get("seed") is not None:
        lines.append(f"Seed {made['seed']}.")
    versions = made.get("versions") or {"orthoact": record.get("version")}
    lines.append(f"Versions: {', '.join(f'{name} {version}' for name, version in versions.items())}.")
    if base.get("files"):
        rows = "\n".join(f"| `{name}` | `{digest}` |" for name, digest in base["files"].items())
        lines.append(f"Files of the base (`orthoact verify` compares):\n\n| file | SHA-256 |\n|---|---|\n{rows}")
    return "\n\n".join(lines)


def picture(acts: dict[str, Activation]) -> bytes:
    """A PNG of the activations, of at most about 60 kB, and of their errors where all replace the same function."""
    ends = [abs(float(end)) for act in acts.values() for end in (act.lo, act.hi) if end.isfinite()]
    reach = min(1.5 * max([4.0, *ends]), 30.0)
    x = np.linspace(-reach, reach, 401)
    at = torch.tensor(x, dtype=torch.float32)
    curves = {}
    with torch.no_grad():
        for name, act in acts.items():
            if act.groups is None:
                curves[name] = act(at).double().numpy()
            else:  # one curve for the first of each group, at most eight
                channel = act.channel if act.channel is not None else -1
                wide = at[:, None].expand(-1, act.groups)
                wide = wide if channel in (-1, 1) else wide.T
                values = act(wide if channel in (-1, 1) else wide[None]).double().numpy()
                values = values.reshape(act.groups, -1).T if channel not in (-1, 1) else values
                curves |= {f"{name} [{g}]": values[:, g] for g in range(min(act.groups, 8))}
    targets = {act.target for act in acts.values()}
    try:
        wanted = get_target(targets.pop())(x)[0] if len(targets) == 1 else None
    except OrthoactError:  # a function that only the model has
        wanted = None
    opened = io.BytesIO()
    plot_curves(x, curves, wanted, opened)
    return opened.getvalue()
