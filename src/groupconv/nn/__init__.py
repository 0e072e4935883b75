"""Layers of grouped convolution for PyTorch."""

from groupconv.nn import functional
from groupconv.nn.blocks import (
    GroupedBottleneck,
    InvertedResidual,
    SeparableConv2d,
    ShuffleUnit,
)
from groupconv.nn.conv import (
    GroupConv1d,
    GroupConv2d,
    GroupConv3d,
    GroupConvTranspose1d,
    GroupConvTranspose2d,
    GroupConvTranspose3d,
)
from groupconv.nn.shuffle import ChannelPermutation, ChannelShuffle

__all__ = [
    "ChannelPermutation",
    "ChannelShuffle",
    "GroupConv1d",
    "GroupConv2d",
    "GroupConv3d",
    "GroupConvTranspose1d",
    "GroupConvTranspose2d",
    "GroupConvTranspose3d",
    "GroupedBottleneck",
    "InvertedResidual",
    "SeparableConv2d",
    "ShuffleUnit",
    "functional",
]
