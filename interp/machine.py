"""The instructions of a loop over values, and the machine code that LLVM makes of them.

What runs is a function for each thread that goes through its part of the values row by row, and calls one over the
values of a row, or of several rows side by side, in which the formula stands.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import lru_cache, reduce
from typing import Any

import torch

from .trace import FUSED, Number, Trace

CHUNK = 4096
"""Values whose parts of a sum are added in the type of the numbers; over these the sums are in float64."""

ROWS = 256
"""Rows of channels whose parts of a sum are added likewise."""

WIDTH = 4096
"""Channels with numbers of their own that are taken together."""

STREAMS = 4
"""Places that a loop goes through side by side, so that the memory is asked for more than one; and rows of channels,
so that their numbers are read once for all."""

LINE = 64
"""Bytes of a line of a cache."""

AHEAD = 8
"""Lines by which what is read is asked for before."""

PAST = 2**20
"""Values of a result that is written past the caches, which have no room for it: lines need not be read before."""

LONG = 24
"""Numbers of a formula from which it stands in a loop once: machine code of several takes seconds to make."""

SIZES = "parts", "step", "size", "inner", "columns"
"""How many parts of so many values there are, how many values in all, how many share their numbers, how many columns
have their own."""

TOLD = *SIZES, "x", "grad", "out", "numbers", "frame", "sums", "held"
"""Sizes and addresses; `held` is room for the sums of a block of channels, for each part as `sums`."""

OPENMP = "omp_get_thread_num", "omp_get_num_threads"
"""What a thread asks: which it is, of how many; there may be fewer than were asked for."""

ONE, SEVERAL, STRAIGHT = "one", "several", "straight"
"""The functions over the values of a row, and of rows side by side."""

Formula = Callable[[Any, list[Any], list[Any]], tuple[Any, list[Any]]]
"""From x, the numbers and lo, hi, unit and offset to a result, and what is summed up over all x."""

Instruction = Any
"""A value of `llvmlite.ir`: what an instruction gives, a constant or an argument."""


class Code:
    """The functions of a loop, as `source`, and how many sums it makes.

    The function `loop` takes the address of whole numbers, `TOLD`. Each thread of its team takes every so many-th part.
    """

    def __init__(
        self, formula: Formula, steep: bool, channels: bool, count: int, dtype: torch.dtype, wide: torch.dtype
    ):
        from llvmlite import ir

        self.ir, self.module, self.parts = ir, ir.Module(), 0
        self.formula, self.steep, self.channels, self.count = formula, steep, channels, count
        types = {torch.float32: ir.FloatType(), torch.float64: ir.DoubleType(), torch.bfloat16: ir.IntType(16)}
        self.read, self.type, self.double = types[dtype], types[wide], ir.DoubleType()
        self.int, self.pointer = ir.IntType(64), ir.PointerType()
        self.streams = 2 * STREAMS if channels and not steep else STREAMS
        self.lanes = LINE // dtype.itemsize
        one = self.row(1)
        several = self.row(self.streams) if (channels or not steep) and count <= LONG else None
        past = self.past() if several and not channels else None
        (address,) = self.function("loop", [self.pointer]).args
        b, self.told = self.b, {}
        for k, name in enumerate(TOLD):
            self.told[name] = self.load(address, self.int(k), self.int if name in SIZES else self.pointer)
        asked = [ir.Function(self.module, ir.FunctionType(ir.IntType(32), []), name) for name in OPENMP]
        thread, team = (b.sext(b.call(function, []), self.int) for function in asked)
        alone = b.icmp_signed("==", self.told["parts"], self.int(1))  # called as it is, by whatever thread
        first, step = b.select(alone, self.int(0), thread), b.select(alone, self.int(1), team)
        with self.steps(first, self.told["parts"]) as (part, advance):
            start = b.mul(part, self.told["step"])
            stop = self.least(b.add(start, self.told["step"]), self.told["size"])
            if channels:
                self.over_channels(part, start, stop, one, several)
            else:
                self.over_rows(part, start, stop, one, several, past)
            advance(b.add(part, step))
        if past:
            b.fence("seq_cst")  # such writes are in no order with others
        b.ret_void()
        self.source = str(self.module)

    def function(self, name: str, arguments: list[Any]) -> Any:
        """A new function, which instructions go to from now on."""
        made = self.ir.Function(self.module, self.ir.FunctionType(self.ir.VoidType(), arguments), name)
        self.b = self.ir.IRBuilder(made.append_basic_block())
        return made

    # -- over all values of a thread ----------------------------------------------------------------------------------

    def over_rows(
        self, part: Instruction, start: Instruction, stop: Instruction, one: Any, several: Any, past: Any
    ) -> None:
        """Over values of which those of a row, `inner` of them, share their numbers."""
        b, columns, inner = self.b, self.told["columns"], self.told["inner"]
        totals = self.place(self.told["sums"], b.mul(part, b.mul(columns, self.int(self.parts))), self.double)
        with self.steps(start, stop) as (at, advance):
            row = b.sdiv(at, inner)
            end = self.least(b.mul(b.add(row, self.int(1)), inner), stop)
            column = b.srem(row, columns)
            own, sums = self.place(self.told["numbers"], column), self.place(totals, column, self.double)
            if several:
                stream = b.sdiv(b.sub(end, at), self.int(self.streams))
                if past:
                    out = b.ptrtoint(self.place(self.told["out"], at, self.read), self.int)
                    whole = b.icmp_signed("==", b.and_(out, self.int(LINE - 1)), self.int(0))
                    long = b.icmp_signed(">=", self.told["size"], self.int(PAST))
                    straight = b.and_(whole, long)
                    stream = b.select(straight, b.and_(stream, self.int(-self.lanes)), stream)
                    with b.if_else(straight) as (yes, no):
                        with yes:
                            self.call(past, at, stream, stream, own, sums)
                        with no:
                            self.call(several, at, stream, stream, own, sums)
                else:
                    self.call(several, at, stream, stream, own, sums)
                at = b.add(at, b.mul(stream, self.int(self.streams)))
            elif self.steep:
                end = self.least(end, b.add(at, self.int(CHUNK)))
            self.call(one, at, self.int(0), b.sub(end, at), own, sums)
            advance(end)

    def over_channels(self, part: Instruction, start: Instruction, stop: Instruction, one: Any, several: Any) -> None:
        """Over rows of which each column has numbers of its own, those of `WIDTH` columns side by side."""
        b, zero, unit, columns = self.b, self.int(0), self.int(1), self.told["columns"]
        totals = self.place(self.told["sums"], b.mul(part, b.mul(columns, self.int(self.parts))), self.double)
        held = self.place(self.told["held"], b.mul(part, self.int(self.parts * WIDTH)))
        first, last = b.sdiv(start, columns), b.sdiv(stop, columns)
        with self.steps(zero, columns) as (left, next_left):
            wide = self.least(self.int(WIDTH), b.sub(columns, left))
            own = self.place(self.told["numbers"], b.mul(left, self.int(self.count)))
            with self.steps(first, last) as (top, next_top):
                bottom = self.least(b.add(top, self.int(ROWS)), last)
                for k in range(self.parts):
                    with self.steps(zero, wide) as (i, advance):
                        b.store(self.type(0.0), self.place(held, b.add(i, self.int(k * WIDTH))))
                        advance(b.add(i, unit))
                with self.steps(top, bottom) as (row, advance):
                    at, after = b.add(b.mul(row, columns), left), b.add(row, self.int(self.streams))
                    together = b.icmp_signed("<=", after, bottom) if several else self.ir.IntType(1)(0)
                    with b.if_else(together) as (yes, no):
                        with yes:
                            self.call(several or one, at, columns, wide, own, held)
                        with no:
                            self.call(one, at, columns, wide, own, held)
                    advance(b.select(together, after, b.add(row, unit)))
                for k in range(self.parts):
                    with self.steps(zero, wide) as (i, advance):
                        place = b.add(b.add(left, i), b.mul(columns, self.int(k)))
                        self.add(totals, place, self.load(held, b.add(i, self.int(k * WIDTH))))
                        advance(b.add(i, unit))
                next_top(bottom)
            next_left(b.add(left, wide))

    def call(
        self, row: Any, at: Instruction, step: Instruction, size: Instruction, numbers: Instruction, sums: Instruction
    ) -> None:
        """Call a function over the values of as many rows side by side as it takes, each a step after the other."""
        streams = 1 if row.name == ONE else self.streams
        places = [self.b.add(at, self.b.mul(step, self.int(k))) for k in range(streams)]
        tensors = [self.place(self.told[name], place, self.read) for place in places for name in ("x", "grad", "out")]
        self.b.call(row, [*tensors, numbers, self.told["frame"], sums, self.told["columns"], size])

    # -- over the values of a row --------------------------------------------------------------------------------------

    def row(self, streams: int) -> Any:
        """Over so many rows side by side: x, gradient and result of each; numbers, joints, sums, their stride, size."""
        made = self.function(ONE if streams == 1 else SEVERAL, [self.pointer] * (3 * streams + 3) + [self.int] * 2)
        made.linkage = "internal"
        # left to itself LLVM takes half as many values at once on some processors; its own list has no such words
        set.update(made.attributes, ["noinline", '"prefer-vector-width"="512"'])
        for argument in made.args[:-2]:
            argument.add_attribute("noalias")  # so that values may be computed side by side
        *tensors, numbers, frame, sums, stride, size = made.args
        trace = Trace(self.b, self.type)
        joints = [Number(trace, self.load(frame, self.int(k))) for k in range(4)]
        own = [] if self.channels else self.numbers(trace, numbers, stride)
        totals: list[Any] = []
        with self.steps(self.int(0), size) as (i, advance):
            own = own or self.numbers(trace, numbers, self.int(WIDTH), i)
            parts = [self.point(trace, i, tensors[3 * k : 3 * k + 3], own, joints) for k in range(streams)]
            for k, part in enumerate(map(self.total, zip(*parts, strict=True))):
                if self.channels:
                    totals.append(self.place(sums, self.b.add(i, self.int(k * WIDTH))))
                else:
                    with self.b.goto_entry_block():
                        totals.append(self.b.alloca(self.type))
                        self.b.store(self.type(0.0), totals[-1])
                self.b.store(self.total((self.b.load(totals[-1], typ=self.type), part)), totals[-1])
            advance(self.b.add(i, self.int(1)))
        if not self.channels:
            for k, total in enumerate(totals):
                self.add(sums, self.b.mul(stride, self.int(k)), self.b.load(total, typ=self.type))
        self.b.ret_void()
        self.parts = len(totals)
        return made

    def past(self) -> Any:
        """As `row`, over rows of whole lines: what is written does not go through the caches."""
        made = self.function(STRAIGHT, [self.pointer] * (3 * self.streams + 3) + [self.int] * 2)
        made.linkage = "internal"
        set.update(made.attributes, ["noinline", '"prefer-vector-width"="512"'])
        *tensors, numbers, frame, _, stride, size = made.args
        trace = Trace(self.b, self.type, self.lanes)
        joints = [Number(trace, trace.spread(self.load(frame, self.int(k)))) for k in range(4)]
        own = [Number(trace, trace.spread(one.value)) for one in self.numbers(trace, numbers, stride)]
        yes = self.ir.IntType(32)(1)
        tag = self.module.add_metadata([yes])
        asked = self.ir.FunctionType(self.ir.VoidType(), [self.pointer, *[yes.type] * 3])
        prefetch = self.ir.Function(self.module, asked, "llvm.prefetch.p0")
        with self.steps(self.int(0), size) as (i, advance):
            for k in range(self.streams):
                x, _, out = (self.place(tensor, i, self.read) for tensor in tensors[3 * k : 3 * k + 3])
                ahead = self.place(x, self.int(AHEAD * self.lanes), self.read)
                self.b.call(prefetch, [ahead, yes.type(0), yes.type(3), yes])
                some = self.wide(self.b.load(x, typ=self.ir.VectorType(self.read, self.lanes), align=2))
                result = trace.value(self.formula(Number(trace, some), own, joints)[0])
                self.b.store(self.narrow(result), out, align=LINE).set_metadata("nontemporal", tag)
            advance(self.b.add(i, self.int(self.lanes)))
        self.b.ret_void()
        return made

    def point(
        self, trace: Trace, i: Any, tensors: list[Any], own: list[Number], joints: list[Number]
    ) -> list[Instruction]:
        """One value: the result is written, and returned is what is to be summed."""
        x, grad, out = tensors
        result, parts = self.formula(Number(trace, self.wide(self.load(x, i, self.read))), own, joints)
        if self.steep:
            slope = Number(trace, self.wide(self.load(grad, i, self.read)))
            result, parts = result * slope, [part * slope for part in parts]
        self.b.store(self.narrow(trace.value(result)), self.place(out, i, self.read))
        return [trace.value(part) for part in parts]

    # -- what instructions are made of --------------------------------------------------------------------------------

    @contextmanager
    def steps(self, start: Any, stop: Any) -> Iterator[tuple[Any, Callable[[Any], Any]]]:
        """A loop from `start` while below `stop`: the number, and what sets the next."""
        with self.b.goto_entry_block():
            kept = self.b.alloca(self.int)
        check, body, end = (self.b.append_basic_block() for _ in range(3))
        self.b.store(start, kept)
        self.b.branch(check)
        self.b.position_at_end(check)
        i = self.b.load(kept, typ=self.int)
        self.b.cbranch(self.b.icmp_signed("<", i, stop), body, end)
        self.b.position_at_end(body)
        yield i, lambda following: self.b.store(following, kept)
        self.b.branch(check)
        self.b.position_at_end(end)

    def place(self, array: Any, index: Any, type: Any = None) -> Any:
        return self.b.gep(array, [index], source_etype=type or self.type)

    def load(self, array: Any, index: Any, type: Any = None) -> Any:
        return self.b.load(self.place(array, index, type), typ=type or self.type)

    def numbers(self, trace: Trace, array: Any, stride: Any, i: Any = None) -> list[Number]:
        places = [self.b.mul(stride, self.int(k)) for k in range(self.count)]
        places = places if i is None else [self.b.add(place, i) for place in places]
        return [Number(trace, self.load(array, place)) for place in places]

    def total(self, values: Iterable[Any]) -> Any:
        """The one place where the order of additions is left to the compiler."""
        return reduce(lambda a, b: self.b.fadd(a, b, flags=("reassoc", "nsz", *FUSED)), values)

    def add(self, sums: Any, index: Any, part: Any) -> None:
        """Add to a sum in float64."""
        part = part if self.type == self.double else self.b.fpext(part, self.double)
        place = self.place(sums, index, self.double)
        self.b.store(self.b.fadd(self.b.load(place, typ=self.double), part), place)

    def least(self, a: Any, b: Any) -> Any:
        return self.b.select(self.b.icmp_signed("<", a, b), a, b)

    def wide(self, value: Any) -> Any:
        """In the type of the numbers what was read, a value or a vector; a bfloat16 is the upper half of a float32."""
        if self.read == self.type:
            return value
        bits = self.b.zext(value, self.like(value, self.ir.IntType(32)))
        return self.b.bitcast(self.b.shl(bits, self.whole(bits, 16)), self.like(value, self.type))

    def narrow(self, value: Any) -> Any:
        """In the type that is written; of two bfloat16 that are as near the even one."""
        if self.read == self.type:
            return value
        b = self.b
        bits = b.bitcast(value, self.like(value, self.ir.IntType(32)))
        odd = b.and_(b.lshr(bits, self.whole(bits, 16)), self.whole(bits, 1))
        near = b.add(bits, b.add(odd, self.whole(bits, 0x7FFF)))
        near = b.trunc(b.lshr(near, self.whole(bits, 16)), self.like(value, self.read))
        return b.select(b.fcmp_unordered("uno", value, value), self.whole(near, 0x7FC0), near)

    def like(self, value: Any, type: Any) -> Any:
        """The type for as many of `type` as `value` has."""
        return self.ir.VectorType(type, value.type.count) if isinstance(value.type, self.ir.VectorType) else type

    def whole(self, value: Any, number: int) -> Any:
        """A whole number of the type of `value`, in all places."""
        return value.type([number] * value.type.count if isinstance(value.type, self.ir.VectorType) else number)


@lru_cache(maxsize=1)
def _processor() -> tuple[Any, str, str]:
    """What LLVM makes code for: the processor that it runs on, its name and features."""
    import llvmlite.binding as llvm

    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    features = llvm.get_host_cpu_features().flatten()
    return llvm.Target.from_default_triple(), llvm.get_host_cpu_name(), features


def compiled(source: str, openmp: dict[str, int]) -> tuple[Callable[[Any], None], Any]:
    """The function `loop` of a source, and what its machine code lives in; `openmp` are the addresses of `OPENMP`."""
    import llvmlite.binding as llvm

    target, name, features = _processor()
    for function, address in openmp.items():
        llvm.add_symbol(function, address)
    machine = target.create_target_machine(name, features, opt=3)  # the engine's own: it goes with it
    module = llvm.parse_assembly(source)
    module.triple, module.data_layout = machine.triple, str(machine.target_data)
    module.verify()
    options = llvm.create_pipeline_tuning_options(speed_level=3)
    options.loop_vectorization = options.loop_interleaving = True
    builder = llvm.create_pass_builder(machine, options)
    builder.getModulePassManager().run(module, builder)
    engine = llvm.create_mcjit_compiler(module, machine)
    engine.finalize_object()
    return ctypes.CFUNCTYPE(None, ctypes.c_void_p)(engine.get_function_address("loop")), engine
