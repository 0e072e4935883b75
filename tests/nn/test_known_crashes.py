"""Crashes and limits that people met elsewhere in grouped convolution; see test_known_faults."""

import pytest
import torch
from compare import assert_close
from torch import Tensor, nn

from groupconv.kernels.reference import group_conv_reference
from groupconv.kernels.spec import ConvSpec
from groupconv.nn import (
    GroupConv1d,
    GroupConv2d,
    GroupConvTranspose1d,
    GroupConvTranspose2d,
    functional,
)


@pytest.mark.parametrize(
    ("layer", "shape", "out_shape"),
    [
        *[
            (GroupConv2d(20, 20, 3, 1, 1, groups=g), (0, 20, 100, 100), (0, 20, 100, 100))
            for g in (1, 4, 20)
        ],
        (
            GroupConvTranspose2d(8, 8, 3, stride=2, padding=1, output_padding=1, groups=4),
            (0, 8, 5, 5),
            (0, 8, 10, 10),
        ),
    ],
    ids=str,
)
def test_empty_batch(layer: nn.Module, shape: tuple[int, ...], out_shape: tuple[int, ...]) -> None:
    """Also checked: its gradients are zero, not memory that nobody set."""
    x = torch.ones(shape, requires_grad=True)
    out = layer(x)
    assert out.shape == out_shape
    out.sum().backward()
    assert x.grad.shape == shape
    for p in layer.parameters():
        assert p.grad.shape == p.shape
        assert p.grad.count_nonzero() == 0


def depthwise_crop_equals_tiles(height: int, width: int) -> None:
    """A depthwise layer on one large image, against the same on overlapping tiles of it."""
    torch.manual_seed(0)
    weight = torch.randn(64, 1, 3, 3)
    x = torch.randn(1, 64, height, width)
    out = functional.group_conv2d(x, weight, padding=1, groups=64)
    assert out.shape == x.shape
    tile = 32
    for top in (1, height // 2, height - tile - 1):  # the last rows lie at the highest addresses
        for left in (1, width // 2, width - tile - 1):
            part = x[:, :, top - 1 : top + tile + 1, left - 1 : left + tile + 1]
            expected = functional.group_conv2d(part.contiguous(), weight, groups=64)
            crop = out[:, :, top : top + tile, left : left + tile]
            assert_close(crop, expected, rtol=1e-5, atol=1e-5)


def test_large_depthwise() -> None:
    depthwise_crop_equals_tiles(280, 186)


@pytest.mark.slow
def test_very_large_depthwise() -> None:
    """0.7 GB in, as much out, and as much again inside torch."""
    depthwise_crop_equals_tiles(2240, 1240)


@pytest.mark.parametrize("shape", [(1, 64, 4480, 2976), (1, 2, 32800, 32800)])
def test_sizes_above_32_bits(shape: tuple[int, ...]) -> None:
    """More than 2**31 bytes, and more than 2**31 elements."""
    channels = shape[1]
    layer = GroupConv2d(channels, channels, 3, padding=1, groups=channels, device="meta")
    out = layer(torch.empty(shape, device="meta"))
    assert out.shape == shape
    spec = ConvSpec(
        1, channels, channels, shape[2:], (3, 3), (1, 1), ((1, 1),) * 2, (1, 1), channels
    )
    assert spec.macs == 9 * out.numel() > 2**32


@pytest.mark.parametrize("groups", [1, 16])
def test_transposed_view_of_length_one(groups: int) -> None:
    x = torch.randn(1, 1, 16).transpose(1, 2)
    layer = GroupConv1d(16, 16, 1, groups=groups, bias=False)
    expected = (
        torch.einsum("oi,nil->nol", layer.weight[:, :, 0], x)
        if groups == 1
        else x * layer.weight.reshape(1, 16, 1)
    )
    for out in (layer(x), functional.group_conv1d(x, layer.weight, groups=groups)):
        assert out.shape == (1, 16, 1)
        assert_close(out, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("cls", "stride", "padding", "output_padding", "shape", "size"),
    [
        (GroupConvTranspose1d, 2, 0, 1, (1, 4, 8), (18,)),
        (GroupConvTranspose1d, 3, 1, 2, (1, 4, 8), (24,)),
        (GroupConvTranspose2d, 2, 0, 1, (1, 4, 8, 5), (18, 12)),
        (GroupConvTranspose2d, 3, 1, 2, (1, 4, 8, 5), (24, 15)),
    ],
)
def test_output_padding_above_padding(
    cls: type[nn.Module],
    stride: int,
    padding: int,
    output_padding: int,
    shape: tuple[int, ...],
    size: tuple[int, ...],
) -> None:
    layer = cls(4, 4, 3, stride=stride, padding=padding, output_padding=output_padding, groups=4)
    x = torch.randn(shape)
    dims = len(size)
    spec = ConvSpec(
        batch=1,
        in_channels=4,
        out_channels=4,
        input_size=shape[2:],
        kernel_size=(3,) * dims,
        stride=(stride,) * dims,
        padding=((padding, padding),) * dims,
        dilation=(1,) * dims,
        groups=4,
        transposed=True,
        output_padding=(output_padding,) * dims,
    )
    out = layer(x)
    assert out.shape == (1, 4, *size)
    assert_close(out, group_conv_reference(spec, x, layer.weight, layer.bias), rtol=1e-5, atol=1e-5)
    # It only adds pixels at the end: the rest stays as it is without.
    bare = cls(4, 4, 3, stride=stride, padding=padding, groups=4)
    bare.load_state_dict(layer.state_dict())
    kept = (..., *[slice(0, n - output_padding) for n in size])
    assert_close(out[kept], bare(x), rtol=1e-6, atol=1e-6)


def test_groups_from_a_shape_compile() -> None:
    def smooth(image: Tensor) -> Tensor:
        channels = image.shape[1]
        weight = torch.ones(channels, 1, 3, 3) / 9
        return functional.group_conv2d(image, weight, groups=channels)

    compiled = torch.compile(smooth, backend="aot_eager", dynamic=True)
    for channels in (3, 4):
        image = torch.randn(1, channels, 16, 16)
        expected = torch.nn.functional.avg_pool2d(image, 3, stride=1)
        assert_close(compiled(image), expected, rtol=1e-5, atol=1e-6)
    torch._dynamo.reset()


def test_one_channel_in_channels_last() -> None:
    """Its strides fit both layouts at once."""
    layer = GroupConv2d(1, 5, 1)
    x = torch.randn(1, 1, 7, 5).contiguous(memory_format=torch.channels_last)
    expected = x * layer.weight.reshape(1, 5, 1, 1) + layer.bias.reshape(1, 5, 1, 1)
    assert_close(layer(x), expected, rtol=1e-6, atol=1e-6)
    program = torch.export.export(layer, (x,))
    assert_close(program.module()(x), expected, rtol=1e-6, atol=1e-6)
    compiled = torch.compile(layer, backend="aot_eager")
    assert_close(compiled(x), expected, rtol=1e-6, atol=1e-6)
    torch._dynamo.reset()
