"""Self-distillation: the converted model learns from its original, which is the same weights with other activations."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..convert.fidelity import outputs
from ..interp.activation import Activation, original
from ..interp.errors import OrthoactError
from .parameters import PARTS
from .swap import Swap

log = logging.getLogger("orthoact")


class Distillation:
    r"""The divergence of a converted model from its original, as a loss that needs inputs and no labels.

    $$T^2 \, E[\mathrm{KL}(p_T \| q_T)] + hidden \cdot E[1 - \cos(h, h')]$$

    with p the original's probabilities and q the model's at temperature T; a model without logits has one minus the
    cosine of the pooled outputs in the place of the first term. h are the outputs of the modules that hold the
    activations (an MLP, say), one mean for each.

    With `swap` the model that learns is one whose activations are not all new yet (see `Swap`).

    The teacher is `model` itself with the activations that were replaced, in evaluation mode, with LoRA switched off:
    no second model is held. Weights that train besides activations and LoRA (norms, say) are copied here, before
    the first step, and lent to the teacher: the copy is as large as they are, and the log tells its size. Raises
    `OrthoactError` where the original of an activation is not known.

    >>> from orthoact import convert_
    >>> net = nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 2)).requires_grad_(False)
    >>> _ = convert_(net, degree=4)
    >>> 0 < Distillation(net).loss(net, {"input": torch.randn(16, 4)}).item() < 0.1
    True
    """

    def __init__(self, model: nn.Module, *, temperature: float = 1.0, hidden: float = 0.0, swap: Swap | None = None):
        if not temperature > 0:
            raise OrthoactError(f"temperature {temperature}: expected a positive number")
        if not hidden >= 0:
            raise OrthoactError(f"hidden {hidden}: expected a weight that is not negative")
        self.temperature, self.hidden, self.swap = temperature, hidden, swap
        sites = {name: m for name, m in model.named_modules() if isinstance(m, Activation)}
        if not sites:
            raise OrthoactError(f"{type(model).__name__} holds no learnable activation: convert it before it is taught")
        with original(model):  # says which originals are not known
            pass
        self.owners = list(dict.fromkeys(name.rpartition(".")[0] for name in sites))
        toggled = {id(p) for part in ("activations", "lora") for p in PARTS[part](model)}
        self.held = {
            name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad and id(p) not in toggled
        }
        if self.held:
            size = sum(t.numel() * t.element_size() for t in self.held.values())
            log.info("distillation: %.1f MB of weights train; the teacher keeps a copy of them", size / 1e6)

    def loss(self, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        """The divergence on one batch of inputs (`labels` are left out), a differentiable scalar in float32."""
        batch = {k: v for k, v in batch.items() if k != "labels"}
        with torch.no_grad(), self.teacher(model):
            told, told_hidden = self._run(model, batch)
        with self.swap if self.swap and torch.is_grad_enabled() else nullcontext():  # measured, all are new
            seen, hidden = self._run(model, batch)
        loss = self._outputs(told, seen, batch.get("attention_mask"))
        if self.hidden:
            pairs = zip(told_hidden, hidden, strict=True)
            cosines = [F.cosine_similarity(a.float(), b.float(), dim=-1).mean() for a, b in pairs]
            loss = loss + self.hidden * (1 - torch.stack(cosines).mean())
        return loss

    def begin(self, step: int) -> None:
        """Tell the number of the step that comes, from 0: a progressive swap goes by it."""
        if self.swap:
            self.swap.begin(step)

    @contextmanager
    def teacher(self, model: nn.Module) -> Iterator[nn.Module]:
        """Run `model` as the original was: its activations, its weights, no LoRA, no dropout."""
        from peft.tuners.tuners_utils import BaseTunerLayer

        parameters = dict(model.named_parameters())
        with ExitStack() as exits:
            exits.enter_context(original(model))
            modes = {m: m.training for m in model.modules()}
            exits.callback(lambda: [setattr(m, "training", mode) for m, mode in modes.items()])
            model.eval()
            for layer in model.modules():
                if isinstance(layer, BaseTunerLayer) and not layer.disable_adapters:
                    exits.callback(setattr, layer, "_disable_adapters", False)
                    layer._disable_adapters = True  # enable_adapters would also freeze the adapter's weights
            for name, kept in self.held.items():
                exits.callback(setattr, parameters[name], "data", parameters[name].data)
                parameters[name].data = self.held[name] = kept.to(parameters[name].device)
            yield model

    def _run(self, model: Any, batch: dict[str, Tensor]) -> tuple[dict[str, Tensor], list[Tensor]]:
        """The outputs of `fidelity.outputs`, and those of the modules that hold the activations."""
        seen: list[Tensor] = []
        with ExitStack() as exits:
            for name in self.owners if self.hidden else ():
                hook = model.get_submodule(name).register_forward_hook(lambda m, args, out: seen.append(out))
                exits.callback(hook.remove)
            return outputs(model, batch), [h for h in seen if isinstance(h, Tensor)]

    def _outputs(self, told: dict[str, Tensor], seen: dict[str, Tensor], mask: Tensor | None) -> Tensor:
        if "logits" not in told:
            return 1 - F.cosine_similarity(told["pooled"].float(), seen["pooled"].float(), dim=-1).mean()
        p = (told["logits"].float() / self.temperature).log_softmax(-1)
        q = (seen["logits"].float() / self.temperature).log_softmax(-1)
        apart = F.kl_div(q, p, reduction="none", log_target=True).sum(-1)
        if mask is not None and mask.shape == apart.shape:
            return self.temperature**2 * (apart * mask).sum() / mask.sum()
        return self.temperature**2 * apart.mean()
