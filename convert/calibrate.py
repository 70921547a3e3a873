"""Calibration: what the inputs of each activation look like on real data, and where an error would hurt the output."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..interp.domains import Measured
from ..interp.errors import OrthoactError
from .calls import exposed
from .data import batches, predicts_next, takes_images
from .fidelity import outputs
from .sites import Site
from .sources import Source

log = logging.getLogger("orthoact")

LIMITS = {"tokens": 2048, "texts": 128, "images": 128}
"""How much data a calibration takes unless told otherwise."""

FEW = 8
"""A calibration says so where it found less than one part in so many of that."""


def calibrate(
    model: nn.Module | Source,
    sites: Iterable[Site],
    inputs: Iterable[dict[str, Tensor]],
    *,
    sensitivity: bool = True,
    seed: int = 0,
    progress: Callable[[int], None] | None = None,
) -> dict[str, Measured]:
    r"""The law of the inputs of each of `sites`, by name, as the model meets them on `inputs` (as of `data.batches`).

    With `sensitivity`, also the squared gradient of a loss $l$ at each site's output $a$, for which nothing but
    inputs is needed: with logits, $l$ is the loss of labels that the model samples itself, so that
    $E[(dl/da)^2]$ is the diagonal of its Fisher matrix and half of it times a squared error is a KL divergence; else
    $l = v \cdot u$ with $u$ the pooled output scaled to length one and $v$ normal, so that
    $E_v[(dl/da)^2] = \sum_j (du_j/da)^2$ and half of it is one minus a cosine. `seed` draws labels and $v$.

    A site that no input reaches is not in the result; sites that share a module share a law. The model runs in
    evaluation mode, a batch at a time; its mode, weights and gradients stay as they were. Raises `OrthoactError` for
    inputs on which it does not run, and for NaN or infinite values at a site.

    >>> from .sites import find_sites
    >>> net = nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 2))
    >>> laws = calibrate(net, find_sites(net), [{"input": torch.randn(16, 4)}])
    >>> laws["1"].count, laws["1"].sensitivity > 0
    (128, True)
    """
    model = model.model if isinstance(model, Source) else model
    modules = {site.name: model.get_submodule(site.name) for site in sites}
    laws = {module: Measured() for module in modules.values()}
    names = {module: name for name, module in modules.items()}

    def add(module: nn.Module, x: Tensor, keep: Tensor | None) -> tuple:
        try:
            return laws[module].add(x if keep is None else x[keep]), keep
        except OrthoactError as error:
            raise OrthoactError(f"{names[module]}: {error}") from error

    def weigh(module: nn.Module, met: tuple, g: Tensor) -> None:
        bins, keep = met
        laws[module].weigh(bins, g if keep is None else g[keep])

    rows = observe(model, list(laws), inputs, add, weigh if sensitivity else None, seed=seed, progress=progress)
    for law in laws.values():
        law.rows += rows
    if sensitivity and not any(law.squares.any() for law in laws.values()):
        log.warning("calibration: no gradient reached any activation; the laws weigh by density alone")
    return {name: laws[module] for name, module in modules.items() if laws[module].count}


def observe(
    model: nn.Module,
    modules: Iterable[nn.Module],
    inputs: Iterable[dict[str, Tensor]],
    add: Callable[[nn.Module, Tensor, Tensor | None], Any],
    weigh: Callable[[nn.Module, Any, Tensor], None] | None = None,
    *,
    seed: int = 0,
    progress: Callable[[int], None] | None = None,
) -> int:
    """Run the model and show what each of `modules` meets; how many positions the losses were summed over.

    `add` is called with a module, its input and, where the input has padding, the mask of what is none. `weigh`, if
    given, is called with the module, what `add` returned, and the gradient of the loss at the output (see `calibrate`).
    The model's mode, weights and gradients stay as they were. Raises `OrthoactError` where it does not run on them.
    """
    exits = ExitStack()
    exits.enter_context(exposed(model))
    parameter = next(model.parameters(), torch.zeros(()))
    generator = torch.Generator(parameter.device).manual_seed(seed)
    anchor = torch.zeros((), device=parameter.device, requires_grad=True)
    mask: Tensor | None = None
    pending: dict[nn.Module, Any] = {}
    summed = 0

    def before(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        x = args[0].detach()  # now: an in-place activation overwrites it
        keep = mask.bool().to(x.device) if mask is not None and x.dim() > 2 and x.shape[:2] == mask.shape else None
        pending[module] = add(module, x, keep)

    def after(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
        met = pending.pop(module)
        if weigh is None or not torch.is_grad_enabled():  # what runs without gradients has none
            return None
        if not output.requires_grad:  # the first site: no weight asks for a gradient
            output = output + anchor.to(output)
        output.register_hook(partial(weigh, module, met))
        return output

    with exits:
        training = {m: m.training for m in model.modules()}
        exits.callback(lambda: [setattr(m, "training", mode) for m, mode in training.items()])
        frozen = [p for p in model.parameters() if p.requires_grad]
        exits.callback(lambda: [p.requires_grad_() for p in frozen])
        for module in modules:
            exits.callback(module.register_forward_pre_hook(before).remove)
            exits.callback(module.register_forward_hook(after).remove)
        exits.enter_context(torch.set_grad_enabled(weigh is not None))
        model.eval()
        for p in frozen:
            p.requires_grad_(False)
        for done, batch in enumerate(inputs):
            batch = {k: v.to(parameter.device) for k, v in batch.items() if k != "labels"}
            mask = batch.get("attention_mask")
            try:
                out = outputs(model, batch)
            except (RuntimeError, ValueError, TypeError, KeyError, AttributeError) as error:
                raise OrthoactError(
                    f"the model does not run on the data ({type(error).__name__}: {error}); give data that fit it"
                ) from error
            if weigh is not None:
                value, gradient, rows = loss_gradient(out, mask, generator)
                summed += rows
                if value.requires_grad:
                    value.backward(gradient)
            if progress:
                progress(done + 1)
    return summed


def calibrate_on(
    source: Source,
    sites: Iterable[Site],
    data: str | Path,
    *,
    limit: int | None = None,
    batch_size: int = 8,
    seed: int = 0,
    flag: str = "--calibrate",
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Measured]:
    """`calibrate` on a text file, a folder of images or a data set on disk; `limit` is that of `LIMITS` by default.

    Messages call the data `flag`.
    """
    kind = "images" if takes_images(source.model) else "tokens" if predicts_next(source.model) else "texts"
    limit = LIMITS[kind] if limit is None else limit
    inputs = batches(source, data, limit=limit, size=batch_size, seed=seed, flag=flag)
    total = len(inputs.items)
    tell = None if progress is None else lambda done: progress(done, total)
    laws = calibrate(source, sites, inputs, seed=seed, progress=tell)
    found = max((law.rows for law in laws.values()), default=0)
    if 0 < found < LIMITS[kind] / FEW:
        log.warning("%s: %d %s say little of the inputs; give some %d", flag, found, kind, LIMITS[kind])
    return laws


def loss_gradient(
    out: dict[str, Tensor], mask: Tensor | None, generator: torch.Generator
) -> tuple[Tensor, Tensor, int]:
    """A tensor of the output, the gradient there of a loss drawn for it, and the number of positions it sums over."""
    if "logits" not in out:
        unit = torch.nn.functional.normalize(out["pooled"].float(), dim=-1)
        return unit, torch.randn(unit.shape, generator=generator, device=unit.device), len(unit)
    logits = out["logits"]
    gradient = logits.detach().float().softmax(-1)
    labels = torch.multinomial(gradient.flatten(0, -2), 1, generator=generator)
    gradient.flatten(0, -2).scatter_add_(1, labels, -torch.ones_like(labels, dtype=gradient.dtype))
    rows = labels.numel()
    if mask is not None and mask.shape == logits.shape[:-1]:
        gradient *= mask[..., None]
        rows = int(mask.sum())
    return logits, gradient.to(logits.dtype), rows
