"""Layer normalisation against float64 and against PyTorch."""

import math

import pytest
import torch
import torch.nn.functional as F
from compiler.steps.run import Rows, run
from torch import Tensor

from groupconv.compiler.steps.norm import LayerNormStep
from groupconv.kernels.machine import Machine, runnable

every_machine = pytest.mark.parametrize("machine", runnable(), ids=lambda machine: machine.name)
CHANNELS = (1, 3, 7, 17, 31, 64, 96, 131, 769)


def normalised(
    step: LayerNormStep,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    machine: Machine,
    threads: int = 1,
    in_place: bool = False,
) -> Tensor:
    """``x`` is (pixels, channels)."""
    rows = Rows(x, step.strides[0])
    y = rows if in_place else Rows((len(x), step.channels), step.strides[1])
    row = [0 if given is None else Rows(given[None]) for given in (weight, bias)]
    run(step, rows, *row, y, images=len(x) // step.pixels, threads=threads, machine=machine)
    if not in_place:
        assert torch.equal(rows.values().nan_to_num(), x.nan_to_num())
    return y.values()


def numbers(rows: int, channels: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(channels)
    x, weight, bias = (
        torch.randn(size, generator=generator) for size in ((rows, channels), channels, channels)
    )
    return x, weight, bias


def errors(y: Tensor, expected: Tensor) -> Tensor:
    """The largest one, and the square root of their mean square."""
    error = (y - expected).abs()
    return torch.stack([error.max(), error.square().mean().sqrt()])


@pytest.mark.parametrize("affine", ["both", "weight", "bias", "none"])
@every_machine
def test_as_exact_as_pytorch(machine: Machine, affine: str) -> None:
    images, pixels = 3, 70
    for channels in CHANNELS:
        x, weight, bias = numbers(images * pixels, channels)
        w = weight if affine in ("both", "weight") else None
        b = bias if affine in ("both", "bias") else None
        wide_w, wide_b = (None if t is None else t.double() for t in (w, b))
        expected = F.layer_norm(x.double(), (channels,), wide_w, wide_b, 1e-5)
        theirs = errors(F.layer_norm(x, (channels,), w, b, 1e-5), expected)
        # The largest is the luck of a few roundings; of one channel so is all.
        allowed = torch.tensor([2.0, 1.1]) * theirs + 2.0**-26 * expected.abs().max()
        for extra in (0, 6):
            strides = (channels + extra, channels + extra // 2)
            step = LayerNormStep(pixels, channels, strides, 1e-5, w is not None, b is not None)
            ours = normalised(step, x, w, b, machine)
            assert (errors(ours, expected) <= allowed).all(), channels
            for threads in (2, 7):
                assert torch.equal(normalised(step, x, w, b, machine, threads), ours)


@every_machine
@pytest.mark.parametrize("offset", [100.0, 1e4, -1e6])
def test_a_large_mean(machine: Machine, offset: float) -> None:
    """The spread of numbers far from 0: better than PyTorch's."""
    for channels in (17, 64, 384, 1000):
        x = numbers(20, channels)[0] + offset
        step = LayerNormStep(20, channels, (channels, channels), 1e-6, False, False)
        expected = F.layer_norm(x.double(), (channels,), eps=1e-6)
        theirs = F.layer_norm(x, (channels,), eps=1e-6)
        error = (normalised(step, x, None, None, machine) - expected).abs().max()
        assert error <= 2e-6
        assert error <= (theirs - expected).abs().max()


@every_machine
def test_in_place(machine: Machine) -> None:
    for channels in (*CHANNELS[1:5], 13 * machine.lanes - 1, 12 * machine.lanes + 1):
        x, weight, bias = numbers(9, channels)
        for extra in (0, 5):
            stride = channels + extra
            step = LayerNormStep(3, channels, (stride, stride), 1e-5)
            apart = normalised(step, x, weight, bias, machine)
            assert torch.equal(normalised(step, x, weight, bias, machine, 2, True), apart)


@every_machine
@pytest.mark.parametrize("eps", [0.0, 1e-12, 1e-5])
def test_constant_rows(machine: Machine, eps: float) -> None:
    """No spread, but for rounding: zero, or NaN where PyTorch divides zero by zero."""
    for channels in (1, 7, 48, 100):
        for value in (0.0, 0.1, -1 / 3, 1234.567):
            x = torch.full((2, channels), value)
            step = LayerNormStep(2, channels, (channels, channels), eps, False, False)
            y = normalised(step, x, None, None, machine)
            if eps:
                assert y.abs().max() <= 1e-3
            else:
                assert y.isnan().all() or not y.any()


@every_machine
def test_nan_and_infinities(machine: Machine) -> None:
    """They spread over their own row alone."""
    for channels in (5, 16, 50):
        for value in (math.nan, math.inf, -math.inf):
            x, weight, bias = numbers(3, channels)
            step = LayerNormStep(3, channels, (channels + 1, channels), 1e-5)
            before = normalised(step, x, weight, bias, machine)
            x[1, channels // 2] = value
            after = normalised(step, x, weight, bias, machine)
            assert F.layer_norm(x, (channels,))[1].isnan().all()
            assert after[1].isnan().all()
            assert torch.equal(after[::2], before[::2])


def test_bytes() -> None:
    assert LayerNormStep(10, 7, (9, 7), 1e-5).bytes == 4 * (70 + 70 + 14)
    assert LayerNormStep(10, 7, (9, 7), 1e-5, bias=False).bytes == 4 * (70 + 70 + 7)
