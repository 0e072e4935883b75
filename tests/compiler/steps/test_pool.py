"""Pooling against PyTorch's, with every kind of padding."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from compare import assert_close
from compiler.evaluate import evaluate
from compiler.steps.images import CHANNELS, apply, every_machine, images
from torch import Tensor

from groupconv.compiler.graph import Graph, Node, Pool, Value
from groupconv.compiler.steps.pool import PoolStep
from groupconv.kernels.machine import Machine

SIZES = ((1, 1), (1, 9), (5, 7), (13, 9))


def pooled(pool: Pool, x: Tensor, target: Machine, wider: tuple[int, int] = (0, 0)) -> Tensor:
    """What native code makes of x, its pixels ``wider`` than their channels."""
    channels = x.shape[1]
    strides = (channels + wider[0], channels + wider[1])
    step = PoolStep(pool, channels, (x.shape[2], x.shape[3]), strides)
    return apply(step, x, channels, step.output_size, strides, target)


def axis(size: int, k: int, stride: int, pad: int, dilation: int, ceil: bool) -> tuple[int, int]:
    """Padding after the input, and how much of it ceil_mode adds: PyTorch's rule."""
    reach = (k - 1) * dilation + 1
    outputs = (size + 2 * pad - reach + (stride - 1 if ceil else 0)) // stride + 1
    if ceil and (outputs - 1) * stride >= size + pad:
        outputs -= 1
    after = (outputs - 1) * stride + reach - size - pad
    return (after, max(0, after - pad)) if ceil else (pad, 0)


def max_pool(x: Tensor, k: int, stride: int, pad: int, dilation: int, ceil: bool) -> Pool:
    ends = [axis(n, k, stride, pad, dilation, ceil)[0] for n in x.shape[2:]]
    padding = ((pad, ends[0]), (pad, ends[1]))
    return Pool("max", (k, k), (stride, stride), padding, (dilation, dilation))


def average_pool(x: Tensor, k: int, stride: int, pad: int, ceil: bool, include: bool) -> Pool:
    ends = [axis(n, k, stride, pad, 1, ceil) for n in x.shape[2:]]
    padding = ((pad, ends[0][0]), (pad, ends[1][0]))
    counted = [(pad, min(pad, end)) if include else (0, 0) for end, _ in ends]
    return Pool("average", (k, k), (stride, stride), padding, counted=(counted[0], counted[1]))


MAX = [
    (k, stride, pad, dilation, ceil)
    for k, stride, pad, dilation, ceil in itertools.product(
        (1, 2, 3, 5), (1, 2, 3), (0, 1, 2), (1, 2), (False, True)
    )
    if pad <= k // 2
]
AVERAGE = [
    (k, stride, pad, ceil, include)
    for k, stride, pad, ceil, include in itertools.product(
        (1, 2, 3, 4), (1, 2, 3), (0, 1, 2), (False, True), (False, True)
    )
    if pad <= k // 2
]


def some(cases: list) -> list:
    """Numbers of all cases, most of them slow."""
    return [
        pytest.param(i, marks=[] if i % 5 < 2 else [pytest.mark.slow]) for i in range(len(cases))
    ]


@every_machine
@pytest.mark.parametrize("number", some(MAX))
def test_max_pooling(number: int, target: Machine) -> None:
    k, stride, pad, dilation, ceil = MAX[number]
    channels, size = CHANNELS[number % 6], SIZES[number % 4]
    size = tuple(max(n, (k - 1) * dilation + 1 - 2 * pad) for n in size)
    x = images(2, channels, *size)
    x[0, 0, 0, 0] = torch.inf
    x[1, -1] = -torch.inf
    x[1, 0, -1, -1] = torch.nan
    expected = F.max_pool2d(x, k, stride, pad, dilation, ceil)
    y = pooled(max_pool(x, *MAX[number]), x, target, (number % 2, number % 3))
    assert_close(y, expected, rtol=0, atol=0, equal_nan=True)


@every_machine
@pytest.mark.parametrize("number", some(AVERAGE))
def test_average_pooling(number: int, target: Machine) -> None:
    k, stride, pad, ceil, include = AVERAGE[number]
    channels, size = CHANNELS[number % 6], SIZES[number % 4]
    size = tuple(max(n, k - 2 * pad) for n in size)
    x = images(2, channels, *size)
    expected = F.avg_pool2d(x.double(), k, stride, pad, ceil, include)
    y = pooled(average_pool(x, *AVERAGE[number]), x, target, (number % 2, number % 3))
    assert_close(y, expected, rtol=1e-6, atol=3e-7)


POOLS = {
    "nothing but padding": Pool("max", (2, 2), (1, 3), ((1, 0), (1, 2)), (3, 2)),
    "other rows than columns": Pool("max", (1, 7), (2, 1), ((0, 1), (3, 4))),
    "large window": Pool("average", (11, 13), (2, 3), ((5, 1), (0, 8)), counted=((2, 0), (0, 5))),
    "dilated average": Pool("average", (2, 3), (1, 2), ((1, 1), (2, 0)), (2, 1), ((1, 0), (0, 0))),
    "one window": Pool("average", (12, 14), (1, 1), ((0, 0), (0, 0))),
    "one column of windows": Pool("average", (2, 14), (2, 1), ((0, 0), (0, 0))),
    "power of two": Pool("average", (4, 4), (4, 4), ((0, 0), (0, 0))),
}


@every_machine
@pytest.mark.parametrize("pool", POOLS.values(), ids=POOLS)
def test_pools_that_pytorch_has_not(pool: Pool, target: Machine) -> None:
    x = images(3, 37, 12, 14)
    y = pooled(pool, x, target, (3, 0))
    value, result = Value("x", tuple(x.shape)), Value("y", tuple(y.shape))
    graph = Graph((value,), (result,), [Node("pool", pool, (value,), result)])
    (expected,) = evaluate(graph, [x.double()])
    assert_close(y, expected, rtol=1e-6, atol=3e-7)


@every_machine
def test_a_window_of_padding_alone_has_no_maximum(target: Machine) -> None:
    x = images(1, 5, 1, 3)
    y = pooled(max_pool(x, 2, 1, 1, 2, False), x, target)
    assert torch.equal(y, F.max_pool2d(x, 2, 1, 1, 2))
    assert torch.isneginf(y).any()


@every_machine
def test_the_pool_of_resnet(target: Machine) -> None:
    x = images(2, 64, 112, 112)
    y = pooled(max_pool(x, 3, 2, 1, 1, False), x, target)
    assert torch.equal(y, F.max_pool2d(x, 3, 2, 1))


def test_bytes() -> None:
    pool = Pool("max", (2, 2), (2, 2), ((0, 0), (0, 0)))
    assert PoolStep(pool, 3, (4, 6), (8, 3)).bytes == 4 * 3 * (24 + 6)
