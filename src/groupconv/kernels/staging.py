"""Layouts: rows of an NCHW image brought into rows of channels and back, through a small buffer.

Kernels compute on pixels that are rows of channels. Where the tensors are not, a few rows of the
channels that one block needs are transposed into a buffer of the thread, and its results out of
another. A given order of the input channels is applied on the same way.
"""

from collections.abc import Callable

from groupconv.kernels.activation import activate
from groupconv.kernels.emit import Emitter
from groupconv.kernels.flow import Value
from groupconv.kernels.machine import Machine
from groupconv.kernels.spec import KernelSpec


class InputStage:
    """Writes the function that fills a buffer with ``channels`` input channels of some pixels."""

    def __init__(self, spec: KernelSpec, machine: Machine, channels: int, name: str) -> None:
        self.spec, self.channels, self.name = spec, channels, name
        self.e = Emitter(machine)

    def write(self) -> str:
        e, conv = self.e, self.spec.conv
        plane = conv.input_size[0] * conv.input_size[1]

        def from_channel(c: Value) -> str:
            channel: Value = e.add("%channel", c)
            if self.spec.ordered:
                channel = e.load_index("%order", channel)
            return e.offset(
                "%x", channel if self.spec.channels_last_input else e.mul(channel, plane)
            )

        _in_squares(
            e,
            self.channels,
            blocked=not self.spec.channels_last_input,
            square=lambda pixel, c, count: self._square(from_channel, pixel, c, count),
            single=lambda pixel, c: e.copy(
                e.offset(from_channel(c), e.mul(e.add("%first", pixel), self.spec.input_stride)),
                e.offset("%buffer", e.add(e.mul(pixel, self.channels), c)),
            ),
        )
        e.do("ret void")
        return (
            f"define internal void @{self.name}(ptr noalias %x, ptr noalias %order, "
            f"ptr noalias %buffer, i64 %channel, i64 %first, i64 %count) #0 {{\n{e.text()}\n}}\n"
        )

    def call(
        self, e: Emitter, x: str, buffer: str, channel: Value, first: Value, count: Value
    ) -> None:
        e.do(
            f"call void @{self.name}(ptr {x}, ptr %order, ptr {buffer}, i64 {channel}, "
            f"i64 {first}, i64 {count})"
        )

    def _square(
        self, from_channel: Callable[[Value], str], pixel: Value, c: Value, count: int
    ) -> None:
        e = self.e
        start = e.add("%first", pixel)
        rows = [e.load(from_channel(e.add(c, j)), start) for j in range(count)]
        rows += ["poison"] * (e.lanes - count)
        for p, column in enumerate(e.transpose(rows)):
            target = e.add(e.mul(e.add(pixel, p), self.channels), c)
            e.store(column, e.offset("%buffer", target), 0, count)


class OutputStage:
    """Writes the function that finishes the results of a block and stores them as NCHW."""

    def __init__(self, spec: KernelSpec, machine: Machine, channels: int, name: str) -> None:
        self.spec, self.channels, self.name = spec, channels, name
        self.e = Emitter(machine)

    def write(self) -> str:
        e = self.e
        if self.spec.output_tensor_size == self.spec.conv.output_size:
            _in_squares(e, self.channels, blocked=True, square=self._square, single=self._single)
        else:
            self._apart()
        e.do("ret void")
        return (
            f"define internal void @{self.name}(ptr noalias %buffer, ptr %residual, "
            f"ptr %y, i64 %channel, i64 %first, i64 %count) #0 {{\n{e.text()}\n}}\n"
        )

    def _square(self, pixel: Value, c: Value, count: int) -> None:
        e = self.e
        rows = [e.load("%buffer", self._source(e.add(pixel, p), c), count) for p in range(e.lanes)]
        for j, column in enumerate(e.transpose(rows)[:count]):
            self._finish(column, e.add(self._plane(e.add(c, j)), e.add("%first", pixel)), None)

    def _single(self, pixel: Value, c: Value) -> None:
        value = self.e.load("%buffer", self._source(pixel, c), 1)
        self._finish(value, self.e.add(self._plane(c), self.e.add("%first", pixel)), 1)

    def _apart(self) -> None:
        """Whole rows whose values go to places that are not neighbours."""
        e, (down, across) = self.e, self.spec.step
        width, written = self.spec.conv.output_size[1], self.spec.output_tensor_size[1]
        with e.loop(0, e.div("%count", width)) as row, e.loop(0, self.channels) as c:
            line = e.mul(e.add(e.div("%first", width), row), down * written)
            start = e.add(self._plane(c), line)
            with e.loop(0, width) as column:
                value = e.load("%buffer", self._source(e.add(e.mul(row, width), column), c), 1)
                self._finish(value, e.add(start, e.mul(column, across)), 1)

    def _source(self, pixel: Value, c: Value) -> Value:
        return self.e.add(self.e.mul(pixel, self.channels), c)

    def _plane(self, c: Value) -> Value:
        size = self.spec.output_tensor_size
        return self.e.mul(self.e.add("%channel", c), size[0] * size[1])

    def _finish(self, value: str, at: Value, count: int | None) -> None:
        e, spec = self.e, self.spec

        def add(value: str) -> str:
            return e.arithmetic("fadd", value, e.load("%residual", at, count))

        if spec.residual == "before":
            value = add(value)
        value = activate(e, spec.activation, spec.slope, value)
        if spec.residual == "after":
            value = add(value)
        e.store(value, "%y", at, count)

    def call(
        self,
        e: Emitter,
        buffer: str,
        residual: str,
        y: str,
        channel: Value,
        first: Value,
        count: Value,
    ) -> None:
        e.do(
            f"call void @{self.name}(ptr {buffer}, ptr {residual}, ptr {y}, i64 {channel}, "
            f"i64 {first}, i64 {count})"
        )


def _in_squares(
    e: Emitter,
    channels: int,
    blocked: bool,
    square: Callable[[Value, Value, int], None],
    single: Callable[[Value, Value], None],
) -> None:
    """Cover ``%count`` pixels of ``channels`` channels by squares as wide as a vector, the pixels
    that are left one value at a time."""
    done: Value = 0
    if blocked:
        done = e.mul(e.div("%count", e.lanes), e.lanes)
        whole = channels // e.lanes * e.lanes
        with e.loop(0, done, e.lanes) as pixel:
            with e.loop(0, whole, e.lanes) as c:
                square(pixel, c, e.lanes)
            if channels > whole:
                square(pixel, whole, channels - whole)
    with e.loop(done, "%count") as pixel, e.loop(0, channels) as c:
        single(pixel, c)
