"""From the plain values of a YAML file to typed frozen dataclasses, with errors that quote the key."""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import fields, is_dataclass
from types import NoneType, UnionType
from typing import Any, get_args, get_origin, get_type_hints

from ..interp.errors import OrthoactError


def near(name: str, known: Iterable[str]) -> str:
    """A remark on the known names that look like this one; empty where none does."""
    close = difflib.get_close_matches(name, list(known), n=3, cutoff=0.5)
    return f" (near: {', '.join(close)})" if close else ""


def unknown(key: str, known: Iterable[str], prefix: str = "") -> OrthoactError:
    """The error for a key that is not among the known ones of its section."""
    leaf = key.removeprefix(prefix)
    hint = near(leaf, known) or f" (known: {', '.join(known)})"
    return OrthoactError(f"{key}: no such key in a recipe{hint}")


def build(cls: Any, values: Any, prefix: str = "") -> Any:
    """The dataclass `cls` with these values; `prefix` is the path of its section, with a dot."""
    if not isinstance(values, Mapping):
        raise OrthoactError(f"{prefix.rstrip('.')}: expected a section with keys, got {values!r}")
    hints, known = get_type_hints(cls), [f.name for f in fields(cls)]
    for key in values:
        if key not in known:
            raise unknown(f"{prefix}{key}", known, prefix)
    return cls(**{key: coerce(f"{prefix}{key}", hints[key], value) for key, value in values.items()})


def coerce(key: str, hint: Any, value: Any) -> Any:
    """The value as the type of its field asks."""
    if is_dataclass(hint):
        return build(hint, value, f"{key}.")
    kinds = get_args(hint) if get_origin(hint) is UnionType else (hint,)
    if value is None and NoneType in kinds:
        return None
    for kind in kinds:
        if kind is bool and isinstance(value, bool):
            return value
        number = _number(value)
        if kind is int and number is not None and number.is_integer():
            return int(value) if isinstance(value, int) else int(number)
        if kind is float and number is not None:
            return number
        if kind is str and isinstance(value, str):
            return value
        if get_origin(kind) is tuple and isinstance(value, list | tuple):
            inner = get_args(kind)[0]
            return tuple(coerce(f"{key}[{i}]", inner, item) for i, item in enumerate(value))
        if get_origin(kind) is dict and isinstance(value, Mapping):
            inner = get_args(kind)[1]
            return {str(k): v if inner is Any else coerce(f"{key}.{k}", inner, v) for k, v in value.items()}
    names = [_NAMES.get(get_origin(kind) or kind, "null") for kind in kinds]
    raise OrthoactError(f"{key}: expected {' or '.join(names)}, got {value!r}")


def _number(value: Any) -> float | None:
    """A finite number; YAML 1.1 reads 1e-3 as a string."""
    if isinstance(value, str) and _NUMBER.fullmatch(value.strip()):
        value = float(value)
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value)


_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?")
_NAMES = {
    **{bool: "true or false", int: "a whole number", float: "a number", str: "a name"},
    **{tuple: "a list", dict: "a mapping"},
}


def plain(value: Any) -> Any:
    """Lists for tuples, at any depth."""
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    return [plain(item) for item in value] if isinstance(value, tuple | list) else value
