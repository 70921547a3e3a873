"""The command line: a thin shell. Every command imports what it needs when it runs, so that --help answers at once."""

from __future__ import annotations

import json
import math
from contextlib import contextmanager
from pathlib import Path
from time import perf_counter
from typing import Any

import click

from ._version import __version__


class _Group(click.Group):
    """Turns the project's one exception into a message and exit code 1."""

    def invoke(self, ctx: click.Context) -> Any:
        from .interp.errors import OrthoactError

        try:
            return super().invoke(ctx)
        except OrthoactError as error:
            raise click.ClickException(str(error)) from error
        except BrokenPipeError:
            raise
        except OSError as error:
            what = f"{error.filename}: {error.strerror}" if error.filename else error.strerror or error
            raise click.ClickException(
                f"{what}; is there room on the disk, and may you read and write there?"
            ) from error
        except KeyboardInterrupt:
            raise click.ClickException("interrupted: nothing was written") from None


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__)
def main() -> None:
    """Convert pretrained models to learnable activations.

    MODEL is a Hub id, a local folder (of transformers or timm), timm:NAME, or `demo`, the small GPT-2 that ships with
    the package.
    """


# -- shared pieces -----------------------------------------------------------------------------------------------------


def _options(*options):
    def decorate(function):
        for option in reversed(options):
            function = option(function)
        return function

    return decorate


as_json = click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout and nothing else.")
quiet = click.option("--quiet", is_flag=True, help="No progress and no table.")
strict = click.option("--strict", is_flag=True, help="Fail (exit code 1) if an activation is left or poorly copied.")
device = click.option("--device", default="cpu", show_default=True, help="Where the model runs.")
loading = _options(
    click.option("--task", help="Load with this head: causal-lm, masked-lm, image-classification, base, ..."),
    click.option("--dtype", help="float32, bfloat16 or float16 weights; default: those of the checkpoint."),
    click.option("--revision", help="Hub revision of MODEL."),
    click.option("--trust-remote-code", is_flag=True, help="Run code that comes with MODEL."),
    device,
)
fitting = _options(
    click.option("--family", default="hermite", show_default=True, help="See `orthoact families`; auto: the best."),
    click.option("--degree", type=int, default=None, help="Degree of the core.  [default: 8]"),
    click.option("--tolerance", type=float, help="Not --degree: the fewest numbers whose root of J is below this."),
    click.option("--tails", default="linear", show_default=True, help="linear or none (a bare series)."),
    click.option("--derivative-weight", type=float, default=None, help="Weight of the slope error in J."),
)
choosing = _options(
    click.option("--include", multiple=True, metavar="GLOB", help="Only sites of this name; gates and heads too."),
    click.option("--exclude", multiple=True, metavar="GLOB", help="Not sites of this name."),
    click.option("--include-heads", is_flag=True, help="Also the activations of heads and poolers."),
)
share = click.option("--share", is_flag=True, help="Sites with one module keep one activation; default: one for each.")


def _console():
    from rich.console import Console

    console = Console(stderr=True, highlight=False)
    if not console.is_terminal:
        console.width = 120
    return console


@contextmanager
def _status(text: str, show: bool):
    """A spinner on a terminal, one line elsewhere."""
    if not show:
        yield
        return
    console = _console()
    if console.is_terminal:
        with console.status(text):
            yield
    else:
        console.print(text)
        yield


@contextmanager
def _progress(text: str, show: bool):
    """A function of batches done and their total that moves a bar; one line where there is no terminal."""
    from rich.progress import Progress

    console = _console()
    if show and not console.is_terminal:
        console.print(text)
    with Progress(console=console, transient=True, disable=not show or not console.is_terminal) as bar:
        job = bar.add_task(text, total=None)
        yield lambda done, total: bar.update(job, completed=done, total=total)


def _silence_libraries() -> None:
    """Transformers' progress bars and load reports would mix with ours."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


def _print_json(value: dict[str, Any]) -> None:
    click.echo(json.dumps(value))


def _table(title: str, columns: list[str], rows: list[list[Any]], *, left: bool = False) -> None:
    from rich.table import Table

    console = _console()
    console.print(title, style="bold")
    table = Table(box=None, pad_edge=False, show_header=any(columns))
    for i, column in enumerate(columns):
        words = left or i == 0 or column == "why"
        table.add_column(column, justify="left" if words else "right", overflow="fold")
    for row in rows:
        table.add_row(*(f"{v:.3g}" if isinstance(v, float) else str(v) for v in row))
    console.print(table)


class _Groups(click.ParamType):
    """A number of groups; `per-channel` is 0."""

    name = "G|per-channel"

    def convert(self, value, param, ctx) -> int:
        return 0 if value == "per-channel" else click.INT.convert(value, param, ctx)


def _fit_options(family, degree, tolerance, tails, derivative_weight, parameters=None) -> dict[str, Any]:
    from .interp.choose import check_choice
    from .interp.fit import DERIVATIVE_WEIGHT

    choices = {"degree": degree, "tolerance": tolerance, "parameters": parameters}
    given = {name: value for name, value in choices.items() if value is not None} or {"degree": 8}
    if len(given) > 1:
        raise click.UsageError(f"give one of {', '.join('--' + name for name in given)}")
    weight = DERIVATIVE_WEIGHT if derivative_weight is None else derivative_weight
    check_choice(family, given.get("degree", 8), tolerance, parameters, tails, weight)
    return {"family": family, "tails": tails, "derivative_weight": weight} | given


def _left_rows(left) -> list[dict[str, Any]]:
    return [{"where": i.where, "function": i.function, "calls": i.calls, "reason": i.reason} for i in left]


def _refuse_left(left) -> None:
    from .interp.errors import OrthoactError

    found = [i for i in left if i.proper]
    if found:
        named = "; ".join(f"{i.where or 'model'}: {i.function} ({i.reason})" for i in found[:5])
        raise OrthoactError(f"--strict: {len(found)} activations are left unconverted: {named}")


def _warn_of_misses(made, strict: bool, tolerance: float | None = None) -> None:
    """Say which sites get a copy in name only, which `--strict` refuses, and which miss the tolerance."""
    from .interp.errors import OrthoactError
    from .interp.fit import percent

    missed = [f for f in made.fits if tolerance is not None and f.objective**0.5 > tolerance]
    if missed:
        worst = max(missed, key=lambda f: f.objective)
        click.echo(
            f"warning: {len(missed)} of {len(made.sites)} sites miss --tolerance {tolerance:g}: {worst.family} "
            f"{worst.degree} comes to {worst.objective**0.5:.1e} of {worst.target}; take another --family or a larger "
            f"--tolerance",
            err=True,
        )
    poor = [(site.name, fit) for site, fit in zip(made.sites, made.fits, strict=True) if fit.poor]
    if not poor:
        return
    name, worst = max(poor, key=lambda pair: pair[1].share)
    text = (
        f"{len(poor)} of {len(made.sites)} sites get a poor copy: {worst.family} {worst.degree} misses {worst.target} "
        f"by {percent(worst.share)} at {name}; take another --family or a higher --degree"
    )
    if strict:
        raise OrthoactError(f"--strict: {text}")
    click.echo(f"warning: {text}", err=True)


# -- commands ----------------------------------------------------------------------------------------------------------


@main.command(short_help="List the activations of MODEL and what would be left.")
@click.argument("model")
@_options(loading, choosing, strict, as_json, quiet)
def inspect(
    model, task, dtype, revision, trust_remote_code, device, include, exclude, include_heads, strict, as_json, quiet
):
    """Name every activation of MODEL: the sites that would be converted, and what would be left and why."""
    from .convert.shards import LIGHT
    from .convert.sources import load_source
    from .convert.surgeon import inspect_model

    _silence_libraries()
    with _status(f"loading {model}", not quiet):
        options = {"task": task, "dtype": dtype, "revision": revision, "trust_remote_code": trust_remote_code}
        source = load_source(model, device=device, most=LIGHT, **options)
    sites, left = inspect_model(source.model, include=include, exclude=exclude, include_heads=include_heads)
    if as_json:
        rows = [{"name": s.name, "target": s.target.name, "module": s.module, "channel": s.channel} for s in sites]
        _print_json({"sites": rows, "left": _left_rows(left)})
    elif not quiet:
        _table(f"{len(sites)} sites", ["name", "target", "module"], [[s.name, s.target.name, s.module] for s in sites])
        if left:
            rows = [[i.where or "(model)", i.function, i.calls, i.reason] for i in left]
            _table(f"{len(left)} left", ["where", "function", "calls", "reason"], rows)
    if strict:
        _refuse_left(left)


@main.command(short_help="Fit a copy of one activation and draw it.")
@click.argument("target")
@fitting
@click.option("--mean", type=float, default=0.0, show_default=True, help="Mean of the inputs' Gaussian law.")
@click.option("--std", type=float, default=1.0, show_default=True, help="Its standard deviation.")
@click.option("--plot", type=click.Path(dir_okay=False), help="Draw it into this .png, .svg or .pdf.")
@_options(as_json, quiet)
def fit(target, family, degree, tolerance, tails, derivative_weight, mean, std, plot, as_json, quiet):
    """Fit a copy of one activation, TARGET (gelu, silu, "leaky_relu(0.2)", ...): errors, joints, coefficients."""
    from .interp.choose import fit_to_tolerance
    from .interp.domains import Gaussian
    from .interp.fit import fit as fit_target
    from .interp.plot import check_format, plot_fit, sketch
    from .interp.targets import get_target

    if plot:
        check_format(plot)

    options = _fit_options(family, degree, tolerance, tails, derivative_weight)
    solve = fit_target if tolerance is None else fit_to_tolerance
    result = solve(get_target(target), domain=Gaussian(mean, std), **options)
    if plot:
        plot_fit(result, get_target(target), plot)
    if as_json:
        _print_json(result.to_dict())
    elif not quiet:
        found, anywhere = result.to_dict(), (-math.inf, math.inf)
        rows = [[name.replace("_", " "), found[name]] for name in ("parameters", "value_rms", "slope_rms", "value_max")]
        rows += [["joints", "none" if result.tails == "none" else f"{result.lo:.6g} and {result.hi:.6g}"]]
        rows += [["holds", "everywhere" if result.holds == anywhere else "from {:.6g} to {:.6g}".format(*result.holds)]]
        rows += [["condition", result.condition], ["why", result.reason]]
        _table(f"{result.target} as {result.family} {result.degree}", ["", ""], rows, left=True)
        if not plot and "utf" in (_console().encoding or "").lower():
            _console().print(sketch(result, get_target(target), min(_console().width, 80)), markup=False)
        _console().print("coefficients:", style="dim")
        click.echo(" ".join(f"{c:.9g}" for c in result.coefficients))
        if plot:
            _console().print(f"wrote {plot}", markup=False)


@main.command(short_help="Replace the activations of MODEL; write a checkpoint.")
@click.argument("model")
@click.option("-o", "--output", type=click.Path(path_type=Path), help="Folder to write.  [default: ./MODEL-FAMILY]")
@_options(fitting, choosing)
@click.option("--parameters", type=int, help="Not --degree: share so many learnable numbers over the sites.")
@click.option("--groups", type=_Groups(), help="Numbers of its own for each of so many groups of channels.")
@share
@loading
@click.option(
    "--calibrate", type=click.Path(), help="Fit each site to this data: as --data.  [default: that of --recover]"
)
@click.option(
    "--recover",
    type=click.Path(),
    help="Then bring the activations nearer to the original on this data: least squares, then --steps.",
)
@click.option("--steps", type=int, help="Of the recovery; 0: least squares alone.  [default: 60]")
@click.option("--limit", type=int, help="Calibrate on so many tokens, texts or images.  [default: 2,048, 128, 128]")
@click.option("--batch-size", type=int, default=8, show_default=True, help="Of the calibration and the recovery.")
@click.option("--dry-run", is_flag=True, help="Plan only; write nothing.")
@click.option("--overwrite", is_flag=True, help="Replace OUTPUT; refit a MODEL that is converted already.")
@click.option(
    "--seed", type=int, default=0, show_default=True, help="Seed of the probe batch, --calibrate and --recover."
)
@click.option("--adapter", is_flag=True, help="Write the activations alone, a few kB, as an adapter of PEFT.")
@click.option("--standalone", is_flag=True, help="Add a code file: without orthoact, by trust_remote_code=True.")
@click.option("--push-to-hub", metavar="REPO", help="Push OUTPUT to this repository of the Hub.")
@click.option("--private", is_flag=True, help="Of --push-to-hub: a repository that only you see, if it is new.")
@click.option("--no-report", is_flag=True, help="Leave report.html out of OUTPUT.")
@_options(strict, as_json, quiet)
def convert(
    model,
    output,
    family,
    degree,
    tolerance,
    tails,
    derivative_weight,
    parameters,
    include,
    exclude,
    include_heads,
    share,
    groups,
    task,
    dtype,
    revision,
    trust_remote_code,
    device,
    calibrate,
    recover,
    steps,
    limit,
    batch_size,
    dry_run,
    overwrite,
    seed,
    adapter,
    standalone,
    push_to_hub,
    private,
    no_report,
    strict,
    as_json,
    quiet,
):
    """Replace the activations of MODEL by learnable ones that start as faithful copies, and write the checkpoint.

    The folder loads with plain from_pretrained (timm: create_model) after `import orthoact`. No weight is changed.
    With --calibrate (a text file, a folder of images, a data set on disk; no labels needed) each site is fitted to its
    own inputs, weighted by how much an error there would change the model's output. With --recover (data alike) the
    new activations alone are then set to the least squares on their inputs and trained, so that the model's output is
    again what it was with the old ones; without --calibrate, each site is fitted to that data before.
    """
    from .convert.calibrate import calibrate_on
    from .convert.checkpoint import check_output, save
    from .convert.data import existing
    from .convert.fidelity import evaluate
    from .convert.provenance import own_command
    from .convert.shards import LIGHT, memory
    from .convert.sources import load_source
    from .convert.surgeon import as_learned, convert_, inspect_model, plan, revert_
    from .interp.errors import OrthoactError

    options = _fit_options(family, degree, tolerance, tails, derivative_weight, parameters)
    flag, calibrate = ("--recover", recover) if calibrate is None else ("--calibrate", calibrate)
    if limit is not None and calibrate is None:
        raise click.UsageError("--limit bounds the data of --calibrate: give that too")
    if steps is not None and recover is None:
        raise click.UsageError("--steps are those of --recover: give that too")
    if steps is not None and steps < 0:
        raise OrthoactError(f"--steps {steps}: expected a whole number that is not negative")
    for name, data in ((flag, calibrate), ("--recover", recover)):  # before a model is loaded
        if data is not None:
            existing(data, name)
    if adapter and standalone:
        raise click.UsageError("give one of --adapter and --standalone")
    form = "adapter" if adapter else "standalone" if standalone else "full"
    out = output or _default_output(model, family)
    if push_to_hub and not dry_run:
        from .convert.hub import check_push

        check_push(push_to_hub)
    if not dry_run:
        check_output(out, overwrite=overwrite)
    _silence_libraries()
    clock = perf_counter()
    with _status(f"loading {model}", not quiet):
        loads = {"task": task, "dtype": dtype, "revision": revision, "trust_remote_code": trust_remote_code}
        whole = calibrate is not None or parameters is not None or standalone or dtype is not None or device != "cpu"
        most = None if whole else LIGHT if dry_run or adapter else memory() // 2
        source = load_source(model, device=device, most=most, **loads)
    loaded = perf_counter() - clock
    if source.converted and overwrite:
        revert_(source.model)
    choice = {"include": include, "exclude": exclude, "include_heads": include_heads}
    laws, calibrated = {}, 0.0
    if calibrate is not None:
        clock = perf_counter()
        with _progress("calibrating", not quiet) as progress:
            sites, _ = inspect_model(source.model, **choice)
            laws = calibrate_on(
                source, sites, calibrate, limit=limit, batch_size=batch_size, seed=seed, flag=flag, progress=progress
            )
        calibrated = perf_counter() - clock
    with _status("fitting", not quiet):
        made = plan(source.model, domains=laws, groups=groups, share=share, **choice, **options)
    if strict:
        _refuse_left(made.left)
    if recover is None or dry_run:
        _warn_of_misses(made, strict, tolerance)
    report: dict[str, Any] = {
        "output": None if dry_run else str(out),
        "sites": made.rows,
        "left": _left_rows(made.left),
        "seconds": {"load": loaded, "fit": made.seconds, "save": 0.0} | ({"calibrate": calibrated} if laws else {}),
        "parameters": made.parameters,
    }
    if not dry_run:
        clock = perf_counter()
        convert_(source.model, made)
        report["seconds"]["fit"] += perf_counter() - clock
        if recover is not None:
            from .finetune.recover import recover as recover_on

            with _progress("recovering", not quiet) as progress:
                chosen = {} if steps is None else {"steps": steps}
                report["recovery"] = recover_on(
                    source, recover, batch_size=batch_size, seed=seed, progress=progress, **chosen
                )
            found = report["recovery"]
            report["seconds"]["recover"] = found["seconds"]
            if found["kept"] != "fit":
                how = {"solved": "least squares on its inputs", "trained": "trained towards the original"}
                how["both"] = f"{how['solved']}, then {how['trained']}"
                made = as_learned(made, source.model, how[found["kept"]])
                report["sites"] = made.rows
            _warn_of_misses(made, strict, tolerance)
        with _status("measuring", not quiet):
            try:
                if source.planned:
                    raise OrthoactError("the weights were not loaded")
                report["fidelity"] = evaluate(source, seed=seed)
            except OrthoactError as error:  # no input could be made up: the conversion itself is sound
                if "NaN" in str(error):
                    raise
                _console().print(f"not measured: {error}")
        with _status(f"writing {out}", not quiet):
            clock = perf_counter()
            record = {k: v for k, v in report.items() if k != "output"}
            record["seconds"] = {k: v for k, v in report["seconds"].items() if k != "save"}
            record |= {"fits": {s.name: f.to_dict() for s, f in zip(made.sites, made.fits, strict=True)}}
            if laws:
                record |= {"calibration": {name: law.histogram() for name, law in laws.items()}}
            made_by = {"form": form, "seed": seed, "command": own_command(), "page": not no_report}
            save(source.model, out, source=source, report=record, overwrite=overwrite, **made_by)
            report["seconds"]["save"] = perf_counter() - clock
        if push_to_hub:
            from .convert.hub import push as push_folder

            with _status(f"pushing {out} to {push_to_hub}", not quiet):
                report["pushed"] = push_folder(out, push_to_hub, private=private)
    if as_json:
        _print_json(report)
    elif not quiet:
        _report(model, report, made)
        if dry_run and recover is not None:
            _console().print("--recover was left out")
        if not (dry_run or no_report or adapter):
            _console().print(f"see {out / 'report.html'}")


def _default_output(model: str, family: str) -> Path:
    name = model.removeprefix("timm:")
    name = Path(name).resolve().name if Path(name).is_dir() else name.rpartition("/")[2]
    return Path(f"{name}-{family}")


def _report(model: str, report: dict[str, Any], made) -> None:
    """The short table at the end of a conversion: one row for sites alike, and why each got what it got."""
    console, sites = _console(), report["sites"]
    said = [row["reason"].split("; ") for row in sites]
    common = [part for part in said[0] if all(part in parts for parts in said)]  # said once, below
    keys = ("target", "family", "degree", "value_rms", "slope_rms", "value_max", "parameters")
    kinds: dict[tuple, list[str]] = {}
    for row, parts in zip(sites, said, strict=True):
        why = "; ".join(part for part in parts if part not in common)
        kinds.setdefault((*(row[key] for key in keys), why), []).append(row["name"])
    columns = ["target", "sites", "family", "degree", "value rms", "slope rms", "value max", "numbers", "why"]
    rows = [[kind[0], len(names), *kind[1:]] for kind, names in kinds.items()]
    if len(kinds) > len({row["target"] for row in sites}):  # sites of one target differ
        columns[:2] = ["site", "target"]
        of = {name: kind for kind, names in kinds.items() for name in names}
        rows = [[row["name"], *of[row["name"]]] for row in sites]
    if not any(row[-1] for row in rows):
        columns, rows = columns[:-1], [row[:-1] for row in rows]
    _table(f"{model}: {len(sites)} sites, {report['parameters']:,} learnable numbers", columns, rows)
    if common:
        console.print("; ".join(common), style="dim")
    for item in made.left:
        console.print(f"left: {item.where or '(model)'} {item.function}: {item.reason}", style="dim")
    if "recovery" in report:
        found = report["recovery"]
        before, solved, after = (f"{found[f'divergence{key}']:.2e}" for key in ("_before", "_solved", ""))
        told = (
            f"recovered by least squares: divergence from the original on held-out data {before} before, {solved} after"
        )
        if found["kept"] in ("fit", "trained"):
            told = f"the least squares were no better than the fit: divergence on held-out data {before}"
        if found["steps"]:
            gained = after if found["kept"] in ("trained", "both") else "no better, and were taken back"
            told += f"; {found['steps']} steps: {gained}"
        console.print(told)
    if "fidelity" in report:
        _fidelity_table(report["fidelity"])
    if report["output"]:
        console.print(f"wrote {report['output']}")
    else:
        console.print("dry run: nothing was written")


def _fidelity_table(result: dict[str, Any]) -> None:
    unit = next(k for k in ("tokens", "texts", "images") if k in result)
    source = {"file": "given data", "demo": "the demo's held-out text", "probe": "a seeded probe batch (no real data)"}
    rows = []
    for name, label in (("perplexity", "perplexity"), ("loss", "loss")):
        if name in result:
            rows.append([label, f"{result[f'{name}_base']:.5f}", f"{result[name]:.5f}"])
    if "change" in result:
        rows.append(["change", "", f"{result['change']:+.4f} %"])
    names = {"kl": "KL(original, converted)", "top1_agreement": "same top-1", "cosine_mean": "cosine, mean"}
    for name, label in (names | {"cosine_min": "cosine, least"}).items():
        if name in result:
            rows.append([label, "", f"{result[name]:.2e}" if name == "kl" else f"{result[name]:.7f}"])
    _table(
        f"against the original, on {result[unit]} {unit} of {source[result['data']]}",
        ["", "original", "converted"],
        rows,
    )


@main.command(short_help="Compare OUT with its original.")
@click.argument("out")
@click.option("--against", metavar="BASE", help="Compare with this model, not with OUT's own original activations.")
@click.option("--data", type=click.Path(), help="A text file, a folder of images, or a data set on disk.")
@click.option("--max-kl", type=float, help="Fail (exit code 1) above this KL divergence, in nats.")
@click.option("--max-change", type=float, help="Fail (exit code 1) above this change of the metric, in per cent.")
@click.option("--limit", type=int, help="At most so many tokens, texts or images.")
@click.option("--batch-size", type=int, default=8, show_default=True)
@click.option("--seed", type=int, default=0, show_default=True, help="Seed of the probe batch and of masks.")
@_options(loading, as_json, quiet)
def evaluate(
    out,
    against,
    data,
    max_kl,
    max_change,
    limit,
    batch_size,
    seed,
    task,
    dtype,
    revision,
    trust_remote_code,
    device,
    as_json,
    quiet,
):
    """How near the converted model OUT is to its original: KL, top-1 agreement, cosine, and the task's loss.

    Without --data: the demo's held-out text for the demo model, a seeded probe batch for every other.
    """
    from .convert.fidelity import evaluate as compare
    from .convert.sources import load_source
    from .interp.errors import OrthoactError

    _silence_libraries()
    loads = {"task": task, "dtype": dtype, "trust_remote_code": trust_remote_code, "device": device}
    with _status(f"loading {out}", not quiet):
        source = load_source(out, revision=revision, **loads)
        base = load_source(against, **loads) if against else None
    with _progress("comparing", not quiet) as progress:
        result = compare(
            source, against=base, data=data, limit=limit, batch_size=batch_size, seed=seed, progress=progress
        )
    if as_json:
        _print_json(result)
    elif not quiet:
        _fidelity_table(result)
    for flag, name, bound in (("--max-kl", "kl", max_kl), ("--max-change", "change", max_change)):
        if bound is not None and name not in result:
            raise OrthoactError(
                f"{flag} {bound}: this model and data give no {name}; leave the bound out or give --data"
            )
        if bound is not None and abs(result[name]) > bound:
            raise OrthoactError(f"{flag} {bound}: the {name} is {result[name]:.4g}")


@main.command(short_help="Put the original activations back.")
@click.argument("out")
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True, help="Folder to write.")
@click.option("--overwrite", is_flag=True, help="Replace OUTPUT.")
@_options(loading, as_json, quiet)
def revert(out, output, overwrite, task, dtype, revision, trust_remote_code, device, as_json, quiet):
    """Put the original activations back into the converted model OUT and write an ordinary checkpoint."""
    from .convert.checkpoint import check_output, save
    from .convert.sources import load_source
    from .convert.surgeon import revert_

    check_output(output, overwrite=overwrite)
    _silence_libraries()
    with _status(f"loading {out}", not quiet):
        loads = {"task": task, "dtype": dtype, "revision": revision, "trust_remote_code": trust_remote_code}
        source = load_source(out, device=device, **loads)
    revert_(source.model)
    save(source.model, output, source=source, overwrite=overwrite)
    if as_json:
        _print_json({"output": str(output)})
    elif not quiet:
        _console().print(f"wrote {output}")


@main.command(short_help="Prove that no other weight of OUT was changed.")
@click.argument("out")
@click.option("--base", help="The model that OUT was made of.  [default: the one that it names]")
@_options(loading, as_json, quiet)
def verify(out, base, task, dtype, revision, trust_remote_code, device, as_json, quiet):
    """Prove that every tensor of the converted model OUT but those of its activations is bit-equal to its base.

    The base's files are compared with the hashes in the record too. Exit code 1 where anything differs.
    """
    from .convert.verify import verify as compare
    from .interp.errors import OrthoactError

    _silence_libraries()
    loads = {"task": task, "dtype": dtype, "trust_remote_code": trust_remote_code, "device": device}
    with _status(f"comparing {out} with its base", not quiet):
        result = compare(out, base, revision=revision, **loads)
    if as_json:
        _print_json(result)
    elif not quiet:
        shown = ("base", "revision", "tensors", "activations")
        rows = [[key, result[key]] for key in shown if result[key] is not None] + [
            [name, state] for name, state in result["files"].items()
        ]
        _table("bit-equal to its base" if result["verified"] else "not its base", ["", ""], rows)
    if not result["verified"]:
        lists = [(k, result[k]) for k in ("differ", "missing", "added") if result[k]]
        wrong = [f"{k} ({len(v)}): {', '.join(v[:3])}{', ...' * (len(v) > 3)}" for k, v in lists]
        wrong += [f"{name} {state}" for name, state in result["files"].items() if state == "differs"]
        raise OrthoactError(f"{out} is not {result['base']} with other activations: {'; '.join(wrong) or 'no tensor'}")


@main.command(short_help="Write OUT as ONNX, torch.export or plain coefficients.")
@click.argument("out")
@click.option("--format", "format_", type=click.Choice(["onnx", "torch", "fold"]), default="onnx", show_default=True)
@click.option("-o", "--output", type=click.Path(path_type=Path), help="File.  [default: OUT.onnx, OUT.pt2, OUT.json]")
@click.option("--atol", type=float, default=1e-5, show_default=True, help="How far it may be from the model.")
@_options(loading, as_json, quiet)
def export(out, format_, output, atol, task, dtype, revision, trust_remote_code, device, as_json, quiet):
    """Write the converted model OUT for another runtime, checked against the model before it takes its name.

    onnx: with a dynamic batch, run in onnxruntime. torch: a program of torch.export. fold: the activations alone, as
    coefficients of polynomials or pieces in JSON.
    """
    from .convert.export import export as export_to

    _silence_libraries()
    loads = {"task": task, "dtype": dtype, "revision": revision, "trust_remote_code": trust_remote_code}
    with _status(f"exporting {out}", not quiet):
        result = export_to(out, output, format=format_, atol=atol, device=device, **loads)
    if as_json:
        _print_json(result)
    elif not quiet:
        shown = ("bytes", "outputs", "dynamic", "difference", "sites", "max_error")
        rows = [[key, ", ".join(v) if isinstance(v := result[key], list) else v] for key in shown if key in result]
        _table(f"wrote {result['output']}", ["", ""], rows, left=True)


@main.command(short_help="Push OUT to the Hub.")
@click.argument("out", type=click.Path(path_type=Path))
@click.argument("repo")
@click.option("--private", is_flag=True, help="A repository that only you see, if it is new.")
@click.option("--revision", help="Branch to push to, made if absent.  [default: main]")
@click.option("--dry-run", is_flag=True, help="List the files; push nothing.")
@click.option("--message", help="Of the commit.")
@_options(as_json, quiet)
def push(out, repo, private, revision, dry_run, message, as_json, quiet):
    """Push the converted model or adapter OUT to the Hub repository REPO, in one commit, with a card."""
    from .convert.hub import push as push_folder

    _silence_libraries()
    with _status(f"pushing {out} to {repo}", not quiet and not dry_run):
        result = push_folder(out, repo, private=private, revision=revision, dry_run=dry_run, message=message)
    if as_json:
        _print_json(result)
    elif not quiet:
        _table(f"{len(result['files'])} files", ["path", "bytes"], [[f["path"], f["bytes"]] for f in result["files"]])
        _console().print("dry run: nothing was pushed" if dry_run else f"pushed to {result['url']}")


def _recipes(ctx, param, incomplete: str) -> list[Any]:
    """The recipes for the tab key: their names without reading them, or files."""
    from click.shell_completion import CompletionItem

    names = sorted(path.stem for path in (Path(__file__).parent / "recipes").glob(f"{incomplete}*.yaml"))
    return [CompletionItem(name) for name in names] or [CompletionItem(incomplete, type="file")]


@main.command(short_help="Train as RECIPE says.")
@click.argument("recipe", shell_complete=_recipes)
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
@click.option("-o", "--output", type=click.Path(path_type=Path), help="Folder to write.  [default: ./RECIPE]")
@click.option("--num-processes", type=int, help="Train on so many processes of this machine.")
@click.option("--resume", is_flag=True, help="Go on from the last checkpoint in OUTPUT, to the same end.")
@click.option("--compare", is_flag=True, help="Run the recipe's table: every row at every rate and seed.")
@click.option("--offline", is_flag=True, help="Take the recipe's substitutes, which need no network.")
@click.option("--overwrite", is_flag=True, help="Replace OUTPUT.")
@click.option("--no-report", is_flag=True, help="Leave report.html out of OUTPUT.")
@_options(as_json, quiet)
def finetune(recipe, overrides, output, num_processes, resume, compare, offline, overwrite, no_report, as_json, quiet):
    """Train as RECIPE says (a name of `orthoact recipes`, or a .yaml file), with some keys replaced.

    OUTPUT is an ordinary converted checkpoint, with metrics.jsonl (one line a logged step) and state/ (checkpoints).
    """
    import sys

    from .convert.report import write_report
    from .finetune.compare import compare as run_table
    from .finetune.launch import close, relaunch
    from .finetune.recipe import read
    from .finetune.run import train

    if resume and overwrite:
        raise click.UsageError("give one of --resume, --overwrite")
    made = read(recipe, overrides, offline=offline)
    if num_processes is not None and relaunch(num_processes, sys.argv[1:]):
        return
    _silence_libraries()
    options: dict[str, Any] = {"resume": resume, "overwrite": overwrite, "processes": num_processes}
    try:
        facts = (run_table if compare else train)(made, output, quiet=quiet or as_json, **options)
    except KeyboardInterrupt:
        raise click.ClickException("interrupted: the same command with --resume goes on") from None
    finally:
        close()
    if not facts:  # not the first process
        return
    if not no_report:
        write_report(facts["output"])
    if as_json:
        _print_json(facts)
    elif not quiet and compare:
        console = _console()
        console.print(facts["table"], markup=False)
        console.print(f"wrote {facts['output']}")
    elif not quiet:
        columns = [("before training", "zero_step"), ("validation", "validation"), ("best", "best"), ("test", "test")]
        names = list(facts["test"])
        shown = {key: {name: f"{value:.5g}" for name, value in (facts[key] or {}).items()} for _, key in columns}
        rows = [[label, *(shown[key].get(name, "") for name in names)] for label, key in columns]
        _table(f"after {facts['step']} steps", ["", *names], rows)
        _console().print(f"wrote {facts['output']}")
    if not (quiet or as_json or no_report):
        _console().print(f"see {Path(facts['output']) / 'report.html'}")


@main.command(short_help="List the recipes, or print one.")
@click.argument("name", required=False, shell_complete=_recipes)
@as_json
def recipes(name, as_json):
    """List the recipes that ship with the package, or print the one called NAME to edit."""
    from .finetune.recipe import listing, read, source_of

    if name is not None:
        if as_json:
            _print_json(read(name).to_dict())
        else:
            click.echo(source_of(name), nl=False)
        return
    found = listing()
    if as_json:
        rows = [
            {"name": r.name, "about": r.about, "model": r.model, "task": r.task, "data": r.data.path} for r in found
        ]
        _print_json({"recipes": rows})
        return
    rows = [[r.name, r.model, r.data.path, r.train.what, r.about] for r in found]
    _table("recipes", ["name", "model", "data", "trains", "about"], rows, left=True)


@main.command(short_help="Write the HTML report on OUT.")
@click.argument("out", type=click.Path(path_type=Path))
@click.option(
    "-o", "--output", type=click.Path(dir_okay=False, path_type=Path), help="File.  [default: OUT/report.html]"
)
@_options(as_json, quiet)
def report(out, output, as_json, quiet):
    """Write the HTML report on the folder OUT: every activation, where the error sits, what training did.

    One file that needs no network. `convert` and `finetune` write it by themselves.
    """
    from .convert.report import write_report

    path = write_report(out, output)
    if as_json:
        _print_json({"report": str(path), "bytes": path.stat().st_size})
    elif not quiet:
        _console().print(f"see {path}")


@main.command(short_help="List the families of activations.")
@as_json
def families(as_json):
    """The families of learnable activations: formula, learnable numbers, smoothness, cost, reference.

    A second table has the variance-preserving start of each, for training from scratch: its moments under N(0, 1).
    """
    from .interp.families import FAMILIES

    def start(family) -> dict[str, Any]:
        found = family.moments(family.variance_preserving(3))
        names = ("mean", "square", "slope_square", "chi", "forward", "backward")
        return {"degree": 3} | {name: getattr(found, name) for name in names}

    fields = ("name", "formula", "numbers", "smoothness", "cost", "reference")
    rows = [
        {key: getattr(f, key) for key in fields}
        | {"degrees": [f.degrees[0], f.degrees[-1]], "parameters": f.size(8)}
        | {"variance_preserving": start(f)}
        for f in FAMILIES.values()
    ]
    if as_json:
        _print_json({"families": rows})
        return
    columns = ["name", "formula", "learnable numbers", "degrees", "smoothness", "cost of a value", "reference"]
    keys = ("name", "formula", "numbers", "degrees", "smoothness", "cost", "reference")
    shown = [r | {"degrees": "{} to {}".format(*r["degrees"])} for r in rows]
    _table("families", columns, [[r[key] for key in keys] for r in shown], left=True)
    starts = [(r["name"], r["variance_preserving"]) for r in rows]
    shown = [[name] + [f"{v[key]:.4f}" for key in ("mean", "square", "slope_square", "chi")] for name, v in starts]
    title = "variance-preserving start at degree 3, inputs from N(0, 1)"
    _table(title, ["name", "E[F]", "E[F^2]", "E[F'^2]", "chi"], shown)


@main.command(short_help="Print versions, for a bug report.")
@as_json
def env(as_json):
    """Versions and settings, for a bug report."""
    import platform
    from importlib.metadata import PackageNotFoundError, version

    import torch

    from .convert.transformers_hooks import TESTED
    from .interp.engine import describe

    found = {"orthoact": __version__, "python": platform.python_version(), "platform": platform.platform()}
    names = (
        "torch",
        "transformers",
        "timm",
        "accelerate",
        "peft",
        "datasets",
        "safetensors",
        "huggingface_hub",
        "scipy",
    )
    for name in names:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "missing"
    found["transformers tested"] = " to ".join(TESTED)
    found["threads"] = str(torch.get_num_threads())
    found["activations"] = describe()
    found["accelerator"] = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    if as_json:
        _print_json(found)
    else:
        for name, value in found.items():
            click.echo(f"{name}: {value}")


if __name__ == "__main__":
    main()
