"""How near a converted model is to its original: the same inputs through both, compared."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..interp import engine
from ..interp.activation import counted, original
from ..interp.errors import OrthoactError
from .data import Batches, batches, predicts_next, takes_images
from .sources import Source, load_source

CHUNK = 2**19
"""Logits that are compared at a time: in float64 those of a whole text would be as large as the model."""


@dataclass
class _Sums:
    """Running sums over positions, labels and pooled outputs."""

    positions: int = 0
    kl: float = 0.0
    agree: int = 0
    labels: int = 0
    loss: float = 0.0
    loss_base: float = 0.0
    cosines: list[Tensor] = field(default_factory=list)


def evaluate(
    source: Source | str | Path,
    *,
    against: Source | None = None,
    data: str | Path | None = None,
    limit: int | None = None,
    batch_size: int = 8,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Compare the converted model of `source` (a loaded one, or its folder or name) with its original.

    The original is `against`, or the same weights with the activations that were replaced. `data` is what `batches`
    takes. Returns what applies of: `data`, `tokens` | `texts` | `images`, `loss_base`, `loss`, `perplexity_base`,
    `perplexity`, `change` (per cent of the perplexity, or of the loss), `kl` (mean over positions of KL(base ||
    converted), nats), `top1_agreement`, `cosine_mean`, `cosine_min` (of mean-pooled, CLS or pooled outputs).
    """
    source = source if isinstance(source, Source) else load_source(str(source))
    model: Any = source.model
    if against is None and not source.converted:
        raise OrthoactError(
            f"{source.name} is not converted: convert it first, or name what to compare with by --against"
        )
    inputs = batches(source, data, limit=limit, size=batch_size, seed=seed)
    reference: Any = model if against is None else against.model
    toggle: Callable[[], AbstractContextManager] = (lambda: original(model)) if against is None else nullcontext
    device = next(model.parameters()).device
    sums, count = _Sums(), 0
    with torch.inference_mode(), ExitStack() as stack:
        for done, batch in enumerate(inputs):
            batch = {k: v.to(device) for k, v in batch.items()}
            labels = batch.pop("labels", None)
            try:
                with toggle():
                    base = outputs(reference, batch)
                with counted(model) as values:
                    new = outputs(model, batch)
            except (RuntimeError, ValueError, TypeError, KeyError, AttributeError) as error:
                raise OrthoactError(
                    f"{source.name}: the model does not run on the {inputs.name} batch "
                    f"({type(error).__name__}: {error}); "
                    f"give it data that fit with --data"
                ) from error
            count += _count(inputs, batch)
            if not done:
                left = sum(values) * (len(inputs.items) - 1)
                where = next(model.parameters()).device
                stack.enter_context(engine.using(engine.suited(left, training=False, device=where)))
            _compare(sums, model, inputs, batch, base, new, labels)
            if progress:
                progress(done + 1, len(inputs.items))
    return {"data": inputs.name, inputs.unit: count, **_summary(sums, model)}


def _count(inputs: Batches, batch: dict[str, Tensor]) -> int:
    first = batch["input_ids"] if "input_ids" in batch else next(iter(batch.values()))
    return first.numel() if inputs.unit == "tokens" else len(first)


def outputs(model: Any, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """Logits and pooled output of one batch, those that the model has."""
    if not hasattr(model, "main_input_name") and not hasattr(model, "forward_features"):
        return {"pooled": model(**batch).flatten(1)}  # of neither library
    if not hasattr(model, "main_input_name"):
        x = next(iter(batch.values()))
        features = model.forward_features(x)
        out = {"pooled": model.forward_head(features, pre_logits=True).flatten(1)}
        return out | ({"logits": model.forward_head(features)} if model.num_classes else {})
    head = type(model).__name__
    classifies = head.endswith(("LMHeadModel", "Classification", "ForMaskedLM", "ForCausalLM", "ConditionalGeneration"))
    result = model(**batch, return_dict=True)
    if classifies and isinstance(result.get("logits"), Tensor):
        return {"logits": result["logits"]}
    hidden = result.get("last_hidden_state")
    pooled = result.get("pooler_output")
    if takes_images(model):
        if pooled is None and hidden is not None:
            pooled = hidden[:, 0] if hidden.dim() == 3 else hidden.flatten(2).mean(-1)
    elif hidden is not None:
        weight = batch.get("attention_mask", torch.ones(hidden.shape[:2], device=hidden.device))[..., None]
        weight = weight if weight.shape[1] == hidden.shape[1] else torch.ones_like(hidden[..., :1])
        pooled = (hidden * weight).sum(1) / weight.sum(1)
    if pooled is None:
        tensors = [v for v in result.to_tuple() if isinstance(v, Tensor) and v.is_floating_point() and v.dim() > 1]
        if not tensors:
            raise OrthoactError(f"{head} gives no tensor that could be compared")
        pooled = tensors[0].flatten(1)
    return {"pooled": pooled.flatten(1)}


def _compare(sums: _Sums, model, inputs: Batches, batch, base, new, labels: Tensor | None) -> None:
    if "pooled" in base:
        sums.cosines.append(F.cosine_similarity(base["pooled"].double(), new["pooled"].double(), dim=-1).cpu())
    if "logits" not in base:
        return
    p, q = base["logits"], new["logits"]
    if predicts_next(model) and inputs.name != "probe":
        labels = F.pad(batch["input_ids"][:, 1:], (0, 1), value=-100)
    mask = batch.get("attention_mask")
    keep = mask.bool().flatten() if mask is not None and mask.shape == p.shape[:-1] else None
    p, q = p.flatten(0, -2), q.flatten(0, -2)
    flat = labels.flatten() if labels is not None and labels.numel() == len(p) else None
    step = max(1, CHUNK // p.shape[-1])
    for start in range(0, len(p), step):
        rows = slice(start, start + step)
        a, b = p[rows].double().log_softmax(-1), q[rows].double().log_softmax(-1)
        if flat is not None:
            sums.loss_base += float(F.nll_loss(a, flat[rows], ignore_index=-100, reduction="sum"))
            sums.loss += float(F.nll_loss(b, flat[rows], ignore_index=-100, reduction="sum"))
            sums.labels += int((flat[rows] != -100).sum())
        if keep is not None:
            a, b = a[keep[rows]], b[keep[rows]]
        sums.positions += len(a)
        sums.kl += float((a.exp() * (a - b)).sum())
        sums.agree += int((a.argmax(-1) == b.argmax(-1)).sum())


def _summary(sums: _Sums, model: Any) -> dict[str, Any]:
    out: dict[str, Any] = {}
    if sums.labels:
        base, new = sums.loss_base / sums.labels, sums.loss / sums.labels
        out |= {"loss_base": base, "loss": new}
        if type(model).__name__.endswith(("LMHeadModel", "ForCausalLM", "ForMaskedLM")):
            out |= {"perplexity_base": math.exp(base), "perplexity": math.exp(new)}
            out["change"] = 100 * math.expm1(new - base)
        elif base:
            out["change"] = 100 * (new - base) / base
    if sums.positions:
        out |= {"kl": sums.kl / sums.positions, "top1_agreement": sums.agree / sums.positions}
    if sums.cosines:
        cosines = torch.cat(sums.cosines)
        out |= {"cosine_mean": float(cosines.mean()), "cosine_min": float(cosines.min())}
    if any(isinstance(v, float) and not math.isfinite(v) for v in out.values()):
        raise OrthoactError("the outputs hold NaN or infinite values: the model or its conversion is broken")
    return out
