"""Interpolation against PyTorch's, by sizes and by scales."""

import pytest
import torch
import torch.nn.functional as F
from compare import assert_close
from compiler.steps.images import CHANNELS, apply, every_machine, images
from torch import Tensor

from groupconv.compiler.graph import Upsample
from groupconv.compiler.steps.upsample import UpsampleStep, places
from groupconv.kernels.machine import Machine, runnable

SIZES = [
    ((1, 1), (3, 2)),
    ((1, 5), (4, 5)),
    ((5, 7), (10, 14)),
    ((5, 7), (1, 1)),
    ((13, 9), (5, 4)),
    ((5, 7), (6, 15)),
    ((5, 7), (5, 7)),
]
SCALES = [2.0, 3.0, 1.7, 0.6, 2.3, 1.0]


def interpolated(
    upsample: Upsample, x: Tensor, size: tuple[int, int], target: Machine, wider: int = 0
) -> Tensor:
    channels = x.shape[1]
    strides = (channels + wider, channels + 2 * wider)
    step = UpsampleStep(upsample, channels, (x.shape[2], x.shape[3]), size, strides)
    return apply(step, x, channels, size, strides, target)


@every_machine
@pytest.mark.parametrize(("into", "out"), SIZES)
@pytest.mark.parametrize("channels", CHANNELS[1::2])
def test_to_a_size(
    channels: int, into: tuple[int, int], out: tuple[int, int], target: Machine
) -> None:
    x = images(2, channels, *into)
    y = interpolated(Upsample("nearest"), x, out, target, channels % 2)
    assert torch.equal(y, F.interpolate(x, out))
    for align in (False, True):
        y = interpolated(Upsample("bilinear", align), x, out, target, channels % 3)
        expected = F.interpolate(x, out, mode="bilinear", align_corners=align)
        assert_close(y, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("size", [(1, 2), (5, 7), (50, 61)])
def test_by_a_scale(scale: float, size: tuple[int, int]) -> None:
    """PyTorch finds places by the scale that is given, not by the sizes that come of it."""
    x = images(1, 3, *size)
    scales, target = (scale, scale), runnable()[0]
    out = tuple(max(1, int(n * scale)) for n in size)
    if min(int(n * scale) for n in size) == 0:
        scales = (None, None)
        expected = F.interpolate(x, out)
    else:
        expected = F.interpolate(x, scale_factor=scale)
    assert torch.equal(interpolated(Upsample("nearest", False, scales), x, out, target), expected)
    for align in (False, True):
        expected = torch.ops.aten.upsample_bilinear2d(x, out, align, *scales)
        y = interpolated(Upsample("bilinear", align, scales), x, out, target)
        assert_close(y, expected, rtol=1e-6, atol=1e-6)


def test_the_nearest_pixel_for_many_sizes() -> None:
    for into in range(1, 60, 3):
        x = torch.arange(float(into)).view(1, 1, 1, into)
        for out in range(1, 130):
            found = places(Upsample("nearest"), into, out, None).first
            assert found.tolist() == F.interpolate(x, (1, out)).flatten().tolist(), (into, out)


def test_bytes() -> None:
    step = UpsampleStep(Upsample("nearest"), 3, (4, 6), (8, 12), (8, 3))
    assert step.bytes == 4 * 3 * (24 + 96)
