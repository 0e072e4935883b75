"""Copies, shuffles and gathers: every channel in its place, bit by bit."""

from collections.abc import Sequence

import pytest
import torch
from compiler.steps.images import CHANNELS, apply, every_machine, images
from torch import Tensor

from groupconv.compiler.steps.copy import CopyStep
from groupconv.compiler.steps.gather import GatherStep
from groupconv.compiler.steps.shuffle import GROUPS, ShuffleStep, regular
from groupconv.kernels.machine import Machine

SIZES = [(1, 1), (5, 7)]


@every_machine
@pytest.mark.parametrize("channels", CHANNELS)
@pytest.mark.parametrize("wider", [(0, 0), (0, 5), (3, 0), (4, 4)])
def test_copy(channels: int, wider: tuple[int, int], target: Machine) -> None:
    for size in SIZES:
        x = images(2, channels, *size)
        strides = (channels + wider[0], channels + wider[1])
        step = CopyStep(size[0] * size[1], channels, strides)
        assert torch.equal(apply(step, x, channels, size, strides, target), x)


@every_machine
def test_a_slice(target: Machine) -> None:
    x, strides = images(2, 40, 5, 3), (40, 13)
    shifted = x.roll(-20, 1)
    step = CopyStep(15, 13, strides)
    assert torch.equal(apply(step, shifted, 13, (5, 3), strides, target), x[:, 20:33])


def gathered(order: Sequence[int], x: Tensor, target: Machine) -> Tensor:
    channels, size, strides = len(order), (x.shape[2], x.shape[3]), (x.shape[1], len(order) + 1)
    step = GatherStep(size[0] * size[1], channels, strides)
    return apply(step, x, channels, size, strides, target, torch.tensor(order))


@every_machine
@pytest.mark.parametrize("channels", CHANNELS)
def test_gather(channels: int, target: Machine) -> None:
    generator = torch.Generator().manual_seed(channels)
    for size in SIZES:
        for into in (channels, 1, channels + 9):
            x = images(2, into, *size)
            order = torch.randint(0, into, (channels,), generator=generator).tolist()
            assert torch.equal(gathered(order, x, target), x[:, order])


def shuffled(order: Sequence[int], x: Tensor, target: Machine) -> Tensor:
    found = regular(order)
    assert found is not None
    first, groups, distance = found
    channels, size, strides = len(order), (x.shape[2], x.shape[3]), (x.shape[1], len(order) + 2)
    step = ShuffleStep(size[0] * size[1], channels, groups, distance, strides)
    return apply(step, x.roll(-first, 1), channels, size, strides, target)


@every_machine
@pytest.mark.parametrize("groups", GROUPS)
@pytest.mark.parametrize("width", [2, 3, 11, 16, 29])
def test_shuffle(groups: int, width: int, target: Machine) -> None:
    order = torch.arange(groups * width).view(groups, width).T.flatten().tolist()
    for size in SIZES:
        x = images(2, groups * width, *size)
        assert torch.equal(shuffled(order, x, target), x[:, order])


@every_machine
@pytest.mark.parametrize("half", [0, 1])
def test_half_of_a_shuffle(half: int, target: Machine) -> None:
    order = torch.arange(116).view(2, 58).T.flatten()[58 * half : 58 * (half + 1)].tolist()
    x = images(2, 116, 7, 5)
    assert torch.equal(shuffled(order, x, target), x[:, order])


@pytest.mark.parametrize(
    ("order", "found"),
    [
        ((0, 3, 1, 4, 2, 5), (0, 2, 3)),
        ((0, 2, 4, 1, 3, 5), (0, 3, 2)),
        ((7, 12, 8, 13), (7, 2, 5)),
        ((5, 1, 6, 2), (5, 2, -4)),
        ((0, 3, 1, 4, 2), None),
        ((0, 3, 1, 5), None),
        ((0, 1), None),
        ((3,), None),
        ((), None),
    ],
)
def test_which_orders_are_regular(order: tuple[int, ...], found: tuple[int, ...] | None) -> None:
    assert regular(order) == found


def test_bytes() -> None:
    assert CopyStep(6, 5, (9, 5)).bytes == 4 * 2 * 30
    assert GatherStep(6, 5, (9, 5)).bytes == 4 * 2 * 30
    assert ShuffleStep(6, 4, 2, 2, (9, 5)).bytes == 4 * 2 * 24
