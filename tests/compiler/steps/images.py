"""Steps from images to images, run on one and on several threads."""

import pytest
import torch
from compiler.steps.run import Rows, run
from torch import Tensor

from groupconv.compiler.steps.step import Step
from groupconv.kernels.machine import Machine, runnable

every_machine = pytest.mark.parametrize("target", runnable(), ids=lambda target: target.name)
# Channels that fill no vector, a part of one, one or more, or more than one block of them.
CHANNELS = (1, 3, 7, 17, 64, 75)


def images(*shape: int, seed: int = 0) -> Tensor:
    """Normal numbers."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def apply(
    step: Step,
    x: Tensor,
    channels: int,
    size: tuple[int, int],
    strides: tuple[int, int],
    target: Machine,
    *more: Tensor,
) -> Tensor:
    """The images ``(N, channels, *size)`` that a step makes of ``(N, C, H, W)``.

    They are the same bit by bit for any number of threads, and nothing else is written.

    Args:
        strides: of the input's and the output's pixels, as the step has them.
        more: what the step takes between its input and its output.
    """
    count = x.shape[0]
    source = Rows(x.permute(0, 2, 3, 1).reshape(-1, x.shape[1]), strides[0])
    found = []
    for threads in (1, 2, 5):
        y = Rows((count * size[0] * size[1], channels), strides[1])
        run(step, source, *more, y, images=count, threads=threads, machine=target)
        found.append(y.values())
    bits = [y.view(torch.int32) for y in found]
    assert all(torch.equal(bits[0], other) for other in bits[1:])
    return found[0].reshape(count, *size, channels).permute(0, 3, 1, 2)
