"""Elementwise functions against float64 and against PyTorch's float32."""

import math

import pytest
import torch
from compare import assert_close
from compiler.steps.reference import applied
from compiler.steps.run import Rows, run
from torch import Tensor

from groupconv.compiler.graph import FUNCTIONS, Instruction
from groupconv.compiler.steps.map import MapStep
from groupconv.kernels import jit
from groupconv.kernels.machine import NAMES, Machine, runnable
from groupconv.kernels.machine import machine as any_machine

every_machine = pytest.mark.parametrize("machine", runnable(), ids=lambda machine: machine.name)

POWERS = (
    0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 7.0, 8.0, -1.0, -2.0, -3.0, 0.5, -0.5,
    1.5, 0.25, 1 / 3, -0.3, 2.9, -4.7, 9.0, -11.0, 12.0,
)  # fmt: skip
# Functions and their parameters.
CASES: list[tuple[str, tuple[float, ...]]] = [
    *((function, ()) for function in FUNCTIONS
      if function not in ("leaky_relu", "elu", "clamp", "power")),
    *(("leaky_relu", (slope,)) for slope in (0.01, -1.5)),
    *(("elu", (alpha,)) for alpha in (1.0, 0.3, -2.0)),
    *(("clamp", bounds) for bounds in ((-1.5, 2.0), (0.1, math.inf), (-math.inf, 0.7), (2.0, 1.0))),
    *(("power", (exponent,)) for exponent in POWERS),
]  # fmt: skip
every_case = pytest.mark.parametrize(
    ("function", "parameters"), CASES, ids=lambda x: x if isinstance(x, str) else str(list(x))
)
# Sums of terms of different sign: their error is one of the larger term.
OF_SCALE = ("gelu", "gelu_tanh")
SPECIAL = (
    0.0, -0.0, 1.0, -1.0, 3.0, -3.0, 20.0, -20.0, math.inf, -math.inf, math.nan, 1e-40, -1e-40,
    2.0**-126, -(2.0**-126), 2.0**-149, 1e30, -1e30, 3.4028234e38, -3.4028234e38, 88.0, 88.73,
    -87.4, -103.9, -104.1, 1e10, -1e10,
)  # fmt: skip


def native(
    machine: Machine, function: str, operands: list[Tensor], parameters: tuple[float, ...] = ()
) -> Tensor:
    """The function of vectors of the same length."""
    program = (Instruction(function, tuple(range(len(operands))), parameters),)
    length, number = len(operands[0]), len(operands)
    step = MapStep(program, ("full",) * number, 0, 1, length, (length,) * (number + 1))
    y = Rows((1, length))
    run(step, *(Rows(x[None]) for x in operands), y, images=1, machine=machine)
    return y.values()[0]


def values() -> Tensor:
    """Both signs, dense where functions bend, and every size."""
    generator = torch.Generator().manual_seed(0)
    sizes = torch.logspace(-44, 38, 1500)
    return torch.cat(
        [
            torch.linspace(-110, 110, 5001),
            torch.linspace(-9.5, 9.5, 8001),
            1 + torch.linspace(-0.6, 1.2, 3001),
            torch.randn(3000, generator=generator) * 1e-3,
            sizes,
            -sizes,
        ]
    )


def operands(function: str) -> list[Tensor]:
    x = values()
    others = [x.roll(977 * i) for i in range(1, FUNCTIONS[function])]
    return [x, *others]


@every_case
@every_machine
def test_as_exact_as_pytorch(
    machine: Machine, function: str, parameters: tuple[float, ...]
) -> None:
    """By the error beside each result; beside the input's size too where terms cancel out."""
    given = operands(function)
    expected = applied(function, [x.double() for x in given], parameters)
    theirs = applied(function, given, parameters).double()
    ours = native(machine, function, given, parameters).double()
    assert torch.equal(ours.isnan(), expected.isnan() | theirs.isnan())
    inside = expected.abs() < 3.4e38
    if function == "sigmoid":
        # Where it is subnormal ours is 0.
        inside &= expected >= 2.0**-126
    beside = expected.abs().clamp_min(2.0**-126)
    if function in OF_SCALE:
        beside = torch.maximum(beside, given[0].abs())
    error, their_error = (
        ((x - expected).abs() / beside)[inside & expected.isfinite()].max() for x in (ours, theirs)
    )
    # Half of the last bit is what rounding alone may cost.
    assert error <= 4 * max(their_error.item(), 2.0**-24), (error, their_error)
    large = expected.abs() > 3.41e38
    assert torch.equal(ours[large], expected[large].sign() * math.inf)


@every_case
@every_machine
def test_special_numbers(machine: Machine, function: str, parameters: tuple[float, ...]) -> None:
    """NaN and infinities are where PyTorch's are, whatever the operands."""
    x = torch.tensor(SPECIAL)
    given = [x]
    if FUNCTIONS[function] == 2:
        given = [x.repeat(len(x)), x.repeat_interleave(len(x))]
    expected = applied(function, given, parameters)
    exact = applied(function, [x.double() for x in given], parameters)
    if function == "gelu":
        # PyTorch's float32 kernel may have NaN for infinity.
        expected = exact.float()
    ours = native(machine, function, given, parameters)
    assert torch.equal(ours.isnan(), expected.isnan())
    for infinity in (math.inf, -math.inf):
        assert torch.equal(ours == infinity, expected == infinity)
    finite = expected.isfinite()
    # Sigmoids are 0 where they are subnormal, and so is what they multiply. In a mish it is the
    # last bit of a subnormal number that is multiplied.
    atol = 88 * 2.0**-126 if function in ("sigmoid", "silu", "gelu_tanh") else 2.0**-142
    rtol = 1e-5 if function in OF_SCALE else 1e-6
    assert_close(ours[finite], exact[finite], rtol=rtol, atol=atol)


@every_case
@every_machine
def test_any_nan_stays_nan(machine: Machine, function: str, parameters: tuple[float, ...]) -> None:
    """Whatever its bits; beside it nothing changes."""
    generator = torch.Generator().manual_seed(0)
    numbers = torch.randint(1, 0x800000, (500,), generator=generator, dtype=torch.int32)
    bits = torch.cat([numbers, torch.tensor([1, 0x400000, 0x7FFFFF], dtype=torch.int32)])
    nan = (bits + 0x7F800000).view(torch.float32)
    nan = torch.cat([nan, -nan])
    assert nan.isnan().all()
    usual = torch.linspace(0.5, 2, len(nan))
    mixed = torch.stack([nan, usual], 1).flatten()
    for place in range(FUNCTIONS[function]):
        given = [torch.ones_like(mixed)] * FUNCTIONS[function]
        given[place] = mixed
        if function == "prelu" and place == 1:
            given[0] = -given[0]
        result = native(machine, function, given, parameters)
        if (function, parameters) == ("power", (0.0,)):
            assert result.eq(1).all()
        else:
            assert result[::2].isnan().all()
        assert result[1::2].isfinite().all()


@every_machine
def test_exact_functions(machine: Machine) -> None:
    """What PyTorch computes with the same roundings has the same bits."""
    exact = {
        "add", "sub", "mul", "div", "maximum", "minimum", "prelu", "relu", "relu6", "neg", "abs",
        "clamp", "leaky_relu",
    }  # fmt: skip
    cases = [case for case in CASES if case[0] in exact]
    cases += [("power", (exponent,)) for exponent in (1.0, 2.0, 3.0, -1.0, -2.0)]
    for function, parameters in cases:
        given = operands(function)
        expected = applied(function, given, parameters)
        assert torch.equal(
            native(machine, function, given, parameters).nan_to_num(7.0), expected.nan_to_num(7.0)
        ), (function, parameters)


@every_machine
def test_square_roots_are_rounded_once(machine: Machine) -> None:
    """PyTorch's may not be: its float64 is enough to round from."""
    x = values().abs()
    for function, parameters in (("sqrt", ()), ("power", (0.5,))):
        expected = torch.sqrt(x.double()).float()
        assert torch.equal(native(machine, function, [x], parameters), expected)


@every_machine
@pytest.mark.parametrize("function", ["erf", "gelu", "gelu_tanh", "tanh", "sigmoid"])
def test_bounded_functions(machine: Machine, function: str) -> None:
    """To 2e-7 of their scale on a dense range, and exactly at the ends."""
    x = torch.linspace(-12, 12, 100_001)
    ours = native(machine, function, [x])
    expected = applied(function, [x.double()])
    scale = x.abs().clamp_min(1) if function.startswith("gelu") else 1
    assert ((ours - expected).abs() / scale).max() <= 2e-7
    far = torch.tensor([150.0, 1e4, 1e20])
    top = far if function.startswith("gelu") else torch.ones(3)
    bottom = -1 if function in ("erf", "tanh") else 0
    assert torch.equal(native(machine, function, [far]), top)
    assert torch.equal(native(machine, function, [-far]), bottom * torch.ones(3))
    if function in ("erf", "tanh"):
        assert ours.abs().max() == 1


@every_machine
def test_large_exponents(machine: Machine) -> None:
    """Far from 1 a power is zero or infinite."""
    x = torch.tensor([0.5, 0.999, 1.0, 1.001, 2.0, 1e30, 1e-30])
    for exponent in (1e3 + 0.5, -1e3 - 0.5, 1e6 + 0.5, 200.0, 201.0, -3e8):
        expected = torch.pow(x.double(), exponent).float()
        ours = native(machine, "power", [x], (exponent,))
        assert torch.equal(ours == 0, expected == 0), exponent
        assert torch.equal(ours.isinf(), expected.isinf()), exponent
        assert ours[2] == 1


@pytest.mark.parametrize("name", NAMES)
def test_no_library_is_called(name: str) -> None:
    """On any machine that code is made for."""
    target = any_machine(name)
    call = "\tbl\t" if name == "neon" else "\tcall"
    for function, parameters in CASES:
        program = (Instruction(function, (0, 1)[: FUNCTIONS[function]], parameters),)
        step = MapStep(program, ("full", "full"), 0, 1, 5, (5, 6, 7))
        assert call not in jit.assembly(step.write(target, "step"), target), function
