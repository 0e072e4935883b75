"""Elementwise expressions: every way to broadcast, strides, sizes, threads."""

import dataclasses
import math

import pytest
import torch
from compare import assert_close
from compiler.steps.reference import mapped
from compiler.steps.run import Rows, run
from torch import Tensor

from groupconv.compiler.graph import Instruction
from groupconv.compiler.steps import code
from groupconv.compiler.steps.map import MapStep
from groupconv.kernels import jit
from groupconv.kernels.machine import Machine, runnable

every_machine = pytest.mark.parametrize("machine", runnable(), ids=lambda machine: machine.name)
CHANNELS = (1, 3, 7, 17, 64, 70)


def shape(read: str, images: int, pixels: int, channels: int) -> tuple[int, int, int]:
    """Of an input, as it broadcasts to (images, pixels, channels)."""
    return {
        "full": (images, pixels, channels),
        "image": (images, 1, channels),
        "channel": (1, 1, channels),
        "pixel": (images, pixels, 1),
    }[read]


def numbers(step: MapStep, images: int) -> list[Tensor]:
    """Inputs and constants."""
    generator = torch.Generator().manual_seed(step.channels)
    reads = [*step.reads, *["channel"] * step.constants]
    return [
        torch.randn(shape(read, images, step.pixels, step.channels), generator=generator)
        for read in reads
    ]


def result(
    step: MapStep,
    given: list[Tensor],
    images: int,
    machine: Machine,
    threads: int = 1,
    in_place: int | None = None,
) -> Tensor:
    """What the step makes of its operands.

    Args:
        in_place: the input in whose memory the result goes.
    """
    strides = [*step.strides[:-1], *[step.channels] * step.constants]
    # A stride that means nothing may be any number.
    operands = [
        Rows(x.flatten(0, 1), max(stride, x.shape[-1]))
        for x, stride in zip(given, strides, strict=True)
    ]
    y = Rows((images * step.pixels, step.channels), step.strides[-1])
    if in_place is not None:
        y = operands[in_place]
    run(step, *operands, y, images=images, threads=threads, machine=machine)
    for x, rows in zip(given, operands, strict=True):
        if rows is not y:
            assert torch.equal(rows.values(), x.flatten(0, 1))
    return y.values().view(images, step.pixels, step.channels)


# x * gate + other, with a number, an earlier result twice, and a bend.
PROGRAM = (
    Instruction("mul", (0, 1)),
    Instruction("add", (-1, 2)),
    Instruction("mul", (-2, 0.3)),
    Instruction("sub", (-3, -2)),
    Instruction("relu", (-4,)),
)
READS = [
    ("full", "full", "full"), ("full", "channel", "channel"), ("full", "image", "full"),
    ("full", "pixel", "full"), ("full", "image", "pixel"), ("full", "pixel", "channel"),
    ("channel", "full", "image"),
]  # fmt: skip


@pytest.mark.parametrize("reads", READS, ids="-".join)
@every_machine
def test_every_way_to_broadcast(machine: Machine, reads: tuple[str, ...]) -> None:
    """The same bits as PyTorch's, on any number of threads."""
    images, pixels = 3, 5
    for channels in CHANNELS:
        strides = tuple({"pixel": 1, "channel": 0}.get(read, channels) for read in reads)
        step = MapStep(PROGRAM, reads, 0, pixels, channels, (*strides, channels))
        given = numbers(step, images)
        expected = mapped(PROGRAM, given)
        for threads in (1, 2, 7):
            assert torch.equal(result(step, given, images, machine, threads), expected), channels


@pytest.mark.parametrize("reads", READS[::2], ids="-".join)
@every_machine
def test_strides(machine: Machine, reads: tuple[str, ...]) -> None:
    """Parts of wider values; what lies between is neither read nor written."""
    images, pixels = 2, 7
    for channels in CHANNELS:
        strides = (*(channels + 3 + i for i in range(len(reads))), channels + 9)
        step = MapStep(PROGRAM, reads, 0, pixels, channels, strides)
        given = numbers(step, images)
        expected = mapped(PROGRAM, given)
        for threads in (1, 3):
            assert torch.equal(result(step, given, images, machine, threads), expected), channels


@every_machine
def test_constants_follow_inputs(machine: Machine) -> None:
    program = (
        Instruction("mul", (0, 1)),
        Instruction("add", (-1, 2)),
        Instruction("prelu", (-2, 3)),
        Instruction("clamp", (-3,), (-0.5, math.inf)),
    )
    for channels in CHANNELS:
        for dense in (True, False):
            stride = channels if dense else channels + 5
            step = MapStep(program, ("full",), 3, 11, channels, (stride, channels))
            given = numbers(step, 2)
            expected = mapped(program, given)
            for threads in (1, 4):
                assert torch.equal(result(step, given, 2, machine, threads), expected), channels


@every_machine
def test_numbers_are_no_operands(machine: Machine) -> None:
    """0.0 and 1.0 stand for themselves, 0 and 1 for operands; -0.0 and 0.0 differ."""
    steps = [
        MapStep((Instruction("div", (0, operand)),), ("full", "full"), 0, 1, 19, (19, 19, 19))
        for operand in (1, 1.0, 0, 0.0, -0.0)
    ]
    assert len(set(steps)) == len({code.name(step, machine) for step in steps}) == 5
    assert steps[0] == dataclasses.replace(steps[0])
    for step in steps:
        given = numbers(step, 1)
        assert torch.equal(result(step, given, 1, machine), mapped(step.program, given))


@every_machine
def test_numbers_too_large_for_float32_are_infinite(machine: Machine) -> None:
    program = (Instruction("minimum", (0, 1e300)), Instruction("add", (-1, -1e300)))
    step = MapStep(program, ("full",), 0, 3, 5, (5, 5))
    assert torch.equal(result(step, numbers(step, 1), 1, machine), torch.full((1, 3, 5), -math.inf))


@pytest.mark.parametrize("reads", READS, ids="-".join)
@every_machine
def test_in_place(machine: Machine, reads: tuple[str, ...]) -> None:
    images, pixels = 2, 9
    for channels in (3, 17, 70, 208, 272):
        for extra in (0, 4):
            strides = (*[channels + extra] * 3, channels + extra)
            step = MapStep(PROGRAM, reads, 0, pixels, channels, strides)
            given = numbers(step, images)
            expected = mapped(PROGRAM, given)
            for place, read in enumerate(reads):
                if read == "full":
                    found = result(step, given, images, machine, 2, place)
                    assert torch.equal(found, expected), (channels, extra, place)


@every_machine
def test_sizes_of_rows(machine: Machine) -> None:
    """Around a whole number of vectors, several at once, and lines shared out to threads."""
    program = (Instruction("add", (0, 1)), Instruction("neg", (-1,)))
    for channels in (*range(1, machine.lanes + 2), 2 * machine.lanes - 1, 3 * machine.lanes + 1):
        step = MapStep(program, ("full",), 1, 1, channels, (channels, channels))
        for images in (1, 2, 13):
            given = numbers(step, images)
            expected = mapped(program, given)
            assert torch.equal(result(step, given, images, machine, 3), expected), channels
    for channels in range(5 * machine.lanes - 2, 18 * machine.lanes, machine.lanes + 3):
        step = MapStep(program, ("full",), 1, 2, channels, (channels + 1, channels + 1))
        given = numbers(step, 1)
        assert torch.equal(result(step, given, 1, machine, 2, 0), mapped(program, given)), channels


@every_machine
def test_more_threads_than_pixels_and_no_images(machine: Machine) -> None:
    for reads, stride in ((("full",), 5), (("full",), 6), (("image",), 5)):
        step = MapStep((Instruction("neg", (0,)),), reads, 0, 2, 5, (stride, 5))
        given = numbers(step, 1)
        expected = mapped(step.program, given).expand(1, 2, 5)
        assert torch.equal(result(step, given, 1, machine, 11), expected)
        y = Rows((2, 5))
        run(step, Rows(given[0].flatten(0, 1), stride), y, images=0, threads=2, machine=machine)
        assert y.values().isnan().all()


@every_machine
def test_a_long_expression(machine: Machine) -> None:
    """More values than registers, of functions that need many."""
    functions = ("gelu", "silu", "mish", "softplus", "tanh", "erf", "sigmoid", "hardswish")
    program = [Instruction(function, (0,)) for function in functions]
    program += [Instruction("add", (-1, -2))]
    program += [Instruction("add", (-9 - i, -3 - i)) for i in range(6)]
    reads = ("full", "channel")
    for channels in (24, 100):
        step = MapStep(tuple(program), reads, 0, 6, channels, (channels, 0, channels))
        given = numbers(step, 2)
        expected = mapped(program, [x.double() for x in given]).expand(2, 6, channels)
        assert_close(result(step, given, 2, machine, 2), expected, rtol=1e-6, atol=1e-6)


def test_bytes() -> None:
    reads = ("full", "image", "channel", "pixel")
    step = MapStep((Instruction("add", (0, 1)),), reads, 2, 10, 7, (7, 7, 0, 1, 7))
    assert step.bytes == 4 * (70 + 7 + 7 + 10 + 2 * 7 + 70)
    assert step.arguments == ("x0", "x1", "x2", "x3", "c0", "c1", "y", "images")


def test_code_is_made_once(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = runnable()[0]
    step = MapStep((Instruction("abs", (0,)),), ("full",), 0, 23, 29, (29, 29))
    address, kept = code.function(step), code.object_code(step, machine)

    def never(*_: object) -> bytes:
        raise AssertionError("compiled again")

    monkeypatch.setattr(jit, "compile_object", never)
    assert code.function(dataclasses.replace(step), machine) == address
    assert code.object_code(step, machine) == kept
    assert code.name(step, machine).encode() in kept
