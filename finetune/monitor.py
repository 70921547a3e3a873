"""What the sites see: minimal, until the branch that owns it is merged."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ..interp.activation import Activation


class Monitor:
    """Watches the inputs of the sites."""

    def __init__(self, model: nn.Module):
        self.sites = {n: m for n, m in model.named_modules() if isinstance(m, Activation)}
        self.seen: dict[str, Any] = {}
        self.handles: list[Any] = []

    def __enter__(self):
        for name, act in self.sites.items():
            self.handles.append(act.register_forward_hook(lambda m, a, out, name=name: self._see(name, m, a[0], out)))
        return self

    def __exit__(self, *_):
        for handle in self.handles:
            handle.remove()

    def _see(self, name: str, act: Any, x: Tensor, out: Tensor) -> None:
        x = x.detach()
        outside = ((x < act.lo) | (x > act.hi)).float().mean()
        self.seen[name] = (outside, x.min(), x.max(), out.detach().isfinite().all())

    def step(self) -> dict[str, Any]:
        """What was seen of each site."""
        return {n: {"outside": float(a), "min": float(b), "max": float(c)} for n, (a, b, c, _) in self.seen.items()}

    def penalty(self) -> Tensor | None:
        """Nothing."""

    def broken(self) -> str | None:
        """The first site whose output is not finite."""
        return next((name for name, seen in self.seen.items() if not bool(seen[3])), None)
