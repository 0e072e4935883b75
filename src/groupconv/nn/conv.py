"""Grouped convolution layers: torch's classes with checked arguments.

Each is a subclass of its namesake in ``torch.nn`` with the same arguments, parameters, state_dict
keys and repr, so it stands wherever that one does. What differs: illegal arguments raise one clear
:class:`~groupconv.errors.ArgumentError`, and the variance of a fresh layer's output does not
depend on ``groups``.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.conv import _ConvNd

from groupconv.errors import ArgumentError
from groupconv.kernels.spec import Ints, check_groups, check_output_padding, to_tuple
from groupconv.nn.checks import check_input, check_padding_name, traced
from groupconv.nn.functional import (
    group_conv1d,
    group_conv2d,
    group_conv3d,
    group_conv_transpose1d,
    group_conv_transpose2d,
    group_conv_transpose3d,
)

_PADDING_MODES = ("zeros", "reflect", "replicate", "circular")


class _GroupConvNd(_ConvNd):
    """What the convolutions of every dimension share."""

    _dims: int
    _function: Callable[..., Tensor]

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Ints,
        stride: Ints = 1,
        padding: str | Ints = 0,
        dilation: Ints = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: str = "zeros",
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        where, dims = type(self).__name__, self._dims
        check_groups(where, in_channels, out_channels, groups)
        strides = to_tuple(where, "stride", stride, dims, 1)
        if isinstance(padding, str):
            check_padding_name(where, padding, strides)
        else:
            padding = to_tuple(where, "padding", padding, dims, 0)
        if padding_mode not in _PADDING_MODES:
            raise ArgumentError(
                f"{where}: padding_mode={padding_mode!r} must be one of {', '.join(_PADDING_MODES)}"
            )
        # The next class in line is torch's ConvNd of _dims axes, not the abstract one.
        super().__init__(  # type: ignore[call-arg]
            in_channels,
            out_channels,
            to_tuple(where, "kernel_size", kernel_size, dims, 1),
            stride=strides,
            padding=padding,
            dilation=to_tuple(where, "dilation", dilation, dims, 1),
            groups=groups,
            bias=bias,
            padding_mode=padding_mode,  # type: ignore[arg-type]
            device=device,
            dtype=dtype,
        )

    def reset_parameters(self) -> None:
        """torch's initialisation, with the bias drawn as for the dense layer.

        torch's weights already give the same variance for every number of groups; its bias is
        bounded by 1/sqrt(fan_in), which grows with groups.
        """
        super().reset_parameters()
        _rescale_bias(self)

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        padding: Any = self.padding
        check_input(type(self).__name__, self._dims, input, weight)
        if self.padding_mode != "zeros":
            _check_wrap(self, input)
            input = F.pad(input, self._reversed_padding_repeated_twice, mode=self.padding_mode)
            padding = 0
        function = type(self)._function
        return function(input, weight, bias, self.stride, padding, self.dilation, self.groups)


class GroupConv1d(_GroupConvNd, nn.Conv1d):
    """1-d grouped convolution: :class:`torch.nn.Conv1d`; see :class:`GroupConv2d`."""

    _dims = 1
    _function = staticmethod(group_conv1d)


class GroupConv2d(_GroupConvNd, nn.Conv2d):
    """2-d grouped convolution: :class:`torch.nn.Conv2d` with checked arguments.

    Args:
        in_channels, out_channels: channels of input and output; groups divides both.
        kernel_size, stride, dilation: an integer or one per axis, in pixels.
        padding: an integer or one per axis, in pixels, or "valid" or "same".
        groups: number of groups; in_channels gives a depthwise layer.
        bias: whether to learn a bias of shape ``(out_channels,)``.
        padding_mode: "zeros", "reflect", "replicate" or "circular".
        device, dtype: of the parameters.

    Shape:
        Input ``(N, in_channels, H, W)`` or ``(in_channels, H, W)``; weight ``(out_channels,
        in_channels / groups, k_h, k_w)``.

    Raises:
        ArgumentError: an argument breaks a rule; the nearest legal groups are named.
    """

    _dims = 2
    _function = staticmethod(group_conv2d)


class GroupConv3d(_GroupConvNd, nn.Conv3d):
    """3-d grouped convolution: :class:`torch.nn.Conv3d`; see :class:`GroupConv2d`."""

    _dims = 3
    _function = staticmethod(group_conv3d)


class _GroupConvTransposeNd(nn.modules.conv._ConvTransposeNd):
    """What the transposed convolutions of every dimension share."""

    _dims: int
    _function: Callable[..., Tensor]

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Ints,
        stride: Ints = 1,
        padding: Ints = 0,
        output_padding: Ints = 0,
        groups: int = 1,
        bias: bool = True,
        dilation: Ints = 1,
        padding_mode: str = "zeros",
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        where, dims = type(self).__name__, self._dims
        check_groups(where, in_channels, out_channels, groups)
        if padding_mode != "zeros":
            raise ArgumentError(
                f'{where}: padding_mode={padding_mode!r} must be "zeros" when transposed'
            )
        strides = to_tuple(where, "stride", stride, dims, 1)
        dilations = to_tuple(where, "dilation", dilation, dims, 1)
        extra = to_tuple(where, "output_padding", output_padding, dims, 0)
        # torch also takes output_padding >= stride here and fails at every call.
        check_output_padding(where, extra, strides, dilations)
        # The next class in line is torch's ConvNd of _dims axes, not the abstract one.
        super().__init__(  # type: ignore[call-arg]
            in_channels,
            out_channels,
            to_tuple(where, "kernel_size", kernel_size, dims, 1),
            stride=strides,
            padding=to_tuple(where, "padding", padding, dims, 0),
            output_padding=extra,
            groups=groups,
            bias=bias,
            dilation=dilations,
            padding_mode=padding_mode,
            device=device,
            dtype=dtype,
        )

    def reset_parameters(self) -> None:
        """torch's initialisation, with the bias drawn as for the dense layer."""
        super().reset_parameters()
        _rescale_bias(self)

    def forward(self, input: Tensor, output_size: Sequence[int] | None = None) -> Tensor:
        """Convolve; ``output_size`` picks one of the sizes that stride > 1 leaves open."""
        where = type(self).__name__
        check_input(where, self._dims, input, self.weight)
        try:
            extra = self._output_padding(
                input,
                None if output_size is None else list(output_size),
                list(self.stride),
                list(self.padding),  # type: ignore[arg-type]
                list(self.kernel_size),
                self._dims,
                list(self.dilation),
            )
        except ValueError as error:
            raise ArgumentError(f"{where}: output_size={output_size}: {error}") from error
        function = type(self)._function
        return function(
            input,
            self.weight,
            self.bias,
            stride=self.stride,
            padding=self.padding,
            output_padding=extra,
            groups=self.groups,
            dilation=self.dilation,
        )


class GroupConvTranspose1d(_GroupConvTransposeNd, nn.ConvTranspose1d):
    """1-d transposed grouped convolution; see :class:`GroupConvTranspose2d`."""

    _dims = 1
    _function = staticmethod(group_conv_transpose1d)


class GroupConvTranspose2d(_GroupConvTransposeNd, nn.ConvTranspose2d):
    """2-d transposed grouped convolution: :class:`torch.nn.ConvTranspose2d`, checked.

    Args:
        in_channels, out_channels: channels of input and output; groups divides both.
        kernel_size, stride, padding, output_padding, dilation: an integer or one per axis, in
            pixels; output_padding is smaller than stride or dilation. No "same" padding.
        groups: number of groups.
        bias: whether to learn a bias of shape ``(out_channels,)``.
        padding_mode: "zeros", the only one.
        device, dtype: of the parameters.

    Shape:
        Input ``(N, in_channels, H, W)`` or ``(in_channels, H, W)``; weight ``(in_channels,
        out_channels / groups, k_h, k_w)``.

    Raises:
        ArgumentError: an argument breaks a rule; the nearest legal groups are named.
    """

    _dims = 2
    _function = staticmethod(group_conv_transpose2d)


class GroupConvTranspose3d(_GroupConvTransposeNd, nn.ConvTranspose3d):
    """3-d transposed grouped convolution; see :class:`GroupConvTranspose2d`."""

    _dims = 3
    _function = staticmethod(group_conv_transpose3d)


LAYERS = (
    GroupConv1d,
    GroupConv2d,
    GroupConv3d,
    GroupConvTranspose1d,
    GroupConvTranspose2d,
    GroupConvTranspose3d,
)


@torch.no_grad()
def _rescale_bias(layer: _ConvNd) -> None:
    """Bring torch's bias bound 1/sqrt(fan_in / groups) to the dense layer's 1/sqrt(fan_in)."""
    if layer.bias is not None:
        layer.bias.div_(math.sqrt(layer.groups))


def _check_wrap(layer: _GroupConvNd, input: Tensor) -> None:
    """Reflected and circular padding take their pixels from the input: it must have enough."""
    if layer.padding_mode == "replicate" or traced():
        return
    spare = 1 if layer.padding_mode == "reflect" else 0
    pads = layer._reversed_padding_repeated_twice
    for axis, size in enumerate(reversed(input.shape[-layer._dims :])):
        pad = max(pads[2 * axis : 2 * axis + 2])
        if pad > size - spare:
            raise ArgumentError(
                f"{type(layer).__name__}: padding_mode={layer.padding_mode!r} with padding={pad} "
                f"needs at least {pad + spare} pixels along every padded axis; "
                f"input has shape {tuple(input.shape)}"
            )
