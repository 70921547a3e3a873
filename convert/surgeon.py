"""The surgeon: plan a conversion, carry it out in place, take it back."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from time import perf_counter
from typing import Any

import torch
from torch import nn

from ..interp.activation import Activation
from ..interp.choose import check_choice, fit_to_tolerance, ladder
from ..interp.domains import Law, Measured
from ..interp.errors import OrthoactError
from ..interp.fit import DERIVATIVE_WEIGHT, Fit, fit
from ..interp.learned import learned
from .audit import Audit, Left, audit
from .budget import sensitivities
from .budget import share as shared_out
from .calls import Shared, exposed, hide_
from .record import attach, detach, put
from .sites import Site, recognise, survey


@dataclass(frozen=True)
class Plan:
    """What a conversion will do: pure data, made before anything is touched."""

    sites: tuple[Site, ...]
    """The activations that are replaced."""
    fits: tuple[Fit, ...]
    """The copy for each of them."""
    left: tuple[Left, ...]
    """What stays, and why."""
    groups: int | None = None
    """Groups of channels with coefficients of their own; 0: each channel."""
    seconds: float = 0.0
    """Time taken."""

    @property
    def parameters(self) -> int:
        """The number of learnable coefficients."""
        return sum(row["parameters"] for row in self.rows)

    @property
    def rows(self) -> list[dict[str, Any]]:
        """One row a site: name, target, family, degree, parameters, errors; calibrated, what was seen of its inputs."""
        kept = ("family", "degree", "value_rms", "slope_rms", "value_max")
        return [
            {"name": s.name, "target": s.target.name}
            | {key: getattr(f, key) for key in kept}
            | {"parameters": 0 if s.shared else f.parameters * (groups_of(s, self.groups) or 1)}
            | {"reason": f"shared with {s.shared}" if s.shared else f.reason}
            | _seen(f)
            for s, f in zip(self.sites, self.fits, strict=True)
        ]


def groups_of(site: Site, groups: int | None) -> int | None:
    """The number of groups at a site: 0 asks for one of each channel."""
    return site.width if groups == 0 else groups


def _seen(fit: Fit) -> dict[str, float]:
    """What a calibration saw of a site."""
    law = fit.domain
    if not isinstance(law, Measured):
        return {}
    seen = {"mean": law.mean, "std": law.std, "outside": law.share_outside(fit.lo, fit.hi)}
    return seen | ({"sensitivity": law.sensitivity} if law.rows else {})


@dataclass(frozen=True)
class Conversion:
    """What was done to a model."""

    plan: Plan
    """The plan that was carried out."""
    spec: dict[str, Any] = field(default_factory=dict)
    """The record that the checkpoint carries."""

    @property
    def sites(self) -> list[dict[str, Any]]:
        """One row a site: name, target, family, degree, parameters, errors."""
        return self.plan.rows

    @property
    def left(self) -> tuple[Left, ...]:
        """What stays, and why."""
        return self.plan.left


def inspect_model(model: nn.Module, **choice) -> tuple[list[Site], list[Left]]:
    """The sites that would be converted and everything that would be left; `choice` as in `find_sites`."""
    return examine(model, **choice)[:2]


def examine(model: nn.Module, **choice) -> tuple[list[Site], list[Left], Audit]:
    """`inspect_model` with what the audit saw."""
    with exposed(model):
        found = survey(model, **choice)
        seen = audit(model, found)
    found = [replace(s, left=s.left or "never called in a forward pass") if s.name in seen.dead else s for s in found]
    sites = [replace(s, channel=seen.channels.get(s.name), width=seen.widths.get(s.name)) for s in found if not s.left]
    return sites, _left(found, seen), seen


def _left(found: list[Site], seen: Audit) -> list[Left]:
    modules = [Left(s.name, s.target.name, seen.calls.get(s.name, 0), s.left) for s in found if s.left]
    return modules + seen.left


def plan(
    model: nn.Module,
    *,
    family: str = "hermite",
    degree: int = 8,
    tolerance: float | None = None,
    parameters: int | None = None,
    tails: str = "linear",
    derivative_weight: float = DERIVATIVE_WEIGHT,
    domain: Law | None = None,
    domains: Mapping[str, Law] | None = None,
    groups: int | str | None = None,
    include: Iterable[str] = (),
    exclude: Iterable[str] = (),
    include_heads: bool = False,
    share: bool = False,
) -> Plan:
    """Find the sites of `model` and fit a copy for each; the model is not touched.

    In place of `degree`, `tolerance` takes for each site the fit with the fewest numbers whose root of J it bounds,
    and `parameters` shares so many numbers over all sites by how much an error at each costs (see `budget`); with
    either, `family="auto"` chooses among all families. `domains` gives sites laws of their own by name, as `calibrate`
    does; the others have `domain`. `groups` gives each of so many groups of channels numbers of its own, 0 or
    `per-channel` each channel. With `share`, sites that have one module keep one activation; else each gets its own, so
    that each can learn. The other arguments are those of `orthoact.fit` and `find_sites`. Raises `OrthoactError`
    where there is nothing to convert, a weight is not finite, a fit is impossible or the budget too small.
    """
    start = perf_counter()
    groups = _number_of(groups)
    check_choice(family, degree, tolerance, parameters, tails, derivative_weight)
    _refuse_converted(model)
    _refuse_fused(model)
    for name, weight in model.named_parameters():
        if not _is_finite(weight):
            raise OrthoactError(
                f"the weight {name} holds NaN or infinite values: repair the checkpoint before converting"
            )
    sites, left = inspect_model(model, include=include, exclude=exclude, include_heads=include_heads)
    if not sites:
        found = (
            "; ".join(f"{item.where or 'model'}: {item.function} ({item.reason})" for item in left) or "no activation"
        )
        raise OrthoactError(f"nothing to convert in {type(model).__name__}: found {found}")
    options: dict[str, Any] = {
        "family": family,
        "tails": tails,
        "derivative_weight": derivative_weight,
    }
    laws = {site.name: (domains or {}).get(site.name, domain) for site in sites}
    if strange := set(domains or {}) - set(laws):
        raise OrthoactError(f"domains: {sorted(strange)[0]!r} is no site of the model; give the laws of its sites")
    if groups is not None:
        _check_groups(groups, sites)
    names = {site.name for site in sites}
    own = [site for site in sites if not share or site.shared not in names]
    units = [groups_of(site, groups) or 1 for site in own]

    def make(site: Site) -> Any:
        law = laws[site.name]
        if parameters is not None:
            return ladder(site.target, domain=law, most=parameters // min(units), **options)
        if tolerance is not None:
            return fit_to_tolerance(site.target, tolerance, domain=law, **options)
        return fit(site.target, degree=degree, domain=law, **options)

    made: dict[Any, Any] = {}  # one law and one target are fitted once, however many sites have them
    for site in own:
        key = (site.key, laws[site.name])
        try:
            made[key] = made[key] if key in made else make(site)
        except OrthoactError as error:
            raise OrthoactError(f"{site.name}: {error}") if domains else error from error
    fits = [made[site.key, laws[site.name]] for site in own]
    if parameters is not None:
        weights, how = sensitivities(model, own, domains or {})
        fits = shared_out(fits, [weights[s.name] for s in own], units, parameters, how)
    chosen = {site.name: f for site, f in zip(own, fits, strict=True)}
    sites = [replace(s, shared="") if s in own else s for s in sites]  # what is shared is what the plan shares
    fits = [chosen.get(s.name) or chosen[s.shared] for s in sites]
    return Plan(tuple(sites), tuple(fits), tuple(left), groups, perf_counter() - start)


def _number_of(groups: int | str | None) -> int | None:
    if groups == "per-channel":
        return 0
    if groups is not None and (not isinstance(groups, int) or groups < 0):
        raise OrthoactError(f"--groups {groups}: expected a positive whole number, or per-channel")
    return groups


def _check_groups(groups: int, sites: list[Site]) -> None:
    named = groups or "per-channel"
    for s in sites:
        if s.channel is None or (groups == 0 and not s.width):
            raise OrthoactError(f"--groups {named}: the channel axis of {s.name} is not known; leave --groups out")
        if groups and s.width and s.width % groups:
            raise OrthoactError(f"--groups {groups}: expected a divisor of the {s.width} channels of {s.name}")


def _refuse_fused(model: nn.Module) -> None:
    """Refuse blocks whose activation is inside a kernel that does not ask the module for it."""
    fused = [n for n, m in model.named_modules() if type(m).__name__.startswith("Liger")]
    patched = [n for n, m in model.named_modules() if "liger" in getattr(type(m).forward, "__module__", "")]
    patched += [n for n, m in model.named_modules() if "liger" in getattr(m.__dict__.get("forward"), "__module__", "")]
    if found := [*fused, *patched]:
        raise OrthoactError(
            f"{found[0]} runs a Liger kernel, which computes its activation inside: load the model without Liger"
        )
    if getattr(model, "_use_kernels", False):
        raise OrthoactError(
            "the model was loaded with use_kernels, which may compute activations inside whole blocks: load it without"
        )


def _refuse_converted(model: nn.Module) -> None:
    if any(isinstance(m, Activation) for m in model.modules()):
        raise OrthoactError(
            "the model is converted already: revert it first (orthoact revert), or --overwrite to refit"
        )


def _is_finite(weight: torch.Tensor) -> bool:
    """Whether a weight holds neither NaN nor infinity; its sum tells at a tenth of the cost, unless that overflows."""
    if weight.is_meta or not weight.is_floating_point():
        return True
    return bool(weight.detach().sum(dtype=torch.float32).isfinite()) or bool(torch.isfinite(weight).all())


def convert_(model: nn.Module, plan_: Plan | None = None, **options) -> Conversion:
    """Replace the activations of `model` in place by learnable copies that compute nearly the same.

    `options` are those of `plan`; a plan made before can be given instead. Everything is checked first: a failure
    leaves the model as it was. Afterwards `model.save_pretrained` (or timm's `save_for_hf`) writes a checkpoint that
    plain `from_pretrained` (`create_model`) loads once orthoact is imported.

    >>> net = nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 2))
    >>> [row["name"] for row in convert_(net, degree=6).sites]
    ['1']
    """
    if plan_ is not None and options:
        raise OrthoactError(f"options {', '.join(options)} beside a plan: give them to plan, which has made its choice")
    made = plan_ or plan(model, **options)
    _refuse_converted(model)
    with exposed(model):
        return _carry_out(model, made)


def _carry_out(model: nn.Module, made: Plan) -> Conversion:
    there = dict(model.named_modules(remove_duplicate=False))
    for site in made.sites:
        old = recognise(site.name, there[site.name]) if site.name in there else None
        if old is None or old.target.name != site.target.name:
            raise OrthoactError(
                f"the plan names {site.name!r}, a {site.target.name} that {type(model).__name__} does not have: "
                f"plan this model"
            )
    activations: dict[str, Activation] = {}
    for site, copy in zip(made.sites, made.fits, strict=True):
        old = model.get_submodule(site.name)
        if site.shared:
            activations[site.name] = activations[site.shared]
            continue
        new = Activation.from_fit(
            copy,
            groups=groups_of(site, made.groups),
            channel=site.channel,
            original=old,
        )
        activations[site.name] = new.train(old.training).to(_device(model, site.name))
    spec = attach(model, activations)
    for name, new in activations.items():
        put(model, name, Shared(new) if spec["sites"][name].get("shared") else new)
    return Conversion(made, spec)


def as_learned(made: Plan, model: nn.Module, reason: str) -> Plan:
    """The plan with each copy as it is in the model now, after a recovery."""
    fits: dict[str, Fit] = {}
    for site, copy in zip(made.sites, made.fits, strict=True):
        if site.shared:
            fits[site.name] = fits[site.shared]
            continue
        act = model.get_submodule(site.name)
        assert isinstance(act, Activation)
        fits[site.name] = learned(act, copy, site.target, reason)
    return replace(made, fits=tuple(fits.values()))


def revert_(model: nn.Module) -> nn.Module:
    """Put the original activations back in place; the weights were never changed. Returns the model.

    >>> net = nn.Sequential(nn.Linear(4, 8), nn.GELU())
    >>> _ = convert_(net)
    >>> revert_(net)[1]
    GELU(approximate='none')
    """
    found = {name: m for name, m in model.named_modules(remove_duplicate=False) if isinstance(m, Activation)}
    if not found:
        raise OrthoactError(f"nothing to revert: {type(model).__name__} holds no learnable activation")
    lost = [name for name, m in found.items() if not isinstance(m.original, nn.Module)]
    if lost:
        raise OrthoactError(f"the original activation of {lost[0]} is not known: load the base model instead")
    for name, m in found.items():
        put(model, name, m.original)  # pyright: ignore[reportArgumentType]
    for name, m in list(model.named_modules(remove_duplicate=False)):
        if isinstance(m, Shared):
            put(model, name, m.activation.original)  # pyright: ignore[reportArgumentType]
    hide_(model.modules())
    detach(model)
    return model


def _device(model: nn.Module, name: str) -> torch.device:
    """Where the site's neighbours live: the nearest owner with parameters."""
    path = name
    while path:
        path = path.rpartition(".")[0]
        parameter = next(model.get_submodule(path).parameters(), None)
        if parameter is not None:
            return torch.device("cpu") if parameter.is_meta else parameter.device
    return torch.device("cpu")
