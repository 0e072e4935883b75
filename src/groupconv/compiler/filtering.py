"""The matrices of minimal filtering F(m, 3), after Toom, Cook and Winograd.

m neighbouring results of a filter of 3 taps are made from m + 2 products instead of 3m: the inputs
and the taps are seen as polynomials, multiplied at m + 1 points and at infinity, and brought back.
See Lavin and Gray, "Fast Algorithms for Convolutional Neural Networks" (arXiv 1509.09308), and
Barabasz and others, "Error Analysis and Improving the Accuracy of Winograd Convolution for Deep
Neural Networks" (arXiv 1803.10986), on the choice of the points.
"""

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

TAPS = 3
# For m results 0, and pairs of a point and its negative. Those of m = 4 lose a third of the digits
# that the usual 1 and 2 lose: their powers are closer to one another.
_PAIRS: dict[int, tuple[Fraction, ...]] = {
    2: (Fraction(1),),
    4: (Fraction(3, 4), Fraction(3, 2)),
}
# Bytes after which the lines of the cache next to the core begin again.
_SAME_LINES = 4096
_Matrix = tuple[tuple[float, ...], ...]


@dataclass(frozen=True)
class Filtering:
    """``results @ ((taps @ g) * (inputs @ d))`` are the m results for taps g and inputs d.

    The rows of ``taps`` and ``inputs``, and the columns of ``results``, are those of the points 0,
    p, -p for every pair, and infinity.

    Args:
        inputs: ``(m + 2, m + 2)``.
        taps: ``(m + 2, 3)``.
        results: ``(m, m + 2)``.
    """

    inputs: _Matrix
    taps: _Matrix
    results: _Matrix


@functools.cache
def filtering(m: int) -> Filtering:
    """The matrices for ``m`` results, 2 or 4."""
    points = [Fraction(0), *(sign * p for p in _PAIRS[m] for sign in (1, -1))]
    others = [[q for q in points if q != p] for p in points]
    scales = [_value(rest, p) for rest, p in zip(others, points, strict=True)]
    inputs = [*([*_product(rest), Fraction(0)] for rest in others), _product(points)]
    taps = [[p**k / scale for k in range(TAPS)] for p, scale in zip(points, scales, strict=True)]
    results = [[*(p**k for p in points), Fraction(k == m - 1)] for k in range(m)]
    infinity = [Fraction(0)] * (TAPS - 1) + [Fraction(1)]
    return Filtering(_floats(inputs), _floats([*taps, infinity]), _floats(results))


def tiles(output_size: Sequence[int], m: int) -> tuple[int, int]:
    """Tiles of m x m results, down and across, that cover an image of them."""
    down, across = (-(-n // m) for n in output_size)
    return down, across


def rows(tiles: int, channels: int) -> int:
    """Of a matrix for so many tiles: one more where all matrices would else begin on the same lines
    of the cache. Those who write and read them go through all of them at once."""
    return min(tiles, tiles + 1, key=lambda rows: math.gcd(4 * rows * channels, _SAME_LINES))


def _value(roots: Sequence[Fraction], x: Fraction) -> Fraction:
    """At x of the polynomial with these roots, and 1 before its highest power."""
    value = Fraction(1)
    for root in roots:
        value *= x - root
    return value


def _product(roots: Sequence[Fraction]) -> list[Fraction]:
    """The same polynomial's coefficients, that of the lowest power first."""
    found = [Fraction(1)]
    for root in roots:
        found = [
            a - root * b for a, b in zip([Fraction(0), *found], [*found, Fraction(0)], strict=True)
        ]
    return found


def _floats(matrix: Sequence[Sequence[Fraction]]) -> _Matrix:
    return tuple(tuple(float(value) for value in row) for row in matrix)
