"""Models too large for memory: planned on the meta device, written as adapters, or shard by shard."""

import json
import subprocess
import sys

import pytest
import tiny_models as tiny
import torch
import transformers as tf
from click.testing import CliRunner

import orthoact
from orthoact import Activation, OrthoactError
from orthoact.cli import main
from orthoact.convert import shards, sources
from orthoact.convert.checkpoint import save
from orthoact.convert.sources import load_source

LARGE = {
    "llama-70b": tf.LlamaConfig(
        hidden_size=8192,
        intermediate_size=28672,
        num_hidden_layers=80,
        num_attention_heads=64,
        num_key_value_heads=8,
        vocab_size=128256,
        architectures=["LlamaForCausalLM"],
    ),
    "mixtral-8x22b": tf.MixtralConfig(
        hidden_size=6144,
        intermediate_size=16384,
        num_hidden_layers=56,
        num_attention_heads=48,
        num_key_value_heads=8,
        architectures=["MixtralForCausalLM"],
    ),
}


PEAK = "print(next(line.split()[1] for line in open('/proc/self/status') if line.startswith('VmHWM')))"
"""Kilobytes of this process alone: getrusage counts those of the process that started it."""


def folder_of(config, folder, size=140 * 2**30):
    """A checkpoint of which only the config and the size are there: the file has no content on the disk."""
    config.save_pretrained(folder)
    with open(folder / "model-00001-of-00001.safetensors", "wb") as file:
        file.truncate(size)
    index = {"weight_map": {"lm_head.weight": "model-00001-of-00001.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


@pytest.mark.parametrize("name", LARGE)
def test_a_large_model_is_planned_and_adapted_without_its_weights(name, tmp_path):
    folder = folder_of(LARGE[name], tmp_path / name)
    limit = 3 * 2**30 // 2
    for options in (["--dry-run"], ["--adapter", "-o", str(tmp_path / "adapter")]):
        code = "import sys; from orthoact.cli import main; main(sys.argv[1:], standalone_mode=False); "
        code += PEAK
        command = [sys.executable, "-W", "ignore", "-c", code, "convert", str(folder), "--json", *options]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=tmp_path)
        assert done.returncode == 0, done.stderr[-2000:]
        report, used = done.stdout.splitlines()
        assert int(used) * 1024 < limit, f"{int(used) / 2**20:.2f} GiB"
        report = json.loads(report)
        assert len(report["sites"]) == LARGE[name].num_hidden_layers and report["left"] == []
    assert (tmp_path / "adapter" / "adapter_model.safetensors").stat().st_size < 200_000


@pytest.mark.parametrize("name", ["gpt2", "llama-silu", "t5-gated", "bert-masked"])
@pytest.mark.parametrize("sharded", [True, False])
def test_shard_by_shard_is_the_same_checkpoint(name, sharded, tmp_path, monkeypatch):
    model = tiny.hf(name)
    model.save_pretrained(tmp_path / "base", max_shard_size="20kB" if sharded else "1GB")
    source = load_source(str(tmp_path / "base"), most=0)
    assert source.planned and not source.converted
    orthoact.convert_(source.model, degree=6)
    save(source.model, tmp_path / "out", source=source)
    orthoact.convert_(model, degree=6)
    loaded, info = type(model).from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert torch.equal(tiny.outputs(loaded), tiny.outputs(model))
    assert sum(isinstance(m, Activation) for m in loaded.modules()) == tiny.HF[name][1]
    for path in (tmp_path / "base").glob("*.safetensors"):
        copies = [p for p in (tmp_path / "out").glob("*.safetensors") if p.read_bytes() == path.read_bytes()]
        assert copies and not any(p.samefile(path) for p in copies), "a copy, so that nothing can change the base"


def test_the_command_line_writes_what_does_not_fit_shard_by_shard(tmp_path, monkeypatch):
    model = tiny.hf("gpt2")
    model.save_pretrained(tmp_path / "base", max_shard_size="20kB")
    monkeypatch.setattr(shards, "memory", lambda: 0)
    done = CliRunner().invoke(main, ["convert", str(tmp_path / "base"), "-o", str(tmp_path / "out"), "--json"])
    assert done.exit_code == 0, done.output
    assert (tmp_path / "out" / shards.ADDED).is_file()
    orthoact.convert_(model)
    assert torch.equal(tiny.outputs(orthoact.load(tmp_path / "out")), tiny.outputs(model))


def test_what_cannot_be_copied_is_refused(tmp_path):
    model = tiny.hf("gpt2")
    model.save_pretrained(tmp_path / "base")
    (tmp_path / "base" / "model.safetensors").rename(tmp_path / "base" / "pytorch_model.bin")
    source = load_source(str(tmp_path / "base"), most=0)
    orthoact.convert_(source.model)
    with pytest.raises(OrthoactError, match="no safetensors"):
        save(source.model, tmp_path / "out", source=source)
    assert not (tmp_path / "out").exists()


def test_the_size_decides_what_is_loaded(tmp_path):
    tiny.hf("gpt2").save_pretrained(tmp_path)
    size = sources.weight_bytes(tmp_path)
    assert size > 0
    assert not load_source(str(tmp_path), most=size).planned
    assert load_source(str(tmp_path), most=size - 1).planned
    assert not load_source(str(tmp_path)).planned


def test_inspect_says_the_same_on_the_meta_device(tmp_path):
    for name in ("gpt2", "bert-masked", "convnext", "t5-gated", "vit"):
        tiny.hf(name).save_pretrained(tmp_path / name)
        both = [orthoact.inspect_model(load_source(str(tmp_path / name), most=most).model) for most in (None, 0)]
        sites = [[(s.name, s.target.name, s.channel, s.width) for s in found] for found, _ in both]
        assert sites[0] == sites[1] and both[0][1] == both[1][1], name
