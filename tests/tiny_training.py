"""Tiny models with tokenizers and processors, as folders that recipes can name."""

from __future__ import annotations

import shutil
from pathlib import Path

import tiny_models as tiny
import torch
import transformers as tf
from timm.models import save_for_hf

from orthoact.convert.sources import demo_folder


def bert_folder(out: Path, classes: int | None = None) -> Path:
    """A BERT of two layers that reads with the demo's tokenizer; with a head of so many classes, or without."""
    torch.manual_seed(0)
    size = {**tiny.BERT, "vocab_size": 1536, "pad_token_id": 0}
    if classes is None:
        model = tf.BertModel(tf.BertConfig(**size))
    else:
        model = tf.BertForSequenceClassification(tf.BertConfig(**size, num_labels=classes))
    model.save_pretrained(out)
    for path in demo_folder().glob("tokenizer*"):
        shutil.copyfile(path, out / path.name)
    return out


def vit_folder(out: Path, name: str = "vit") -> Path:
    """A timm ViT of two layers for 32 pixels with 4 classes, or `vit-headless`."""
    model = tiny.timm_model(name)
    data = {"input_size": (3, 32, 32), "crop_pct": 1.0}
    save_for_hf(model, str(out), safe_serialization=True, data_config=data)
    return out
