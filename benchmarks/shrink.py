"""Small models of every type that transformers and timm know, made from their default configs.

A transformers config is shrunk by rules on its keys: fewer layers, a small vocabulary, narrower layers. What the rules
cannot keep consistent is tried with fewer cuts, at last on the meta device, which needs no memory.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import torch

VOCABULARY = 512
LAYERS = re.compile(
    r"^(num_|n_|n)?((hidden|encoder|decoder|text|vision|audio|fusion|self|cross|transformer|entity|early|intermediate"
    r"|enhancer|local_transformer|predictor|pred|perceiver|resampler|num_entity|depth|acoustic|qformer|mask|backbone"
    r"|projector|global|iou_head|depth_decoder|duration_predictor|speech_decoder_prenet|flow|prior_encoder)_)*"
    r"(hidden_layers|layers|layer|depth|num_blocks|num_self_attends_per_block|encoder_layer|decoder_layer)$"
)
"""Keys that count layers."""
KEPT_LAYERS = {"num_adapter_layers", "num_layers_per_block", "iou_head_depth", "num_hidden_layers_per_stage"}
WIDTHS = re.compile(
    r"(hidden_size|hidden_dim|d_model|n_embd|embed_dim|emb_dim|intermediate|ffn_dim|d_ff|d_inner|mlp_dim|ffn_hidden"
    r"|embedding_size|projection_dim|output_dim|n_inner|ffn_size|dim_feedforward|inner_dim|^dim$|^width$"
    r"|out_hidden_size|hidden_channels|encoder_dim|decoder_dim|lru_width|latent_size)"
)
"""Keys of widths that are divided by the factor by which the hidden size shrinks."""
HEADS = re.compile(
    r"^(num_|n_)?((encoder|decoder|text|vision|cross|self|self_attention|cross_attention)_)?(attention_)?heads?$"
)
LISTED = re.compile(r"(indices|indexes|layer_ids|layers_idx|_blocks|_layers|index|stages|layer_indices)$")

ROPE = {"rope_theta": 1e4, "rope_type": "default"}
ROUTED = {"num_experts_per_tok": 2, "n_group": 1, "topk_group": 1}
OCR = {**ROUTED, "mlp_layer_types": ["dense", "sparse"]}
SPECIAL: dict[str, dict[str, Any]] = {
    **{kind: {"prediction_length": 8} for kind in ("autoformer", "informer", "time_series_transformer")},
    **{kind: {"text_config.rope_parameters.mrope_section": [2, 3, 3]} for kind in ("glm4v", "glm46v", "glmga")},
    "glm4v_moe": {"text_config.rope_parameters.mrope_section": [1, 1, 2]},
    "glm_image": {"text_config.rope_parameters.mrope_section": [2, 3, 3]},
    "glm4v_text": {"rope_parameters.mrope_section": [2, 3, 3]},
    "glm_image_text": {"rope_parameters.mrope_section": [2, 3, 3]},
    "glm4v_moe_text": {"rope_parameters.mrope_section": [1, 1, 2]},
    "esm": {"vocab_size": 33, "pad_token_id": 1, "mask_token_id": 32},
    "chameleon": {"vocabulary_map": {"<image>": 5}},
    "emu3": {"vocabulary_map": {"<image>": 5}, "pad_token_id": 0},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, **ROUTED},
    "deepseek_v2": ROUTED,
    "deepseek_ocr2_text": OCR,
    "deepseek_ocr2": {f"text_config.{k}": v for k, v in OCR.items()},
    "cohere_compass_text": {"rope_parameters": {"full_attention": ROPE}},
    "cohere_compass": {"text_config.rope_parameters": {"full_attention": ROPE}},
    "gemma4_assistant": {"text_config.hidden_size_per_layer_input": 0},
    "dbrx": {"attn_config.rope_theta": 1e4, "attn_config.clip_qkv": 8.0},
    "bamba": {"attn_layer_indices": [1]},
    **{kind: {"head_dim": 16} for kind in ("hunyuan_v1_dense", "hunyuan_v1_moe", "hunyuan_vl_text", "ministral")},
    "hunyuan_vl": {"text_config.head_dim": 16},
    "reformer": {"is_decoder": True},
    "nemotron": {"num_key_value_heads": 4},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
}
"""Values that the rules do not find, by model type; dots reach into a part of the config."""


def shrink(config: dict[str, Any], *, widths: bool = True) -> dict[str, Any]:
    """A smaller config: few layers, a small vocabulary and, with `widths`, narrow layers."""
    small = dict(config)
    lengths: dict[int, int] = {}
    indices = [
        k
        for k, v in config.items()
        if isinstance(v, list | tuple) and v and LISTED.search(str(k)) and all(type(i) is int for i in v)
    ]
    each = config.get("num_hidden_layers")  # a list of as many numbers has one for each layer
    most = max([2, *(len(config[k]) for k in indices if len(config[k]) != each)])
    for key, value in config.items():
        if type(value) is int and LAYERS.match(str(key)) and key not in KEPT_LAYERS and value > most:
            lengths[value] = small[key] = most
    if "depths" in config and isinstance(config["depths"], list):
        small["depths"] = [min(d, 1) for d in config["depths"]]
    for key, value in config.items():
        if isinstance(value, dict):
            plain = key in ("id2label", "label2id") or not all(isinstance(k, str) for k in value)
            small[key] = value if plain else shrink(value, widths=widths)
        elif key in indices and len(value) == each and each in lengths:
            small[key] = list(value[: lengths[each]])
        elif key in indices and lengths:
            first = 1 if key in ("out_indices",) else 0
            if max(value) + 1 - first >= most:
                small[key] = list(range(first, first + len(value)))
        elif isinstance(value, list | tuple) and len(value) in lengths and not key.startswith("rope"):
            n = lengths[len(value)]
            kinds = list(dict.fromkeys(v for v in value if isinstance(v, str)))
            small[key] = (kinds * n)[:n] if kinds else [value[0], *[value[-1]] * (n - 1)]
    for key, value in config.items():
        if re.search(r"vocab_size|^n_words$", str(key)) and type(value) is int:
            small[key] = min(value, VOCABULARY)
    if overrides := config.get("per_layer_config"):  # of single layers: the last one gets those of the first
        small["per_layer_config"] = {int(small.get("num_hidden_layers", most)) - 1: next(iter(overrides.values()))}
    return _narrow(small) if widths else small


def tokens(config: dict[str, Any]) -> dict[str, Any]:
    """The config with its special tokens inside the small vocabulary, equal ones still equal."""
    renamed: dict[int, int] = {}

    def visit(part: dict[str, Any]) -> dict[str, Any]:
        out = {}
        for key, value in part.items():
            if isinstance(value, dict):
                value = visit(value)
            elif re.search(r"token_(id|index)$", str(key)):
                values = value if isinstance(value, list) else [value]
                values = [
                    renamed.setdefault(v, VOCABULARY - 1 - len(renamed)) if type(v) is int and v >= VOCABULARY else v
                    for v in values
                ]
                value = values if isinstance(value, list) else values[0]
            out[key] = value
        return out

    return visit(config)


def _narrow(config: dict[str, Any]) -> dict[str, Any]:
    """Narrow layers: a head of width 16, at most four heads, every other width by the same factor."""
    small = dict(config)
    size = next(
        (
            config[k]
            for k in ("hidden_size", "d_model", "n_embd", "dim", "embed_dim", "emb_dim", "hidden_dim")
            if type(config.get(k)) is int
        ),
        None,
    )
    if size is None or size <= 64:
        return small
    heads = {k: v for k, v in config.items() if HEADS.match(k) and type(v) is int and v > 0}
    count = next(iter(heads.values()), 4)
    few = next(n for n in (4, 3, 2, 5, 7, 1) if count % n == 0)
    narrow = 16 * few
    if "head_dim" in config and isinstance(config["head_dim"], int):
        small["head_dim"] = 16
    factor = size / narrow
    rope = config.get("rope_parameters") or {}
    if sections := rope.get("mrope_section"):
        wide = config.get("head_dim") or size // count
        total = sum(sections) * 16 // wide
        first = [max(1, n * 16 // wide) for n in sections[:-1]]
        small["rope_parameters"] = {**rope, "mrope_section": [*first, total - sum(first)]}
    for number, width in (("mamba_n_heads", "mamba_d_head"), ("mamba_num_heads", "mamba_head_dim")):
        if type(config.get(number)) is int and type(config.get(width)) is int:
            small[number], small[width] = few, narrow * int(config.get("mamba_expand") or 2) // few
            small |= {k: 1 for k in ("mamba_n_groups", "mamba_ngroups") if k in config}
    for key, value in heads.items():
        small[key] = few if value == count else max(1, value * few // count)
    for key in ("num_key_value_heads", "num_kv_heads", "n_head_kv", "multi_query_group_num"):
        if type(config.get(key)) is int:
            small[key] = max(1, config[key] * few // count) if few % max(1, config[key] * few // count) == 0 else few
    for key, value in config.items():
        if type(value) is int and value > 32 and WIDTHS.search(key):
            small[key] = max(16, round(value / factor / 16) * 16)
    for key in ("n_routed_experts", "num_experts", "num_local_experts", "moe_num_experts"):
        if type(config.get(key)) is int and config[key] > 4:
            small[key] = 4
            for group in ("n_group", "topk_group"):
                if type(config.get(group)) is int:
                    small[group] = 1
            for top in ("num_experts_per_tok", "moe_k", "top_k", "moe_topk", "num_experts_per_token", "moe_top_k"):
                if type(config.get(top)) is int:
                    small[top] = min(config[top], 2)
    for key, width in (("q_lora_rank", 32), ("kv_lora_rank", 16), ("qk_nope_head_dim", 16), ("qk_rope_head_dim", 16)):
        if type(config.get(key)) is int:
            small[key] = width
    if type(config.get("v_head_dim")) is int:
        small["v_head_dim"] = 16
    if type(config.get("qk_head_dim")) is int:
        small["qk_head_dim"] = 32
    if type(config.get("d_kv")) is int:
        small["d_kv"] = 16
    return small


LADDER: dict[str, dict[str, Any]] = {
    "tiny": {"widths": True},
    "thin": {"widths": False},
    "default": {},
}
"""How much is cut, the most first."""


def small_config(model_type: str, size: str) -> Any:
    """The shrunk default config of a model type."""
    from transformers import CONFIG_MAPPING

    cls = CONFIG_MAPPING[model_type]
    default = cls()
    if size == "default":
        return default
    config = default.to_dict()
    for key in ("id2label", "label2id", "transformers_version", "architectures"):
        config.pop(key, None)
    config = tokens(shrink(config, **LADDER[size]))
    for path, value in SPECIAL.get(model_type, {}).items():
        *parts, leaf = path.split(".")
        owner = config
        for part in parts:
            owner[part] = owner.get(part) or {}
            owner = owner[part]
        owner[leaf] = value
    return cls.from_dict(config)


def build(make: Callable[[], Any], limit: int) -> Any:
    """A model in evaluation mode, on the meta device where it has more than `limit` numbers."""
    with torch.device("meta"):
        model = make()
    if sum(p.numel() for p in model.parameters()) > limit:
        return model.eval()
    torch.manual_seed(0)
    return make().eval()
