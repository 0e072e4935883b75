"""Max and average pooling."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from groupconv.compiler.graph import Pool
from groupconv.compiler.steps import entry
from groupconv.compiler.steps.channels import Cut, cover
from groupconv.compiler.steps.step import Step
from groupconv.compiler.steps.window import Range, Window
from groupconv.kernels.emit import Emitter
from groupconv.kernels.flow import Value
from groupconv.kernels.machine import Machine

# Vectors of channels whose results are kept in registers.
_VECTORS = 4


@dataclass(frozen=True)
class PoolStep(Step):
    """Pooling of images in NHWC.

    Args:
        pool: what is computed.
        channels: of a pixel.
        input_size: rows and columns of an image.
        strides: of the input and of the output.
    """

    pool: Pool
    channels: int
    input_size: tuple[int, int]
    strides: tuple[int, int]

    arguments: ClassVar[tuple[str, ...]] = ("x", "y", "images")

    @property
    def output_size(self) -> tuple[int, int]:
        return self._rows.outputs, self._columns.outputs

    @property
    def bytes(self) -> int:
        pixels = self._rows.size * self._columns.size + self._rows.outputs * self._columns.outputs
        return 4 * self.channels * pixels

    @property
    def _rows(self) -> "_Axis":
        return _Axis.of(self.pool, self.input_size, 0)

    @property
    def _columns(self) -> "_Axis":
        return _Axis.of(self.pool, self.input_size, 1)

    def write(self, machine: Machine, name: str) -> str:
        return entry.module(machine, name, self.arguments, lambda e: _Code(self, e).body())


@dataclass(frozen=True)
class _Axis:
    """Pooling along one axis; the fields are those of Pool, and the size of the input."""

    size: int
    kernel: int
    stride: int
    padding: tuple[int, int]
    dilation: int
    counted: tuple[int, int]

    @classmethod
    def of(cls, pool: Pool, input_size: tuple[int, int], axis: int) -> "_Axis":
        return cls(
            input_size[axis],
            pool.kernel_size[axis],
            pool.stride[axis],
            pool.padding[axis],
            pool.dilation[axis],
            pool.counted[axis],
        )

    @property
    def _reach(self) -> int:
        return (self.kernel - 1) * self.dilation + 1

    @property
    def outputs(self) -> int:
        return (self.size + sum(self.padding) - self._reach) // self.stride + 1

    @property
    def inner(self) -> tuple[int, int]:
        """The outputs whose windows lie inside."""
        first = -(-self.padding[0] // self.stride)
        stop = (self.size + self.padding[0] - self._reach) // self.stride + 1
        first = min(max(first, 0), self.outputs)
        return first, min(max(stop, first), self.outputs)

    @property
    def whole(self) -> bool:
        return self.inner == (0, self.outputs)

    def start(self, e: Emitter, output: Value) -> Value:
        """Where in the input the window of an output begins."""
        return e.sub(e.mul(output, self.stride), self.padding[0])

    def taps(self, e: Emitter, start: Value) -> Range:
        """Those of a window that lie inside."""
        return self._between(e, start, 0, self.size)

    def count(self, e: Emitter, start: Value) -> Value:
        """How many taps of a window count in an average."""
        first, stop = self._between(e, start, -self.counted[0], self.size + self.counted[1])
        return e.max(e.sub(stop, first), 1)

    def _between(self, e: Emitter, start: Value, low: int, high: int) -> Range:
        def taps(distance: Value) -> Value:
            """Taps that a window has before one at ``distance`` from its start or later."""
            steps = e.div(e.add(e.max(distance, 0), self.dilation - 1), self.dilation)
            return e.min(steps, self.kernel)

        return taps(e.sub(low, start)), taps(e.sub(high, start))


class _Code:
    """Writes the loops over output rows and columns."""

    def __init__(self, step: PoolStep, e: Emitter) -> None:
        self.e, self.channels, (self.into, self.out) = e, step.channels, step.strides
        self.rows, self.columns = step._rows, step._columns
        self.window = Window(e, step.pool.kind)

    def body(self) -> None:
        e, rows, columns = self.e, self.rows, self.columns
        with e.loop(*entry.part(e, e.mul("%images", rows.outputs))) as line:
            image, row = e.div(line, rows.outputs), e.rem(line, rows.outputs)
            top = rows.start(e, row)
            # Where no window is clipped these are numbers, and loops over them are written out.
            taps = (0, rows.kernel) if rows.whole else rows.taps(e, top)
            count = rows.kernel if rows.whole else rows.count(e, top)
            pixel = e.add(e.mul(image, rows.size * columns.size), e.mul(top, columns.size))
            x = e.offset("%x", e.mul(pixel, self.into))
            y = e.offset("%y", e.mul(line, columns.outputs * self.out))
            first, stop = columns.inner
            self._clipped(x, y, taps, count, (0, first))
            self._inside(x, y, taps, count, (first, stop))
            self._clipped(x, y, taps, count, (stop, columns.outputs))

    def _inside(self, x: str, y: str, rows: Range, count: Value, outputs: tuple[int, int]) -> None:
        """Outputs whose windows have all their columns."""
        if outputs[0] == outputs[1]:
            return
        e, columns = self.e, self.columns
        total = e.mul(count, columns.kernel)
        divisor = total if isinstance(total, int) else self._divisor(total)
        with e.loop(*outputs) as column:
            start = columns.start(e, column)
            self._pixel(x, y, rows, (0, columns.kernel), divisor, column, start)

    def _clipped(self, x: str, y: str, rows: Range, count: Value, outputs: tuple[int, int]) -> None:
        if outputs[0] == outputs[1]:
            return
        e, columns = self.e, self.columns
        with e.loop(*outputs) as column:
            start = columns.start(e, column)
            divisor = self._divisor(e.mul(count, columns.count(e, start)))
            self._pixel(x, y, rows, columns.taps(e, start), divisor, column, start)

    def _divisor(self, count: Value) -> str:
        return self.e.integer(count) if self.window.kind == "average" else "poison"

    def _pixel(
        self,
        x: str,
        y: str,
        rows: Range,
        columns: Range,
        divisor: str | int,
        column: Value,
        start: Value,
    ) -> None:
        e = self.e
        x, y = e.offset(x, e.mul(start, self.into)), e.offset(y, e.mul(column, self.out))
        row_step = self.columns.size * self.into * self.rows.dilation
        step = self.into * self.columns.dilation

        def some(channel: Value, vectors: Sequence[Cut]) -> None:
            at = e.offset(x, channel)
            found = self.window.rows(at, rows, row_step, columns, step, vectors)
            self.window.store(found, divisor, e.offset(y, channel), vectors)

        cover(e, self.channels, _VECTORS, some)
