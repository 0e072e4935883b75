"""Softmax against float64 and against PyTorch."""

import math

import pytest
import torch
from compiler.steps.run import Rows, run
from torch import Tensor

from groupconv.compiler.steps.softmax import SoftmaxStep
from groupconv.kernels.machine import Machine, runnable

every_machine = pytest.mark.parametrize("machine", runnable(), ids=lambda machine: machine.name)
CHANNELS = (1, 3, 7, 17, 64, 131, 197, 1000)


def softmax(
    step: SoftmaxStep, x: Tensor, machine: Machine, threads: int = 1, in_place: bool = False
) -> Tensor:
    """``x`` is (pixels, channels)."""
    rows = Rows(x, step.strides[0])
    y = rows if in_place else Rows((len(x), step.channels), step.strides[1])
    run(step, rows, y, images=len(x) // step.pixels, threads=threads, machine=machine)
    if not in_place:
        assert torch.equal(rows.values().nan_to_num(), x.nan_to_num())
    return y.values()


@pytest.mark.parametrize("scale", [1e-3, 1.0, 20.0, 1e3, 1e37])
@every_machine
def test_as_exact_as_pytorch(machine: Machine, scale: float) -> None:
    images, pixels = 2, 7
    for channels in CHANNELS:
        generator = torch.Generator().manual_seed(channels)
        x = torch.randn(images * pixels, channels, generator=generator) * scale
        expected = x.double().softmax(1)
        for extra in (0, 6):
            step = SoftmaxStep(pixels, channels, (channels + extra, channels + extra // 2))
            ours = softmax(step, x, machine)
            errors = [
                ((y - expected).abs() / expected.clamp_min(2.0**-126)).max()
                for y in (ours, x.softmax(1))
            ]
            assert errors[0] <= 4 * max(errors[1].item(), 2.0**-24), channels
            for threads in (2, 5):
                assert torch.equal(softmax(step, x, machine, threads), ours)


@every_machine
def test_in_place(machine: Machine) -> None:
    for channels in (*CHANNELS[1:5], 13 * machine.lanes - 1, 12 * machine.lanes + 1):
        x = torch.randn(9, channels, generator=torch.Generator().manual_seed(0)) * 3
        for extra in (0, 5):
            stride = channels + extra
            step = SoftmaxStep(3, channels, (stride, stride))
            assert torch.equal(softmax(step, x, machine, 2, True), softmax(step, x, machine))


@every_machine
@pytest.mark.parametrize("channels", [1, 5, 16, 50])
def test_nan_and_infinities(machine: Machine, channels: int) -> None:
    """-inf is no weight, unless there is nothing else; the rest is NaN for its row."""
    x = torch.randn(7, channels, generator=torch.Generator().manual_seed(0))
    x[1, channels // 2] = math.nan
    x[2] = -math.inf
    x[3, :: max(2, channels // 3)] = -math.inf
    x[4, -1] = math.inf
    x[5] = math.nan
    x[6, 0], x[6, -1] = -math.inf, math.nan
    expected = x.softmax(1)
    y = softmax(SoftmaxStep(7, channels, (channels + 2, channels)), x, machine)
    assert torch.equal(y.isnan(), expected.isnan())
    assert torch.equal(y == 0, expected == 0)
    torch.testing.assert_close(y, expected, equal_nan=True, rtol=1e-6, atol=0)


@every_machine
def test_weights_that_vanish(machine: Machine) -> None:
    """Subnormal ones are kept."""
    x = torch.tensor([[0.0, -80.0, -90.0, -100.0, -103.5, -104.5, -200.0, -3e38]])
    y = softmax(SoftmaxStep(1, 8, (8, 8)), x, machine)
    assert ((y - x.double().softmax(1)).abs() <= 2.0**-149 + 2.0**-23 * y).all()


def test_bytes() -> None:
    assert SoftmaxStep(10, 7, (9, 7)).bytes == 4 * (70 + 70)
