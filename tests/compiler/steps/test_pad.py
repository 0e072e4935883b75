"""Padding and cropping, bit by bit."""

import math

import pytest
import torch
import torch.nn.functional as F
from compiler.steps.images import CHANNELS, apply, every_machine, images

from groupconv.compiler.graph import Pad
from groupconv.compiler.steps.pad import PadStep
from groupconv.kernels.machine import Machine

PADDINGS = [
    ((0, 0), (0, 0)),
    ((1, 1), (1, 1)),
    ((0, 1), (0, 1)),
    ((3, 0), (0, 9)),
    ((-1, 0), (0, -2)),
    ((-2, 3), (4, -1)),
    ((2, -3), (-3, 2)),
    ((-1, -1), (-1, -1)),
]


@every_machine
@pytest.mark.parametrize("number", range(len(PADDINGS)))
@pytest.mark.parametrize(("size", "wider"), [((5, 7), (0, 0)), ((13, 9), (2, 0)), ((4, 5), (0, 3))])
def test_pad(number: int, size: tuple[int, int], wider: tuple[int, int], target: Machine) -> None:
    padding = PADDINGS[number]
    for channels in (CHANNELS[number % 6], CHANNELS[(number + 3) % 6]):
        x = images(2, channels, *size)
        strides = (channels + wider[0], channels + wider[1])
        step = PadStep(Pad(padding, 0.5), channels, size, strides)
        expected = F.pad(x, [*padding[1], *padding[0]], value=0.5)
        assert torch.equal(apply(step, x, channels, step.output_size, strides, target), expected)


@every_machine
@pytest.mark.parametrize("value", [0.0, -math.inf, 0.1, 3])
def test_values(value: float, target: Machine) -> None:
    x, strides = images(1, 5, 1, 1), (5, 6)
    step = PadStep(Pad(((1, 0), (0, 2)), value), 5, (1, 1), strides)
    y = apply(step, x, 5, (2, 3), strides, target)
    assert torch.equal(y, F.pad(x, [0, 2, 1, 0], value=value))


def test_bytes() -> None:
    step = PadStep(Pad(((1, -2), (3, 0))), 3, (4, 6), (8, 3))
    assert step.output_size == (3, 9)
    assert step.bytes == 4 * 3 * (2 * 6 + 3 * 9)
