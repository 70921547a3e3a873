"""Activations that are called as functions: each call becomes a child module, so that everything else sees modules.

`F.gelu(x)` in a forward, a singleton of a library, an activation made on the spot (`ACT2FN[name](x)`), one written out
(`x * torch.sigmoid(x)`), a function kept in an attribute: a walk over modules sees none of them. Their owner gets a
subclass that holds the same methods, read from the same file, with these expressions replaced by `self.<child>(x)`.
No architecture is listed. What is not understood stays as it is, and the audit names it.
"""

from __future__ import annotations

import ast
import copy
import functools
import inspect
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import BuiltinFunctionType, FunctionType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..interp.activation import Activation
from ..interp.errors import OrthoactError

PREFIX = "functional_"
"""How the names of children begin that stand for a call."""

FUNCTIONS = {
    *("gelu", "silu", "swish", "quick_gelu", "relu", "relu_", "relu6", "leaky_relu", "leaky_relu_", "elu", "elu_"),
    *("celu", "celu_", "selu", "selu_", "mish", "hardswish", "gelu_new", "gelu_fast", "gelu_python", "gelu_accurate"),
}
"""Names under which activations proper are called; gates (tanh, sigmoid, softplus) are not among them."""

MODULES: dict[Any, type[nn.Module]] = {
    **{F.gelu: nn.GELU, F.silu: nn.SiLU, F.relu: nn.ReLU, torch.relu: nn.ReLU, F.relu6: nn.ReLU6, F.mish: nn.Mish},
    **{F.leaky_relu: nn.LeakyReLU, F.elu: nn.ELU, F.celu: nn.CELU, F.selu: nn.SELU, F.hardswish: nn.Hardswish},
}
"""The module of each function of torch; any other function is wrapped by `Call`."""


FUSED = {"causal_conv1d_fn", "causal_conv1d_update"}
"""Functions that end with the activation that `activation` names, if any; prefill and decoding call one each."""


GATED = ("selective_scan", "selective_scan_fn", "selective_state_update")
"""How the names of functions end that multiply what they give by SiLU of `z`, if there is one."""
WHOLE = ("mamba_inner_fn", "split_conv1d_scan_combined")
"""How the names of functions end that run a block in one kernel while it trains; they give None where there is none."""

ONCE = {"fused": "fused", "gate": "silu"}
"""Names of the child for all calls of FUSED, and of GATED, in a class: they are the same place of the network."""


class Call(nn.Module):
    """A function of one tensor as a module."""

    def __init__(self, function: Callable[[Tensor], Tensor]):
        super().__init__()
        self.function = function

    def forward(self, input: Tensor) -> Tensor:
        return self.function(input)

    def extra_repr(self) -> str:
        return getattr(self.function, "__name__", repr(self.function))


class Shared(nn.Module):
    """The activation of another site, where several had one module and keep one; it holds no tensor of its own."""

    def __init__(self, activation: Activation):
        super().__init__()
        self._activation = [activation]  # in a list: not a child, so that its tensors are in a file once

    @property
    def activation(self) -> Activation:
        """The activation that runs."""
        return self._activation[0]

    def forward(self, input: Tensor) -> Tensor:
        return self.activation(input)


def scaled_silu(x: Tensor, scale: float = 1.0) -> Tensor:
    """X sigmoid(scale x), as models write it out."""
    return x * torch.sigmoid(scale * x)


def gated(out: Any, gate: Tensor | None, act: nn.Module, step: bool) -> Any:
    """What a scan without a gate gives, times the activation of the gate; a tuple holds the last state too.

    In one `step` of decoding the gate has no axis of time: all behind the first are channels.
    """
    if gate is None:
        return out
    factor = act(gate.flatten(1)).view_as(gate) if step else act(gate)
    return (out[0] * factor, *out[1:]) if isinstance(out, tuple) else out * factor


# -- exposing and hiding ----------------------------------------------------------------------------------------------


@contextmanager
def exposed(model: nn.Module) -> Iterator[nn.Module]:
    """`model` with a child module for every call of an activation; afterwards it is as it was.

    >>> import torch.nn.functional
    >>> layer = nn.TransformerEncoderLayer(8, 2, activation="gelu")  # keeps F.gelu in an attribute
    >>> with exposed(layer):
    ...     layer.activation
    GELU(approximate='none')
    """
    owners = expose_(model)
    try:
        yield model
    finally:
        hide_(owners)


def expose_(model: nn.Module) -> list[nn.Module]:
    """Give every module of `model` a child for each activation that it calls as a function; computes the same.

    Returns the modules that got children, for `hide_`.
    """
    owners = []
    for owner in list(model.modules()):
        base, held = base_of(owner), children_of(owner)
        found = {name: child for name, child in _calls(owner, base).items() if name not in held}
        if found and not _is_activation(owner):
            _settle(owner, base, held | found)
            owners.append(owner)
    return owners


def hide_(owners: Iterable[nn.Module]) -> None:
    """Take away the children that `expose_` made, but not those that have been put in their places since."""
    for owner in list(owners):
        held = children_of(owner)
        kept = {name: child for name, child in held.items() if not getattr(child, "_orthoact_call", False)}
        if len(kept) < len(held) or (not kept and type(owner) is not base_of(owner)):
            _settle(owner, base_of(owner), kept)


def base_of(owner: nn.Module) -> type[nn.Module]:
    """The class of a module before its calls were exposed."""
    return type(owner).__dict__.get("_orthoact_base", type(owner))


def children_of(owner: nn.Module) -> dict[str, nn.Module]:
    """The children of a module that stand for calls, by name."""
    return {name: owner._modules[name] for name in type(owner).__dict__.get("_orthoact_children", ())}  # pyright: ignore


def _settle(owner: nn.Module, base: type[nn.Module], children: dict[str, nn.Module]) -> None:
    """Give `owner` exactly these children for calls, and the class that calls them."""
    stored = owner.__dict__.setdefault("_orthoact_functions", {})
    for name in children_of(owner).keys() - children.keys():
        del owner._modules[name]
        if name in stored:
            owner.__dict__[name] = stored.pop(name)
    apart = bool(children) or (runs_whole(base) and any(isinstance(m, Activation | Shared) for m in owner.modules()))
    owner.__class__ = rewritten(base, tuple(sorted(children))) if apart else base
    for name, child in children.items():
        if name in owner.__dict__:
            stored[name] = owner.__dict__.pop(name)
        if owner._modules.get(name) is not child:
            owner._modules[name] = child.train(owner.training)
    if not stored:
        del owner.__dict__["_orthoact_functions"]
    settle_fused_path(owner)


def settle_fused_path(owner: nn.Module) -> None:
    """Let torch's fused encoder layer run what the module holds: it goes by a number, whatever the activation is."""
    if isinstance(owner, nn.TransformerEncoderLayer):
        act: Any = owner.activation
        owner.activation_relu_or_gelu = 1 if act is F.relu or type(act) is nn.ReLU else 0
        if act is F.gelu or (type(act) is nn.GELU and act.approximate == "none"):
            owner.activation_relu_or_gelu = 2


# -- what a class calls -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Slot:
    """One expression of a class that may call an activation."""

    child: str
    """Name of the child that would take its place."""
    owner: type
    """The class whose source holds it: the module's own or one that it inherits from."""
    method: str
    """The method that holds it."""
    me: str
    """What the method calls its own module."""
    position: tuple[int, ...]
    """Lines and columns in the file."""
    function: ast.expr | None
    """What is called; None for x sigmoid(scale x) written out, or for the name of an activation in `arguments`."""
    arguments: tuple[tuple[str | int, ast.expr], ...]
    """Its arguments beside the input, by name or place."""
    channel: int | None = None
    """The axis of its input that counts channels, where the function tells."""


@functools.cache
def slots_of(cls: type[nn.Module]) -> tuple[Slot, ...]:
    """The expressions of a class that may call an activation, by the look of its source."""
    found: list[Slot] = []
    names: dict[str, int] = {}
    for owner, method, node in _methods(cls):
        for call in sorted(_candidates(node), key=lambda c: (c[0].lineno, c[0].col_offset)):
            expression, name, function, arguments = call
            n = names[name] = 0 if name in ONCE else names.get(name, -1) + 1
            child = name if name.startswith("self.") else f"{PREFIX}{ONCE.get(name, name)}{f'_{n}' if n else ''}"
            found.append(
                Slot(
                    child=child.removeprefix("self."),
                    owner=owner,
                    method=method,
                    me=node.args.args[0].arg,
                    position=_position(expression),
                    function=function,
                    arguments=arguments,
                    channel=1 if name in ONCE else None,
                )
            )
    return tuple(found)


def _methods(cls: type[nn.Module]) -> Iterator[tuple[type, str, ast.FunctionDef]]:
    """The methods of a class whose source is what runs, with the class that defines each."""
    seen: set[str] = set()
    for owner in cls.__mro__:
        if owner.__module__.split(".")[0] in ("torch", "builtins") or owner.__name__ == "PreTrainedModel":
            continue
        node = _class_node(owner)
        for item in node.body if node else []:
            if not isinstance(item, ast.FunctionDef) or item.name in seen or item.name == "__init__":
                continue
            seen.add(item.name)
            kept = owner.__dict__.get(item.name)
            plain = inspect.unwrap(kept) if callable(kept) and not isinstance(kept, staticmethod) else None
            if not isinstance(plain, FunctionType) or not item.args.args:
                continue
            lines = range(min([item.lineno, *(d.lineno for d in item.decorator_list)]), item.lineno + 1)
            decorated = plain is kept or bool(item.decorator_list)  # else a decorator of the class replaced it
            if plain.__code__.co_firstlineno in lines and decorated:
                yield owner, item.name, item


def _position(node: Any) -> tuple[int, ...]:
    return node.lineno, node.col_offset, node.end_lineno, node.end_col_offset


@functools.cache
def _class_nodes(module: str) -> dict[str, ast.ClassDef]:
    path = getattr(sys.modules.get(module), "__file__", None)
    try:
        tree = ast.parse(Path(path).read_text(encoding="utf-8")) if path else ast.Module([], [])
    except (OSError, SyntaxError, ValueError):  # no source beside the byte code
        return {}
    return {node.name: node for node in ast.walk(tree) if isinstance(node, ast.ClassDef)}


def _class_node(cls: type) -> ast.ClassDef | None:
    return None if "." in cls.__qualname__ else _class_nodes(cls.__module__).get(cls.__name__)


def _candidates(method: ast.FunctionDef) -> Iterator[tuple[Any, str, ast.expr | None, tuple]]:
    """The expressions of a method that may be a call of an activation: name, function, arguments beside the input."""
    me = method.args.args[0].arg
    bare = {id(s.value) for s in ast.walk(method) if isinstance(s, ast.Expr)}
    targets = {
        id(s.value): ast.unparse(s.targets[0])
        for s in ast.walk(method)
        if isinstance(s, ast.Assign) and len(s.targets) == 1
    }
    for node in ast.walk(method):
        if isinstance(node, ast.BinOp | ast.AugAssign) and isinstance(node.op, ast.Mult):
            if (scale := _written_out(node)) is not None:
                yield node, "silu", None, scale
        elif isinstance(node, ast.Call) and id(node) not in bare:
            taken = _called(node, me)
            if taken is None:
                continue
            name, function, x, arguments = taken
            in_place = name.endswith("_") or any(key == "inplace" for key, _ in arguments)
            if in_place and isinstance(x, ast.Name) and targets.get(id(node)) != x.id:
                continue  # the input itself is expected to change
            yield node, name.rstrip("_") if not name.startswith("self.") else name, function, arguments


def _called(node: ast.Call, me: str) -> tuple[str, ast.expr | None, ast.expr, tuple] | None:
    """Name, function, input and further arguments of a call that may be one of an activation."""
    function = node.func
    if isinstance(function, ast.Name | ast.Attribute):
        last = function.id if isinstance(function, ast.Name) else function.attr
        given = {k.arg: k.value for k in node.keywords}
        if last in FUSED:
            return ("fused", None, node, (("activation", given["activation"]),)) if "activation" in given else None
        if last.endswith(GATED):
            none = ast.unparse(given.get("z", ast.Constant(None))) == "None"
            return None if none else ("gate", None, node, (("activation", ast.Constant("silu")),))
    if any(isinstance(a, ast.Starred) for a in node.args) or any(k.arg is None for k in node.keywords):
        return None
    keywords = [(k.arg, k.value) for k in node.keywords]
    if not node.args:
        if isinstance(function, ast.Attribute) and function.attr in ("relu", "relu_") and not keywords:
            module = ast.copy_location(ast.Name("torch", ast.Load()), function)
            relu = ast.copy_location(ast.Attribute(module, "relu", ast.Load()), function)
            return function.attr, relu, function.value, ()  # a method of the tensor
        return None
    x, *more = node.args
    arguments = (*enumerate(more, 1), *keywords)
    if isinstance(function, ast.Name | ast.Attribute):
        name = function.id if isinstance(function, ast.Name) else function.attr
        if isinstance(function, ast.Attribute) and isinstance(function.value, ast.Name) and function.value.id == me:
            return f"self.{name}", function, x, arguments  # if it is kept in an attribute
        return (name, function, x, arguments) if name in FUNCTIONS else None
    if isinstance(function, ast.Subscript) and "ACT2" in ast.unparse(function.value):
        return "activation", function, x, arguments
    if isinstance(function, ast.Call):  # nn.ReLU()(x), get_activation("gelu")(x)
        return "activation", function, x, arguments
    return None


def _written_out(node: ast.BinOp | ast.AugAssign) -> tuple | None:
    """The scale of x * sigmoid(scale * x) or x *= sigmoid(scale * x), empty for 1; None for another product."""
    for x, gate in _factors(node):
        inner = _sigmoid(gate)
        if inner is None or not isinstance(x, ast.Name | ast.Attribute):
            continue
        if ast.unparse(inner) == ast.unparse(x):
            return ()
        if isinstance(inner, ast.BinOp) and isinstance(inner.op, ast.Mult):
            for factor, scale in ((inner.left, inner.right), (inner.right, inner.left)):
                if ast.unparse(factor) == ast.unparse(x):
                    return (("scale", scale),)
    return None


def _factors(node: ast.BinOp | ast.AugAssign) -> list[tuple[ast.expr, ast.expr]]:
    if isinstance(node, ast.AugAssign):
        return [(node.target, node.value)]
    return [(node.left, node.right), (node.right, node.left)]


def _sigmoid(node: ast.expr) -> ast.expr | None:
    """The input of sigmoid(...), as a function or a method."""
    if not isinstance(node, ast.Call) or node.keywords:
        return None
    name = ast.unparse(node.func).rpartition(".")[2]
    if name == "sigmoid" and len(node.args) == 1:
        return node.args[0]
    if name == "sigmoid" and not node.args and isinstance(node.func, ast.Attribute):
        return node.func.value
    return None


@functools.cache
def mentions(cls: type[nn.Module]) -> bool:
    """Whether the source of a class calls anything that may be an activation proper."""
    return any(slot.child.startswith(PREFIX) for slot in slots_of(cls))


@functools.cache
def runs_whole(cls: type[nn.Module]) -> bool:
    """Whether a block of this class may run in one kernel, past the activations that its modules hold."""
    return any(_is_whole(node) for _, _, method in _methods(cls) for node in ast.walk(method))


def _is_whole(node: ast.AST) -> bool:
    return isinstance(node, ast.Call) and ast.unparse(node.func).endswith(WHOLE)


# -- what a module calls ----------------------------------------------------------------------------------------------


def _calls(owner: nn.Module, base: type[nn.Module]) -> dict[str, nn.Module]:
    """A module for each activation that `owner` calls as a function, by the name of the child."""
    found = {}
    for name, value in list(owner.__dict__.items()):
        if _is_function(value) and _name(value) in FUNCTIONS and not name.startswith("_"):
            found[name] = _as_module(value, (), {})
    for slot in slots_of(base):
        if slot.child.startswith(PREFIX):
            child = _resolve(slot, owner)
            if child is not None:
                child.__dict__["_orthoact_channel"] = slot.channel
                found[slot.child] = child
    found = {name: child for name, child in found.items() if _is_activation(child)}
    for child in found.values():
        child.__dict__["_orthoact_call"] = True  # how hide_ knows them
    return found


def _is_activation(module: nn.Module) -> bool:
    from .sites import recognise

    return recognise("", module) is not None


def _is_function(value: Any) -> bool:
    return isinstance(value, FunctionType | BuiltinFunctionType | functools.partial)


def _name(function: Any) -> str:
    return getattr(getattr(function, "func", function), "__name__", "")


class _Opaque(Exception):
    """An expression that has no value before it runs."""


def _resolve(slot: Slot, owner: nn.Module) -> nn.Module | None:
    """The module for a slot, its function and settings as this very module has them; None where they are not known."""
    names = vars(sys.modules[slot.owner.__module__])
    me = slot.me
    try:
        values = {key: _value(expression, owner, me, names) for key, expression in slot.arguments}
        if slot.function is not None:
            function = _value(slot.function, owner, me, names)
        elif "activation" in values:
            from transformers.activations import ACT2FN

            function = ACT2FN[values.pop("activation")]
        else:
            function = scaled_silu
    except (_Opaque, KeyError):
        return None
    if not callable(function) or (isinstance(function, nn.Module) and any(m is function for m in owner.modules())):
        return None
    values.pop("inplace", None)
    places = [values.pop(key) for key in sorted(k for k in values if isinstance(k, int))]
    return _as_module(function, places, values)


def _as_module(function: Any, places: Any, values: dict[Any, Any]) -> nn.Module:
    if isinstance(function, functools.partial) and not function.args:
        function, values = function.func, {**function.keywords, **values}
    if isinstance(function, nn.Module) and not places and not values:
        return copy.deepcopy(function)
    if function in MODULES:
        values.pop("inplace", None)
        try:
            return MODULES[function](*places, **values)
        except (TypeError, ValueError):
            pass
    if places:
        names = list(inspect.signature(function).parameters)[1:]
        values = {**dict(zip(names, places, strict=False)), **values}
    return Call(functools.partial(function, **values) if values else function)


def _value(node: ast.expr, owner: nn.Module, me: str, names: dict[str, Any]) -> Any:
    """The value of an expression of constants, names of the file and attributes of the module."""
    if isinstance(node, ast.Constant):
        return node.value
    if isinstance(node, ast.Name):
        if node.id == me:
            return owner
        if node.id in names:
            return names[node.id]
        raise _Opaque
    if isinstance(node, ast.Attribute):
        value = getattr(_value(node.value, owner, me, names), node.attr, _Opaque)
    elif isinstance(node, ast.Subscript):
        try:
            value = _value(node.value, owner, me, names)[_value(node.slice, owner, me, names)]
        except (KeyError, TypeError, IndexError):
            value = _Opaque
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        value = -_value(node.operand, owner, me, names)
    elif isinstance(node, ast.Call):
        function = _value(node.func, owner, me, names)
        maker = isinstance(function, type) and issubclass(function, nn.Module)
        if not maker and _name(function) not in ("get_activation", "get_act_layer", "create_act_layer"):
            raise _Opaque
        value = function(
            *(_value(a, owner, me, names) for a in node.args),
            **{k.arg: _value(k.value, owner, me, names) for k in node.keywords if k.arg},
        )
    else:
        raise _Opaque
    if value is _Opaque:
        raise _Opaque
    return value


# -- the subclass -----------------------------------------------------------------------------------------------------


@functools.cache
def rewritten(base: type[nn.Module], children: tuple[str, ...]) -> type[nn.Module]:
    """A subclass of `base` that calls these children where `base` calls functions.

    Its methods are compiled from the source of `base` in the names of the same file, so that tracing, copying and
    whatever goes by the name of the class work as before.
    """
    slots = [s for s in slots_of(base) if s.child in children]
    body: dict[str, Any] = {}
    for owner, method, node in _methods(base):
        mine = {s.position: s.child for s in slots if s.owner is owner and s.method == method}
        if mine or any(_is_whole(part) for part in ast.walk(node)):
            body[method] = _compiled(owner, node, mine)
    body |= {"_orthoact_base": base, "_orthoact_children": children}
    body |= {"__module__": base.__module__, "__qualname__": base.__qualname__, "__doc__": base.__doc__}
    body |= {"__reduce_ex__": _reduce, "__init__": _made_anew(base)}
    return type(base)(base.__name__, (base,), body)  # pyright: ignore[reportCallIssue]


def _made_anew(base: type[nn.Module]) -> Callable:
    """A new module made of the class of a converted one is as the library makes it: what follows converts it."""

    @functools.wraps(base.__init__)
    def __init__(self, *args, **kwargs):
        self.__class__ = base
        base.__init__(self, *args, **kwargs)

    return __init__


def _reduce(self: nn.Module, protocol: Any) -> Any:
    return _revive, (base_of(self), tuple(children_of(self))), self.__dict__


def _revive(base: type[nn.Module], children: tuple[str, ...]) -> nn.Module:
    cls = rewritten(base, children)
    return cls.__new__(cls)


def _compiled(owner: type, method: ast.FunctionDef, children: dict[tuple[int, ...], str]) -> Any:
    """A method with the expressions at these positions replaced by calls of children."""
    me = method.args.args[0].arg
    new = _Replace(me, children).visit(copy.deepcopy(method))
    new.decorator_list = [d for d in new.decorator_list if "docstring" not in ast.unparse(d)]
    # in a class of the same name, for the names with two underscores, and in a function, for super()
    shell = ast.ClassDef(owner.__name__, [], [], [new], [])
    if sys.version_info >= (3, 12):
        shell.type_params = []
    make = ast.parse("def make(__orthoact_class__, __orthoact_gated__): pass").body[0]
    assert isinstance(make, ast.FunctionDef)
    make.body = [shell, ast.Return(ast.Name(owner.__name__, ast.Load()))]
    ast.copy_location(shell, method)
    tree = ast.fix_missing_locations(ast.Module([make], []))
    module, made = sys.modules[owner.__module__], {}
    try:
        exec(compile(tree, str(module.__file__), "exec"), vars(module), made)
        return made["make"](owner, gated).__dict__[method.name]
    except Exception as error:  # a decorator of any library
        raise OrthoactError(
            f"{owner.__name__}.{method.name} could not be compiled with its activations as modules "
            f"({type(error).__name__}: {error}); --exclude '*{PREFIX}*' leaves them"
        ) from error


class _Replace(ast.NodeTransformer):
    def __init__(self, me: str, children: dict[tuple[int, ...], str]):
        self.me, self.children = me, children

    def visit(self, node: ast.AST) -> Any:
        at = _position(node) if isinstance(node, ast.expr | ast.AugAssign) else ()
        if _is_whole(node):  # as where there is no such kernel: the block then asks its modules
            return ast.copy_location(ast.Constant(None), node)
        taken = self._input(node) if at in self.children else None
        if taken is None:
            node = self.generic_visit(node)
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "super":
                if not node.args:
                    node.args = [ast.Name("__orthoact_class__", ast.Load()), ast.Name(self.me, ast.Load())]
            return node
        function = ast.Attribute(ast.Name(self.me, ast.Load()), self.children.pop(at), ast.Load())
        call = ast.Call(function, [self.visit(taken)], [])
        if isinstance(node, ast.Call) and (gate := next((k.value for k in node.keywords if k.arg == "z"), None)):
            step = ast.Constant(ast.unparse(node.func).endswith("state_update"))
            call = ast.Call(ast.Name("__orthoact_gated__", ast.Load()), [call.args[0], gate, function, step], [])
        if isinstance(node, ast.AugAssign):
            return ast.copy_location(ast.Assign([node.target], call), node)
        return ast.copy_location(call, node)

    def _input(self, node: ast.AST) -> ast.expr | None:
        """What the child is given in the place of this expression."""
        if isinstance(node, ast.Call):
            called = _called(node, self.me)
            if called is None or called[2] is not node:
                return copy.deepcopy(called[2]) if called else None
            bare = copy.deepcopy(node)  # the function goes on without its activation
            bare.end_col_offset = -1  # another expression now: not to be replaced again
            for keyword in bare.keywords:
                if keyword.arg in ("activation", "z"):
                    keyword.value = ast.copy_location(ast.Constant(None), keyword.value)
            return bare
        if isinstance(node, ast.BinOp | ast.AugAssign) and isinstance(node.op, ast.Mult):
            if _written_out(node) is not None:
                x = next(x for x, gate in _factors(node) if _sigmoid(gate) is not None)
                return ast.parse(ast.unparse(x), mode="eval").body  # read, also where it was assigned to
        return None
