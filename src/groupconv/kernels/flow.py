"""A function in LLVM IR as it grows: arithmetic of integers, loops and conditions.

A value is a Python int while it is known and the name of an SSA value once it is not, so that
arithmetic on known sizes leaves no instructions behind.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence

from groupconv.kernels.machine import Machine

Value = int | str


class Flow:
    """Writes the instructions of one function, block by block: integers, loops, conditions."""

    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        self.lanes = machine.lanes
        self.vector = f"<{machine.lanes} x float>"
        self.declarations: set[str] = set()
        self._stack: list[str] = []
        self._lines: list[str] = []
        self._count = 0
        self._block = "entry"

    def text(self) -> str:
        """The body of the function."""
        return "\n".join(["entry:", *self._stack, *self._lines])

    def do(self, instruction: str) -> None:
        """An instruction without a result."""
        self._lines.append(f"  {instruction}")

    def let(self, instruction: str) -> str:
        """An instruction with a result; returns its name."""
        name = f"%v{self._count}"
        self._count += 1
        self._lines.append(f"  {name} = {instruction}")
        return name

    def call(self, type: str, function: str, parameters: str, arguments: str) -> str:
        """The result of a function, declared once for the module."""
        self.declarations.add(f"declare {type} @{function}({parameters})")
        return self.let(f"call {type} @{function}({arguments})")

    # Integers (64 bits, signed).

    def add(self, a: Value, b: Value) -> Value:
        if isinstance(a, int) and isinstance(b, int):
            return a + b
        if a == 0:
            return b
        return a if b == 0 else self.let(f"add i64 {a}, {b}")

    def sub(self, a: Value, b: Value) -> Value:
        if isinstance(a, int) and isinstance(b, int):
            return a - b
        return a if b == 0 else self.let(f"sub i64 {a}, {b}")

    def mul(self, a: Value, b: Value) -> Value:
        if isinstance(a, int) and isinstance(b, int):
            return a * b
        if a == 0 or b == 0:
            return 0
        if a == 1:
            return b
        return a if b == 1 else self.let(f"mul i64 {a}, {b}")

    def div(self, a: Value, b: Value) -> Value:
        """Quotient of two numbers that are not negative."""
        if isinstance(a, int) and isinstance(b, int):
            return a // b
        return a if b == 1 else self.let(f"udiv i64 {a}, {b}")

    def rem(self, a: Value, b: Value) -> Value:
        if isinstance(a, int) and isinstance(b, int):
            return a % b
        return 0 if b == 1 else self.let(f"urem i64 {a}, {b}")

    def min(self, a: Value, b: Value) -> Value:
        if isinstance(a, int) and isinstance(b, int):
            return min(a, b)
        return self.call("i64", "llvm.smin.i64", "i64, i64", f"i64 {a}, i64 {b}")

    def max(self, a: Value, b: Value) -> Value:
        if isinstance(a, int) and isinstance(b, int):
            return max(a, b)
        return self.call("i64", "llvm.smax.i64", "i64, i64", f"i64 {a}, i64 {b}")

    # Control.

    def _label(self, hint: str) -> str:
        self._count += 1
        return f"{hint}{self._count}"

    def _enter(self, label: str) -> None:
        self._lines.append(f"{label}:")
        self._block = label

    @contextlib.contextmanager
    def loop(self, start: Value, stop: Value, step: int = 1) -> Iterator[Value]:
        """Run the body for each index; no loop is left where there is one."""
        if _is_once(start, stop, step):
            yield start
            return
        with self._repeat(start, stop, step, ()) as (index, _, _):
            yield index

    def fold(
        self,
        start: Value,
        stop: Value,
        step: int,
        vectors: Sequence[str],
        body: Callable[[Value, list[str]], list[str]],
    ) -> list[str]:
        """``vectors = body(index, vectors)`` for each index, the vectors kept in registers."""
        if _is_once(start, stop, step):
            return body(start, list(vectors))
        with self._repeat(start, stop, step, vectors) as (index, carried, results):
            results += body(index, list(carried))
        return carried

    @contextlib.contextmanager
    def _repeat(
        self, start: Value, stop: Value, step: int, vectors: Sequence[str]
    ) -> Iterator[tuple[str, list[str], list[str]]]:
        """A loop. Its body is given the index, the vectors as they are, and a list for what they
        become."""
        head, body, done = (self._label(hint) for hint in ("head", "body", "done"))
        index, following = f"%{head}.index", f"%{head}.next"
        before = self._block
        self.do(f"br label %{head}")
        self._enter(head)
        # What the values come from is known when the body is written.
        phi = len(self._lines)
        self.do("")
        carried = [f"%{head}.{i}" for i in range(len(vectors))]
        results: list[str] = []
        self.do(f"%{head}.more = icmp slt i64 {index}, {stop}")
        self.do(f"br i1 %{head}.more, label %{body}, label %{done}")
        self._enter(body)
        yield index, carried, results
        self.do(f"{following} = add i64 {index}, {step}")
        self._lines[phi] = "\n".join(
            f"  {name} = phi {type} [ {first}, %{before} ], [ {next}, %{self._block} ]"
            for name, type, first, next in (
                (index, "i64", start, following),
                *zip(carried, [self.vector] * len(vectors), vectors, results, strict=True),
            )
        )
        self.do(f"br label %{head}")
        self._enter(done)

    @contextlib.contextmanager
    def when(self, condition: str) -> Iterator[None]:
        """Run the body only where ``condition`` (an i1) holds."""
        inside, done = self._label("then"), self._label("done")
        self.do(f"br i1 {condition}, label %{inside}, label %{done}")
        self._enter(inside)
        yield
        self.do(f"br label %{done}")
        self._enter(done)

    def unreachable(self, hint: str) -> None:
        """Start a block that nothing enters, after an instruction that leaves the function."""
        self._enter(self._label(hint))

    def choose(
        self, condition: str, yes: Callable[[], list[str]], no: Callable[[], list[str]]
    ) -> list[str]:
        """The vectors of ``yes()`` where ``condition`` (an i1) holds, else those of ``no()``."""
        first, second, done = (self._label(hint) for hint in ("yes", "no", "done"))
        self.do(f"br i1 {condition}, label %{first}, label %{second}")
        self._enter(first)
        a, from_a = yes(), self._block
        self.do(f"br label %{done}")
        self._enter(second)
        b, from_b = no(), self._block
        self.do(f"br label %{done}")
        self._enter(done)
        return [
            self.let(f"phi {self.vector} [ {x}, %{from_a} ], [ {y}, %{from_b} ]")
            for x, y in zip(a, b, strict=True)
        ]


def _is_once(start: Value, stop: Value, step: int) -> bool:
    """Whether a loop is known to run once."""
    return isinstance(start, int) and isinstance(stop, int) and start < stop <= start + step
