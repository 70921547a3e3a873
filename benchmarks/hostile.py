"""Folders of somebody who means harm: every one is refused in one sentence, or loads as activations that compute.

Hypothesis damages the record, the config and the tensors of real converted folders, of transformers and adapters; what
comes out is read by the package, one in twenty also by transformers or PEFT. Memory is bounded by the operating system,
so that whoever would allocate what a record asks for fails.

    python benchmarks/hostile.py            # 10,000 cases: minutes; writes benchmarks/hostile.md
"""

from __future__ import annotations

import copy
import json
import math
import re
import resource
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers as tf
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

import orthoact
from orthoact.convert.checkpoint import save
from orthoact.convert.folder import read_activations
from orthoact.convert.names import CONFIG, WEIGHTS
from orthoact.convert.sources import Source

CASES = 10_000
MEMORY = 2**29
"""Bytes of address space that all cases together may add."""
SECONDS = 5.0
"""The longest that one case may take."""
WHOLE = 20
"""One case in so many is loaded by the libraries themselves."""


def base() -> Any:
    torch.manual_seed(0)
    config = tf.GPT2Config(
        n_embd=16, n_layer=3, n_head=2, n_positions=32, vocab_size=64, bos_token_id=1, eos_token_id=2
    )
    return tf.GPT2LMHeadModel(config).eval()


class Folders:
    """Whole folders, as they are before they are damaged."""

    def __init__(self, root: Path):
        self.root = root
        self.whole: dict[str, tuple[str, str, dict[str, Any], dict[str, np.ndarray]]] = {}
        base().save_pretrained(root / "base")
        for form, config, weights in (("full", "config.json", "model.safetensors"), ("adapter", CONFIG, WEIGHTS)):
            model = base()
            orthoact.convert_(model, family="rational" if form == "full" else "hermite", degree=4, groups=2)
            source = Source(model, "base", "transformers", root / "base")
            save(model, root / form, source=source, form=form)
            text, tensors = (root / form / config).read_text(), load_file(root / form / weights)
            self.whole[form] = (config, weights, json.loads(text), tensors)

    def write(self, form: str, config: str, tensors: dict[str, np.ndarray] | bytes) -> Path:
        folder = self.root / form
        name, weights, *_ = self.whole[form]
        (folder / name).write_text(config, encoding="utf-8", errors="surrogatepass")
        if isinstance(tensors, bytes):
            (folder / weights).write_bytes(tensors)
        else:
            save_file(tensors, folder / weights, {"format": "pt"})
        return folder


# -- damage ------------------------------------------------------------------------------------------------------------

NAMES = ["../../../etc/passwd", "/etc/passwd", "transformer.h.0.mlp.act", "h.0.mlp.act", "transformer", "lm_head", ""]
NAMES += [
    "transformer.h.0..mlp",
    "__class__",
    "transformer.h.9.mlp.act",
    "a" * 400,
    "transformer.h.0.mlp.act\n",
    "é.\x00",
]
WORDS = [*orthoact.FAMILIES, "gelu", "linear", "none", "gaussian", "measured", "orthoact", "splines", *NAMES]
NUMBERS = [0, -1, 1, 2, 24, 25, 64, 10**6, 2**27, 2**31, 2**63, 10**400, 0.0, -0.0, 1e-300, 1e300, -1e30, 0.5]
NUMBERS += [math.nan, math.inf, -math.inf]
scalars = st.one_of(st.none(), st.booleans(), st.sampled_from(NUMBERS), st.sampled_from(WORDS), st.text(max_size=5))
nested = st.recursive(
    scalars,
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.sampled_from(WORDS), inner, max_size=3)),
    max_leaves=6,
)
values = st.one_of(st.sampled_from(NUMBERS), st.sampled_from(WORDS), scalars, nested)
rarely = st.sampled_from([False] * 9 + [True])
KEYS = ["family", "degree", "tails", "groups", "channel", "target", "domain", "derivative_weight", "shared"]
TOP = ["format", "version", "sites", "activations", "fusion_sentinel", "shapes", "base", "made"]


@st.composite
def damage(draw, record: dict[str, Any]) -> dict[str, Any]:
    """A record, one to three of its values replaced, removed, or moved to another name."""
    record = copy.deepcopy(record)
    for _ in range(draw(st.integers(1, 3))):
        sites = record.get("sites")
        names = list(sites) if isinstance(sites, dict) and sites else []
        kind = draw(st.sampled_from(["value", "value", "value", "lost", "top", "name", "twin", "share", "many", "law"]))
        if kind == "top" or not names:
            record[draw(st.sampled_from(TOP))] = draw(values)
            continue
        name = draw(st.sampled_from(names))
        entry = sites[name]
        if kind == "name":
            sites[draw(st.sampled_from(NAMES))] = sites.pop(name)
        elif kind == "twin":
            sites[draw(st.sampled_from(NAMES))] = copy.deepcopy(entry)
        elif kind == "many":
            sites |= {f"{name}.{i}": entry for i in range(draw(st.sampled_from([3, 300])))}
        elif not isinstance(entry, dict):
            sites[name] = draw(values)
        elif kind == "lost":
            entry.pop(draw(st.sampled_from(KEYS)), None)
        elif kind == "share":
            entry["shared"] = draw(st.sampled_from([*names, *NAMES]))
        elif kind == "law" and isinstance(entry.get("domain"), dict):
            entry["domain"][draw(st.sampled_from(["kind", "mean", "std", "low", "count", "above", "x"]))] = draw(values)
        else:
            entry[draw(st.sampled_from(KEYS))] = draw(values)
    return record


@st.composite
def damaged_tensors(draw, tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray] | bytes:
    """The tensors of a folder: one of another type, shape or size, lost, not finite; or a file with a broken header."""
    held = dict(tensors)
    name = draw(st.sampled_from([k for k in held if ".act." in k or "orthoact_act" in k]))
    value = held[name]
    kind = draw(st.sampled_from(["none", "none", "dtype", "shape", "nan", "lost", "value", "header"]))
    if kind == "dtype":
        held[name] = value.astype(draw(st.sampled_from([np.float16, np.float64, np.int32, np.int8, np.bool_])))
    elif kind == "shape":
        shape = draw(st.sampled_from([(0,), (*value.shape, 1), (1, *value.shape), (value.size + 1,), (4096, 64)]))
        held[name] = np.zeros(shape, np.float32)
    elif kind in ("nan", "value"):
        held[name] = value.copy()
        bad = [np.nan, np.inf, -np.inf] if kind == "nan" else [0.0, -1.0, 1e38, -1e38, 1e-38]
        held[name].flat[draw(st.integers(0, value.size - 1))] = draw(st.sampled_from(bad))
    elif kind == "lost":
        del held[name]
    elif kind == "header":
        size = draw(st.sampled_from([0, 7, 10**10, 2**63, 2**64 - 1]))
        return size.to_bytes(8, "little") + draw(st.binary(max_size=64))
    return held


@st.composite
def cases(draw, folders: Folders):
    form = draw(st.sampled_from(sorted(folders.whole)))
    _, _, config, tensors = folders.whole[form]
    config = copy.deepcopy(config)
    if not draw(rarely):  # the tensors alone
        config["orthoact"] = draw(damage(config["orthoact"]))
    if draw(rarely):
        config["orthoact"] = draw(values)
    if draw(rarely):
        config["base_model_name_or_path"] = draw(st.sampled_from(["adapter", ".", "..", *NAMES]))
    text = json.dumps(config)
    if draw(rarely):  # not JSON at all, or a name twice
        text = draw(
            st.sampled_from([text[: len(text) // 2], "[" * 100_000, text.replace('"sites"', '"format"'), "1", ""])
        )
    held = draw(damaged_tensors(tensors)) if draw(st.booleans()) else tensors
    return form, text, held


# -- what must hold ----------------------------------------------------------------------------------------------------


def sentence(error: Exception) -> str:
    """The message of a refusal: one line, of a length that can be read, and of this package."""
    assert isinstance(error, orthoact.OrthoactError), f"{type(error).__name__}: {error}"
    text = str(error)
    assert text and "\n" not in text and len(text) < 1500, text[:2000]
    assert text.isprintable(), repr(text)
    return text


def refused_or_sound(folder: Path) -> str:
    """What reading a folder ends in: `sound`, or the sentence that refuses it."""
    try:
        acts = read_activations(folder)
    except Exception as error:
        return sentence(error)
    x = torch.linspace(-50, 50, 64)
    for act in acts.values():
        with torch.no_grad():
            out = act(
                x
                if act.groups is None
                else x.reshape(*[1] * 8, -1)
                .movedim(-1, act.channel)
                .expand_as(x.reshape(*[1] * 8, -1).movedim(-1, act.channel))
            )
        assert out.isfinite().all(), "an activation that was let through does not compute"
    return "sound"


def load_whole(folder: Path) -> str:
    """The same folder through transformers, or through PEFT by its base."""
    try:
        if folder.name == "adapter":
            model = orthoact.load(str(folder))
        else:
            model = tf.AutoModelForCausalLM.from_pretrained(folder)
    except orthoact.OrthoactError as error:
        return sentence(error)
    except Exception as error:  # the library's own refusal, in the library's words
        if isinstance(error, MemoryError | AttributeError):
            raise
        return f"{type(error).__name__}"
    with torch.no_grad():
        assert model(input_ids=torch.arange(3, 9)[None]).logits.isfinite().all()
    return "sound"


def run(root: Path, count: int, start: int = 0, whole: int = WHOLE) -> Counter[str]:
    """Check `count` cases; returns how many ended in which way. Raises where one holds what it must not."""
    folders, ways, slowest = Folders(root), Counter(), [0.0]
    done, failed, sentences = [0], {}, Counter()

    @seed(start)
    @settings(
        max_examples=count,
        deadline=None,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(cases(folders))
    def check(case):
        form, text, tensors = case
        folder, began = folders.write(form, text, tensors), time.perf_counter()
        done[0] += 1
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                end = refused_or_sound(folder)
                if whole and done[0] % whole == 0:
                    ways["loaded whole: " + ("sound" if load_whole(folder) == "sound" else "refused")] += 1
        except Exception as error:  # all of them are told at the end
            place = traceback.extract_tb(error.__traceback__)[-1]
            where = f"{Path(place.filename).name}:{place.lineno} {type(error).__name__}: {str(error)[:200]}"
            failed.setdefault(where[:80], (where, form, text[:100_000]))
            return
        took = time.perf_counter() - began
        if took > SECONDS:
            failed.setdefault("time", (f"{took:.1f} s", form, text[:100_000]))
        slowest[0] = max(slowest[0], took)
        ways["sound" if end == "sound" else "refused"] += 1
        sentences[re.sub(r"[\d'][^\s:]*|/\S+", "#", end)[:90]] += 1

    tf.logging.set_verbosity_error()
    tf.utils.logging.disable_progress_bar()
    check()
    if failed:
        (root / "failed.json").write_text(json.dumps(failed))
        raise AssertionError("\n".join(where for where, *_ in failed.values()))
    ways["different sentences"] = len(sentences)
    if "-v" in sys.argv:
        print(*(f"{n:6d} {text}" for text, n in sentences.most_common()), sep="\n")
    ways["slowest case, ms"] = round(1000 * slowest[0])
    return ways


def bounded(most: int = MEMORY) -> None:
    """From here on the process may take so many bytes of address space more."""
    with open("/proc/self/statm") as opened:
        held = int(opened.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (held + most, resource.RLIM_INFINITY))


def main() -> None:
    count = next((int(a) for a in sys.argv[1:] if a.isdigit()), CASES)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        run(Path(name) / "warm", 40)  # what is imported on the way is not the cases' memory
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        bounded()
        began = time.perf_counter()
        ways = run(Path(name) / "all", count)
        seconds = time.perf_counter() - began
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    rows = [*sorted(ways.items()), ("seconds", round(seconds)), ("resident memory grew by, MB", round(grown))]
    lines = ["| hostile folders | |", "|---|---|", f"| cases | {count} |", *(f"| {k} | {v} |" for k, v in rows)]
    text = "\n".join(lines) + f"\n\nAddress space was limited to {MEMORY // 2**20} MB more than at the start.\n"
    print(text)
    if count >= CASES:
        Path(__file__).with_suffix(".md").write_text(text)


if __name__ == "__main__":
    main()
