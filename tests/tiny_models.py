"""Real models, tiny, built from configs with seeded random weights: no network."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import timm
import torch
import transformers as tf
from torch import nn

SMALL = {"vocab_size": 96, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
BERT = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64, "vocab_size": 96}
IMAGE = {"image_size": 32, "num_channels": 3}


def _llama(act: str) -> Any:
    config = tf.LlamaConfig(
        **SMALL,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=64,
        hidden_act=act,
        tie_word_embeddings=True,
    )
    return tf.LlamaForCausalLM(config)


def _t5(act: str) -> Any:
    config = tf.T5Config(
        d_model=32,
        d_kv=16,
        d_ff=64,
        num_layers=2,
        num_heads=2,
        vocab_size=96,
        feed_forward_proj=act,
        decoder_start_token_id=0,
    )
    return tf.T5ForConditionalGeneration(config)


def _gpt2(cls: type = tf.GPT2LMHeadModel, **options) -> Any:
    return cls(tf.GPT2Config(**SMALL, n_embd=32, n_layer=2, n_head=2, n_positions=64, **options))


HF: dict[str, tuple[Callable[[], Any], int, str]] = {
    "gpt2": (_gpt2, 2, "gelu_tanh"),
    "gpt2-base": (lambda: _gpt2(tf.GPT2Model), 2, "gelu_tanh"),
    "gpt2-classifier": (lambda: _gpt2(tf.GPT2ForSequenceClassification, num_labels=3), 2, "gelu_tanh"),
    "llama-silu": (lambda: _llama("silu"), 2, "silu"),
    "llama-relu": (lambda: _llama("relu"), 2, "relu"),
    "t5-gated": (lambda: _t5("gated-gelu"), 4, "gelu_tanh"),
    "t5-relu": (lambda: _t5("relu"), 4, "relu"),
    "bert-masked": (lambda: tf.BertForMaskedLM(tf.BertConfig(**BERT)), 2, "gelu"),
    "bert-classifier": (lambda: tf.BertForSequenceClassification(tf.BertConfig(**BERT)), 2, "gelu"),
    "bloom": (
        lambda: tf.BloomForCausalLM(tf.BloomConfig(vocab_size=96, hidden_size=32, n_layer=2, n_head=2)),
        2,
        "gelu_tanh",
    ),
    "gemma": (
        lambda: tf.GemmaForCausalLM(
            tf.GemmaConfig(
                **SMALL,
                hidden_size=32,
                intermediate_size=64,
                num_hidden_layers=2,
                num_attention_heads=2,
                num_key_value_heads=1,
                head_dim=16,
                max_position_embeddings=64,
            )
        ),
        2,
        "gelu_tanh",
    ),
    "vit": (
        lambda: tf.ViTForImageClassification(
            tf.ViTConfig(**{k: v for k, v in BERT.items() if k != "vocab_size"}, **IMAGE, patch_size=16, num_labels=4)
        ),
        2,
        "gelu",
    ),
    "dinov2": (
        lambda: tf.Dinov2Model(
            tf.Dinov2Config(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, **IMAGE, patch_size=16)
        ),
        2,
        "gelu",
    ),
    "convnext": (
        lambda: tf.ConvNextForImageClassification(
            tf.ConvNextConfig(
                **IMAGE, hidden_sizes=[8, 16], depths=[1, 1], num_stages=2, num_labels=4, layer_scale_init_value=1.0
            )
        ),
        2,
        "gelu",
    ),
    "mobilenet": (
        lambda: tf.MobileNetV2ForImageClassification(
            tf.MobileNetV2Config(**IMAGE, depth_multiplier=0.35, num_labels=4)
        ),
        35,
        "relu6",
    ),
}
"""Name -> (builder, number of sites by default, target of each)."""

TIMM: dict[str, tuple[str, dict[str, Any], int, str]] = {
    "vit": (
        "vit_tiny_patch16_224",
        {"img_size": 32, "embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 4},
        2,
        "gelu",
    ),
    "vit-headless": (
        "vit_tiny_patch16_224",
        {"img_size": 32, "embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 0},
        2,
        "gelu",
    ),
    "convnext": (
        "convnext_atto",
        {"depths": (1, 1, 1, 1), "dims": (8, 16, 16, 16), "num_classes": 4, "ls_init_value": 1.0},
        4,
        "gelu",
    ),
    "mobilenet": ("mobilenetv3_small_050", {"num_classes": 4}, 33, "hardswish"),
}
"""Name -> (architecture, arguments, number of sites by default, target of most)."""

_built: dict[tuple[str, str], nn.Module] = {}


def hf(name: str) -> Any:
    """A fresh copy of a tiny transformers model, in evaluation mode."""
    return _fresh("hf", name, HF[name][0])


def timm_model(name: str) -> Any:
    """A fresh copy of a tiny timm model, in evaluation mode."""
    architecture, options, *_ = TIMM[name]
    return _fresh("timm", name, lambda: timm.create_model(architecture, **options))


def _fresh(kind: str, name: str, build: Callable[[], Any]) -> Any:
    if (kind, name) not in _built:
        torch.manual_seed(0)
        model = build().eval()
        with torch.no_grad():
            for parameter in model.parameters():  # inputs of activations of size one, through any depth
                if parameter.dim() > 1:
                    parameter.normal_(std=parameter[0].numel() ** -0.5)
        _built[kind, name] = model
    return copy.deepcopy(_built[kind, name])


def outputs(model: Any, seed: int = 0, run: Callable[..., Any] | None = None) -> torch.Tensor:
    """One output tensor of a model for seeded inputs; `run` is a compiled form of it."""
    from orthoact.convert.audit import probe_batch

    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.data_ptr() % 64:  # mapped from a file: some of torch's own kernels round differently there
            tensor.data = tensor.data.clone()
    with torch.no_grad():
        out = (model if run is None else run)(**probe_batch(model, seed=seed))
    if isinstance(out, torch.Tensor):
        return out
    return out["logits"] if "logits" in out else out["last_hidden_state"]
