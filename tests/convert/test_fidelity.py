"""Fidelity is measured right: against computations done the long way, on every kind of data."""

import json
import math

import datasets
import numpy as np
import pytest
import tiny_models as tiny
import torch
import torch.nn.functional as F
from PIL import Image

import orthoact
from orthoact import OrthoactError
from orthoact.convert.checkpoint import save
from orthoact.convert.data import batches
from orthoact.convert.fidelity import evaluate
from orthoact.convert.sources import load_source


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    source = load_source("demo")
    orthoact.convert_(source.model, degree=4)
    return load_source(str(save(source.model, tmp_path_factory.mktemp("demo") / "out", source=source)))


def test_a_causal_model_the_long_way(demo, tmp_path):
    from transformers import AutoTokenizer

    text = (demo.folder / "tokenizer_config.json").parent  # the tokenizer was carried along
    tokenizer = AutoTokenizer.from_pretrained(text)
    (tmp_path / "t.txt").write_text("It is a truth universally acknowledged. " * 40)
    ids = tokenizer((tmp_path / "t.txt").read_text(), return_tensors="pt").input_ids[0, :300]
    length = demo.model.config.n_positions
    kl, agree, base_loss, loss, n, labels = 0.0, 0, 0.0, 0.0, 0, 0
    with torch.no_grad():
        for start in range(0, 300, length):
            part = ids[None, start : start + length]
            if part.shape[1] < 2:
                continue
            new = demo.model(part).logits[0].double().log_softmax(-1)
            with orthoact.original(demo.model):
                old = demo.model(part).logits[0].double().log_softmax(-1)
            kl += float(F.kl_div(new, old, log_target=True, reduction="sum"))
            agree += int((new.argmax(-1) == old.argmax(-1)).sum())
            base_loss += float(F.nll_loss(old[:-1], part[0, 1:], reduction="sum"))
            loss += float(F.nll_loss(new[:-1], part[0, 1:], reduction="sum"))
            n, labels = n + part.shape[1], labels + part.shape[1] - 1
    result = evaluate(demo, data=tmp_path / "t.txt", limit=300)
    assert result["data"] == "file" and result["tokens"] == n
    assert result["kl"] == pytest.approx(kl / n, rel=1e-4) and result["top1_agreement"] == agree / n
    assert result["loss_base"] == pytest.approx(base_loss / labels, rel=1e-6)
    assert result["perplexity"] == pytest.approx(math.exp(loss / labels), rel=1e-6)
    assert result["change"] == pytest.approx(100 * (result["perplexity"] / result["perplexity_base"] - 1), rel=1e-6)


def test_an_exact_copy_measures_zero(tmp_path):
    model = tiny.hf("llama-relu")
    model.save_pretrained(tmp_path / "base")
    source = load_source(str(tmp_path / "base"))
    orthoact.convert_(source.model)
    result = evaluate(source)
    assert result["data"] == "probe" and abs(result["kl"]) < 1e-9 and result["top1_agreement"] == 1.0


def test_the_demo_text_is_used_for_the_demo_only(demo, tmp_path):
    assert evaluate(demo, limit=50)["data"] == "demo"
    tiny.hf("gpt2").save_pretrained(tmp_path / "other")
    source = load_source(str(tmp_path / "other"))
    orthoact.convert_(source.model)
    result = evaluate(source)
    assert result["data"] == "probe" and "perplexity" not in result, "a probe batch has no labels"


@pytest.mark.parametrize("name", tiny.HF)
def test_every_model_can_be_probed(name, tmp_path):
    tiny.hf(name).save_pretrained(tmp_path / name)
    source = load_source(str(tmp_path / name))
    orthoact.convert_(source.model, degree=12)
    result = evaluate(source)
    assert result["data"] == "probe"
    assert ("kl" in result) != ("cosine_mean" in result)
    assert result.get("kl", 0.0) < 1e-2 and result.get("cosine_mean", 1.0) > 0.999
    assert evaluate(source) == result, "seeded"


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    generator = np.random.default_rng(0)
    for label in ("a", "b", "c", "d"):
        (folder / label).mkdir()
        for i in range(3):
            pixels = generator.integers(0, 255, (40, 40, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / label / f"{i}.png")
    return folder


def test_images_through_transformers(images, tmp_path):
    model = tiny.hf("vit")
    model.save_pretrained(tmp_path / "vit")
    processor = {"image_processor_type": "ViTImageProcessor", "size": {"height": 32, "width": 32}}
    (tmp_path / "vit" / "preprocessor_config.json").write_text(json.dumps(processor))
    source = load_source(str(tmp_path / "vit"))
    orthoact.convert_(source.model)
    result = evaluate(source, data=images, batch_size=5)
    assert result["images"] == 12 and result["data"] == "file"
    assert {"loss", "kl", "top1_agreement"} <= set(result), "four folders fit the four classes of the head"
    assert evaluate(source, data=images, limit=7)["images"] == 7


def test_images_through_timm(images, tmp_path):
    for name, expected in (("vit", "kl"), ("vit-headless", "cosine_mean")):
        source = load_source(str(save(tiny.timm_model(name), tmp_path / name)))
        orthoact.convert_(source.model)
        result = evaluate(source, data=images)
        assert result["images"] == 12 and expected in result and result["cosine_mean"] > 0.99


def test_texts_from_every_format(demo, tmp_path):
    rows = {"text": ["The first text.", "The second, which is longer than the first."], "label": [0, 1]}
    made = datasets.Dataset.from_dict(rows)
    made.save_to_disk(str(tmp_path / "saved"))
    datasets.DatasetDict({"train": made.select([0]), "test": made}).save_to_disk(str(tmp_path / "splits"))
    made.to_csv(str(tmp_path / "t.csv"), index=False)
    made.to_json(str(tmp_path / "t.jsonl"))
    counts = {evaluate(demo, data=tmp_path / name)["tokens"] for name in ("saved", "splits", "t.csv", "t.jsonl")}
    assert len(counts) == 1 and counts.pop() > 10


def test_masked_and_classifying_models(tmp_path):
    for name in ("bert-masked", "bert-classifier"):
        folder = tmp_path / name
        tiny.hf(name).save_pretrained(folder)
        words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(chr(i) for i in range(97, 123)), *map(str, range(60))]
        from transformers import BertTokenizerFast

        BertTokenizerFast(vocab={word: i for i, word in enumerate(words)}).save_pretrained(folder)
        datasets.Dataset.from_dict({"text": ["a b c d e f g", "h i j"] * 4, "label": [0, 1] * 4}).save_to_disk(
            str(folder / "d")
        )
        source = load_source(str(folder))
        orthoact.convert_(source.model, degree=12)
        result = evaluate(source, data=folder / "d", batch_size=3)
        assert result["texts"] == 8 and result["kl"] < 1e-2
        assert ("perplexity" in result) == (name == "bert-masked") and result["loss"] == pytest.approx(
            result["loss_base"], rel=0.02
        )
        assert evaluate(source, data=folder / "d", batch_size=3) == result


def test_a_folder_without_a_tokenizer_is_probed_and_text_refused(tmp_path):
    tiny.hf("gpt2").save_pretrained(tmp_path / "bare")
    source = load_source(str(tmp_path / "bare"))
    orthoact.convert_(source.model)
    assert evaluate(source)["data"] == "probe"
    (tmp_path / "t.txt").write_text("Some words.")
    with pytest.raises(OrthoactError, match="holds no tokenizer"):
        evaluate(source, data=tmp_path / "t.txt")


def test_wrong_kinds_of_data(demo, images, tmp_path):
    with pytest.raises(OrthoactError, match="expected a column of text"):
        evaluate(demo, data=images)
    (tmp_path / "x.xyz").write_text("?")
    with pytest.raises(OrthoactError, match=r"expected \.txt"):
        evaluate(demo, data=tmp_path / "x.xyz")
    with pytest.raises(OrthoactError, match="batch-size"):
        batches(demo, None, size=0)


def test_broken_outputs_are_an_error(demo):
    import copy
    from dataclasses import replace

    broken = replace(demo, model=copy.deepcopy(demo.model))
    with torch.no_grad():
        broken.model.transformer.h[0].mlp.act.theta[0] = float("nan")
    with pytest.raises(OrthoactError, match="NaN"):
        evaluate(broken, limit=50)
