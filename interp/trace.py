"""A formula's operations as instructions of LLVM.

The formulas of the families are written once for numpy's arrays and torch's tensors. Called with a `Number`, on which
numpy's functions and operators work as well, they write down what they do in place of doing it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

FUSED = ("contract",)
"""Multiply and add may be one instruction, which rounds once."""


def _intrinsic(name: str) -> Callable[..., Any]:
    def call(trace: Trace, *inputs: Any) -> Any:
        return trace.builder.call(trace.intrinsic(name), inputs)

    return call


OPERATIONS: dict[Any, Callable[..., Any]] = {
    np.add: lambda trace, a, b: trace.builder.fadd(a, b, flags=FUSED),
    np.subtract: lambda trace, a, b: trace.builder.fsub(a, b, flags=FUSED),
    np.multiply: lambda trace, a, b: trace.builder.fmul(a, b, flags=FUSED),
    np.true_divide: lambda trace, a, b: trace.builder.fdiv(a, b, flags=FUSED),
    np.negative: lambda trace, a: trace.builder.fneg(a),
    np.absolute: _intrinsic("fabs"),
    np.rint: _intrinsic("rint"),
    np.sqrt: _intrinsic("sqrt"),
    np.exp: _intrinsic("exp"),
    np.cos: _intrinsic("cos"),
    np.sin: _intrinsic("sin"),
    # no comparison with NaN is true: the first of both stays NaN
    np.maximum: lambda trace, a, b: trace.builder.select(trace.builder.fcmp_ordered("<", a, b), b, a),
    np.minimum: lambda trace, a, b: trace.builder.select(trace.builder.fcmp_ordered(">", a, b), b, a),
}
"""numpy's functions of numbers; a family of one's own may need more, without which torch computes it."""

TESTS: dict[Any, str] = {
    np.greater: ">",
    np.greater_equal: ">=",
    np.less: "<",
    np.less_equal: "<=",
    np.equal: "==",
    np.not_equal: "!=",
}
"""Those whose results are true or false."""

LOGIC: dict[Any, str] = {np.bitwise_and: "and_", np.bitwise_or: "or_", np.invert: "not_"}
"""Functions of truths."""


class Trace:
    """Where instructions go, and the type of the numbers.

    >>> from llvmlite import ir
    >>> single = ir.FloatType()
    >>> square = ir.Function(ir.Module(), ir.FunctionType(single, [single]), "square")
    >>> trace = Trace(ir.IRBuilder(square.append_basic_block()), single)
    >>> x = Number(trace, square.args[0])
    >>> trace.builder.ret((x * x).value).operands[0].opname
    'fmul'
    """

    def __init__(self, builder: Any, type: Any, lanes: int = 0):
        from llvmlite import ir

        self.builder, self.type, self.lanes = builder, type, lanes
        self.made = ir.VectorType(type, lanes) if lanes else type
        """What an instruction makes: a number, or `lanes` of them at once."""

    def constant(self, value: float) -> Any:
        return self.made([value] * self.lanes if self.lanes else value)

    def intrinsic(self, name: str) -> Any:
        from llvmlite import ir

        full = f"llvm.{name}.{f'v{self.lanes}' * bool(self.lanes)}{self.type.intrinsic_name}"
        module = self.builder.module
        return module.globals.get(full) or ir.Function(module, ir.FunctionType(self.made, [self.made]), full)

    def spread(self, value: Any) -> Any:
        """A number, in every lane."""
        if not self.lanes:
            return value
        from llvmlite import ir

        first = self.builder.insert_element(self.made(ir.Undefined), value, ir.IntType(32)(0))
        return self.builder.shuffle_vector(first, first, ir.VectorType(ir.IntType(32), self.lanes)([0] * self.lanes))

    def value(self, one: Any) -> Any:
        """What stands for a number, a truth (one or zero) or a constant."""
        if isinstance(one, Truth):
            return self.builder.select(one.value, self.constant(1.0), self.constant(0.0))
        return one.value if isinstance(one, Number) else self.constant(float(one))

    def number(self, operation: Callable[..., Any], *inputs: Any) -> Number:
        return Number(self, operation(self, *map(self.value, inputs)))


class _Traced(np.lib.mixins.NDArrayOperatorsMixin):
    """Something whose operations are written down."""

    def __init__(self, trace: Trace, value: Any):
        self.trace, self.value = trace, value

    def __bool__(self) -> bool:
        raise TypeError("what is true is only known when the code runs")

    def __array_ufunc__(self, ufunc: np.ufunc, method: str, *inputs: Any, **how: Any) -> Any:
        if method != "__call__" or how:
            return NotImplemented
        if ufunc is np.power and isinstance(inputs[1], int | float) and inputs[1] == 2:
            return inputs[0] * inputs[0]
        if ufunc in OPERATIONS:
            return self.trace.number(OPERATIONS[ufunc], *inputs)
        builder = self.trace.builder
        if ufunc in TESTS:
            compare = builder.fcmp_unordered if ufunc is np.not_equal else builder.fcmp_ordered
            return Truth(self.trace, compare(TESTS[ufunc], *map(self.trace.value, inputs)))
        if ufunc in LOGIC and all(isinstance(one, Truth) for one in inputs):
            return Truth(self.trace, getattr(builder, LOGIC[ufunc])(*(one.value for one in inputs)))
        return NotImplemented

    def __array_function__(self, function: Callable, types: Any, inputs: Any, how: Any) -> Any:
        if function is not np.where or how:
            return NotImplemented
        test, yes, no = inputs
        return self.trace.number(lambda trace, a, b: trace.builder.select(test.value, a, b), yes, no)


class Number(_Traced):
    """A number that is known when the code runs."""

    @property
    def single(self) -> bool:
        """Whether it is in float32: sine and cosine are then wanted as polynomials, see `fourier.cos_sin`."""
        return self.trace.type.intrinsic_name == "f32"

    def clip(self, min: Any = None, max: Any = None) -> Number:
        found = self if min is None else self.trace.number(OPERATIONS[np.maximum], self, min)
        return found if max is None else self.trace.number(OPERATIONS[np.minimum], found, max)

    def round(self) -> Number:
        return self.trace.number(OPERATIONS[np.rint], self)


class Truth(_Traced):
    """True or false; one or zero where it is reckoned with."""
