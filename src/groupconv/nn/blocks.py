"""Blocks of grouped convolutions that people write by hand.

Every block takes and returns ``(N, C, H, W)``; with stride 1 the spatial size is kept.
"""

import torch
from torch import Tensor, nn

from groupconv.errors import ArgumentError
from groupconv.kernels.spec import Ints, is_int
from groupconv.nn.conv import GroupConv2d
from groupconv.nn.shuffle import ChannelShuffle


class SeparableConv2d(nn.Module):
    """Depthwise separable convolution: one filter per channel, then a pointwise layer.

    In place of a dense ``k x k`` layer it needs ``1/out_channels + 1/k^2`` of the MACs
    (Chollet 2017, https://arxiv.org/abs/1610.02357).

    Args:
        in_channels, out_channels: channels of input and output.
        kernel_size, stride, padding, dilation, padding_mode: of the depthwise layer, as in
            :class:`GroupConv2d`.
        bias: whether the pointwise layer has a bias; the depthwise one never needs it.
        device, dtype: of the parameters.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Ints,
        stride: Ints = 1,
        padding: str | Ints = 0,
        dilation: Ints = 1,
        bias: bool = True,
        padding_mode: str = "zeros",
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.depthwise = GroupConv2d(
            in_channels,
            in_channels,
            kernel_size,
            stride=stride,
            padding=padding,
            dilation=dilation,
            groups=in_channels,
            bias=False,
            padding_mode=padding_mode,
            device=device,
            dtype=dtype,
        )
        self.pointwise = GroupConv2d(
            in_channels, out_channels, 1, bias=bias, device=device, dtype=dtype
        )

    def forward(self, input: Tensor) -> Tensor:
        return self.pointwise(self.depthwise(input))


class ShuffleUnit(nn.Module):
    """Unit of ShuffleNet v1: grouped pointwise, shuffle, depthwise 3x3, grouped pointwise.

    Stride 1 adds the input to the result; stride 2 halves the image and concatenates the
    average-pooled input (Zhang et al. 2018, https://arxiv.org/abs/1707.01083).

    Args:
        in_channels, out_channels: equal at stride 1; out_channels > in_channels at stride 2.
        groups: of the pointwise layers, and of the shuffle between them.
        stride: 1 or 2.
        first_grouped: False leaves the first pointwise layer dense, as the paper does where the
            input has few channels.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        groups: int,
        stride: int = 1,
        first_grouped: bool = True,
    ) -> None:
        super().__init__()
        _check_stride("ShuffleUnit", stride)
        _check_positive("ShuffleUnit", in_channels=in_channels, groups=groups)
        if not is_int(out_channels) or out_channels < 4:
            raise ArgumentError(
                f"ShuffleUnit: out_channels={out_channels!r} must be an integer >= 4, of which "
                "a quarter are the hidden channels"
            )
        if (stride == 1 and in_channels != out_channels) or (
            stride == 2 and in_channels >= out_channels
        ):
            raise ArgumentError(
                f"ShuffleUnit: in_channels={in_channels}, out_channels={out_channels}, "
                f"stride={stride}: channels must be equal at stride 1 and grow at stride 2"
            )
        hidden = out_channels // 4
        branch = out_channels - in_channels if stride == 2 else out_channels
        self.conv1 = GroupConv2d(
            in_channels, hidden, 1, groups=groups if first_grouped else 1, bias=False
        )
        self.bn1 = nn.BatchNorm2d(hidden)
        self.shuffle = ChannelShuffle(groups)
        self.conv2 = GroupConv2d(
            hidden, hidden, 3, stride=stride, padding=1, groups=hidden, bias=False
        )
        self.bn2 = nn.BatchNorm2d(hidden)
        self.conv3 = GroupConv2d(hidden, branch, 1, groups=groups, bias=False)
        self.bn3 = nn.BatchNorm2d(branch)
        self.pool = nn.AvgPool2d(3, stride=2, padding=1) if stride == 2 else None
        self.relu = nn.ReLU(inplace=True)

    def forward(self, input: Tensor) -> Tensor:
        out = self.shuffle(self.relu(self.bn1(self.conv1(input))))
        out = self.bn3(self.conv3(self.bn2(self.conv2(out))))
        if self.pool is None:
            return self.relu(out + input)
        return self.relu(torch.cat([self.pool(input), out], 1))


class GroupedBottleneck(nn.Module):
    """Bottleneck of ResNeXt: 1x1, grouped 3x3, 1x1, and a shortcut.

    https://arxiv.org/abs/1611.05431

    Args:
        in_channels, out_channels: channels of input and output.
        groups: of the 3x3 layer (the paper's cardinality).
        width: channels per group of the 3x3 layer.
        stride: 1 or 2, of the 3x3 layer.
    """

    def __init__(
        self, in_channels: int, out_channels: int, groups: int, width: int, stride: int = 1
    ) -> None:
        super().__init__()
        _check_stride("GroupedBottleneck", stride)
        _check_positive("GroupedBottleneck", groups=groups, width=width)
        hidden = groups * width
        self.conv1 = GroupConv2d(in_channels, hidden, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(hidden)
        self.conv2 = GroupConv2d(
            hidden, hidden, 3, stride=stride, padding=1, groups=groups, bias=False
        )
        self.bn2 = nn.BatchNorm2d(hidden)
        self.conv3 = GroupConv2d(hidden, out_channels, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(out_channels)
        self.relu = nn.ReLU(inplace=True)
        self.downsample: nn.Module = nn.Identity()
        if stride != 1 or in_channels != out_channels:
            self.downsample = nn.Sequential(
                GroupConv2d(in_channels, out_channels, 1, stride=stride, bias=False),
                nn.BatchNorm2d(out_channels),
            )

    def forward(self, input: Tensor) -> Tensor:
        out = self.relu(self.bn1(self.conv1(input)))
        out = self.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        return self.relu(out + self.downsample(input))


class InvertedResidual(nn.Module):
    """Block of MobileNetV2: widen by a 1x1 layer, depthwise 3x3, narrow linearly.

    The input is added when stride is 1 and the channels are equal (Sandler et al. 2018,
    https://arxiv.org/abs/1801.04381).

    Args:
        in_channels, out_channels: channels of input and output.
        expand_ratio: hidden channels per input channel; 1 drops the widening layer.
        stride: 1 or 2, of the depthwise layer.
    """

    def __init__(
        self, in_channels: int, out_channels: int, expand_ratio: int = 6, stride: int = 1
    ) -> None:
        super().__init__()
        _check_stride("InvertedResidual", stride)
        _check_positive("InvertedResidual", in_channels=in_channels, expand_ratio=expand_ratio)
        hidden = in_channels * expand_ratio
        layers: list[nn.Module] = []
        if expand_ratio != 1:
            layers += [
                GroupConv2d(in_channels, hidden, 1, bias=False),
                nn.BatchNorm2d(hidden),
                nn.ReLU6(inplace=True),
            ]
        layers += [
            GroupConv2d(hidden, hidden, 3, stride=stride, padding=1, groups=hidden, bias=False),
            nn.BatchNorm2d(hidden),
            nn.ReLU6(inplace=True),
            GroupConv2d(hidden, out_channels, 1, bias=False),
            nn.BatchNorm2d(out_channels),
        ]
        self.conv = nn.Sequential(*layers)
        self.add_input = stride == 1 and in_channels == out_channels

    def forward(self, input: Tensor) -> Tensor:
        out = self.conv(input)
        return input + out if self.add_input else out


def _check_stride(where: str, stride: int) -> None:
    if stride not in (1, 2):
        raise ArgumentError(f"{where}: stride={stride!r} must be 1 or 2")


def _check_positive(where: str, **values: int) -> None:
    for name, value in values.items():
        if not is_int(value) or value < 1:
            raise ArgumentError(f"{where}: {name}={value!r} must be a positive integer")
