"""A small vocabulary over LLVM IR: vectors, parts of vectors, and what memory holds."""

import ctypes
import struct
from collections.abc import Sequence

from groupconv.kernels.flow import Flow, Value


class Emitter(Flow):
    """Writes the instructions of one function; a vector has a lane for each that the machine's
    registers have."""

    # Memory: pointers to float32, offsets in elements.

    def unpack(
        self, record: Sequence[str], integers: Sequence[str], names: Sequence[str] | None = None
    ) -> None:
        """Values of ``%record``, eight bytes each, under their names: pointers and integers.

        Args:
            record: names of all its values, in order.
            integers: which of them are integers.
            names: which are wanted; all by default.
        """
        for name in record if names is None else names:
            kind = "i64" if name in integers else "ptr"
            place = self.let(f"getelementptr i64, ptr %record, i64 {record.index(name)}")
            self.do(f"%{name} = load {kind}, ptr {place}")

    def offset(self, pointer: str, elements: Value) -> str:
        if elements == 0:
            return pointer
        return self.let(f"getelementptr float, ptr {pointer}, i64 {elements}")

    def stack(self, vectors: int) -> str:
        """Memory of this call for so many vectors."""
        self._count += 1
        name = f"%v{self._count}.stack"
        # At the start of the function, so that no loop takes more and more of it.
        self._stack.append(f"  {name} = alloca [{vectors} x {self.vector}], align 64")
        return name

    def opaque(self, pointer: str) -> str:
        """The same pointer, from where LLVM can't see it.

        Otherwise LLVM moves the loads of one channel among those of another, needs more registers
        than there are, and spills: half the speed.
        """
        return self.let(f'call ptr asm sideeffect "", "=r,0"(ptr {pointer})')

    def load(self, pointer: str, offset: Value = 0, count: int | None = None) -> str:
        """A vector of ``count`` values (all lanes by default); other lanes are undefined."""
        pointer = self.offset(pointer, offset)
        count = self.lanes if count is None else count
        if count == self.lanes:
            return self.let(f"load {self.vector}, ptr {pointer}, align 4")
        if self.machine.masked:
            suffix = f"v{self.lanes}f32.p0"
            return self.call(
                self.vector, f"llvm.masked.load.{suffix}", f"ptr, i32, {self._bits}, {self.vector}",
                f"ptr {pointer}, i32 4, {self._mask(count)}, {self.vector} poison",
            )  # fmt: skip
        result = "poison"
        for start, size in _pieces(count):
            part = self.let(f"load <{size} x float>, ptr {self.offset(pointer, start)}, align 4")
            spread = [
                lane - start if 0 <= lane - start < size else None for lane in range(self.lanes)
            ]
            wide = self._shuffle(f"<{size} x float>", part, "poison", spread)
            if result == "poison":
                result = wide
            else:
                lanes = [
                    self.lanes + lane if start <= lane < start + size else lane
                    for lane in range(self.lanes)
                ]
                result = self._shuffle(self.vector, result, wide, lanes)
        return result

    def store(self, vector: str, pointer: str, offset: Value = 0, count: int | None = None) -> None:
        """Store the first ``count`` lanes (all by default); nothing else is touched."""
        pointer = self.offset(pointer, offset)
        count = self.lanes if count is None else count
        if count == self.lanes:
            self.do(f"store {self.vector} {vector}, ptr {pointer}, align 4")
        elif self.machine.masked:
            function = f"llvm.masked.store.v{self.lanes}f32.p0"
            self.declarations.add(
                f"declare void @{function}({self.vector}, ptr, i32, {self._bits})"
            )
            self.do(
                f"call void @{function}({self.vector} {vector}, ptr {pointer}, i32 4, "
                f"{self._mask(count)})"
            )
        else:
            for start, size in _pieces(count):
                part = self._shuffle(
                    self.vector, vector, "poison", list(range(start, start + size))
                )
                self.do(
                    f"store <{size} x float> {part}, ptr {self.offset(pointer, start)}, align 4"
                )

    def copy(self, source: str, target: str) -> None:
        """One value from memory to memory."""
        value = self.let(f"load float, ptr {source}, align 4")
        self.do(f"store float {value}, ptr {target}, align 4")

    def load_index(self, pointer: str, index: Value) -> str:
        """Element ``index`` of an array of 64-bit integers."""
        place = self.let(f"getelementptr i64, ptr {pointer}, i64 {index}")
        return self.let(f"load i64, ptr {place}, align 8")

    def prefetch(self, pointer: str, offset: Value) -> None:
        """Ask for a line of memory that will be read; any address will do."""
        self.declarations.add("declare void @llvm.prefetch.p0(ptr, i32, i32, i32)")
        place = self.offset(pointer, offset)
        self.do(f"call void @llvm.prefetch.p0(ptr {place}, i32 0, i32 3, i32 1)")

    def broadcast(self, pointer: str, offset: Value = 0) -> str:
        """One value from memory in every lane."""
        value = self.let(f"load float, ptr {self.offset(pointer, offset)}, align 4")
        single = self.let(f"insertelement {self.vector} poison, float {value}, i64 0")
        return self._shuffle(self.vector, single, "poison", [0] * self.lanes)

    # Vectors of float32.

    def constant(self, value: float) -> str:
        """``value`` in every lane, rounded to float32."""
        return f"splat (float {_hex(value)})"

    def integer(self, value: Value) -> str:
        """An integer in every lane, rounded to float32."""
        if isinstance(value, int):
            return self.constant(float(value))
        single = self.let(f"sitofp i64 {value} to float")
        first = self.let(f"insertelement {self.vector} poison, float {single}, i64 0")
        return self._shuffle(self.vector, first, "poison", [0] * self.lanes)

    def shuffle(self, a: str, b: str, lanes: Sequence[int | None]) -> str:
        """Lane i holds lane ``lanes[i]`` of ``a`` followed by ``b``; None leaves it undefined."""
        return self._shuffle(self.vector, a, b, lanes)

    def multiply_add(self, a: str, b: str, c: str) -> str:
        """``a * b + c``, rounded once where the machine can."""
        v = self.vector
        return self.call(
            v, f"llvm.fmuladd.v{self.lanes}f32", f"{v}, {v}, {v}", f"{v} {a}, {v} {b}, {v} {c}"
        )

    def arithmetic(self, operation: str, a: str, b: str) -> str:
        """``fadd``, ``fsub``, ``fmul`` or ``fdiv``."""
        return self.let(f"{operation} {self.vector} {a}, {b}")

    def maximum(self, a: str, b: str) -> str:
        """The larger one, NaN where either is; of 0.0 and -0.0 any."""
        v, function = self.vector, f"llvm.maximum.v{self.lanes}f32"
        self.declarations.add(f"declare {v} @{function}({v}, {v})")
        return self.let(f"call nsz {v} @{function}({v} {a}, {v} {b})")

    def select(self, condition: str, a: str, b: str) -> str:
        return self.let(f"select {self._bits} {condition}, {self.vector} {a}, {self.vector} {b}")

    def less(self, a: str, b: str) -> str:
        """Lane by lane, false for NaN."""
        return self.let(f"fcmp olt {self.vector} {a}, {b}")

    def equal(self, a: str, b: str) -> str:
        """Lane by lane, false for NaN."""
        return self.let(f"fcmp oeq {self.vector} {a}, {b}")

    def negate(self, a: str) -> str:
        return self.let(f"fneg {self.vector} {a}")

    def absolute(self, a: str) -> str:
        return self._unary("fabs", a)

    def square_root(self, a: str) -> str:
        """Rounded as IEEE 754 says; NaN below zero."""
        return self._unary("sqrt", a)

    def with_sign(self, a: str, sign: str) -> str:
        """``a`` with the sign of ``sign``, lane by lane."""
        v = self.vector
        return self.call(v, f"llvm.copysign.v{self.lanes}f32", f"{v}, {v}", f"{v} {a}, {v} {sign}")

    def add_to_exponent(self, a: str, low_bits: str) -> str:
        """``a * 2**n``, where n is the integer in the low bits of each lane of ``low_bits``."""
        integers = f"<{self.lanes} x i32>"
        n = self.let(f"bitcast {self.vector} {low_bits} to {integers}")
        shifted = self.let(f"shl {integers} {n}, splat (i32 23)")
        bits = self.let(f"bitcast {self.vector} {a} to {integers}")
        scaled = self.let(f"add {integers} {bits}, {shifted}")
        return self.let(f"bitcast {integers} {scaled} to {self.vector}")

    def scale(self, a: str, low_bits: str) -> str:
        """The same for any n between -250 and 250 and any ``a``, NaN included: rounded once where
        the result is subnormal, infinite where it is too large."""
        integers = f"<{self.lanes} x i32>"
        n = self.let(f"bitcast {self.vector} {low_bits} to {integers}")
        # A shift keeps the low bits of the half right, whatever is in the high ones.
        half = self.let(f"ashr {integers} {n}, splat (i32 1)")
        rest = self.let(f"sub {integers} {n}, {half}")
        for part in (half, rest):
            power = self.let(f"bitcast {integers} {part} to {self.vector}")
            a = self.arithmetic("fmul", a, self.add_to_exponent(self.constant(1.0), power))
        return a

    def split(self, a: str) -> tuple[str, str]:
        """m and n so that ``a = m * 2**n``, m between sqrt(1/2) and sqrt(2), n an integer.

        Of normal positive numbers; of others the result means nothing.
        """
        integers = f"<{self.lanes} x i32>"
        bits = self.let(f"bitcast {self.vector} {a} to {integers}")
        # The bits of sqrt(1/2): what is above them in the place of the exponent is n.
        above = self.let(f"sub {integers} {bits}, splat (i32 {0x3F3504F3})")
        n = self.let(f"ashr {integers} {above}, splat (i32 23)")
        shifted = self.let(f"shl {integers} {n}, splat (i32 23)")
        m = self.let(f"sub {integers} {bits}, {shifted}")
        return (
            self.let(f"bitcast {integers} {m} to {self.vector}"),
            self.let(f"sitofp {integers} {n} to {self.vector}"),
        )

    def transpose(self, rows: Sequence[str]) -> list[str]:
        """The columns of ``lanes`` vectors, as vectors."""
        lanes, rows = self.lanes, list(rows)
        half = lanes // 2
        while half:
            # Swap the off-diagonal squares of side ``half`` in every square of twice that side.
            low = [lane if not lane & half else lane - half + lanes for lane in range(lanes)]
            high = [lane + half if not lane & half else lane + lanes for lane in range(lanes)]
            swapped = list(rows)
            for i in range(lanes):
                if not i & half:
                    a, b = rows[i], rows[i + half]
                    swapped[i] = self.shuffle(a, b, low)
                    swapped[i + half] = self.shuffle(a, b, high)
            rows = swapped
            half //= 2
        return rows

    def unordered(self, a: str) -> str:
        """Lane by lane, whether it is NaN."""
        return self.let(f"fcmp uno {self.vector} {a}, {a}")

    def _unary(self, function: str, a: str) -> str:
        v = self.vector
        return self.call(v, f"llvm.{function}.v{self.lanes}f32", v, f"{v} {a}")

    @property
    def _bits(self) -> str:
        return f"<{self.lanes} x i1>"

    def _mask(self, count: int) -> str:
        bits = ", ".join(f"i1 {int(lane < count)}" for lane in range(self.lanes))
        return f"{self._bits} <{bits}>"

    def _shuffle(self, type: str, a: str, b: str, lanes: Sequence[int | None]) -> str:
        mask = ", ".join("i32 poison" if lane is None else f"i32 {lane}" for lane in lanes)
        return self.let(f"shufflevector {type} {a}, {type} {b}, <{len(lanes)} x i32> <{mask}>")


def _pieces(count: int) -> list[tuple[int, int]]:
    """``count`` as (start, size) with powers of two, largest first."""
    pieces, start = [], 0
    while start < count:
        size = 1 << ((count - start).bit_length() - 1)
        pieces.append((start, size))
        start += size
    return pieces


def _hex(value: float) -> str:
    """A float32 as LLVM writes it: the bits of the double of the same value."""
    single = ctypes.c_float(value).value
    return f"0x{struct.unpack('<Q', struct.pack('<d', single))[0]:016X}"
