"""Data: the right rows in the right splits, packed, padded, prepared; what does not fit is told before training."""

import json
from dataclasses import replace

import numpy as np
import pytest
import tiny_training as tiny
import torch
from PIL import Image

from orthoact import OrthoactError
from orthoact.convert.data import rgb
from orthoact.convert.sources import load_source
from orthoact.finetune.data import digest, make_examples, read_rows
from orthoact.finetune.examples import IGNORED, Stream
from orthoact.finetune.recipe import Recipe, read
from orthoact.finetune.sections import Data


def language(**data):
    return replace(read("demo-smoke"), data=Data(**data))


def sentences(path, **data):
    return Recipe(task="sequence-classification", data=Data(path=str(path), **data))


def test_a_text_is_cut_into_three_in_order(tmp_path):
    lines = [f"line number {i} of a text that is long enough\n" for i in range(400)]
    (tmp_path / "a.txt").write_text("".join(lines))
    rows = read_rows(language(path=str(tmp_path / "a.txt"), holdout=0.2))
    parts = ["".join(part) for part in (rows.train, rows.validation, rows.test)]
    assert "".join(parts) == "".join(lines), "nothing is lost, nothing is in two splits"
    sizes = [len(part) / len("".join(lines)) for part in parts]
    assert sizes == pytest.approx([0.6, 0.2, 0.2], abs=0.01)


def test_windows_hold_every_token_once():
    recipe = language(path="demo", length=32)
    source = load_source("demo")
    rows = read_rows(recipe)
    examples = make_examples(rows, source, recipe)
    from transformers import AutoTokenizer

    ids = AutoTokenizer.from_pretrained(source.folder)("".join(rows.test), add_special_tokens=False)["input_ids"]
    labels = torch.cat([w["labels"] for w in examples.test])
    assert labels[labels != IGNORED].tolist() == ids[1:], "every token but the first is predicted once"
    first = examples.train[0]
    assert torch.equal(first["input_ids"][1:], first["labels"][:-1]), "a label is the next token"
    stream = Stream(examples.train, 100, seed=3)
    assert all((item["labels"] != IGNORED).all() for item in stream), "no filling in training"


def test_the_order_is_a_function_of_seed_and_place():
    recipe = language(path="demo", length=32)
    examples = make_examples(read_rows(recipe), load_source("demo"), recipe)
    a, b, c = (Stream(examples.train, 120, seed) for seed in (0, 0, 1))
    items = [a[i]["input_ids"] for i in range(120)]
    assert all(torch.equal(b[i]["input_ids"], items[i]) for i in (119, 3, 70)), "in any order of asking"
    assert not all(torch.equal(c[i]["input_ids"], items[i]) for i in range(10))
    n = len(examples.train)
    assert sorted(Stream(range_split(n), n, 0)[i] for i in range(n)) == list(range(n)), "an epoch is a permutation"


def range_split(n):
    class Split(list):
        def trained(self, i, epoch, seed):
            return self[i]

    return Split(range(n))


def test_documents_begin_with_the_end_of_text(tmp_path):
    (tmp_path / "train.jsonl").write_text(
        "".join(json.dumps({"text": f"Emma was here. {i}"}) + "\n" for i in range(60))
    )
    recipe = language(path=str(tmp_path), eos=True, length=16)
    source = load_source("demo")
    examples = make_examples(read_rows(recipe), source, recipe)
    eos = source.model.config.eos_token_id
    assert (examples.train.ids == eos).sum() == 48, "one a document of the training split, a tenth each is held out"


@pytest.mark.parametrize("kind", ["csv", "jsonl", "folder", "saved"])
def test_classified_texts_of_every_form(kind, tmp_path):
    rows = [{"text": f"{'good' if i % 2 else 'bad'} {i}", "label": "yes" if i % 2 else "no"} for i in range(40)]
    path = tmp_path / f"d.{kind}" if kind in ("csv", "jsonl") else tmp_path
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    if kind == "csv":
        path.write_text("text,label\n" + "".join(f"{r['text']},{r['label']}\n" for r in rows))
    elif kind == "jsonl":
        path.write_text(lines)
    elif kind == "folder":
        (path / "train.jsonl").write_text(lines)
        (path / "validation.jsonl").write_text(lines[: lines.index("\n") + 1] * 3)
    else:
        import datasets

        datasets.Dataset.from_list(rows).save_to_disk(str(path))
    found = read_rows(sentences(path))
    assert found.labels == ("no", "yes")
    assert len(found.validation) == (3 if kind == "folder" else 4)
    assert all(number == int("good" in text) for text, number in (found.train[i] for i in range(len(found.train))))
    texts = [split[i][0] for split in (found.train, found.test) for i in range(len(split))]
    assert len(texts) == len(set(texts)), "no row is in two splits"


def test_the_seed_draws_training_rows_and_no_others(tmp_path):
    path = tmp_path / "d.csv"
    path.write_text("text,label\n" + "".join(f"t{i},{i % 2}\n" for i in range(60)))
    a, b = (read_rows(replace(sentences(path, train_limit=20), seed=seed)) for seed in (0, 1))
    texts = lambda split: [split[i][0] for i in range(len(split))]  # noqa: E731
    assert texts(a.train) != texts(b.train) and len(a.train) == 20
    assert texts(a.validation) == texts(b.validation) and texts(a.test) == texts(b.test)


def images(folder, count=12, names=("cat", "dog")):
    for i in range(count):
        path = folder / names[i % len(names)] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.random.default_rng(i).integers(0, 255, (40, 40, 3), dtype=np.uint8)).save(path)
    return folder


@pytest.mark.parametrize("size", [None, 32])
def test_augmentation_is_for_training_alone(size, tmp_path):
    model = tiny.vit_folder(tmp_path / "model")
    recipe = Recipe(
        model=str(model), task="image-classification", data=Data(path=str(images(tmp_path / "d")), size=size)
    )
    rows, source = read_rows(recipe), load_source(str(model))
    examples = make_examples(rows, source, recipe)
    shape = examples.train[0]["x"].shape
    assert shape == (3, 32, 32)
    assert not torch.equal(examples.train.trained(0, 0, 1)["x"], examples.train[0]["x"])
    assert torch.equal(examples.train.trained(0, 0, 1)["x"], examples.train.trained(0, 5, 1)["x"]), "by its seed alone"
    for split in (examples.validation, examples.test):
        assert torch.equal(split.trained(0, 0, 1)["x"], split[0]["x"])
    plain = make_examples(rows, source, replace(recipe, data=replace(recipe.data, augment=False)))
    assert torch.equal(plain.train.trained(0, 0, 1)["x"], plain.train[0]["x"])


def bad_column(tmp_path):
    (tmp_path / "d.csv").write_text("body,label\nx,0\ny,1\n" * 10)
    return sentences(tmp_path / "d.csv"), r"data\.text: .* has no column 'text' in train, it has body, label"


def bad_label_column(tmp_path):
    (tmp_path / "d.csv").write_text("text,kind\n" + "x,0\ny,1\n" * 10)
    return sentences(tmp_path / "d.csv"), r"data\.label: .* has no column 'label' in train, it has text, kind"


def unlabelled(tmp_path):
    (tmp_path / "train.csv").write_text("text,label\n" + "x,0\ny,1\n" * 10)
    (tmp_path / "test.csv").write_text("text,label\n" + "x,-1\ny,-1\n")
    return sentences(tmp_path), r"data\.test: the label -1 of 2 rows is none of the 2 classes"


def real_labels(tmp_path):
    (tmp_path / "d.csv").write_text("text,label\n" + "x,0.5\ny,1.5\n" * 10)
    return sentences(tmp_path / "d.csv"), r"data\.label: expected whole numbers or names .* row 1 has 0\.5"


def of_rows(tmp_path, *rows):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"text": text, "label": label}) + "\n" for text, label in rows))
    return sentences(path)


def no_text(tmp_path):
    return of_rows(tmp_path, *[("x", 0), ("y", 1)] * 9, (None, 0)), r"data\.text: .* of train, row 19 has None"


def no_label(tmp_path):
    return of_rows(tmp_path, *[("x", 0), ("y", 1)] * 9, ("x", None)), r"data\.label: row 19 of .* has no label"


def lists_of_labels(tmp_path):
    return of_rows(tmp_path, *[("x", [0]), ("y", [1])] * 9), r"data\.label: .* row 1 has \[0\]"


def one_class(tmp_path):
    return of_rows(tmp_path, *[("x", 1)] * 20), r"data\.label: all rows of train have the label 1; expected two"


def negative_labels(tmp_path):
    return of_rows(tmp_path, *[("x", -1), ("y", 1)] * 9), r"data\.label: expected whole numbers from 0, .* has -1"


def too_few_rows(tmp_path):
    return of_rows(tmp_path, ("x", 0), ("y", 1)), r"data\.holdout: a share of 0\.1 .* leaves none for validation"


def numbers_for_text(tmp_path):
    (tmp_path / "d.csv").write_text("text\n" + "1\n" * 30)
    return language(path=str(tmp_path / "d.csv")), r"data\.text: expected text in column 'text' of train, row 1 has 1"


def paths_of_images(tmp_path):
    (tmp_path / "d.csv").write_text("image,label\n" + "a.png,0\nb.png,1\n" * 10)
    recipe = Recipe(task="image-classification", data=Data(path=str(tmp_path / "d.csv")))
    return recipe, r"data\.image: column 'image' .* holds 'a\.png', no images"


def empty_split(tmp_path):
    (tmp_path / "train.csv").write_text("text,label\n" + "x,0\ny,1\n" * 10)
    (tmp_path / "validation.csv").write_text("text,label\n")
    return sentences(tmp_path), r"data\.validation: the split 'validation' of .* is empty"


def empty_text(tmp_path):
    (tmp_path / "a.txt").write_text(" \n \n")
    return language(path=str(tmp_path / "a.txt")), r"data\.train: the split 'train' of .* holds no text"


def unknown_split(tmp_path):
    (tmp_path / "d.csv").write_text("text,label\n" + "x,0\ny,1\n" * 10)
    return sentences(tmp_path / "d.csv", test="exam"), r"data\.test: .* has no split 'exam', it has train"


def no_file(tmp_path):
    return sentences(tmp_path / "none.csv"), r"data\.path: there is no file or folder .*none\.csv"


def not_on_the_hub(tmp_path):
    return sentences("nobody/nothing"), r"data\.path: nobody/nothing is no file .* --offline"


CASES = (
    *(bad_column, bad_label_column, unlabelled, real_labels),
    *(no_text, no_label, lists_of_labels, one_class, negative_labels, too_few_rows, numbers_for_text, paths_of_images),
    *(empty_split, empty_text, unknown_split, no_file, not_on_the_hub),
)


@pytest.mark.parametrize("case", CASES)
def test_what_does_not_fit_is_told_in_one_sentence(case, tmp_path):
    recipe, said = case(tmp_path)
    with pytest.raises(OrthoactError, match=said) as error:
        read_rows(recipe)
    assert "\n" not in str(error.value)


def test_a_text_too_short_for_a_window(tmp_path):
    (tmp_path / "a.txt").write_text("Emma was here.\n" * 6)
    short = language(path=str(tmp_path / "a.txt"), length=200)
    with pytest.raises(OrthoactError, match=r"data\.length: a window of 200 tokens is longer than the \d+ tokens of"):
        make_examples(read_rows(short), load_source("demo"), short)
    long = language(path="demo", length=300)
    with pytest.raises(OrthoactError, match=r"data\.length: demo takes at most 256 tokens, got 300"):
        make_examples(read_rows(long), load_source("demo"), long)


def test_classes_by_true_and_false(tmp_path):
    rows = read_rows(of_rows(tmp_path, *[("x", True), ("y", False)] * 20))
    assert rows.labels == ("false", "true") and {type(n) for n in rows.train.numbers} == {int}
    assert all((text == "x") == number for text, number in (rows.train[i] for i in range(len(rows.train))))


def test_a_rare_class_is_one_wherever_it_falls(tmp_path):
    rows = read_rows(of_rows(tmp_path, *[("x", "a"), ("y", "b")] * 20, *[(str(i), f"rare{i}") for i in range(9)]))
    assert len(rows.labels) == 11


def test_data_that_changed_are_read_again(tmp_path):
    recipe = of_rows(tmp_path, *[("x", 0), ("y", 1)] * 20)
    before = len(read_rows(recipe).train)
    assert len(read_rows(of_rows(tmp_path, *[("x", 0), ("y", 1)] * 30)).train) > before


def test_one_long_line_is_cut_between_words(tmp_path):
    (tmp_path / "a.txt").write_text(" ".join(f"word{i}" for i in range(1000)))
    found = read_rows(language(path=str(tmp_path / "a.txt")))
    parts = ["".join(part) for part in (found.train, found.validation, found.test)]
    assert "".join(parts) == (tmp_path / "a.txt").read_text()
    assert [round(len(part) / 7890, 1) for part in parts] == [0.8, 0.1, 0.1]


def test_text_in_utf_16(tmp_path):
    (tmp_path / "a.txt").write_bytes(("Für Elise\n" * 40).encode("utf-16"))
    assert set("".join(read_rows(language(path=str(tmp_path / "a.txt"))).train).splitlines()) == {"Für Elise"}


def test_images_of_sixteen_bits_keep_their_levels():
    levels = np.linspace(0, 65535, 256).round().astype(np.uint16).reshape(16, 16)
    found = np.asarray(rgb(Image.fromarray(levels)))
    assert found.shape == (16, 16, 3) and (found == np.arange(256).reshape(16, 16, 1)).all()


def test_an_image_that_cannot_be_read(tmp_path):
    model, folder = tiny.vit_folder(tmp_path / "model"), images(tmp_path / "d")
    (folder / "cat" / "0.png").write_bytes(b"no image")
    recipe = Recipe(model=str(model), task="image-classification", data=Data(path=str(folder)))
    rows, source = read_rows(recipe), load_source(str(model))
    examples = make_examples(rows, source, recipe)
    with pytest.raises(OrthoactError, match=r"data\.image: an image cannot be read .*0\.png"):
        [split[i] for split in (examples.train, examples.validation, examples.test) for i in range(len(split))]


def test_the_digest_is_of_the_data_alone(tmp_path):
    """A run that writes beside its data goes on with them."""
    (tmp_path / "train.txt").write_text("a text\n" * 40)
    before = digest(str(tmp_path))
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "orthoact.json").write_text("{}")
    assert digest(str(tmp_path)) == before and digest("demo") is None
    (tmp_path / "train.txt").write_text("b text\n" * 40)
    assert digest(str(tmp_path)) != before
