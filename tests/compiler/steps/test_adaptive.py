"""Adaptive pooling against PyTorch's; the mean of an image against float64."""

import pytest
import torch
import torch.nn.functional as F
from compare import assert_close
from compiler.steps.images import CHANNELS, apply, every_machine, images
from torch import Tensor

from groupconv.compiler.steps.adaptive import AdaptivePoolStep
from groupconv.kernels.machine import Machine, runnable

# Input and output sizes: even and uneven windows, windows that overlap, more outputs than inputs.
SIZES = [
    ((1, 1), (1, 1)),
    ((1, 5), (1, 1)),
    ((5, 7), (1, 1)),
    ((13, 9), (1, 1)),
    ((33, 35), (1, 1)),
    ((5, 7), (5, 7)),
    ((12, 8), (6, 2)),
    ((13, 9), (5, 4)),
    ((7, 7), (6, 6)),
    ((2, 3), (7, 5)),
    ((6, 9), (1, 4)),
    ((9, 6), (4, 1)),
]


def pooled(
    kind: str, x: Tensor, size: tuple[int, int], target: Machine, wider: tuple[int, int] = (0, 0)
) -> Tensor:
    channels = x.shape[1]
    strides = (channels + wider[0], channels + wider[1])
    step = AdaptivePoolStep(kind, channels, (x.shape[2], x.shape[3]), size, strides)
    return apply(step, x, channels, size, strides, target)


@every_machine
@pytest.mark.parametrize(("into", "out"), SIZES)
@pytest.mark.parametrize("channels", CHANNELS[1::2])
def test_average(
    channels: int, into: tuple[int, int], out: tuple[int, int], target: Machine
) -> None:
    x = images(3, channels, *into)
    y = pooled("average", x, out, target, (channels % 2, channels % 3))
    assert_close(y, F.adaptive_avg_pool2d(x.double(), out), rtol=5e-7, atol=2e-7)


@every_machine
@pytest.mark.parametrize(("into", "out"), SIZES)
@pytest.mark.parametrize("channels", [3, 37])
def test_maximum(
    channels: int, into: tuple[int, int], out: tuple[int, int], target: Machine
) -> None:
    x = images(3, channels, *into)
    x[0] = -torch.inf
    x[1, -1, -1, 0] = torch.nan
    x[2, 0, 0, -1] = torch.inf
    y = pooled("max", x, out, target, (2, 1))
    assert_close(y, F.adaptive_max_pool2d(x, out), rtol=0, atol=0, equal_nan=True)


@every_machine
@pytest.mark.parametrize("channels", [300, 520])
def test_many_channels(channels: int, target: Machine) -> None:
    x = images(2, channels, 7, 7)
    y = pooled("average", x, (1, 1), target)
    assert_close(y, x.double().mean((2, 3), keepdim=True), rtol=5e-7, atol=2e-7)


@pytest.mark.parametrize("size", [(7, 7), (14, 14), (56, 56), (224, 224), (67, 71)])
@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_the_mean_is_as_accurate_as_pytorch(size: tuple[int, int], offset: float) -> None:
    x = images(1, 40, *size) + offset
    truth = x.double().mean((2, 3))
    ours = pooled("average", x, (1, 1), runnable()[0])[:, :, 0, 0]
    theirs = x.to(memory_format=torch.channels_last).mean((2, 3))
    least = 2.0**-24 * max(offset, float(x.std()) / 4)
    assert _error(ours, truth) <= max(1.2 * _error(theirs, truth), least)


def _error(y: Tensor, truth: Tensor) -> float:
    return float((y.double() - truth).square().mean().sqrt())


def test_bytes() -> None:
    step = AdaptivePoolStep("average", 3, (4, 6), (1, 1), (8, 3))
    assert step.bytes == 4 * 3 * (24 + 1)
