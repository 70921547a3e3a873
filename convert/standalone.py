"""Standalone checkpoints: a code file beside the weights that evaluates the activations without this package.

The file is generated from the package's own source, so that there is one truth: the definitions that evaluation needs
are found by following names through the syntax trees, methods that nothing calls (those of fitting) are left out, and
the families are those of the record. Sentinel and record stay as they are: without `trust_remote_code=True` and without
orthoact the folder fails as loudly as every other.
"""

from __future__ import annotations

import ast
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

from torch import nn

from .._version import __version__
from ..interp.errors import OrthoactError
from .calls import PREFIX
from .record import spec_of

FILE = "modeling_orthoact"
"""Name of the code file, without its ending."""

Key = tuple[str, str]
"""A definition: its module, dotted from the package's root, and its name."""

TRANSFORMERS: tuple[Key, ...] = (("convert.runtime", "loadable"),)
TIMM: tuple[Key, ...] = (("convert.timm_hooks", "register"), ("convert.runtime", "checked"))
"""What the code file of each library starts from."""

STUBS: dict[Key, str] = {
    ("interp.engine", "get_path"): "def get_path():\n    return 'eager'",
    ("interp.loops", "loop_values"): "def loop_values(*_):\n    return None",
    ("interp.loops", "loop_gradients"): "def loop_gradients(*_):\n    return None",
    ("interp.kernels", "kernel_values"): "kernel_values = None",
    ("interp.kernels", "kernel_gradients"): "kernel_gradients = None",
    ("convert.record", "install"): "install = install_recorded",
    ("convert.calls", "settle_fused_path"): (
        "def settle_fused_path(owner):\n"
        "    if hasattr(owner, 'activation_relu_or_gelu'):\n"
        "        owner.activation_relu_or_gelu = 0"
    ),
}
"""What stands in for a definition that would bring in what evaluation does without: compilers, fitting, probing."""

IMPLIED: dict[Key, tuple[Key, ...]] = {
    ("convert.record", "install"): (("convert.runtime", "install_recorded"),),
}
"""What the stubs name."""

DROPPED = {"from_fit", "load_fit", "variance_preserving", "curve", "moments", "coefficients"}
"""Methods that are left out whoever has one of that name."""

CALLED = {"forward", "backward", "setup_context", "extra_repr", "_apply", "_init_weights", "from_pretrained"}
"""Methods that others call by their names."""


@dataclass
class Module:
    """The source of one module of the package."""

    name: str
    definitions: dict[str, ast.stmt] = field(default_factory=dict)
    imports: dict[str, tuple[str, Any]] = field(default_factory=dict)
    """Local name -> (`outside`, statement) | (`definition`, key) | (`module`, its name)."""


def _absolute(module: str, node: ast.ImportFrom) -> str:
    """The module that a relative import names, dotted from the root; empty for the root."""
    parts = module.split(".")[: -node.level]
    return ".".join([*parts, *((node.module or "").split(".") if node.module else [])])


def _path(module: str) -> Path:
    return Path(__file__).parent.parent.joinpath(*module.split(".")).with_suffix(".py")


def _imported(module: str, node: ast.stmt) -> Iterator[tuple[str, tuple[str, Any]]]:
    if isinstance(node, ast.Import):
        for alias in node.names:
            yield alias.asname or alias.name.split(".")[0], ("outside", ast.unparse(ast.Import([alias])))
    elif isinstance(node, ast.ImportFrom) and node.level == 0:
        for alias in node.names:
            statement = ast.unparse(ast.ImportFrom(node.module, [alias], 0))
            yield alias.asname or alias.name, ("outside", statement)
    elif isinstance(node, ast.ImportFrom):
        source = _absolute(module, node)
        for alias in node.names:
            inner = f"{source}.{alias.name}".strip(".")
            if _path(inner).is_file():
                yield alias.asname or alias.name, ("module", inner)
            else:
                yield alias.asname or alias.name, ("definition", (source, alias.name))


@lru_cache
def _module(name: str) -> Module:
    found = Module(name)
    for node in ast.parse(_path(name).read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.definitions[node.name] = node
        elif isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            found.definitions[node.targets[0].id] = node
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and node.value:
            found.definitions[node.target.id] = node
        found.imports.update(_imported(name, node))
    return found


class _Bundle:
    """The definitions that some others need, as one source text."""

    def __init__(self, roots: tuple[Key, ...], families: set[str]):
        self.families, self.kept, self.used = families, {}, set(CALLED)
        self.outside: set[str] = set()
        while True:  # a method that is kept may call others by name
            before = (len(self.kept), len(self.used))
            self.kept = {}
            for root in roots:
                self._follow(root)
            if (len(self.kept), len(self.used)) == before:
                break

    def _follow(self, key: Key) -> None:
        module, name = key
        if key in self.kept:
            return
        if key in STUBS:
            self.kept[key] = ast.parse(STUBS[key]).body[0]
            for other in IMPLIED.get(key, ()):
                self._follow(other)
            return
        if name not in _module(module).definitions:
            if name in _module(module).imports:  # handed on
                return self._follow(_module(module).imports[name][1])
            raise OrthoactError(f"the code file needs {module}.{name}, which is not there: report this")
        node = self._pruned(_module(module).definitions[name])
        self.kept[key] = node
        for other in self._names(module, node):
            self._follow(other)

    def _pruned(self, node: ast.stmt) -> ast.stmt:
        """A copy without docstrings, annotations and what nothing calls; the table of families cut down."""
        node = ast.parse(ast.unparse(node)).body[0]
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            value = node.value
            if node.target.id == "FAMILIES" and isinstance(value, ast.Dict):
                pairs = [(k, v) for k, v in zip(value.keys, value.values, strict=True) if k.value in self.families]  # pyright: ignore
                value = ast.Dict([k for k, _ in pairs], [v for _, v in pairs])
            node = ast.fix_missing_locations(ast.Assign([node.target], value))  # pyright: ignore
        for part in ast.walk(node):
            if isinstance(part, ast.FunctionDef):
                part.returns = None
                every = [*part.args.args, *part.args.posonlyargs, *part.args.kwonlyargs]
                for argument in [*every, part.args.vararg, part.args.kwarg]:
                    if argument is not None:
                        argument.annotation = None
            if isinstance(part, ast.ClassDef):
                part.body = [s for s in part.body if self._stays(s)]
            if isinstance(part, ast.AnnAssign) and isinstance(part.target, ast.Attribute):
                part.annotation = ast.Constant(None)  # of a local type
            if isinstance(part, ast.FunctionDef | ast.ClassDef):
                part.body = [
                    s
                    for s in part.body
                    if not (
                        isinstance(s, ast.Expr) and isinstance(s.value, ast.Constant) and isinstance(s.value.value, str)
                    )
                ] or [ast.Pass()]
        return node

    def _stays(self, statement: ast.stmt) -> bool:
        if isinstance(statement, ast.FunctionDef):
            name = statement.name
            return (name.startswith("__") or name in self.used) and name not in DROPPED
        return True

    def _names(self, module: str, node: ast.stmt) -> list[Key]:
        """What a definition refers to in the package; imports from outside and attributes are noted on the way."""
        imports, own = dict(_module(module).imports), set()
        for part in ast.walk(node):
            if isinstance(part, ast.Import | ast.ImportFrom):
                inner = dict(_imported(module, part))
                own |= {name for name, (kind, _) in inner.items() if kind == "outside"}
                imports.update(inner)
        found = []
        for part in ast.walk(node):
            if isinstance(part, ast.Attribute):
                owner = part.value.id if isinstance(part.value, ast.Name) else None
                kind, what = imports.get(owner or "", ("", None))
                if kind == "module":
                    found.append((what, part.attr))
                else:
                    self.used.add(part.attr)
            elif isinstance(part, ast.Constant) and isinstance(part.value, str) and part.value.isidentifier():
                self.used.add(part.value)
            elif isinstance(part, ast.Name):
                kind, what = imports.get(part.id, ("", None))
                if kind == "outside" and part.id not in own:
                    self.outside.add(what)
                elif kind == "definition":
                    found.append(what)
                elif part.id in _module(module).definitions:
                    found.append((module, part.id))
        return found

    # -- the text -----------------------------------------------------------------------------------------------------

    def text(self) -> str:
        names: dict[str, list[Key]] = {}
        for key in self.kept:
            names.setdefault(key[1], []).append(key)
        flat = {
            key: name if len(keys) == 1 else f"{key[0].rpartition('.')[2]}_{name}".replace("__", "_")
            for name, keys in names.items()
            for key in keys
        }
        written: list[str] = []
        done: set[Key] = set()

        def write(key: Key) -> None:
            if key in done:
                return
            done.add(key)
            node = self.kept[key]
            for other in self._hard(key, node):
                write(other)
            renamed = _Renamed(key, self._targets(key, flat), flat[key]).visit(ast.parse(ast.unparse(node)).body[0])
            written.append(ast.unparse(ast.fix_missing_locations(renamed)))

        for key in sorted(self.kept, key=lambda key: (key[0] != "interp.errors", key[0].startswith("convert"))):
            write(key)
        return "\n".join(sorted(self.outside)) + "\n\n\n" + "\n\n\n".join(written) + "\n"

    def _targets(self, key: Key, flat: dict[Key, str]) -> dict[str, Any]:
        """How each name in a definition is called in the file."""
        module, node = key[0], self.kept[key]
        imports = dict(_module(module).imports)
        for part in ast.walk(node):
            if isinstance(part, ast.Import | ast.ImportFrom):
                imports.update(_imported(module, part))
        found: dict[str, Any] = {
            name: flat[module, name] for name in _module(module).definitions if (module, name) in flat
        }
        for local, (kind, what) in imports.items():
            if kind == "definition":
                owner, name = what
                while (owner, name) not in flat and name in _module(owner).imports:
                    owner, name = _module(owner).imports[name][1]
                if (owner, name) in flat:
                    found[local] = flat[owner, name]
            elif kind == "module":
                found[local] = {name: flat[what, name] for (owner, name) in flat if owner == what}
        return found

    def _hard(self, key: Key, node: ast.stmt) -> list[Key]:
        """What must be there before a definition is executed."""
        if isinstance(node, ast.FunctionDef):
            parts: list[ast.AST] = [*node.decorator_list, *node.args.defaults, *(d for d in node.args.kw_defaults if d)]
        elif isinstance(node, ast.ClassDef):
            parts = [*node.bases, *node.decorator_list, *(s for s in node.body if not isinstance(s, ast.FunctionDef))]
            for method in (s for s in node.body if isinstance(s, ast.FunctionDef)):
                parts += [*method.decorator_list, *method.args.defaults]
        else:
            parts = [node]
        wrapped = ast.Module([ast.Expr(p) if isinstance(p, ast.expr) else p for p in parts], [])  # pyright: ignore
        names = self._names(key[0], wrapped)  # pyright: ignore[reportArgumentType]
        keys = [*names, *IMPLIED.get(key, ())]
        return [k for k in keys if k in self.kept and k != key]


class _Renamed(ast.NodeTransformer):
    """A definition with the names of the file; local variables keep theirs."""

    def __init__(self, key: Key, targets: dict[str, Any], own: str):
        self.targets, self.own, self.key, self.local = targets, own, key, []

    def _shadowed(self, name: str) -> bool:
        return any(name in scope for scope in self.local)

    def visit_FunctionDef(self, node):
        bound = {a.arg for a in ast.walk(node.args) if isinstance(a, ast.arg)}
        for part in ast.walk(node):
            if isinstance(part, ast.Name) and isinstance(part.ctx, ast.Store):
                bound.add(part.id)
            if part is not node and isinstance(part, ast.FunctionDef | ast.ClassDef):
                bound.add(part.name)
        node.decorator_list = [self.visit(d) for d in node.decorator_list]
        if not self.local and node.name == self.key[1]:
            node.name = self.own
        self.local.append(bound)
        node.args = self.visit(node.args)
        node.body = [s for s in (self.visit(s) for s in node.body) if s is not None] or [ast.Pass()]
        self.local.pop()
        return node

    def visit_Lambda(self, node):
        self.local.append({a.arg for a in ast.walk(node.args) if isinstance(a, ast.arg)})
        node = self.generic_visit(node)
        self.local.pop()
        return node

    def visit_ClassDef(self, node):
        if not self.local and node.name == self.key[1]:
            node.name = self.own
        return self.generic_visit(node)

    def visit_ImportFrom(self, node):
        return None if node.level else node

    def visit_Attribute(self, node):
        if isinstance(node.value, ast.Name) and not self._shadowed(node.value.id):
            inside = self.targets.get(node.value.id)
            if isinstance(inside, dict) and node.attr in inside:
                return ast.Name(inside[node.attr], node.ctx)
        return self.generic_visit(node)

    def visit_Name(self, node):
        target = self.targets.get(node.id)
        if isinstance(target, str) and not self._shadowed(node.id):
            node.id = target
        return node


HEADER = '''"""The learnable activations of this checkpoint, without orthoact: load it with trust_remote_code=True.

Generated by orthoact {version} from its own source; see https://pypi.org/project/orthoact. Apache-2.0.
"""

from __future__ import annotations

'''


def code(roots: tuple[Key, ...], families: set[str]) -> str:
    """The source of `roots` and of all that they need, with these families.

    >>> text = code(TRANSFORMERS, {"hermite"})
    >>> "class Hermite" in text, "class Rational" in text, "lstsq" in text
    (True, False, False)
    """
    return HEADER.format(version=__version__) + _Bundle(roots, families).text()


def write_standalone(model: nn.Module, folder: Path) -> None:
    """Add the code file and `auto_map` to a checkpoint that has just been written into `folder`."""
    spec, path = spec_of(model) or {}, folder / "config.json"
    families = {entry["family"] for entry in spec["sites"].values()}
    config = json.loads(path.read_text(encoding="utf-8"))
    for name, entry in spec["sites"].items():
        if name.rpartition(".")[2].startswith(PREFIX) or entry.get("shared"):
            raise OrthoactError(
                f"{name}: a call of a function, or of another site's activation, needs orthoact to be loaded: leave "
                f"--standalone out, or --exclude it"
            )
    if config.get("auto_map"):
        raise OrthoactError(f"{type(model).__name__} comes with code of its own: leave --standalone out")
    if hasattr(model, "pretrained_cfg"):
        text, classes = code(TIMM, families) + TIMM_CLASSES, dict(TIMM_AUTO)
    else:
        classes = _auto_classes(model)
        names = sorted(set(classes.values()))
        text = code(TRANSFORMERS, families) + "\n\nimport transformers\n\n"
        text += "".join(f"{name} = loadable(transformers.{name})\n" for name in names)
    compile(text, FILE, "exec")
    (folder / f"{FILE}.py").write_text(text, encoding="utf-8")
    config["auto_map"] = {auto: f"{FILE}.{name}" for auto, name in sorted(classes.items())}
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


TIMM_CLASSES = '''

register()

import transformers


class TimmConfig(transformers.TimmWrapperConfig):
    """That of transformers: loading it has taught timm the model that the record names."""


class TimmModel(checked(transformers.TimmWrapperModel)):
    config_class = TimmConfig


class TimmModelForImageClassification(checked(transformers.TimmWrapperForImageClassification)):
    config_class = TimmConfig
'''

TIMM_AUTO = {
    "AutoConfig": "TimmConfig",
    "AutoModel": "TimmModel",
    "AutoModelForImageClassification": "TimmModelForImageClassification",
}


def _auto_classes(model: Any) -> dict[str, str]:
    """The classes of transformers that can be made of a config, by the automatic class that chooses each."""
    import transformers
    from transformers.models.auto import modeling_auto

    found = {}
    for auto in vars(modeling_auto).values():
        mapping = getattr(auto, "_model_mapping", None)
        if not isinstance(auto, type) or mapping is None or type(model.config) not in mapping:
            continue
        cls = mapping[type(model.config)]
        cls = (
            type(model) if isinstance(cls, tuple) and type(model) in cls else cls[0] if isinstance(cls, tuple) else cls
        )
        if auto.__name__.startswith("AutoModel") and getattr(transformers, cls.__name__, None) is cls:
            found[auto.__name__] = cls.__name__
    if type(model).__name__ not in found.values():
        raise OrthoactError(
            f"{type(model).__name__} is chosen by no automatic class of transformers: leave --standalone out"
        )
    return found
