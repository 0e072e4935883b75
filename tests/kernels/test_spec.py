"""ConvSpec against torch and against numbers worked out by hand."""

import dataclasses
import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from compare import assert_close
from torch import nn

from groupconv.errors import ArgumentError
from groupconv.kernels.reference import group_conv_reference
from groupconv.kernels.spec import (
    ConvSpec,
    KernelSpec,
    check_groups,
    is_int,
    legal_groups,
    same_padding,
    to_tuple,
)

CONV = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
CONV_TRANSPOSE = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
SIZES = ((9,), (9, 7), (6, 7, 5))
GRID = list(itertools.product([1, 2, 3], [False, True], [1, 2, 4], [1, 3], [1, 2], [0, 1], [1, 2]))


def make_spec(
    dims: int, transposed: bool, groups: int, kernel: int, stride: int, padding: int, dilation: int
) -> ConvSpec:
    return ConvSpec(
        batch=2,
        in_channels=4,
        out_channels=8,
        input_size=SIZES[dims - 1],
        kernel_size=(kernel,) * dims,
        stride=(stride,) * dims,
        padding=((padding, padding),) * dims,
        dilation=(dilation,) * dims,
        groups=groups,
        transposed=transposed,
        output_padding=(1,) * dims if transposed and stride > 1 else (),
    )


def make_layer(spec: ConvSpec, **kwargs: object) -> nn.Module:
    dims = len(spec.input_size)
    if spec.transposed:
        kwargs["output_padding"] = spec.output_padding or (0,) * dims
    return (CONV_TRANSPOSE if spec.transposed else CONV)[dims - 1](
        spec.in_channels,
        spec.out_channels,
        spec.kernel_size,
        stride=spec.stride,
        padding=tuple(before for before, _ in spec.padding),
        dilation=spec.dilation,
        groups=spec.groups,
        **kwargs,
    )


@pytest.mark.parametrize("numbers", GRID, ids=str)
def test_shapes_are_torchs(numbers: tuple) -> None:
    spec = make_spec(*numbers)
    layer = make_layer(spec, device="meta")
    out = layer(torch.empty(spec.batch, spec.in_channels, *spec.input_size, device="meta"))
    assert tuple(layer.weight.shape) == spec.weight_shape
    assert tuple(out.shape) == (spec.batch, spec.out_channels, *spec.output_size)


@pytest.mark.parametrize("numbers", GRID, ids=str)
def test_reference_is_torchs_layer(numbers: tuple) -> None:
    spec = make_spec(*numbers)
    torch.manual_seed(0)
    layer = make_layer(spec, dtype=torch.float64)
    x = torch.randn(spec.batch, spec.in_channels, *spec.input_size, dtype=torch.float64)
    actual = group_conv_reference(spec, x, layer.weight, layer.bias)
    assert actual.dtype == torch.float64
    assert_close(actual, layer(x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("numbers", [n for n in GRID if n[5] == 0], ids=str)
def test_macs_are_the_sum_of_a_convolution_of_ones(numbers: tuple) -> None:
    """Without padding every multiply-add then adds one to the sum of the output."""
    spec = make_spec(*numbers)
    layer = make_layer(spec, bias=False, dtype=torch.float64)
    nn.init.ones_(layer.weight)
    x = torch.ones(spec.batch, spec.in_channels, *spec.input_size, dtype=torch.float64)
    assert layer(x).sum().item() == spec.macs > 0


def spec_of(layer: nn.Module, *shape: int) -> ConvSpec:
    return ConvSpec(
        batch=shape[0],
        in_channels=layer.in_channels,
        out_channels=layer.out_channels,
        input_size=shape[2:],
        kernel_size=layer.kernel_size,
        stride=layer.stride,
        padding=tuple((p, p) for p in layer.padding),
        dilation=layer.dilation,
        groups=layer.groups,
        transposed=layer.transposed,
        output_padding=layer.output_padding if layer.transposed else (),
    )


@pytest.mark.parametrize(
    ("layer", "shape", "macs"),
    [
        # Transposed: depthwise; equal in and out; in, out and image all different.
        (
            nn.ConvTranspose2d(4, 4, 3, stride=2, padding=1, output_padding=1, groups=4),
            (2, 4, 8, 8),
            4608,
        ),
        (nn.ConvTranspose2d(6, 6, 2, stride=2, groups=3), (2, 6, 8, 8), 6144),
        (nn.ConvTranspose2d(32, 1, 3), (1, 32, 1, 1), 288),
        # Half of 28,800 floating point operations.
        (nn.Conv2d(8, 8, 3, padding=1, groups=4), (1, 8, 10, 10), 14400),
        # The bias is not counted.
        (nn.Conv2d(3, 10, 3, bias=True), (1, 3, 32, 32), 10 * 3 * 9 * 30 * 30),
        (nn.Conv2d(3, 10, 3, bias=False), (1, 3, 32, 32), 10 * 3 * 9 * 30 * 30),
        # First layer of ResNet-50, and the 3x3 layer of a ResNeXt-50 32x4d block.
        (nn.Conv2d(3, 64, 7, stride=2, padding=3), (1, 3, 224, 224), 118013952),
        (nn.Conv2d(128, 128, 3, padding=1, groups=32), (1, 128, 56, 56), 14450688),
        (nn.Conv1d(768, 768, 31, padding=15, groups=768), (1, 768, 100), 768 * 31 * 100),
        (nn.Conv3d(16, 16, 3, padding=1, groups=4), (1, 16, 8, 24, 24), 16 * 4 * 27 * 4608),
        (nn.Conv2d(20, 20, 3, padding=1, groups=4), (0, 20, 100, 100), 0),
    ],
    ids=str,
)
def test_macs_by_hand(layer: nn.Module, shape: tuple[int, ...], macs: int) -> None:
    assert spec_of(layer, *shape).macs == macs


def test_macs_do_not_overflow() -> None:
    """2 * 9 * 32800**2 is above 2**32."""
    layer = nn.Conv2d(2, 2, 3, padding=1, groups=2, device="meta")
    assert spec_of(layer, 1, 2, 32800, 32800).macs == 19365120000


LEGAL = make_spec(2, False, 2, 3, 2, 1, 1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"groups": 0}, "groups=0"),
        ({"groups": -1}, "groups=-1"),
        ({"groups": 3}, "groups=3"),
        ({"groups": 2.0}, "groups=2.0"),
        ({"groups": True}, "groups=True"),
        ({"in_channels": 0}, "in_channels=0"),
        ({"out_channels": 7}, "out_channels=7"),
        ({"batch": -1}, "batch=-1"),
        ({"batch": None}, "batch=None"),
        ({"input_size": ()}, "must have 0 items"),
        ({"input_size": (1, 2, 3, 4)}, "input_size=(1, 2, 3, 4)"),
        ({"input_size": (0, 9)}, "input_size=(0, 9)"),
        ({"kernel_size": (3,)}, "kernel_size=(3,)"),
        ({"kernel_size": 3}, "kernel_size=3"),
        ({"kernel_size": (3, 0)}, "kernel_size=(3, 0)"),
        ({"stride": (0, 1)}, "stride=(0, 1)"),
        ({"stride": (1, 1, 1)}, "stride=(1, 1, 1)"),
        ({"stride": (1, "2")}, "stride=(1, '2')"),
        ({"dilation": (1, -1)}, "dilation=(1, -1)"),
        ({"padding": ((1, 1),)}, "padding=((1, 1),)"),
        ({"padding": ((1, 1), (1,))}, "padding=(1,)"),
        ({"padding": (1, 1)}, "padding=1"),
        ({"padding": ((1, 0.5), (0, 0))}, "padding=(1, 0.5)"),
        ({"output_padding": (1, 1)}, "output_padding=(1, 1)"),
        ({"output_padding": (2, 0), "transposed": True}, "output_padding=(2, 0)"),
        ({"output_padding": (1,), "transposed": True}, "output_padding=(1,)"),
        ({"output_padding": (-1, 0), "transposed": True}, "output_padding=(-1, 0)"),
        ({"kernel_size": (12, 3)}, "kernel_size=(12, 3)"),
        ({"dilation": (6, 1)}, "dilation=(6, 1)"),
        ({"padding": ((12, 12), (0, 0)), "transposed": True}, "padding=((12, 12), (0, 0))"),
    ],
    ids=str,
)
def test_illegal_records(change: dict[str, object], message: str) -> None:
    with pytest.raises(ArgumentError) as caught:
        dataclasses.replace(LEGAL, **change)
    assert message in str(caught.value)


PLAIN = ConvSpec(1, 12, 18, (8, 7), (3, 3), (1, 1), ((1, 1), (1, 1)), (1, 1), 3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"residual": True}, "residual=True must be None or one of before, after"),
        ({"activation": "tanh"}, "activation='tanh' must be None or one of relu"),
        ({"input_pixel": 11}, "input_pixel=11 must be an integer >= 12, the channels of a pixel"),
        ({"input_pixel": 12.0}, "input_pixel=12.0 must be an integer >= 12"),
        ({"output_pixel": 17}, "output_pixel=17 must be an integer >= 18"),
        ({"residual": "after", "residual_pixel": 0}, "residual_pixel=0 must be an integer >= 18"),
        ({"residual_pixel": 20}, "residual_pixel=20 needs a residual"),
        (
            {"input_pixel": 12, "channels_last_input": False},
            "input_pixel=12 needs channels last, not NCHW",
        ),
        ({"output_pixel": 20, "channels_last_output": False}, "output_pixel=20 needs channels"),
        (
            {"residual": "before", "residual_pixel": 20, "channels_last_output": False},
            "residual_pixel=20 needs channels last",
        ),
        ({"conv": dataclasses.replace(PLAIN, batch=2)}, "must be 2-d, plain, of one image"),
    ],
)
def test_kernels_say_what_they_do_not_take(change: dict[str, object], message: str) -> None:
    with pytest.raises(ArgumentError) as caught:
        dataclasses.replace(KernelSpec(PLAIN), **change)
    assert message in str(caught.value)


def test_elements_between_pixels() -> None:
    def strides(**rest: object) -> tuple[int, int, int]:
        spec = KernelSpec(PLAIN, **rest)
        return spec.input_stride, spec.output_stride, spec.residual_stride

    assert strides() == (12, 18, 18)
    assert strides(channels_last_input=False, channels_last_output=False) == (1, 1, 1)
    assert strides(input_pixel=20, output_pixel=30) == (20, 30, 18)
    assert strides(residual="after", residual_pixel=40) == (12, 18, 40)


def test_records_are_hashable_and_frozen() -> None:
    assert len({LEGAL, dataclasses.replace(LEGAL)}) == 1
    with pytest.raises(dataclasses.FrozenInstanceError):
        LEGAL.groups = 1


def test_legal_groups() -> None:
    assert legal_groups(12, 18) == [1, 2, 3, 6]
    assert legal_groups(69, 64) == [1]
    assert legal_groups(64, 64) == [1, 2, 4, 8, 16, 32, 64]
    for a, b in itertools.product(range(1, 25), repeat=2):
        assert legal_groups(a, b) == [g for g in range(1, 25) if a % g == b % g == 0]


@pytest.mark.parametrize(
    ("channels", "groups", "message"),
    [
        ((12, 18), 4, "out_channels=18 not divisible by groups=4 (in_channels=12"),
        ((12, 18), 4, "nearest legal groups: 3, 6"),
        ((12, 18), 9, "in_channels=12 not divisible by groups=9"),
        ((12, 18), 9, "nearest legal groups: 6"),
        ((10, 15), 4, "in_channels=10 and out_channels=15 not divisible by groups=4"),
        ((10, None), 4, "in_channels=10 not divisible by groups=4 (in_channels=10)"),
        ((10, None), 4, "nearest legal groups: 2, 5"),
    ],
)
def test_messages_about_groups(channels: tuple, groups: int, message: str) -> None:
    with pytest.raises(ArgumentError) as caught:
        check_groups("Layer", *channels, groups)
    assert message in str(caught.value)
    assert str(caught.value).startswith("Layer: ")


def test_to_tuple() -> None:
    assert to_tuple("f", "stride", 2, 3, 1) == (2, 2, 2)
    assert to_tuple("f", "stride", [2], 2, 1) == (2, 2)
    assert to_tuple("f", "stride", torch.Size([1, 2]), 2, 1) == (1, 2)
    for bad in (0, -1, 1.0, "2", None, (), (1, 2, 3), [1, 0], torch.tensor([1, 1]), np.ones(2)):
        with pytest.raises(ArgumentError, match="stride="):
            to_tuple("f", "stride", bad, 2, 1)


def test_integers() -> None:
    assert all(map(is_int, (0, -3, 2**70, np.int64(4), np.uint8(4))))
    assert not any(map(is_int, (True, 1.0, "1", None, torch.tensor(1), np.array(1), np.bool_(1))))


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel:UserWarning")
@pytest.mark.parametrize(("kernel", "dilation"), list(itertools.product(range(1, 6), range(1, 4))))
def test_same_padding_is_torchs(kernel: int, dilation: int) -> None:
    x = torch.randn(1, 1, 11, dtype=torch.float64)
    weight = torch.randn(1, 1, kernel, dtype=torch.float64)
    ((before, after),) = same_padding([kernel], [dilation])
    actual = F.conv1d(F.pad(x, (before, after)), weight, dilation=dilation)
    expected = F.conv1d(x, weight, padding="same", dilation=dilation)
    assert_close(actual, expected, rtol=1e-12, atol=1e-12)
