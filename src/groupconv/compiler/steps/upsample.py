"""Nearest and bilinear interpolation."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from groupconv.compiler.graph import Upsample
from groupconv.compiler.steps import entry
from groupconv.compiler.steps.channels import Cut, cover
from groupconv.compiler.steps.copy import copy_channels
from groupconv.compiler.steps.step import Step
from groupconv.kernels.emit import Emitter
from groupconv.kernels.flow import Value
from groupconv.kernels.machine import Machine

# Vectors of channels that are interpolated together.
_VECTORS = 2
# The two pixels along an axis that an output lies between.
_PLACES = ("first", "second")


@dataclass(frozen=True)
class UpsampleStep(Step):
    """Interpolation of images in NHWC.

    Args:
        upsample: how.
        channels: of a pixel.
        input_size, output_size: rows and columns of an image.
        strides: of the input and of the output.
    """

    upsample: Upsample
    channels: int
    input_size: tuple[int, int]
    output_size: tuple[int, int]
    strides: tuple[int, int]

    arguments: ClassVar[tuple[str, ...]] = ("x", "y", "images")

    @property
    def bytes(self) -> int:
        return 4 * self.channels * (math.prod(self.input_size) + math.prod(self.output_size))

    def write(self, machine: Machine, name: str) -> str:
        rows, columns = (
            places(self.upsample, n, out, scale)
            for n, out, scale in zip(
                self.input_size, self.output_size, self.upsample.scales, strict=True
            )
        )
        into = self.strides[0]
        tables = [
            *rows.tables("rows", self.input_size[1] * into),
            *columns.tables("columns", into),
        ]
        return entry.module(machine, name, self.arguments, self._body, tables)

    def _body(self, e: Emitter) -> None:
        (height, width), (rows, columns), (into, out) = (
            self.input_size, self.output_size, self.strides,
        )  # fmt: skip
        with e.loop(*entry.part(e, e.mul("%images", rows))) as line:
            image, row = e.div(line, rows), e.rem(line, rows)
            x = e.offset("%x", e.mul(image, height * width * into))
            y = e.offset("%y", e.mul(line, columns * out))
            pixels = self._nearest if self.upsample.mode == "nearest" else self._bilinear
            pixels(e, x, y, row)

    def _nearest(self, e: Emitter, x: str, y: str, row: Value) -> None:
        line = e.offset(x, e.load_index("@rows.first", row))
        with e.loop(0, self.output_size[1]) as column:
            source = e.offset(line, e.load_index("@columns.first", column))
            copy_channels(e, source, e.offset(y, e.mul(column, self.strides[1])), self.channels)

    def _bilinear(self, e: Emitter, x: str, y: str, row: Value) -> None:
        lines = [e.offset(x, e.load_index(f"@rows.{place}", row)) for place in _PLACES]
        down = _weights(e, "rows", row)
        with e.loop(0, self.output_size[1]) as column:
            across = _weights(e, "columns", column)
            starts = [e.load_index(f"@columns.{place}", column) for place in _PLACES]
            corners = [e.offset(line, start) for line in lines for start in starts]
            weights = [e.arithmetic("fmul", a, b) for a in down for b in across]
            self._interpolate(e, corners, weights, e.offset(y, e.mul(column, self.strides[1])))

    def _interpolate(self, e: Emitter, corners: list[str], weights: list[str], target: str) -> None:
        """The sum of four pixels, each times its weight."""

        def some(channel: Value, vectors: Sequence[Cut]) -> None:
            places = [(e.add(channel, offset), count) for offset, count in vectors]
            for at, count in places:
                total = e.arithmetic("fmul", e.load(corners[0], at, count), weights[0])
                for corner, weight in zip(corners[1:], weights[1:], strict=True):
                    total = e.multiply_add(e.load(corner, at, count), weight, total)
                e.store(total, target, at, count)

        cover(e, self.channels, _VECTORS, some)


def _weights(e: Emitter, axis: str, index: Value) -> list[str]:
    """The weights of the first and of the second place."""
    second = e.broadcast(f"@{axis}.weight", index)
    return [e.arithmetic("fsub", e.constant(1.0), second), second]


@dataclass(frozen=True)
class Places:
    """Where the outputs along one axis come from.

    Args:
        first, second: pixels of the input, int64; equal where one is taken as it is.
        weight: of the second ones, float32; that of the first ones is 1 less this.
    """

    first: np.ndarray
    second: np.ndarray
    weight: np.ndarray

    def tables(self, axis: str, step: int) -> list[str]:
        """Constants: the places as elements, ``step`` from one to the next, and the weights."""
        return [
            entry.table(f"{axis}.first", self.first * step),
            entry.table(f"{axis}.second", self.second * step),
            entry.table(f"{axis}.weight", self.weight),
        ]


def places(upsample: Upsample, size: int, outputs: int, scale: float | None) -> Places:
    """As PyTorch finds them, in float32."""
    index = np.arange(outputs, dtype=np.float32)
    if size == outputs:
        position = index
    elif upsample.mode == "nearest":
        # To twice the size, whatever scale was given.
        ratio = np.float32(0.5) if outputs == 2 * size else _ratio(size, outputs, scale)
        position = np.floor(index * ratio)
    elif upsample.align_corners:
        position = index * _ratio(size - 1, max(1, outputs - 1), None)
    else:
        # Rounded once, as its compiler makes one instruction of the product and the difference.
        exact = (index + 0.5).astype(np.float64) * _ratio(size, outputs, scale) - 0.5
        position = np.maximum(exact, 0).astype(np.float32)
    first = np.minimum(np.floor(position).astype(np.int64), size - 1)
    weight = np.clip(position - first.astype(np.float32), 0, 1).astype(np.float32)
    second = first if size == outputs else np.minimum(first + 1, size - 1)
    return Places(first, second, weight)


def _ratio(size: int, outputs: int, scale: float | None) -> np.float32:
    """Pixels of the input for one of the output."""
    if scale is not None and scale > 0:
        return np.float32(1 / scale)
    return np.float32(size) / np.float32(outputs)
