"""Activations as vector code, applied before a result is stored."""

import math
from collections.abc import Sequence

from groupconv.kernels.emit import Emitter

# exp(r) for |r| <= log(2) / 2, by powers of r: 1/n!, which is within 1 ulp at degree 7.
EXP = [1 / math.factorial(n) for n in range(8)]
# log(2) in two parts, so that n * log(2) is added or subtracted with one rounding.
LOG2_HIGH, LOG2_LOW = 0.693359375, -2.12194440e-4
# Adding it leaves the nearest integer in the low bits of the sum.
ROUND = 1.5 * 2**23
# exp(x) is finite and normal between these.
_EXP_LOW, _EXP_HIGH = -87.33, 88.37


def activate(e: Emitter, name: str | None, slope: float, x: str) -> str:
    """The activation ``name`` of a vector; NaN stays NaN."""
    zero = e.constant(0.0)
    match name:
        case None:
            return x
        case "relu":
            return _at_least(e, x, 0.0)
        case "relu6":
            return clamp(e, x, 0.0, 6.0)
        case "leaky_relu":
            scaled = e.arithmetic("fmul", x, e.constant(slope))
            return e.select(e.less(x, zero), scaled, x)
        case "hardswish":
            shifted = e.arithmetic("fadd", x, e.constant(3.0))
            gate = clamp(e, shifted, 0.0, 6.0)
            product = e.arithmetic("fmul", x, gate)
            return e.arithmetic("fmul", product, e.constant(1 / 6))
        case "sigmoid":
            return _sigmoid(e, x)
        case "silu":
            return e.arithmetic("fmul", x, _sigmoid(e, x))
    raise AssertionError(f"unknown activation {name}")


def _at_least(e: Emitter, x: str, bound: float) -> str:
    return e.select(e.less(x, e.constant(bound)), e.constant(bound), x)


def _at_most(e: Emitter, x: str, bound: float) -> str:
    return e.select(e.less(e.constant(bound), x), e.constant(bound), x)


def _sigmoid(e: Emitter, x: str) -> str:
    """1 / (1 + exp(-x)); 0 where that is less than the smallest normal number."""
    one = e.constant(1.0)
    result = e.arithmetic("fdiv", one, e.arithmetic("fadd", one, _exp(e, e.negate(x))))
    result = e.select(e.less(x, e.constant(_EXP_LOW)), e.constant(0.0), result)
    # The bits of a NaN are not those of a number that can be scaled.
    return e.select(e.unordered(x), x, result)


def _exp(e: Emitter, x: str) -> str:
    """e**x where that is finite and normal; else the nearest number that is."""
    n, r = reduce(e, clamp(e, x, _EXP_LOW, _EXP_HIGH))
    return e.add_to_exponent(polynomial(e, EXP, r), n)


def reduce(e: Emitter, x: str) -> tuple[str, str]:
    """n and r so that e**x = 2**n * e**r, |r| <= log(2) / 2: n is the integer in the low bits."""
    shifted = e.multiply_add(x, e.constant(1 / math.log(2)), e.constant(ROUND))
    n = e.arithmetic("fsub", shifted, e.constant(ROUND))
    r = e.multiply_add(n, e.constant(-LOG2_HIGH), x)
    return shifted, e.multiply_add(n, e.constant(-LOG2_LOW), r)


def clamp(e: Emitter, x: str, low: float, high: float) -> str:
    """The nearest number between the bounds; NaN stays NaN."""
    return _at_most(e, _at_least(e, x, low), high)


def polynomial(e: Emitter, coefficients: Sequence[float], x: str) -> str:
    """By Horner's rule; the constant comes first."""
    result = e.constant(coefficients[-1])
    for coefficient in reversed(coefficients[:-1]):
        result = e.multiply_add(result, x, e.constant(coefficient))
    return result
