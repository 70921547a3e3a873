"""What a converted model is measured on: texts or images from a file, a folder or a `datasets` folder."""

from __future__ import annotations

import io
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..interp.errors import OrthoactError
from .audit import probe_batch
from .sources import DEMO, Source, demo_folder

IMAGES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
TEXTS = (".txt", ".md", ".text")


@dataclass
class Batches:
    """Model inputs, with what they are called and counted in."""

    name: str
    """`file`, `demo` or `probe`."""
    unit: str
    """`tokens`, `texts` or `images`."""
    items: list[dict[str, Tensor]]
    """Keyword arguments of the model, one dict a batch; `labels` are taken out before the call."""

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        return iter(self.items)


def takes_images(model: Any) -> bool:
    """Whether the model's main input is an image."""
    return getattr(model, "main_input_name", "pixel_values") == "pixel_values"


def predicts_next(model: Any) -> bool:
    """Whether the model is a causal language model."""
    return type(model).__name__.endswith(("ForCausalLM", "LMHeadModel")) and not model.config.is_encoder_decoder


def batches(
    source: Source,
    data: str | Path | None,
    *,
    limit: int | None = None,
    size: int = 8,
    seed: int = 0,
    flag: str = "--data",
) -> Batches:
    """Inputs for the model of `source`.

    `data` is a text file (.txt), a folder of images, or anything that `datasets` reads from disk (a saved data set, a
    folder, .csv, .json, .jsonl, .parquet); None means the demo's held-out text for the demo model and a seeded probe
    batch for every other. `limit` bounds the tokens (causal models), texts or images; `flag` is what errors call the
    data. Raises `OrthoactError` for data
    that is missing, empty, or of the wrong kind, and for a folder without the tokenizer or processor that it needs.
    """
    model = source.model
    if limit is not None and limit < 1:
        raise OrthoactError(f"--limit {limit}: expected a positive whole number")
    if size < 1:
        raise OrthoactError(f"--batch-size {size}: expected a positive whole number")
    name = "file"
    if data is None:
        if source.base != DEMO or not predicts_next(model):
            images = takes_images(model)
            batch = probe_batch(model, rows=2, length=12, seed=seed)
            return Batches("probe", "images" if images else "texts", [batch])
        data, name = demo_folder() / "heldout.txt", "demo"
    path = existing(data, flag)
    try:
        return _read(source, path, name, limit, size, seed)
    except OrthoactError as error:
        raise OrthoactError(str(error).replace("--data", flag)) from error


def _read(source: Source, path: Path, name: str, limit: int | None, size: int, seed: int) -> Batches:
    model = source.model
    if takes_images(model):
        return Batches(name, "images", _images(source, path, limit, size))
    texts, labels = _texts(path)
    tokenizer = tokenizer_of(source)
    if predicts_next(model):
        return Batches(name, "tokens", _windows(model, tokenizer, "".join(texts), limit, size))
    return Batches(name, "texts", _sentences(model, tokenizer, texts, labels, limit, size, seed))


# -- text --------------------------------------------------------------------------------------------------------------


def _texts(path: Path) -> tuple[list[str], list[int] | None]:
    """The texts of a file (its lines, with their ends) or of a data set, and their labels if there are any."""
    if path.is_file() and path.suffix in TEXTS:
        text = read_text(path)
        if not text.strip():
            raise OrthoactError(f"--data {path}: the file is empty")
        return text.splitlines(keepends=True), None
    rows = _dataset(path)
    columns = [
        name for name, feature in rows.features.items() if getattr(feature, "dtype", "") in ("string", "large_string")
    ]
    if not columns:
        raise OrthoactError(f"--data {path}: expected a column of text, it has {', '.join(rows.column_names)}")
    column = "text" if "text" in columns else columns[0]
    labels = rows["label"][:] if "label" in rows.column_names else None
    return [f"{text}\n\n" for text in rows[column]], labels


def read_text(path: Path) -> str:
    """A file of UTF-8, or of UTF-16 with its mark; what is neither becomes replacement characters."""
    data = path.read_bytes()
    coding = "utf-16" if data.startswith((b"\xff\xfe", b"\xfe\xff")) else "utf-8-sig"
    return io.TextIOWrapper(io.BytesIO(data), encoding=coding, errors="replace").read()


def tokenizer_of(source: Source) -> Any:
    """The tokenizer in the folder of a model; `OrthoactError` where there is none."""
    from transformers import AutoTokenizer

    names = ("tokenizer*", "vocab*", "*.model", "*.tiktoken")
    why: Exception | None = None
    if source.folder is not None and any(path for name in names for path in source.folder.glob(name)):
        try:
            return AutoTokenizer.from_pretrained(str(source.folder))
        except Exception as error:
            why = error
    raise OrthoactError(
        f"{source.name}: its folder holds no tokenizer that can be read, and --data is text; leave --data out to use "
        f"a seeded probe batch"
    ) from why


def existing(data: str | Path, flag: str) -> Path:
    """The path of the data; `OrthoactError`, which calls it `flag`, where there is nothing."""
    path = Path(data).expanduser()
    if not str(data) or not path.exists():
        raise OrthoactError(f"{flag} {data}: there is no such file or folder")
    return path


def _windows(model: Any, tokenizer: Any, text: str, limit: int | None, size: int) -> list[dict[str, Tensor]]:
    """The text as consecutive windows of the model's context (1,024 tokens at most)."""
    ids = tokenizer(text, return_tensors="pt", verbose=False).input_ids[0]
    ids = ids[:limit]
    if len(ids) < 2:
        what = "the text has" if limit is None or limit > 1 else "--limit leaves"
        raise OrthoactError(f"--data: expected at least two tokens, {what} {len(ids)}")
    context = getattr(model.config, "max_position_embeddings", None) or 1024
    length = min(context, 1024)
    whole = len(ids) // length * length
    windows = [ids[:whole].reshape(-1, length)] if whole else []
    out = [{"input_ids": part} for w in windows for part in w.split(max(1, size * 256 // length))]
    if len(ids) - whole > 1:
        out.append({"input_ids": ids[None, whole:]})
    return out


def _sentences(model: Any, tokenizer: Any, texts, labels, limit, size, seed) -> list[dict[str, Tensor]]:
    """Padded batches of texts; masked models get a seeded 15 % of masks, whose originals are the labels."""
    kept = [(t.strip(), labels[i] if labels else None) for i, t in enumerate(texts) if t.strip()][:limit]
    if not kept:
        raise OrthoactError("--data: expected at least one text that is not empty")
    length = min(getattr(model.config, "max_position_embeddings", None) or 512, 512) - 2
    mask = cast(int, tokenizer.mask_token_id)  # None where the tokenizer has no mask
    masked = type(model).__name__.endswith("ForMaskedLM") and mask is not None
    classes = getattr(model.config, "num_labels", 0) if type(model).__name__.endswith("SequenceClassification") else 0
    generator = torch.Generator().manual_seed(seed)
    out = []
    for start in range(0, len(kept), size):
        part = kept[start : start + size]
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        batch = tokenizer([t for t, _ in part], padding=True, truncation=True, max_length=length, return_tensors="pt")
        batch = {k: v for k, v in batch.items() if isinstance(v, Tensor)}
        ids = batch["input_ids"]
        if masked:
            special = torch.isin(ids, torch.tensor(tokenizer.all_special_ids))
            chosen = (torch.rand(ids.shape, generator=generator) < 0.15) & ~special
            batch["labels"] = torch.where(chosen, ids, -100)
            batch["input_ids"] = ids.masked_fill(chosen, mask)
        elif classes and all(isinstance(y, int) and 0 <= y < classes for _, y in part):
            batch["labels"] = torch.tensor([y for _, y in part])
        if getattr(model.config, "is_encoder_decoder", False):
            batch["decoder_input_ids"] = ids
        out.append(batch)
    return out


# -- images ------------------------------------------------------------------------------------------------------------


def _images(source: Source, path: Path, limit: int | None, size: int) -> list[dict[str, Tensor]]:
    if path.is_file() and path.suffix in TEXTS:
        raise OrthoactError(f"--data {path}: a text, and this model takes images; give a folder of them or a data set")
    rows = _dataset(path)
    columns = [name for name, feature in rows.features.items() if type(feature).__name__ == "Image"]
    if not columns:
        raise OrthoactError(f"--data {path}: expected images for this model, it has {', '.join(rows.column_names)}")
    rows = rows.select(range(min(limit or len(rows), len(rows))))
    transform, name = transform_of(source), input_name(source)
    classes = getattr(rows.features.get("label"), "num_classes", None)
    known = getattr(source.model, "num_classes", None) or getattr(
        getattr(source.model, "config", None), "num_labels", None
    )
    out = []
    for start in range(0, len(rows), size):
        try:
            part = rows[start : start + size]
        except (OSError, ValueError) as error:  # decoded now
            raise OrthoactError(f"--data {path}: {error}; repair that image or take it out") from error
        batch = {name: torch.stack([transform(rgb(image)) for image in part[columns[0]]])}
        if classes is not None and classes == known:
            batch["labels"] = torch.tensor(part["label"])
        out.append(batch)
    return out


def rgb(image: Any) -> Any:
    """A PIL image in three channels of eight bits; those of sixteen are scaled, which Pillow cuts off at 255."""
    if image.mode.startswith("I"):
        levels = np.asarray(image)
        unit = 257 if levels.max() > 255 else 1
        image = Image.fromarray((levels / unit).round().clip(0, 255).astype(np.uint8))
    return image.convert("RGB")


def input_name(source: Source) -> str:
    """What the image is called among the model's arguments."""
    return "pixel_values" if source.kind == "transformers" else "x"


def transform_of(source: Source) -> Any:
    """From a PIL image to the model's input, as the model's own library prepares it for evaluation."""
    model: Any = source.model
    if source.kind == "timm":
        from timm.data.config import resolve_model_data_config
        from timm.data.transforms_factory import create_transform

        return create_transform(**resolve_model_data_config(model), is_training=False)
    from transformers import AutoImageProcessor

    try:
        processor = AutoImageProcessor.from_pretrained(str(source.folder))
    except Exception as error:
        raise OrthoactError(
            f"{source.name}: its folder holds no image processor that can be read; leave --data out for a probe batch"
        ) from error
    return lambda image: processor(image, return_tensors="pt")["pixel_values"][0]


def _dataset(path: Path) -> Any:
    """One split of whatever `datasets` reads at a path."""
    loaded = read_datasets(path)
    split = next((name for name in ("test", "validation", "train") if name in loaded), next(iter(loaded)))
    if len(loaded[split]) == 0:
        raise OrthoactError(f"--data {path}: the data set is empty")
    return loaded[split]


def read_datasets(path: Path) -> dict[str, Any]:
    """Every split of whatever `datasets` reads at a path, by name."""
    import datasets

    datasets.disable_progress_bars()
    kinds = {".csv": "csv", ".json": "json", ".jsonl": "json", ".parquet": "parquet"}
    try:
        if path.is_file():
            if path.suffix not in kinds:
                raise OrthoactError(f"--data {path}: expected .txt, .csv, .json, .jsonl, .parquet or a folder")
            loaded = datasets.load_dataset(kinds[path.suffix], data_files=str(path))
        elif (path / "dataset_info.json").is_file() or (path / "dataset_dict.json").is_file():
            loaded = datasets.load_from_disk(str(path))
        elif any(p.suffix.lower() in IMAGES for p in path.rglob("*")):
            loaded = datasets.load_dataset("imagefolder", data_dir=str(path))
        else:
            loaded = datasets.load_dataset(str(path))
    except OrthoactError:
        raise
    except Exception as error:
        why = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise OrthoactError(f"--data {path}: datasets could not read it ({why})") from error
    return {str(name): split for name, split in loaded.items()} if isinstance(loaded, dict) else {"train": loaded}
