"""Layouts: rows of an NCHW image brought into rows of channels and back, through a small buffer.

Kernels compute on pixels that are rows of channels. Where the tensors are not, a few rows of the
channels that one block needs are transposed into a buffer of the thread, and its results out of
another. A given order of the input channels is applied on the same way.
"""

from collections.abc import Callable

from groupconv.kernels.activation import activate
from groupconv.kernels.emit import Emitter, Value
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

        step = conv.in_channels if self.spec.channels_last_input else 1
        _in_squares(
            e,
            self.channels,
            blocked=not self.spec.channels_last_input,
            square=lambda pixel, c, count: self._square(from_channel, pixel, c, count),
            single=lambda pixel, c: e.copy(
                e.offset(from_channel(c), e.mul(e.add("%first", pixel), step)),
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
        e, spec = self.e, self.spec
        size = spec.output_tensor_size
        plane = size[0] * size[1]

        def place(pixel: Value, c: Value) -> Value:
            position = e.add("%first", pixel)
            if spec.step != (1, 1):
                width = spec.conv.output_size[1]
                row, column = e.div(position, width), e.rem(position, width)
                position = e.add(e.mul(row, spec.step[0] * size[1]), e.mul(column, spec.step[1]))
            return e.add(e.mul(e.add("%channel", c), plane), position)

        def finish(value: str, at: Value, count: int | None) -> None:
            if spec.residual:
                value = e.arithmetic("fadd", value, e.load("%residual", at, count))
            e.store(activate(e, spec.activation, spec.slope, value), "%y", at, count)

        def square(pixel: Value, c: Value, count: int) -> None:
            rows = [
                e.load("%buffer", e.add(e.mul(e.add(pixel, p), self.channels), c), count)
                for p in range(e.lanes)
            ]
            for j, column in enumerate(e.transpose(rows)[:count]):
                finish(column, place(pixel, e.add(c, j)), None)

        def single(pixel: Value, c: Value) -> None:
            value = e.load("%buffer", e.add(e.mul(pixel, self.channels), c), 1)
            finish(value, place(pixel, c), 1)

        _in_squares(e, self.channels, blocked=spec.step == (1, 1), square=square, single=single)
        e.do("ret void")
        return (
            f"define internal void @{self.name}(ptr noalias %buffer, ptr %residual, "
            f"ptr %y, i64 %channel, i64 %first, i64 %count) #0 {{\n{e.text()}\n}}\n"
        )

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
