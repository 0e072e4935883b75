"""Sums and maxima over windows of pixels, a few vectors of channels at a time."""

import functools
from collections.abc import Sequence

from groupconv.compiler.steps.channels import Cut
from groupconv.kernels.emit import Emitter
from groupconv.kernels.flow import Value

# From one number to another: the first one, and the one after the last.
Range = tuple[Value, Value]
# Pixels of a window that are written out rather than looped over.
_FEW = 9


class Window:
    """Joins pixels by ``max`` or ``average`` (their sum; it is divided in the end).

    NaN is larger than all else, and of no pixels the maximum is -inf.
    """

    def __init__(self, e: Emitter, kind: str) -> None:
        assert kind in ("max", "average"), kind
        self.e, self.kind = e, kind

    def join(self, a: Sequence[str], b: Sequence[str]) -> list[str]:
        e = self.e
        if self.kind == "max":
            return [e.maximum(x, y) for x, y in zip(a, b, strict=True)]
        return [e.arithmetic("fadd", x, y) for x, y in zip(a, b, strict=True)]

    def nothing(self, vectors: Sequence[Cut]) -> list[str]:
        """What no pixels make."""
        value = float("-inf") if self.kind == "max" else 0.0
        return [self.e.constant(value)] * len(vectors)

    def load(self, pixel: str, vectors: Sequence[Cut]) -> list[str]:
        return [self.e.load(pixel, offset, count) for offset, count in vectors]

    def row(self, x: str, columns: Range, step: int, vectors: Sequence[Cut]) -> list[str]:
        """Pixels ``step`` elements apart, of which number 0 lies at ``x``, in one chain."""
        e, (first, stop) = self.e, columns
        known = _known(columns)
        if known is not None and len(known) <= _FEW:
            pixels = (self.load(e.offset(x, i * step), vectors) for i in known)
            return functools.reduce(self.join, pixels)

        def more(i: Value, found: list[str]) -> list[str]:
            return self.join(found, self.load(e.offset(x, e.mul(i, step)), vectors))

        return e.fold(first, stop, 1, self.nothing(vectors), more)

    def rows(
        self,
        x: str,
        rows: Range,
        row_step: int,
        columns: Range,
        step: int,
        vectors: Sequence[Cut],
    ) -> list[str]:
        """The same of several rows, each with a sum of its own."""
        e, (first, stop) = self.e, rows

        def row(i: Value) -> list[str]:
            return self.row(e.offset(x, e.mul(i, row_step)), columns, step, vectors)

        known, across = _known(rows), _known(columns)
        if known is not None and across is not None and len(known) * len(across) <= _FEW:
            return functools.reduce(self.join, map(row, known))
        return e.fold(
            first, stop, 1, self.nothing(vectors), lambda i, found: self.join(found, row(i))
        )

    def store(self, found: Sequence[str], count: str | int, y: str, vectors: Sequence[Cut]) -> None:
        """Store what was found in ``count`` pixels: a vector of this number, or what it is."""
        for value, (offset, lanes) in zip(found, vectors, strict=True):
            if self.kind == "average":
                value = self._divided(value, count)
            self.e.store(value, y, offset, lanes)

    def _divided(self, value: str, count: str | int) -> str:
        e = self.e
        if isinstance(count, str):
            return e.arithmetic("fdiv", value, count)
        if count & (count - 1) == 0:
            # The same number: a power of two has an exact reciprocal.
            return e.arithmetic("fmul", value, e.constant(1 / count))
        return e.arithmetic("fdiv", value, e.constant(float(count)))


def _known(numbers: Range) -> range | None:
    """The numbers, where they are known and there are some."""
    first, stop = numbers
    if isinstance(first, int) and isinstance(stop, int) and first < stop:
        return range(first, stop)
    return None
