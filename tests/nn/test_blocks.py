"""Blocks: shapes, sizes, gradients and illegal arguments."""

import pytest
import torch
from compare import assert_close
from torch import nn

from groupconv.errors import ArgumentError
from groupconv.nn import (
    GroupedBottleneck,
    InvertedResidual,
    SeparableConv2d,
    ShuffleUnit,
)

BLOCKS = [
    # block, input channels, output channels, stride, parameters
    (SeparableConv2d(6, 10, 3, padding=1), 6, 10, 1, 6 * 9 + 6 * 10 + 10),
    (SeparableConv2d(6, 10, 3, 2, 1, bias=False), 6, 10, 2, 6 * 9 + 6 * 10),
    (SeparableConv2d(6, 10, (1, 5), padding="same"), 6, 10, 1, 6 * 5 + 6 * 10 + 10),
    # 1x1 layers of in/g * out, a depthwise 3x3, and two numbers per channel of each BatchNorm.
    (ShuffleUnit(24, 24, 3), 24, 24, 1, 24 * 6 // 3 + 6 * 9 + 6 * 24 // 3 + 2 * (6 + 6 + 24)),
    (ShuffleUnit(8, 24, 2, 2), 8, 24, 2, 8 * 6 // 2 + 6 * 9 + 6 * 16 // 2 + 2 * (6 + 6 + 16)),
    (ShuffleUnit(8, 24, 2, 2, False), 8, 24, 2, 8 * 6 + 6 * 9 + 6 * 16 // 2 + 2 * (6 + 6 + 16)),
    (GroupedBottleneck(16, 16, 4, 2), 16, 16, 1, 16 * 8 + 8 * 2 * 9 + 8 * 16 + 2 * (8 + 8 + 16)),
    (
        GroupedBottleneck(16, 32, 2, 4, stride=2),
        16, 32, 2,
        16 * 8 + 8 * 4 * 9 + 8 * 32 + 16 * 32 + 2 * (8 + 8 + 32 + 32),
    ),
    (InvertedResidual(8, 8), 8, 8, 1, 8 * 48 + 48 * 9 + 48 * 8 + 2 * (48 + 48 + 8)),
    (InvertedResidual(8, 12, 2, 2), 8, 12, 2, 8 * 16 + 16 * 9 + 16 * 12 + 2 * (16 + 16 + 12)),
    (InvertedResidual(8, 8, 1), 8, 8, 1, 8 * 9 + 8 * 8 + 2 * (8 + 8)),
]  # fmt: skip
every_block = pytest.mark.parametrize(
    ("block", "channels", "out_channels", "stride", "parameters"),
    BLOCKS,
    ids=[f"{type(row[0]).__name__}-{i}" for i, row in enumerate(BLOCKS)],
)


@every_block
def test_shape_and_number_of_parameters(
    block: nn.Module, channels: int, out_channels: int, stride: int, parameters: int
) -> None:
    out = block.eval()(torch.randn(2, channels, 8, 12))
    assert out.shape == (2, out_channels, 8 // stride, 12 // stride)
    assert sum(p.numel() for p in block.parameters()) == parameters


@every_block
def test_gradients_reach_every_parameter(
    block: nn.Module, channels: int, out_channels: int, stride: int, parameters: int
) -> None:
    torch.manual_seed(0)
    block.train().zero_grad()
    x = torch.randn(4, channels, 8, 12, requires_grad=True)
    out = block(x)
    out.backward(torch.randn_like(out))
    for name, tensor in [("input", x), *block.named_parameters()]:
        assert tensor.grad is not None, name
        assert tensor.grad.isfinite().all(), name
        assert tensor.grad.abs().max() > 0, name


def test_separable_is_depthwise_then_pointwise() -> None:
    block = SeparableConv2d(6, 10, 3, padding=1)
    assert (block.depthwise.groups, block.pointwise.groups) == (6, 1)
    dense = nn.Conv2d(6, 10, 3, padding=1)
    with torch.no_grad():
        dense.weight.copy_(block.pointwise.weight * block.depthwise.weight.transpose(0, 1))
        dense.bias.copy_(block.pointwise.bias)
    x = torch.randn(2, 6, 7, 8)
    assert_close(block(x), dense(x), rtol=1e-4, atol=1e-5)


def test_separable_passes_its_arguments_on() -> None:
    block = SeparableConv2d(
        4, 6, 3, stride=2, padding=2, dilation=2, padding_mode="circular",
        device="meta", dtype=torch.float64,
    )  # fmt: skip
    first = block.depthwise
    assert (first.stride, first.padding, first.dilation) == ((2, 2), (2, 2), (2, 2))
    assert first.padding_mode == "circular"
    assert first.bias is None
    assert all(p.is_meta and p.dtype == torch.float64 for p in block.parameters())
    assert block(torch.empty(1, 4, 8, 8, device="meta", dtype=torch.float64)).shape == (1, 6, 4, 4)


@pytest.mark.parametrize(
    "block",
    [ShuffleUnit(8, 8, 2), GroupedBottleneck(8, 8, 2, 2), InvertedResidual(8, 8)],
    ids=lambda block: type(block).__name__,
)
def test_shortcut(block: nn.Module) -> None:
    """With the last BatchNorm at zero only the shortcut is left."""
    last = [m for m in block.modules() if isinstance(m, nn.BatchNorm2d)][-1]
    nn.init.zeros_(last.weight)
    x = torch.randn(2, 8, 6, 6)
    expected = x if isinstance(block, InvertedResidual) else x.relu()
    assert_close(block(x.clone()), expected, rtol=0, atol=0)


def test_shuffle_unit_is_the_papers() -> None:
    """No activation follows the depthwise layer; the shuffle stands before it."""
    unit, x = ShuffleUnit(24, 24, 3).eval(), torch.randn(2, 24, 6, 6)
    hidden = unit.bn1(unit.conv1(x)).relu()[:, [0, 2, 4, 1, 3, 5]]  # of three groups of two
    out = unit.bn3(unit.conv3(unit.bn2(unit.conv2(hidden))))
    assert_close(unit(x), (out + x).relu(), rtol=0, atol=0)


def test_shuffle_unit_keeps_the_pooled_input() -> None:
    unit, x = ShuffleUnit(8, 24, 2, stride=2).eval(), torch.randn(2, 8, 6, 6)
    pooled = nn.functional.avg_pool2d(x, 3, stride=2, padding=1)
    assert_close(unit(x)[:, :8], pooled.relu(), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("block", "arguments", "message"),
    [
        (SeparableConv2d, (0, 8, 3), "in_channels=0"),
        (SeparableConv2d, (8, 0, 3), "out_channels=0"),
        (SeparableConv2d, (8, 8, 0), "kernel_size=0"),
        (SeparableConv2d, (8, 8, 3, 0), "stride=0"),
        (SeparableConv2d, (8, 8, 3, 1, "full"), "padding='full'"),
        (SeparableConv2d, (8, 8, 3, 2, "same"), "padding='same'"),
        (SeparableConv2d, (8, 8, 3, 1, 0, 0), "dilation=0"),
        (SeparableConv2d, (8, 8, 3, 1, 0, 1, True, "wrap"), "padding_mode='wrap'"),
        (ShuffleUnit, (24, 24, 3, 3), "stride=3"),
        (ShuffleUnit, (24, 24, 0), "groups=0"),
        (ShuffleUnit, (24, 24, 5), "groups=5"),
        (ShuffleUnit, (24, 24, 4), "groups=4"),  # divides 24, but not the 6 hidden channels
        (ShuffleUnit, (24, 48, 3, 1), "out_channels=48"),
        (ShuffleUnit, (24, 24, 3, 2), "in_channels=24"),
        (ShuffleUnit, (2, 2, 1), "out_channels=2"),  # no hidden channel is left
        (GroupedBottleneck, (16, 16, 4, 2, 0), "stride=0"),
        (GroupedBottleneck, (16, 16, 0, 2), "groups=0"),
        (GroupedBottleneck, (16, 16, 4, 0), "width=0"),
        (GroupedBottleneck, (0, 16, 4, 2), "in_channels=0"),
        (InvertedResidual, (8, 8, 0), "expand_ratio=0"),
        (InvertedResidual, (8, 8, 1.5), "expand_ratio=1.5"),
        (InvertedResidual, (8, 8, 6, 4), "stride=4"),
        (InvertedResidual, (8, -8), "out_channels=-8"),
    ],
)
def test_illegal_arguments(block: type[nn.Module], arguments: tuple, message: str) -> None:
    with pytest.raises(ArgumentError) as caught:
        block(*arguments)
    assert message in str(caught.value)
