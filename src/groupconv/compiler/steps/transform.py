"""Code for the transforms of minimal filtering, on squares of vectors."""

from collections.abc import Callable, Sequence

from groupconv.compiler.filtering import filtering
from groupconv.kernels.emit import Emitter

Square = list[list[str]]


def inputs(e: Emitter, m: int, square: Square) -> Square:
    """A tile of m + 2 inputs to a side, as the points see it."""
    return _both_ways(square, lambda line: _inputs(e, m, line))


def results(e: Emitter, m: int, square: Square) -> Square:
    """m results to a side, of as many products as :func:`inputs` gave numbers."""
    return _both_ways(square, lambda line: _results(e, m, line))


def _both_ways(square: Square, transform: Callable[[list[str]], list[str]]) -> Square:
    """The transform of every column, then of every row of what that makes."""
    columns = [transform(list(column)) for column in zip(*square, strict=True)]
    return [transform(list(row)) for row in zip(*columns, strict=True)]


def _inputs(e: Emitter, m: int, line: Sequence[str]) -> list[str]:
    matrix = filtering(m).inputs
    found = [_sum(e, matrix[0], line)]
    # A point's even powers are those of its negative, the odd ones are their negatives.
    for row in matrix[1:-1:2]:
        even = _sum(e, [c if i % 2 == 0 else 0.0 for i, c in enumerate(row)], line)
        odd = _sum(e, [c if i % 2 else 0.0 for i, c in enumerate(row)], line)
        found += [e.arithmetic("fadd", even, odd), e.arithmetic("fsub", even, odd)]
    return [*found, _sum(e, matrix[-1], line)]


def _results(e: Emitter, m: int, line: Sequence[str]) -> list[str]:
    pairs = list(zip(line[1:-1:2], line[2:-1:2], strict=True))
    sums = [e.arithmetic("fadd", a, b) for a, b in pairs]
    differences = [e.arithmetic("fsub", a, b) for a, b in pairs]
    found = []
    for power, row in enumerate(filtering(m).results):
        halves = differences if power % 2 else sums
        found.append(_sum(e, [row[0], *row[1:-1:2], row[-1]], [line[0], *halves, line[-1]]))
    return found


def _sum(e: Emitter, factors: Sequence[float], values: Sequence[str]) -> str:
    """The sum of ``values`` times ``factors``; where a factor is 1, nothing is multiplied."""
    used = [(f, v) for f, v in zip(factors, values, strict=True) if f]
    # Plain ones first: the others join them in one instruction each.
    used.sort(key=lambda pair: pair[0] != 1.0)
    (factor, total), *rest = used
    if factor != 1.0:
        total = e.arithmetic("fmul", e.constant(factor), total)
    for factor, value in rest:
        if abs(factor) == 1.0:
            total = e.arithmetic("fadd" if factor > 0 else "fsub", total, value)
        else:
            total = e.multiply_add(e.constant(factor), value, total)
    return total
