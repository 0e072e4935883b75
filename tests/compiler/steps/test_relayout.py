"""Planes to rows of channels and back, bit by bit."""

import pytest
import torch
from compiler.steps.images import every_machine, images
from compiler.steps.run import Rows, run

from groupconv.compiler.steps.relayout import RelayoutStep
from groupconv.kernels.machine import Machine

PIXELS = (1, 5, 16, 35, 117)


@every_machine
@pytest.mark.parametrize("channels", [1, 2, 3, 4, 7, 8, 16, 17, 75])
@pytest.mark.parametrize("wider", [0, 3])
@pytest.mark.parametrize("inward", [True, False])
def test_relayout(channels: int, wider: int, inward: bool, target: Machine) -> None:
    for pixels in PIXELS:
        x = images(3, channels, pixels, 1)[..., 0]
        planes, rows = x.reshape(-1, pixels), x.transpose(1, 2).reshape(-1, channels)
        stride = channels + wider
        given, expected = (planes, rows) if inward else (rows, planes)
        strides = (pixels, stride) if inward else (stride, pixels)
        step = RelayoutStep(pixels, channels, stride, inward)
        for threads in (1, 2, 5):
            y = Rows((len(expected), expected.shape[1]), strides[1])
            run(step, Rows(given, strides[0]), y, images=3, threads=threads, machine=target)
            assert torch.equal(y.values(), expected)


def test_bytes() -> None:
    assert RelayoutStep(6, 5, 9, True).bytes == 4 * 2 * 30
