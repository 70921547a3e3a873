"""The round trip of one model of the census: convert, save, reload, perturb, and load where orthoact is absent."""

from __future__ import annotations

import contextlib
import re
import shutil
import tempfile
from pathlib import Path
from typing import Any


def trip(model: Any, load: Any) -> dict[str, Any]:
    """Convert, save, reload, perturb, and load where orthoact is absent."""
    import timm
    import torch

    import orthoact
    from orthoact.convert.checkpoint import save
    from orthoact.convert.record import absent

    livened(model)
    batch = runnable(model)
    if batch is None:
        return {"why": "no batch runs"}
    base = output(model, batch)
    done = orthoact.convert_(model, degree=4, include_heads=True)
    acts = {s.name: model.get_submodule(s.name) for s in done.plan.sites}
    with torch.no_grad():
        for act in acts.values():
            act.theta += 0.05 * torch.randn_like(act.theta)
    reached: dict[str, str] = {}  # site -> the part of the model whose run reaches it
    runs: dict[str, tuple[Any, Any]] = {}
    parts = [(path, part) for path, part in model.named_modules() if not path or hasattr(part, "main_input_name")]
    parts += [(owner, model.get_submodule(owner)) for owner in dict.fromkeys(owner_path(model, n) for n in acts)]
    for path, part in parts:
        if path and all(n in reached for n in acts if n.startswith(f"{path}.")):
            continue
        made = runnable(part) if path else batch
        if made is None:
            continue
        calls = passed(list(acts.values()), part, made)
        fresh = {
            n: path
            for n, act in acts.items()
            if n not in reached and any(t.numel() for out in calls[id(act)] for t in out)
        }
        if fresh or not path:
            runs[path] = made, output(part, made)
            reached |= fresh
    result: dict[str, Any] = {"sites": len(acts), "reached": len(reached)}
    with orthoact.original(model):
        result["original"] = same(output(model, batch), base)
    folder = Path(tempfile.mkdtemp()) / "made"
    try:
        save(model, folder)
        loaded = load(str(folder))
        for tensor in loaded.parameters():  # read in place from a file, at any address: kernels round by it
            tensor.data = tensor.data.clone()
        if sorted(model.state_dict()) != sorted(loaded.state_dict()):
            return result | {"why": "other tensors after reloading"}
        lost = [k for k, v in model.state_dict().items() if not torch.equal(v, loaded.state_dict()[k].to(v.dtype))]
        result["equal"] = not lost and all(
            same(output(loaded.get_submodule(path), made), before) for path, (made, before) in runs.items()
        )
        if lost:
            result["lost"] = lost[:3]
        result |= perturbed(model, acts, reached, runs)
        token = absent.set(True)
        registered = timm.models._registry._model_entrypoints.pop("orthoact", None)
        try:
            load(str(folder))
            result["loud"] = False
        except Exception as error:
            result["loud"] = "orthoact" in str(error)
            if not result["loud"]:
                result["said"] = told(error)
        finally:
            absent.reset(token)
            if registered:
                timm.models._registry._model_entrypoints["orthoact"] = registered
    finally:
        shutil.rmtree(folder.parent, ignore_errors=True)
    return result


def runnable(model: Any) -> dict[str, Any] | None:
    """The first made-up batch that a model, or a layer of one, takes."""
    import torch

    from orthoact.convert.audit import probe_batches, tensors_for

    whole = hasattr(model, "main_input_name") or hasattr(model, "pretrained_cfg")
    with contextlib.suppress(Exception):
        for made in probe_batches(model, rows=1, length=8) if whole else tensors_for(model):
            with contextlib.suppress(Exception):
                torch.manual_seed(0)
                made = made if whole else {"": torch.randn_like(made[""])}
                output(model, made)
                return made
    return None


def owner_path(model: Any, name: str) -> str:
    """The module whose forward calls the activation of this name."""
    import torch

    path = name.rpartition(".")[0]
    while path and isinstance(model.get_submodule(path), torch.nn.ModuleList | torch.nn.ModuleDict):
        path = path.rpartition(".")[0]
    return path


def passed(inner: list[Any], model: Any, batch: dict[str, Any]) -> dict[int, list[Any]]:
    """What modules inside a model give out in one run of the model."""
    kept: dict[int, list[Any]] = {id(m): [] for m in inner}
    hooks = [m.register_forward_hook(lambda m, x, out: kept[id(m)].append(flat(out))) for m in inner]
    output(model, batch)
    for hook in hooks:
        hook.remove()
    return kept


def perturbed(model: Any, acts: dict[str, Any], reached: dict[str, str], runs: dict[str, Any]) -> dict[str, Any]:
    """The sites whose coefficients change nothing: `silent`; those that do nothing in the original too: `unused`."""
    import torch

    import orthoact

    found: dict[str, Any] = {"silent": []}
    unused = []
    for name, path in reached.items():
        act, (made, before), part = acts[name], runs[path], model.get_submodule(path)
        kept = act.theta.detach().clone()
        for step in (0.5, -1.0, 20.0, -20.0):  # a clamp behind it may hold the output on one side
            with torch.no_grad():
                act.theta.copy_(kept + step)
            if not same(output(part, made), before):
                break
        else:
            with orthoact.original(model):
                plain = output(part, made)
                shifted = [shift(act, by, lambda part=part, made=made: output(part, made)) for by in (0.5, -1.0, 20.0)]
            (unused if all(same(out, plain) for out in shifted) else found["silent"]).append(name)
        act.theta.data.copy_(kept)
    return found | ({"unused": unused} if unused else {})


def shift(module: Any, by: float, run: Any) -> Any:
    """What `run` gives while a number is added to all that a module gives out."""
    hook = module.register_forward_hook(lambda m, x, out: out + by)
    try:
        return run()
    finally:
        hook.remove()


def livened(model: Any) -> None:
    """Weights with which every part of a random model matters."""
    import torch

    torch.manual_seed(0)
    stored = model.state_dict()
    floating = {n: b for n, b in model.named_buffers() if b.is_floating_point() and n in stored}
    frozen = [b for n, b in floating.items() if n.endswith("weight")]  # of batch norms
    codes = [b for n, b in floating.items() if re.search(r"embed(_sum|_avg)?$", n) and b.dim() == 2]
    padding = {
        id(m.weight): m.padding_idx
        for m in model.modules()
        if getattr(m, "padding_idx", None) is not None and hasattr(m, "weight")
    }
    with torch.no_grad():
        for b in frozen:
            b.uniform_(0.5, 1.5)
        for b in codes:
            b.normal_()
        for name, p in model.named_parameters():
            if not p.is_floating_point():
                continue
            if p.dim() > 1:
                p.normal_(std=max(1, p[0].numel()) ** -0.5)
                if id(p) in padding:
                    p[padding[id(p)]] = 0
            elif name.endswith("bias"):
                p.normal_(std=0.1)
            elif p.numel() > 1:
                p.uniform_(0.5, 1.5)
    model.train()
    model.eval()  # some keep what they made of the old weights
    for module in model.modules():
        if getattr(module, "_embed", None) is not None:  # so do code books
            module._embed = None


def output(model: Any, batch: dict[str, Any]) -> list[Any]:
    """Every tensor of the output; the same random numbers each time."""
    import torch

    torch.manual_seed(0)
    with torch.no_grad():
        return flat(model(batch[""]) if "" in batch else model(**batch))


def flat(value: Any) -> list[Any]:
    import torch

    if isinstance(value, torch.Tensor):
        return [value.clone()]
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
    return [tensor for v in inner for tensor in flat(v)]


def same(first: list[Any], second: list[Any]) -> bool:
    import torch

    return len(first) == len(second) and all(
        a.shape == b.shape and (torch.equal(a, b) or bool(((a == b) | (a.isnan() & b.isnan())).all()))
        for a, b in zip(first, second, strict=True)
    )


def told(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [""]
    return f"{type(error).__name__}: {lines[-1] if 'validation' in lines[0] else lines[0]}"[:200]
