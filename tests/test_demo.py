"""The demo model is what its card says."""

import json
import re

import pytest
import train_demo
from transformers import AutoModelForCausalLM, AutoTokenizer

from orthoact.convert.sources import demo_folder

CARD = (demo_folder() / "README.md").read_text()


def row(label):
    """The numbers of a table row of the card."""
    line = next(line for line in CARD.splitlines() if line.startswith(f"| {label} |"))
    return [float(cell.replace(",", "")) for cell in re.findall(r"[\d,]+\.?\d*", line.split("|", 2)[2])]


def test_it_is_small_and_ordinary():
    files = {p.name: p.stat().st_size for p in demo_folder().iterdir()}
    assert files["model.safetensors"] <= 6_000_000 and sum(files.values()) <= 6_500_000
    config = json.loads((demo_folder() / "config.json").read_text())
    assert config["activation_function"] == "gelu_new" and config["architectures"] == ["GPT2LMHeadModel"]
    assert "_name_or_path" not in config
    assert "license: apache-2.0" in CARD and "train_demo.py" in CARD


def test_its_held_out_perplexity_is_the_measured_one():
    model = AutoModelForCausalLM.from_pretrained(demo_folder()).eval()
    text = (demo_folder() / "heldout.txt").read_text()
    measured = train_demo.measure_model(model, AutoTokenizer.from_pretrained(demo_folder()), text)
    size, tokens, perplexity, bits = row("`heldout.txt`")
    assert (measured["bytes"], measured["tokens"]) == (size, tokens)
    assert measured["perplexity"] == pytest.approx(perplexity, abs=0.02)
    assert measured["bpb"] == pytest.approx(bits, abs=2e-4)


def test_it_beats_the_baselines_on_text_it_never_saw():
    ours = row("**this model**")
    for other in ("5-gram over tokens", "5-gram over bytes", "xz, after the training text", "xz, alone"):
        assert all(mine < theirs for mine, theirs in zip(ours, row(other), strict=True)), other
    assert ours[0] < 0.9 * row("5-gram over bytes")[0] and ours[0] < 0.9 * row("xz, after the training text")[0]
