"""Layer normalisation of the channels of each pixel."""

from dataclasses import dataclass
from typing import ClassVar

from groupconv.compiler.steps import entry, row
from groupconv.compiler.steps.step import Step
from groupconv.kernels.emit import Emitter
from groupconv.kernels.flow import Value
from groupconv.kernels.machine import Machine


@dataclass(frozen=True)
class LayerNormStep(Step):
    """See :class:`groupconv.compiler.graph.LayerNorm`; y may be the memory of x.

    Args:
        pixels: of one image.
        channels: of a pixel.
        strides: of x and of y.
        eps: added to the variance.
        weight, bias: whether there is one; the pointer means nothing where there is none.
    """

    pixels: int
    channels: int
    strides: tuple[int, int]
    eps: float
    weight: bool = True
    bias: bool = True

    arguments: ClassVar[tuple[str, ...]] = ("x", "weight", "bias", "y", "images")

    @property
    def bytes(self) -> int:
        return 4 * self.channels * (2 * self.pixels + self.weight + self.bias)

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
        def add(a: str, b: str) -> str:
            return e.arithmetic("fadd", a, b)

        def subtract(a: str, b: str) -> str:
            return e.arithmetic("fsub", a, b)

        def multiply(a: str, b: str) -> str:
            return e.arithmetic("fmul", a, b)

        def mean(terms: list[str]) -> list[str]:
            return [e.arithmetic("fdiv", t, e.constant(self.channels)) for t in terms]

        zero = e.constant(0.0)
        sums = row.total(e, self.channels, [zero], lambda c, n: [e.load(x, c, n)], add)
        (middle,) = mean(sums)

        def moments(c: Value, count: int) -> list[str]:
            apart = subtract(e.load(x, c, count), middle)
            return [apart, multiply(apart, apart)]

        # The mean was rounded: what is left of it is taken off the differences, of which it is a
        # small part (Chan, Golub and LeVeque, "Algorithms for computing the sample variance").
        rest, square = mean(row.total(e, self.channels, [zero, zero], moments, add))
        variance = e.multiply_add(e.negate(rest), rest, square)
        variance = e.select(e.less(variance, zero), zero, variance)
        root = e.square_root(add(variance, e.constant(self.eps)))
        factor = e.arithmetic("fdiv", e.constant(1.0), root)

        def value(c: Value, count: int) -> str:
            apart = subtract(subtract(e.load(x, c, count), middle), rest)
            result = multiply(apart, factor)
            weight = e.load("%weight", c, count) if self.weight else None
            bias = e.load("%bias", c, count) if self.bias else None
            if weight and bias:
                return e.multiply_add(result, weight, bias)
            if weight:
                return multiply(result, weight)
            return add(result, bias) if bias else result

        row.store(e, y, self.channels, value)
