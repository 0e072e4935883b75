"""Softmax over the channels of each pixel."""

import math
from dataclasses import dataclass
from typing import ClassVar

from groupconv.compiler.steps import entry, row
from groupconv.compiler.steps.functions import exp
from groupconv.compiler.steps.step import Step
from groupconv.kernels.emit import Emitter
from groupconv.kernels.flow import Value
from groupconv.kernels.machine import Machine


@dataclass(frozen=True)
class SoftmaxStep(Step):
    """See :class:`groupconv.compiler.graph.Softmax`; y may be the memory of x.

    Args:
        pixels: of one image.
        channels: of a pixel.
        strides: of x and of y.
    """

    pixels: int
    channels: int
    strides: tuple[int, int]

    arguments: ClassVar[tuple[str, ...]] = ("x", "y", "images")

    @property
    def bytes(self) -> int:
        return 4 * 2 * self.pixels * self.channels

    def write(self, machine: Machine, name: str) -> str:
        return entry.module(machine, name, self.arguments, self._body)

    def _body(self, e: Emitter) -> None:
        start, stop = entry.part(e, e.mul("%images", self.pixels))
        with e.loop(start, stop) as pixel:
            x, y = (
                e.offset(pointer, e.mul(pixel, stride))
                for pointer, stride in zip(("%x", "%y"), self.strides, strict=True)
            )
            self._row(e, x, y)

    def _row(self, e: Emitter, x: str, y: str) -> None:
        def larger(a: str, b: str) -> str:
            # NaN may be lost here: the sum finds it.
            return e.select(e.less(a, b), b, a)

        least = e.constant(-math.inf)
        (top,) = row.total(e, self.channels, [least], lambda c, n: [e.load(x, c, n)], larger)

        def power(c: Value, count: int) -> list[str]:
            value = exp(e, e.arithmetic("fsub", e.load(x, c, count), top))
            e.store(value, y, c, count)
            return [value]

        zero = e.constant(0.0)
        (sum_,) = row.total(
            e, self.channels, [zero], power, lambda a, b: e.arithmetic("fadd", a, b)
        )
        factor = e.arithmetic("fdiv", e.constant(1.0), sum_)

        def value(c: Value, count: int) -> str:
            return e.arithmetic("fmul", e.load(y, c, count), factor)

        row.store(e, y, self.channels, value)
