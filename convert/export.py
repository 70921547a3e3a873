"""Export a converted model to other runtimes: ONNX, a program of `torch.export`, or the activations alone (see `fold`).

What is written was run before it takes its name: in onnxruntime, or loaded back by torch, at other batch sizes than it
was traced with, against the model itself.
"""

from __future__ import annotations

import inspect
import json
import os
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..interp import curve
from ..interp.activation import Activation
from ..interp.errors import OrthoactError
from .audit import probe_batch
from .fold import fold
from .record import put

FORMATS = {"onnx": ".onnx", "torch": ".pt2", "fold": ".json"}
"""Format -> the ending of its file."""

ATOL = 1e-5
"""How far an exported model may be from the model itself, of the largest output where that is above one."""

ONE_FILE = 2**31 - 2**20
"""Bytes of weights from which ONNX needs a second file for them."""

OUTPUTS = ("logits", "last_hidden_state")
"""Which output of a model of transformers is exported: the first of these, else its first tensor."""


def export(
    out: str | Path, file: str | Path | None = None, *, format: str = "onnx", atol: float = ATOL, **options
) -> dict[str, Any]:
    """Write the converted folder (or Hub id) `out` in another `format`: `onnx`, `torch` (`torch.export`) or `fold`.

    `file` is OUT with the format's ending unless given. ONNX and torch.export have a dynamic batch, and a dynamic
    length where the model takes token ids; both are checked against the model to `atol` (of its largest output where
    that is above one) and nothing is written that is further off. `options` are those of `load_source`.

    Returns `output`, `format`, `bytes`, and `inputs` and `outputs` (name: axes), `dynamic`, `checked` (shapes),
    `difference`; for `fold` `sites` and `max_error`. Raises `OrthoactError` where the model cannot be exported.
    """
    if format not in FORMATS:
        raise OrthoactError(f"format {format!r}: expected one of {', '.join(FORMATS)}")
    name = str(out).rstrip("/")
    path = Path(file) if file is not None else Path(f"{Path(name).name}{FORMATS[format]}")
    if path.is_dir():
        raise OrthoactError(f"{path} is a folder: give a file with -o")
    if format == "fold":
        from .folder import read_activations, read_record
        from .sources import fetch

        folder = fetch(name, ["*.json", "*.safetensors"])
        made = fold(read_activations(folder), read_record(folder))
        with _written(path) as new:
            new.write_text(json.dumps(made, separators=(",", ":")) + "\n", encoding="utf-8")
        errors = [site["max_error"] for site in made["sites"].values()]
        facts: dict[str, Any] = {"sites": len(errors), "max_error": max(errors)}
    else:
        from .sources import load_source

        model = load_source(name, **options).model
        with _written(path) as new:
            facts = export_model(model, new, format=format, atol=atol)
            second = new.with_name(f"{new.name}.data").is_file()
        if format == "onnx" and not second:  # of a larger model that was here before
            path.with_name(f"{path.name}.data").unlink(missing_ok=True)
    held = [path, path.with_name(f"{path.name}.data")] if format == "onnx" else [path]
    size = sum(file.stat().st_size for file in held if file.is_file())
    return {"output": str(path), "format": format, "bytes": size, **facts}


def export_model(model: nn.Module, file: Path, *, format: str = "onnx", atol: float = ATOL) -> dict[str, Any]:
    """Write a model in memory as `file`; what it says of it as `export`. The model is as it was, afterwards.

    Its activations are written with their numbers worked out, in float32: the graph has no float64.
    """
    if format == "onnx":
        _require("onnx", "onnxscript", "onnxruntime")
    with ExitStack() as stack:
        stack.enter_context(_inference(model))
        batches = [probe_batch(model, rows=rows, length=length, seed=rows) for rows, length in ((2, 16), (1, 16))]
        batches += [probe_batch(model, rows=3, length=9, seed=3)]
        wanted = [_outputs(model, batch) for batch in batches]
        last: Exception | None = None
        for length, eager in ((True, False), (True, True), (False, False), (False, True)):
            if eager and not hasattr(model, "set_attn_implementation"):
                break
            with _attention(model, "eager" if eager else None), _settled(model):
                axes = _axes(batches[0], length=length)
                try:
                    program = _traced(model, batches[0], axes)
                    if format == "onnx":
                        run = _write_onnx(program, axes, list(wanted[0]), file)
                    else:
                        run = _write_program(program, file)
                except Exception as error:  # what tracing and conversion raise is of every kind
                    last = error
                    continue
            pairs = [(b, w) for b, w in zip(batches, wanted, strict=True) if length or _alike(b, batches[0])]
            difference = max(_difference(run(batch), outputs) for batch, outputs in pairs)
            if not difference <= atol:
                raise OrthoactError(
                    f"the exported {type(model).__name__} is {difference:.2g} from the model, allowed are {atol:g}: "
                    f"nothing was written"
                )
            return {
                "inputs": {name: [*map(str, _named(tensor, axes[name]))] for name, tensor in batches[0].items()},
                "outputs": list(wanted[0]),
                "dynamic": sorted({name for dims in axes.values() for name in dims.values()}),
                "checked": [{name: list(tensor.shape) for name, tensor in batch.items()} for batch, _ in pairs],
                "difference": difference,
            }
    reason = next(iter(str(_root(cast(Exception, last))).strip().splitlines()), type(last).__name__)
    raise OrthoactError(
        f"{type(model).__name__} could not be exported to {format} by torch {torch.__version__}: {reason[:200]}"
    ) from last


# -- the model as it is traced -----------------------------------------------------------------------------------------


class Settled(nn.Module):
    """An activation whose numbers are worked out: what inference needs, in float32."""

    def __init__(self, act: Activation):
        super().__init__()
        numbers, frame = act.numbers(torch.float32)
        self.register_buffer("core", numbers.detach().clone())
        self.register_buffer("frame", frame.detach().clone())
        self.how = (act.family, act.groups, act.channel)

    def forward(self, input: Tensor) -> Tensor:
        return curve.plain(input, cast(Tensor, self.core), cast(Tensor, self.frame), *self.how)


@contextmanager
def _settled(model: nn.Module) -> Iterator[None]:
    """`model` with `Settled` in the place of each activation; a shared one is asked for by those that share it."""
    found = [(path, m) for path, m in model.named_modules(remove_duplicate=False) if isinstance(m, Activation)]
    if found and found[0][0] == "":
        raise OrthoactError("expected a model with activations, got an activation alone: fold it")
    new = {id(act): Settled(act) for _, act in found}
    shared = [m for m in model.modules() if "_activation" in vars(m)]
    held = [m._activation for m in shared]
    try:
        for path, act in found:
            put(model, path, new[id(act)])
        for module in shared:
            vars(module)["_activation"] = [new[id(module.activation)]]
        yield
    finally:
        for path, act in found:
            put(model, path, act)
        for module, before in zip(shared, held, strict=True):
            vars(module)["_activation"] = before


@contextmanager
def _inference(model: nn.Module) -> Iterator[None]:
    """In evaluation mode, without gradients and caches; other libraries' warnings about tracing are not ours."""
    mode, config = model.training, getattr(model, "config", None)
    cache = getattr(config, "use_cache", None)
    if any(p.dtype in (torch.float16, torch.bfloat16) for p in model.parameters()):
        raise OrthoactError(f"{type(model).__name__} has weights of half precision: export it with --dtype float32")
    if any(p.is_meta for p in model.parameters()):
        raise OrthoactError(f"the weights of {type(model).__name__} are not loaded: it is too large for this machine")
    try:
        model.eval()
        if cache is not None:
            cast(Any, config).use_cache = False
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        model.train(mode)
        if cache is not None:
            cast(Any, config).use_cache = cache


@contextmanager
def _attention(model: Any, implementation: str | None) -> Iterator[None]:
    """With another implementation of attention: one that torch cannot trace has an equal that it can."""
    if implementation is None:
        yield
        return
    before = model.config._attn_implementation
    model.set_attn_implementation(implementation)
    try:
        yield
    finally:
        model.set_attn_implementation(before)


def _outputs(model: nn.Module, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The output that is exported, by its name."""
    out = model(**batch)
    if isinstance(out, Tensor):
        return {"output": out}
    if isinstance(out, Mapping):
        name = next((name for name in OUTPUTS if isinstance(out.get(name), Tensor)), None)
        name = name or next((key for key, value in out.items() if isinstance(value, Tensor)), None)
        if name is not None:
            return {name: out[name]}
    raise OrthoactError(f"{type(model).__name__} returns a {type(out).__name__}: expected a tensor, or a dict of them")


def _axes(batch: Mapping[str, Tensor], *, length: bool) -> dict[str, dict[int, str]]:
    """The dynamic axes of each input: the batch, and with `length` that of token ids and of what goes with them."""
    found = {name: {0: "batch"} for name in batch}
    if length:
        for name, tensor in batch.items():
            if tensor.dim() == 2 and not tensor.is_floating_point():
                found[name][1] = "decoder_length" if name.startswith("decoder_") else "length"
    return found


def _named(tensor: Tensor, axes: Mapping[int, str]) -> list[Any]:
    return [axes.get(axis, size) for axis, size in enumerate(tensor.shape)]


def _alike(batch: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    """Whether two batches differ in their first axis alone."""
    return all(batch[name].shape[1:] == other[name].shape[1:] for name in batch)


def _traced(model: nn.Module, batch: Mapping[str, Tensor], axes: Mapping[str, Mapping[int, str]]) -> Any:
    class Exported(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, **inputs):
            return _outputs(self.model, inputs)

    parameter = inspect.Parameter
    named = [parameter(name, parameter.POSITIONAL_OR_KEYWORD) for name in ("self", *batch)]
    Exported.forward.__signature__ = inspect.Signature(named)  # pyright: ignore  # else guards have no names
    dims = {name: dict.fromkeys(held, torch.export.Dim.DYNAMIC) for name, held in axes.items()}
    return torch.export.export(Exported().eval(), (), dict(batch), dynamic_shapes=dims, strict=False)


# -- the formats -------------------------------------------------------------------------------------------------------

Run = Callable[[Mapping[str, Tensor]], dict[str, Tensor]]


def _write_onnx(program: Any, axes: Mapping[str, Mapping[int, str]], outputs: list[str], file: Path) -> Run:
    import onnxruntime

    made = torch.onnx.export(
        program,
        dynamo=True,
        verbose=False,
        dynamic_shapes={name: dict(held) for name, held in axes.items()},
        output_names=outputs,
    )
    size = sum(tensor.nbytes for tensor in program.state_dict.values())
    cast(Any, made).save(str(file), external_data=size > ONE_FILE)
    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    taken = {item.name for item in session.get_inputs()}

    def run(batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        fed = {name: tensor.cpu().numpy() for name, tensor in batch.items() if name in taken}
        return dict(zip(outputs, map(torch.from_numpy, session.run(outputs, fed)), strict=True))

    return run


def _write_program(program: Any, file: Path) -> Run:
    torch.export.save(program, str(file))
    loaded = torch.export.load(str(file)).module()
    return lambda batch: loaded(**batch)


def _difference(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> float:
    (name, tensor), other = next(iter(wanted.items())), next(iter(found.values()))
    if other.shape != tensor.shape:
        raise OrthoactError(f"the exported {name} has shape {tuple(other.shape)}, the model's {tuple(tensor.shape)}")
    return float((other.to(tensor.device) - tensor).abs().max() / tensor.abs().max().clamp(min=1.0))


def _require(*packages: str) -> None:
    from importlib.util import find_spec

    lost = [name for name in packages if find_spec(name) is None]
    if lost:
        raise OrthoactError(f"ONNX needs {', '.join(lost)}: pip install {' '.join(packages)}")


def _root(error: BaseException) -> BaseException:
    while error.__cause__ is not None:
        error = error.__cause__
    return error


@contextmanager
def _written(path: Path) -> Iterator[Path]:
    """A path of the same name in a folder beside; at the end what lies there takes its place, the file itself last."""
    path = Path(os.path.abspath(path.expanduser()))
    path.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    try:
        yield folder / path.name
        for made in sorted(folder.iterdir(), key=lambda p: p.name == path.name):
            os.replace(made, path.parent / made.name)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
