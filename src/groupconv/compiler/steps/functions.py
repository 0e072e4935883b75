"""Elementwise functions as vector code: those of :data:`groupconv.compiler.graph.FUNCTIONS`.

NaN stays NaN and infinities go where PyTorch's go. Errors are a few units in the last place of
the result; of ``erf``, ``gelu`` and ``gelu_tanh`` below zero, of the largest term.
"""

import math
from collections.abc import Sequence

from groupconv.kernels.activation import (
    EXP,
    LOG2_HIGH,
    LOG2_LOW,
    ROUND,
    activate,
    clamp,
    polynomial,
    reduce,
)
from groupconv.kernels.emit import Emitter

# Between them exp(x) goes from zero to infinity.
_EXP_LOW, _EXP_HIGH = -105.0, 89.0
# Up to it exp(x) - 1 is -1.
_MINUS_1 = -25.0
# log(1 + f) = f - f**2 / 2 + f**3 * P(f), 1 + f between sqrt(1/2) and sqrt(2); from Cephes' logf.
_LOG = (
    3.3333331174e-1, -2.4999993993e-1, 2.0000714765e-1, -1.6668057665e-1, 1.4249322787e-1,
    -1.2420140846e-1, 1.1676998740e-1, -1.1514610310e-1, 7.0376836292e-2,
)  # fmt: skip
# erf(x) = 1 - exp(-x * P(x)) for x between 0 and 4; fitted to the least relative error by least
# squares with iterated weights (Lawson) in 50 digits: 4.0e-9 without rounding.
_ERF = (
    1.128379172, 0.6366193802, 0.1027778471, -1.915311932e-2, -1.60304209e-4, 1.666941407e-3,
    -6.327902507e-4, 1.176277994e-4, -9.254675964e-6,
)  # fmt: skip
# Past it erf is 1.
_ERF_END = 4.0
# log(1 + x) = x * P(x) / Q(x) for x between 0 and 1, fitted likewise (Loeb's way for Q): 9.4e-10.
_LOG1P = (
    (0.9999999991, 1.066214561, 0.2381552855, 3.417215206e-3),
    (1.0, 1.566214431, 0.6879320949, 7.528641978e-2),
)
# Exponents of powers that are products, or their inverse; others might overflow on the way.
_PRODUCTS = (-2.0, -1.0, 1.0, 2.0, 3.0, 4.0)


def apply(e: Emitter, function: str, operands: Sequence[str], parameters: Sequence[float]) -> str:
    """The result of a function of vectors; its ``parameters`` are those of an Instruction."""
    x = operands[0]
    match function, parameters:
        case (("add" | "sub" | "mul" | "div"), ()):
            return e.arithmetic(f"f{function}", x, operands[1])
        case "maximum", ():
            return _either(e, e.less(x, operands[1]), x, operands[1])
        case "minimum", ():
            return _either(e, e.less(operands[1], x), x, operands[1])
        case "prelu", ():
            scaled = e.arithmetic("fmul", x, operands[1])
            return e.select(e.less(e.constant(0.0), x), x, scaled)
        case (("relu" | "relu6" | "silu" | "hardswish" | "sigmoid"), ()):
            return activate(e, function, 0.0, x)
        case "leaky_relu", (slope,):
            return activate(e, function, slope, x)
        case "hardsigmoid", ():
            shifted = e.arithmetic("fadd", x, e.constant(3.0))
            return e.arithmetic("fmul", clamp(e, shifted, 0.0, 6.0), e.constant(1 / 6))
        case "clamp", (low, high):
            return clamp(e, x, low, high)
        case "elu", (alpha,):
            power = _exp_minus_1(e, clamp(e, x, _MINUS_1, 0.0))
            scaled = e.arithmetic("fmul", power, e.constant(alpha))
            return e.select(e.less(e.constant(0.0), x), x, scaled)
        case "tanh", ():
            return _tanh(e, x)
        case "erf", ():
            return _erf(e, x)
        case "gelu", ():
            return _gelu(e, x)
        case "gelu_tanh", ():
            return _gelu_tanh(e, x)
        case "exp", ():
            return exp(e, x)
        case "log", ():
            return _log(e, x)
        case "softplus", ():
            return _softplus(e, x)
        case "mish", ():
            return _mish(e, x)
        case "sqrt", ():
            return e.square_root(x)
        case "rsqrt", ():
            return _inverse(e, e.square_root(x))
        case "neg", ():
            return e.negate(x)
        case "abs", ():
            return e.absolute(x)
        case "power", (exponent,):
            return _power(e, x, exponent)
    raise AssertionError(f"unknown function {function} with parameters {parameters}")


def exp(e: Emitter, x: str) -> str:
    """e**x over the whole range of float32: subnormal, zero or infinite where that is nearest."""
    n, r = reduce(e, clamp(e, x, _EXP_LOW, _EXP_HIGH))
    return e.scale(polynomial(e, EXP, r), n)


def _either(e: Emitter, second: str, a: str, b: str) -> str:
    """``b`` where ``second`` holds or b is NaN, else ``a``."""
    return e.select(e.unordered(b), b, e.select(second, b, a))


def _inverse(e: Emitter, x: str) -> str:
    return e.arithmetic("fdiv", e.constant(1.0), x)


def _tanh(e: Emitter, x: str) -> str:
    """(1 - t) / (1 + t), t = e**(-2 * |x|), with the sign of x"""
    twice = e.arithmetic("fmul", e.absolute(x), e.constant(-2.0))
    above = e.negate(_exp_minus_1(e, clamp(e, twice, _MINUS_1, 0.0)))
    result = e.arithmetic("fdiv", above, e.arithmetic("fsub", e.constant(2.0), above))
    return e.with_sign(result, x)


def _erf(e: Emitter, x: str) -> str:
    size, end = e.absolute(x), e.constant(_ERF_END)
    size = e.select(e.less(end, size), end, size)
    exponent = e.arithmetic("fmul", size, polynomial(e, _ERF, size))
    return e.with_sign(_exp_minus_1(e, e.negate(exponent)), x)


def _gelu(e: Emitter, x: str) -> str:
    """x / 2 * (1 + erf(x / sqrt(2)))"""
    error = _erf(e, e.arithmetic("fmul", x, e.constant(math.sqrt(0.5))))
    half = e.arithmetic("fmul", x, e.constant(0.5))
    return e.arithmetic("fmul", half, e.arithmetic("fadd", error, e.constant(1.0)))


def _gelu_tanh(e: Emitter, x: str) -> str:
    """x / 2 * (1 + tanh(u)) = x * sigmoid(2 * u), u = sqrt(2 / pi) * (x + 0.044715 * x**3)"""
    factor = 2 * math.sqrt(2 / math.pi)
    square = e.arithmetic("fmul", x, x)
    slope = e.multiply_add(square, e.constant(0.044715 * factor), e.constant(factor))
    gate = activate(e, "sigmoid", 0.0, e.arithmetic("fmul", x, slope))
    return e.arithmetic("fmul", x, gate)


def _exp_minus_1(e: Emitter, x: str) -> str:
    """e**x - 1 between ``_MINUS_1`` and 0; with e**x = 2**n * e**r it is
    2**n * (e**r - 1) + (2**n - 1)."""
    n, r = reduce(e, x)
    power = e.add_to_exponent(e.constant(1.0), n)
    rest = e.arithmetic("fmul", r, polynomial(e, EXP[1:], r))
    return e.multiply_add(power, rest, e.arithmetic("fsub", power, e.constant(1.0)))


def _softplus(e: Emitter, x: str) -> str:
    """log(1 + e**x) = max(x, 0) + log(1 + e**-|x|)"""
    t = exp(e, e.negate(e.absolute(x)))
    above, below = (polynomial(e, coefficients, t) for coefficients in _LOG1P)
    rest = e.arithmetic("fmul", t, e.arithmetic("fdiv", above, below))
    return e.arithmetic("fadd", activate(e, "relu", 0.0, x), rest)


def _mish(e: Emitter, x: str) -> str:
    """x * tanh(log(1 + t)) = x * w / (w + 2), t = e**x, w = t * (t + 2)"""
    # Past 20 the ratio is 1, and w would overflow.
    t, two = exp(e, clamp(e, x, -math.inf, 20.0)), e.constant(2.0)
    w = e.arithmetic("fmul", t, e.arithmetic("fadd", t, two))
    return e.arithmetic("fmul", x, e.arithmetic("fdiv", w, e.arithmetic("fadd", w, two)))


def _split(e: Emitter, x: str) -> tuple[str, str]:
    """m and n so that ``x = m * 2**n``, of finite numbers above zero, subnormal ones too."""
    small = e.less(x, e.constant(2.0**-126))
    larger = e.arithmetic("fmul", x, e.constant(2.0**24))
    m, n = e.split(e.select(small, larger, x))
    return m, e.arithmetic("fsub", n, e.select(small, e.constant(24.0), e.constant(0.0)))


def _log_past(e: Emitter, f: str) -> str:
    """log(1 + f) - f"""
    square = e.arithmetic("fmul", f, f)
    cubic = e.arithmetic("fmul", e.arithmetic("fmul", f, square), polynomial(e, _LOG, f))
    return e.multiply_add(square, e.constant(-0.5), cubic)


def _log(e: Emitter, x: str) -> str:
    m, n = _split(e, x)
    f = e.arithmetic("fsub", m, e.constant(1.0))
    rest = e.multiply_add(n, e.constant(LOG2_LOW), _log_past(e, f))
    result = e.multiply_add(n, e.constant(LOG2_HIGH), e.arithmetic("fadd", f, rest))
    zero = e.constant(0.0)
    result = e.select(e.equal(x, zero), e.constant(-math.inf), result)
    result = e.select(e.less(x, zero), e.constant(math.nan), result)
    # Infinity, and NaN.
    return e.select(e.less(x, e.constant(math.inf)), result, x)


def _power(e: Emitter, x: str, exponent: float) -> str:
    """x**exponent; sqrt for 1/2, as PyTorch has it, of -inf too."""
    if abs(exponent) == 0.5:
        root = e.square_root(x)
        return root if exponent > 0 else _inverse(e, root)
    if exponent == 0:
        return e.constant(1.0)
    if exponent not in _PRODUCTS:
        return _general_power(e, x, exponent)
    result, square = x, e.arithmetic("fmul", x, x)
    match abs(exponent):
        case 2.0:
            result = square
        case 3.0:
            result = e.arithmetic("fmul", square, x)
        case 4.0:
            result = e.arithmetic("fmul", square, square)
    return result if exponent > 0 else _inverse(e, result)


def _general_power(e: Emitter, x: str, y: float) -> str:
    """|x|**y = 2**(y * log2(|x|)), then what the sign of x and its infinities ask for.

    The relative error is about ``1 + |y| / 8`` units in the last place: of the logarithm's terms
    the larger ones are multiplied exactly, factors of 12 bits, the small rest is rounded.
    """
    size = e.absolute(x)
    m, n = _split(e, size)
    f = e.arithmetic("fsub", m, e.constant(1.0))
    # To a multiple of 2**-12.
    shift = e.constant(1.5 * 2**11)
    f_high = e.arithmetic("fsub", e.arithmetic("fadd", f, shift), shift)
    y_high, scaled = _leading(y), y / math.log(2)
    scaled_high = _leading(scaled)
    whole = e.arithmetic("fmul", n, e.constant(y_high))
    part = e.arithmetic("fmul", f_high, e.constant(scaled_high))
    rest = e.arithmetic("fmul", _log_past(e, f), e.constant(scaled))
    rest = e.multiply_add(e.arithmetic("fsub", f, f_high), e.constant(scaled), rest)
    rest = e.multiply_add(f_high, e.constant(scaled - scaled_high), rest)
    rest = e.multiply_add(n, e.constant(y - y_high), rest)

    # Past these the result is zero or infinite.
    total = e.arithmetic("fadd", whole, e.arithmetic("fadd", part, rest))
    shifted = e.arithmetic("fadd", clamp(e, total, -200.0, 200.0), e.constant(ROUND))
    nearest = e.arithmetic("fsub", shifted, e.constant(ROUND))
    left = e.arithmetic("fadd", e.arithmetic("fsub", whole, nearest), part)
    left = clamp(e, e.arithmetic("fadd", left, rest), -1.0, 1.0)
    r = e.arithmetic("fmul", left, e.constant(math.log(2)))
    result = e.scale(polynomial(e, EXP, r), shifted)

    grows, zero = y > 0, e.constant(0.0)
    if not y.is_integer():
        result = e.select(e.less(x, zero), e.constant(math.nan), result)
    result = e.select(e.equal(x, zero), e.constant(0.0 if grows else math.inf), result)
    # Infinity, and NaN.
    finite = e.less(size, e.constant(math.inf))
    result = e.select(finite, result, size if grows else _inverse(e, size))
    return e.with_sign(result, x) if y % 2 == 1 else result


def _leading(value: float) -> float:
    """The leading 12 bits."""
    fraction, scale = math.frexp(value)
    return math.ldexp(round(fraction * 2**12), scale - 12)
