r"""The learnable activation: a core series between two joints, continued by straight tails.

$$F(x) = S(x_c) + s_{lo} \min(x - lo, 0) + s_{hi} \max(x - hi, 0), \quad x_c = \mathrm{clip}(x, lo, hi)$$

with $s_{lo} = S'(lo) + jump_{lo}$ and likewise at hi. The jumps are zero, but for the rounding that they undo, unless a
joint sits on a kink of the target: F is continuously differentiable. Pretrained transformers have outliers of +-20 at
these inputs; the tails keep them where the target has them.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from contextlib import contextmanager
from math import inf
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from . import curve, engine
from .errors import OrthoactError
from .families import get_family
from .family import TAILS, Linear

if TYPE_CHECKING:
    from .domains import Law
    from .fit import Copy

TENSORS = ("theta", "start", "transform", "location", "scale", "lo", "hi", "jumps")
"""Every tensor of an `Activation` in a file; all are needed to evaluate it."""

BUFFERS = tuple(name for name in TENSORS if name != "theta")
"""Those that do not learn."""


class Activation(nn.Module):
    r"""A learnable activation $F$ with coefficients $a = a_0 + W \theta$.

    `theta` (float32, shape (n+1,) or (groups, n+1)) is the parameter, zero at the start; `start` ($a_0$), `transform`
    ($W$, see `coordinates`), `location`, `scale`, `lo`, `hi` and `jumps` are float32 buffers. They stay float32 under
    `.half()`, `.bfloat16()` and `.to(dtype)`; the series is evaluated in float32 or better and the result has the
    input's dtype. With `groups=G` each of G groups of channels, counted along
    the axis `channel`, has coefficients of its own.

    >>> from .fit import fit
    >>> act = Activation.from_fit(fit("gelu"))
    >>> x = torch.linspace(-20, 20, 101)
    >>> torch.allclose(act(x), nn.functional.gelu(x), atol=0.01)
    True

    Raises `OrthoactError` for an unknown family, a wrong degree, tails or number of groups.
    """

    theta: nn.Parameter
    start: Tensor
    transform: Tensor
    location: Tensor
    scale: Tensor
    lo: Tensor
    hi: Tensor
    jumps: Tensor

    def __init__(
        self,
        family: str = "hermite",
        degree: int = 8,
        *,
        tails: str = "linear",
        groups: int | None = None,
        channel: int | None = -1,
        target: str = "",
        original: Callable[[Tensor], Tensor] | None = None,
    ):
        super().__init__()
        self.family = get_family(family)
        if not isinstance(degree, int) or degree not in self.family.degrees:
            raise OrthoactError(f"degree {degree!r}: expected {self.family.degrees[0]} to {self.family.degrees[-1]}")
        if tails not in TAILS:
            raise OrthoactError(f"tails {tails!r}: expected one of {', '.join(TAILS)}")
        if groups is not None and (not isinstance(groups, int) or groups < 1):
            raise OrthoactError(f"groups {groups!r}: expected a positive whole number")
        if groups is not None and channel is None:
            raise OrthoactError(f"groups {groups}: expected the axis that counts the channels, got none")
        self.degree, self.tails, self.groups, self.channel, self.target = degree, tails, groups, channel, target
        self.domain: Law | None = None  # of the fit, with its derivative weight: what a fresh start needs
        self.derivative_weight: float | None = None
        self.bypass = False
        self.awaiting = False  # rebuilt on the meta device: its tensors must come from a file
        self._rest: Rest | None = None
        self._original = [original]  # in a list: not a child, so that it is in no state dict
        n = self.family.size(degree)
        self.theta = nn.Parameter(torch.zeros(n if groups is None else (groups, n), dtype=torch.float32))
        self.register_buffer("start", torch.zeros(n, dtype=torch.float32))
        self.register_buffer("transform", torch.eye(n, dtype=torch.float32))
        for name, value in (("location", 0.0), ("scale", 1.0), ("lo", -1.0), ("hi", 1.0)):
            self.register_buffer(name, torch.tensor(value, dtype=torch.float32))
        self.register_buffer("jumps", torch.zeros(2, dtype=torch.float32))
        conversion = self.family.conversion(degree)
        # a constant of family and degree, no buffer: it is in no file, and is never made on the meta device
        self._conversion = None if conversion is None else torch.from_numpy(conversion)

    @classmethod
    def from_fit(
        cls,
        fit: Copy,
        *,
        groups: int | None = None,
        channel: int | None = -1,
        original: Callable[[Tensor], Tensor] | None = None,
    ) -> Activation:
        """The activation that starts as `fit`."""
        act = cls(
            fit.family,
            fit.degree,
            tails=fit.tails,
            groups=groups,
            channel=channel,
            target=fit.target,
            original=original,
        )
        act.load_fit(fit)
        return act

    @classmethod
    def variance_preserving(
        cls, family: str = "hermite", degree: int = 3, *, groups: int | None = None, channel: int | None = -1
    ) -> Activation:
        """A start for training from scratch: a bare series with E[F^2] = E[F'^2] = 1 under N(0, 1) (see `variance`).

        Weights with variance 1 / fan_in then keep the variance of activations and gradients at every depth.

        >>> act = Activation.variance_preserving("fourier", 5)
        >>> x = torch.randn(100_000, generator=torch.Generator().manual_seed(0))
        >>> round((act(x) ** 2).mean().item(), 2)
        1.0
        """
        from .fit import variance_preserving

        return cls.from_fit(variance_preserving(family, degree), groups=groups, channel=channel)

    @torch.no_grad()
    def load_fit(self, fit: Copy) -> None:
        """Start afresh from `fit`, which has this activation's family, degree and tails."""
        from .coordinates import transform

        self.domain, self.derivative_weight = fit.domain, fit.derivative_weight
        values = {
            "theta": torch.zeros_like(self.theta),
            "start": torch.tensor(fit.coefficients, dtype=torch.float64),
            "transform": torch.from_numpy(transform(fit)),
            "jumps": torch.tensor(fit.jumps, dtype=torch.float64),
        }
        for name in ("location", "scale", "lo", "hi"):
            values[name] = torch.tensor(getattr(fit, name), dtype=torch.float64)
        for name, value in values.items():
            getattr(self, name).copy_(value)
        if self.tails == "linear":  # the tails' slopes exact at the start, in spite of rounded coefficients
            at = np.array([fit.lo, fit.hi])
            wanted = torch.from_numpy(fit(at)[1]) + torch.tensor(fit.jumps, dtype=torch.float64)
            self.jumps.copy_(wanted - self.core_slopes(self.start.double()))

    def core_slopes(self, a: Tensor) -> Tensor:
        """The core's slopes at lo and hi for coefficients (n+1,) or (groups, n+1): shape (2,) or (groups, 2)."""
        scale = self.scale.to(a.dtype)
        at = (torch.stack([self.lo, self.hi]).to(a.dtype) - self.location.to(a.dtype)) / scale
        return self.family.slope(list(a.unsqueeze(-1).unbind(-2)), at) / scale

    @property
    def coefficients(self) -> Tensor:
        """The plain coefficients of the series, lowest degree first: shape (n+1,) or (groups, n+1), differentiable."""
        return self.start + _times(self.transform, self.theta)

    @property
    def exact_coefficients(self) -> Tensor:
        """The coefficients in float64, not rounded: those that are evaluated."""
        wide = torch.float64
        return self.start.to(wide) + _times(self.transform.to(wide), self.theta.to(wide))

    def curve(self, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Values and slopes at `x` in float64, for `variance.moments`; without groups."""
        if self.groups is not None:
            raise OrthoactError(f"groups {self.groups}: expected an activation with one curve, without groups")
        at = torch.tensor(x, dtype=torch.float64, device=self.start.device, requires_grad=True)
        with torch.enable_grad():
            value = self(at)
            (slope,) = torch.autograd.grad(value.sum(), at)
        return value.detach().cpu().numpy(), slope.cpu().numpy()

    @property
    def original(self) -> Callable[[Tensor], Tensor] | None:
        """The activation that this one replaced."""
        return self._original[0]

    def forward(self, input: Tensor) -> Tensor:
        if self.bypass:
            assert self.original is not None
            return self.original(input)
        if input.is_nested:  # from torch's fused encoder
            return torch.nested.as_nested_tensor([self(part) for part in input.unbind()])
        if self.groups is not None:
            self._check_groups(input)
        if not input.is_floating_point():
            raise OrthoactError(f"{self.target}: expected an input of floating point numbers, got {input.dtype}")
        dtype, how = torch.promote_types(input.dtype, torch.float32), (self.family, self.groups, self.channel)
        if curve.is_whole(input) or curve.is_whole(self.theta):
            return curve.plain(input, *self.numbers(dtype), *how)
        rest = None
        if self.theta.device.type == "cpu":
            rest = self._rest_now()
            numbers, frame = rest.rounded(self.theta, dtype), rest.frame(dtype)
        else:
            numbers, frame = self.numbers(dtype)
        if not torch.is_grad_enabled():
            return curve.values(input, numbers, frame, *how)
        if rest is None or not self.theta.requires_grad:
            return curve.Curve.apply(input, numbers, frame, None, *how)
        return curve.Curve.apply(input, self.theta, frame, Source(self, rest), *how)

    def numbers(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """What `curve` takes: the core's numbers and the slopes outwards of the tails, and the joints and the unit.

        In float64, and then rounded: the conversion has large entries; and autocast leaves it alone.
        """
        return self._numbers(self.theta).to(dtype), self._frame().to(dtype)

    def _rest_now(self) -> Rest:
        """Made again when a tensor has changed, by whatever means: its content is compared, not its version."""
        rest = self._rest
        if rest is None or not rest.is_of(self):
            rest = self._rest = Rest(self)
        return rest

    def _numbers(self, theta: Tensor) -> Tensor:
        wide = torch.float64
        a = self.start.to(wide) + _times(self.transform.to(wide), theta.to(wide))
        core = a if self._conversion is None else _times(self._conversion.to(a.device), a)
        if self.tails == "none":
            return torch.cat([core, a.new_zeros(*a.shape[:-1], 2)], dim=-1)
        slopes = self.core_slopes(a) + self.jumps.to(wide)
        return torch.cat([core, -slopes[..., :1], slopes[..., 1:]], dim=-1)

    def _frame(self) -> Tensor:
        lo, hi, location, scale = (getattr(self, name).double() for name in ("lo", "hi", "location", "scale"))
        if self.tails == "none":
            lo, hi = lo.new_tensor(-inf), hi.new_tensor(inf)
        return torch.stack([lo, hi, 1 / scale, -location / scale])

    def _check_groups(self, x: Tensor) -> None:
        assert self.groups is not None and self.channel is not None
        if not -x.dim() <= self.channel < x.dim():
            raise OrthoactError(f"channel {self.channel}: expected an axis of the input, which is {tuple(x.shape)}")
        width = x.shape[self.channel]
        if width % self.groups or not width:
            raise OrthoactError(
                f"groups {self.groups}: expected a divisor of the {width} channels of an input {tuple(x.shape)}"
            )

    def extra_repr(self) -> str:
        groups = "" if self.groups is None else f", groups={self.groups}, channel={self.channel}"
        how = f"degree={self.degree}, tails={self.tails}{groups}, path={engine.get_path()}"
        return f"{self.target} as {self.family.name}, {how}"

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_rest": None}  # what follows from the tensors is in no copy and no file

    def _apply(self, fn, recurse=True):
        def keep_dtype(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        return super()._apply(keep_dtype, recurse)


def _times(matrix: Tensor, vectors: Tensor) -> Tensor:
    """The product for vectors along the last axis, elementwise and a sum.

    A matrix product would run in bfloat16 under autocast, and its last bits would depend on where the numbers lie.
    """
    return (matrix * vectors.unsqueeze(-2)).sum(-1)


class Rest:
    """All tensors of an activation on a CPU but theta, and how its numbers follow from theta.

    By numpy, whose operations on so few numbers take a fraction of the time of torch's.
    """

    def __init__(self, act: Activation):
        n, self.family, self.tails = act.start.numel(), act.family, act.tails != "none"
        self.buffers = [Held.now(getattr(act, name)) for name in BUFFERS]
        self.start, self.transform = _numpy(act.start), _numpy(act.transform)
        self.jumps = _numpy(act.jumps) * (-1.0, 1.0)
        self.ends = np.array([act.lo.item(), act.hi.item()])
        self.location, self.scale = act.location.item(), act.scale.item()
        self.matrix = None
        if isinstance(act.family, Linear):
            conversion, slopes = act.family.conversion(act.degree), np.zeros((2, n))
            if self.tails:
                at = act.family.slopes(self.at(), act.degree)
                slopes = np.stack(at, axis=-1) / self.scale * ((-1.0,), (1.0,))
            matrix = np.concatenate([np.eye(n) if conversion is None else conversion, slopes])
            self.level, self.matrix = matrix @ self.start, matrix @ self.transform
            self.level[-2:] += self.jumps * self.tails
        self.frames: dict[torch.dtype, Tensor] = {}
        self.made: tuple[Held, dict[torch.dtype, Tensor]] = Held(None, 0, b""), {}

    def is_of(self, act: Activation) -> bool:
        """Whether the tensors that it was made from are those of the activation, with the same content."""
        return all(held.is_now(getattr(act, name)) for name, held in zip(BUFFERS, self.buffers, strict=True))

    def at(self) -> np.ndarray:
        return (self.ends - self.location) / self.scale

    def frame(self, dtype: torch.dtype) -> Tensor:
        if dtype not in self.frames:
            ends = self.ends if self.tails else (-inf, inf)
            with torch.inference_mode(False):  # kept, and needed for backward later
                frame = [*ends, 1 / self.scale, -self.location / self.scale]
                self.frames[dtype] = torch.tensor(frame, dtype=dtype, device="cpu")
        return self.frames[dtype]

    def rounded(self, theta: Tensor, dtype: torch.dtype) -> Tensor:
        """The numbers for this theta, the same tensor each time until it changes."""
        held, made = self.made  # replaced together: another thread may run with another theta
        if not held.is_now(theta):
            held, made = self.made = Held.now(theta), {}
        if dtype not in made:
            with torch.inference_mode(False):  # those of all groups side by side, as the kernels read them
                made[dtype] = torch.from_numpy(self.numbers(theta)).t().to(dtype).contiguous().t()
        return made[dtype]

    def numbers(self, theta: Tensor) -> np.ndarray:
        """What `Activation._numbers` computes."""
        if self.matrix is not None:
            return _product(_numpy(theta), self.matrix.T) + self.level
        a = self.start + _product(_numpy(theta), self.transform.T)
        numbers = np.zeros((*a.shape[:-1], a.shape[-1] + 2))
        numbers[..., :-2] = a
        if self.tails:
            slopes = self.family.slope(_unbound(a), self.at()) / self.scale
            numbers[..., -2:] = slopes * (-1.0, 1.0) + self.jumps
        return numbers

    def gradient(self, theta: Tensor, by: np.ndarray) -> np.ndarray:
        """The derivative by theta of the sum of the numbers weighted with `by`."""
        if self.matrix is not None:
            return _product(by, self.matrix)
        found = by[..., :-2]
        if self.tails:
            a = self.start + _product(_numpy(theta), self.transform.T)
            turned = by[..., -2:] * (-1.0, 1.0)
            each = self.family.jacobian(_unbound(a), self.at())[1]
            found = found + np.stack([(part * turned).sum(-1) for part in each], -1) / self.scale
        return _product(found, self.transform)


class Source(NamedTuple):
    """How the numbers of a `Curve` follow from theta, and their derivative: without a node of autograd of their own."""

    act: Activation
    rest: Rest

    def numbers(self, theta: Tensor, dtype: torch.dtype) -> Tensor:
        return self.rest.rounded(theta, dtype)

    def recorded(self, theta: Tensor, dtype: torch.dtype) -> Tensor:
        """The same by operations that can be differentiated."""
        return self.act._numbers(theta).to(dtype)

    def gradient(self, theta: Tensor, by: Tensor) -> Tensor:
        return torch.from_numpy(self.rest.gradient(theta, _numpy(by))).to(theta.dtype)


class Held(NamedTuple):
    """A tensor on a CPU and its bytes, read by the shortest way there is; one that numpy reads can never be resized."""

    tensor: Tensor | None
    """None for one that cannot be held: what it is made from would live on with it, or it does not lie in one piece."""
    address: int
    content: bytes

    @staticmethod
    def now(tensor: Tensor) -> Held:
        if tensor.grad_fn is not None or not (tensor.is_cpu and tensor.is_contiguous()):
            return Held(None, 0, b"")
        return Held(tensor, tensor.data_ptr(), ctypes.string_at(tensor.data_ptr(), tensor.nbytes))

    def is_now(self, tensor: Tensor) -> bool:
        """Whether it is the same tensor in the same place with the same bytes."""
        then, address, content = self
        return (
            tensor is then
            and tensor.data_ptr() == address
            and tensor.nbytes == len(content)
            and tensor.is_contiguous()
            and ctypes.string_at(address, len(content)) == content
        )


def _numpy(tensor: Tensor) -> np.ndarray:
    # a copy: a storage that numpy has seen cannot be resized, which FSDP does
    return tensor.detach().to(torch.float64, copy=True).numpy()


def _product(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    # of many rows not by numpy: the threads of its library and torch's would wait for one another
    return a @ b if a.ndim == 1 else torch.mm(torch.from_numpy(a), torch.from_numpy(b)).numpy()


def _unbound(a: np.ndarray) -> list[np.ndarray]:
    return [a[..., k : k + 1] for k in range(a.shape[-1])]


@contextmanager
def counted(model: nn.Module):
    """How many values pass through the activations of `model` in this block: the sum of the list that it gives.

    >>> from .fit import fit
    >>> net = nn.Sequential(Activation.from_fit(fit("gelu", degree=4)))
    >>> with counted(net) as values:
    ...     _ = net(torch.zeros(3, 5))
    >>> sum(values)
    15
    """
    values: list[int] = []

    def count(module: nn.Module, inputs: tuple[Any, ...]) -> None:
        values.append(inputs[0].numel())

    hooks = [m.register_forward_pre_hook(count) for m in model.modules() if isinstance(m, Activation)]
    try:
        yield values
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def original(model: nn.Module):
    """Run `model` with the activations that were replaced, on the same weights: the teacher, or a control.

    >>> from .fit import fit
    >>> net = nn.Sequential(Activation.from_fit(fit("gelu", degree=4), original=nn.GELU()))
    >>> x = torch.linspace(-3, 3, 7)
    >>> with original(net):
    ...     torch.equal(net(x), nn.GELU()(x))
    True
    """
    activations = [m for m in model.modules() if isinstance(m, Activation)]
    lost = [m for m in activations if m.original is None]
    if lost:
        raise OrthoactError(f"the original of {len(lost)} activations is not known: load the base model instead")
    before = [m.bypass for m in activations]
    try:
        for m in activations:
            m.bypass = True
        yield model
    finally:
        for m, state in zip(activations, before, strict=True):
            m.bypass = state
