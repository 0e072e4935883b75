"""Grouped convolutions as functions: torch's signatures, checked before anything runs.

Each takes what its namesake in ``torch.nn.functional`` takes, and refuses illegal arguments with
one error that names argument, value, rule and the nearest legal numbers of groups, alike on every
device. Shapes below are for 2-d; unbatched input ``(C, H, W)`` is accepted as by torch.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from groupconv.errors import ArgumentError
from groupconv.kernels import dispatch
from groupconv.kernels.request import why_lowered
from groupconv.kernels.spec import (
    ConvSpec,
    Ints,
    check_groups,
    check_output_padding,
    same_padding,
    to_tuple,
)
from groupconv.nn.checks import (
    check_bias,
    check_input,
    check_kernel_fits,
    check_output,
    check_padding_name,
)

__all__ = [
    "channel_shuffle",
    "group_conv1d",
    "group_conv2d",
    "group_conv3d",
    "group_conv_transpose1d",
    "group_conv_transpose2d",
    "group_conv_transpose3d",
]

_CONV: tuple[Callable[..., Tensor], ...] = (F.conv1d, F.conv2d, F.conv3d)
_CONV_TRANSPOSE: tuple[Callable[..., Tensor], ...] = (
    F.conv_transpose1d,
    F.conv_transpose2d,
    F.conv_transpose3d,
)


def group_conv1d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Ints = 1,
    padding: str | Ints = 0,
    dilation: Ints = 1,
    groups: int = 1,
) -> Tensor:
    """1-d grouped convolution; see :func:`group_conv2d`, with one spatial axis."""
    return _conv(1, input, weight, bias, stride, padding, dilation, groups)


def group_conv2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Ints = 1,
    padding: str | Ints = 0,
    dilation: Ints = 1,
    groups: int = 1,
) -> Tensor:
    """2-d grouped convolution: output group q sees the q-th ``in_channels / groups`` channels.

    Args:
        input: ``(N, C_in, H, W)`` or ``(C_in, H, W)``.
        weight: ``(C_out, C_in / groups, k_h, k_w)``.
        bias: ``(C_out,)`` or None.
        stride, dilation: an integer or one per axis, in pixels.
        padding: an integer or one per axis, in pixels, or ``"valid"`` or ``"same"``.
        groups: divides C_in and C_out.

    Returns:
        ``(N, C_out, H_out, W_out)``.

    Raises:
        ArgumentError: an argument breaks a rule.
    """
    return _conv(2, input, weight, bias, stride, padding, dilation, groups)


def group_conv3d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Ints = 1,
    padding: str | Ints = 0,
    dilation: Ints = 1,
    groups: int = 1,
) -> Tensor:
    """3-d grouped convolution; see :func:`group_conv2d`, with three spatial axes."""
    return _conv(3, input, weight, bias, stride, padding, dilation, groups)


def group_conv_transpose1d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Ints = 1,
    padding: Ints = 0,
    output_padding: Ints = 0,
    groups: int = 1,
    dilation: Ints = 1,
) -> Tensor:
    """1-d transposed grouped convolution; see :func:`group_conv_transpose2d`."""
    return _conv_transpose(
        1, input, weight, bias, stride, padding, output_padding, groups, dilation
    )


def group_conv_transpose2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Ints = 1,
    padding: Ints = 0,
    output_padding: Ints = 0,
    groups: int = 1,
    dilation: Ints = 1,
) -> Tensor:
    """2-d transposed grouped convolution (the gradient of :func:`group_conv2d` as a layer).

    The order of arguments is torch's: ``groups`` before ``dilation``, unlike the convolution.

    Args:
        input: ``(N, C_in, H, W)`` or ``(C_in, H, W)``.
        weight: ``(C_in, C_out / groups, k_h, k_w)``.
        bias: ``(C_out,)`` or None.
        stride, padding, output_padding, dilation: an integer or one per axis, in pixels;
            output_padding is smaller than stride or dilation.
        groups: divides C_in and C_out.

    Returns:
        ``(N, C_out, H_out, W_out)``.

    Raises:
        ArgumentError: an argument breaks a rule.
    """
    return _conv_transpose(
        2, input, weight, bias, stride, padding, output_padding, groups, dilation
    )


def group_conv_transpose3d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Ints = 1,
    padding: Ints = 0,
    output_padding: Ints = 0,
    groups: int = 1,
    dilation: Ints = 1,
) -> Tensor:
    """3-d transposed grouped convolution; see :func:`group_conv_transpose2d`."""
    return _conv_transpose(
        3, input, weight, bias, stride, padding, output_padding, groups, dilation
    )


def channel_shuffle(input: Tensor, groups: int) -> Tensor:
    """Interleave the channels of ``groups`` groups (Zhang et al. 2018, ShuffleNet).

    Output channel ``i * groups + q`` is input channel ``q * (C / groups) + i``, so that the next
    grouped layer sees channels of every group. https://arxiv.org/abs/1707.01083

    Args:
        input: ``(N, C, *)`` with at least one spatial axis.
        groups: divides C.

    Returns:
        Same shape and memory format as ``input``.

    Raises:
        ArgumentError: groups does not divide C, or input has fewer than three axes.
    """
    if input.ndim < 3:
        raise ArgumentError(
            f"channel_shuffle: input has shape {tuple(input.shape)}; expected (N, C, *) with at "
            "least one spatial axis"
        )
    check_groups("channel_shuffle", input.shape[1], None, groups)
    return input if groups == 1 else torch.channel_shuffle(input, groups)


def _conv(
    dims: int,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Ints,
    padding: str | Ints,
    dilation: Ints,
    groups: int,
) -> Tensor:
    where = f"group_conv{dims}d"
    watched = why_lowered(input, weight, bias)
    call = None
    if watched is None:
        call = _call(input, weight, bias, where, stride, padding, dilation, groups)
    if call is not None and (choice := dispatch.known(call)) is not None:
        return choice(input, weight, bias)
    if torch.jit.is_tracing():
        dispatch.tell_lowered("torch.jit is tracing")
        return _CONV[dims - 1](input, weight, bias, stride, padding, dilation, groups)

    in_channels = check_input(where, dims, input, weight)
    strides = to_tuple(where, "stride", stride, dims, 1)
    dilations = to_tuple(where, "dilation", dilation, dims, 1)
    check_groups(where, in_channels, weight.shape[0], groups)
    if weight.shape[1] * groups != in_channels:
        raise ArgumentError(
            f"{where}: weight has shape {tuple(weight.shape)}, but weight.shape[1] must be "
            f"in_channels / groups = {in_channels} / {groups} = {in_channels // groups}"
        )
    check_bias(where, bias, weight.shape[0])
    if isinstance(padding, str):
        check_padding_name(where, padding, strides)
    pads: Any = "same"
    if padding != "same":
        pads = to_tuple(where, "padding", 0 if isinstance(padding, str) else padding, dims, 0)
        check_kernel_fits(where, input.shape[-dims:], weight.shape[2:], pads, dilations)
    if watched is not None:
        dispatch.tell_lowered(watched)
        return _CONV[dims - 1](input, weight, bias, strides, pads, dilations, groups)
    if input.ndim == dims + 1:
        return _conv(
            dims, input.unsqueeze(0), weight, bias, strides, pads, dilations, groups
        ).squeeze(0)

    both = [(pad, pad) for pad in pads]
    if pads == "same":
        both = same_padding(weight.shape[2:], dilations)
    conv = ConvSpec(
        batch=input.shape[0],
        in_channels=in_channels,
        out_channels=weight.shape[0],
        input_size=tuple(input.shape[2:]),
        kernel_size=tuple(weight.shape[2:]),
        stride=strides,
        padding=tuple(both),
        dilation=dilations,
        groups=int(groups),
    )
    return dispatch.choose(call, conv, input, weight, bias)(input, weight, bias)


def _conv_transpose(
    dims: int,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Ints,
    padding: Ints,
    output_padding: Ints,
    groups: int,
    dilation: Ints,
) -> Tensor:
    where = f"group_conv_transpose{dims}d"
    watched = why_lowered(input, weight, bias)
    call = None
    if watched is None:
        call = _call(input, weight, bias, where, stride, padding, dilation, groups, output_padding)
    if call is not None and (choice := dispatch.known(call)) is not None:
        return choice(input, weight, bias)
    if torch.jit.is_tracing():
        dispatch.tell_lowered("torch.jit is tracing")
        return _CONV_TRANSPOSE[dims - 1](
            input, weight, bias, stride, padding, output_padding, groups, dilation
        )

    in_channels = check_input(where, dims, input, weight)
    strides = to_tuple(where, "stride", stride, dims, 1)
    dilations = to_tuple(where, "dilation", dilation, dims, 1)
    pads = to_tuple(where, "padding", padding, dims, 0)
    extra = to_tuple(where, "output_padding", output_padding, dims, 0)
    check_output_padding(where, extra, strides, dilations)
    # weight.shape[1] is out_channels / groups, so any groups divides the product.
    check_groups(where, in_channels, None, groups)
    if weight.shape[0] != in_channels:
        raise ArgumentError(
            f"{where}: weight has shape {tuple(weight.shape)}, but weight.shape[0] must be "
            f"in_channels = {in_channels}"
        )
    check_bias(where, bias, weight.shape[1] * groups)
    check_output(where, input.shape[-dims:], weight.shape[2:], strides, pads, extra, dilations)
    if watched is not None:
        dispatch.tell_lowered(watched)
        return _CONV_TRANSPOSE[dims - 1](
            input, weight, bias, strides, pads, extra, groups, dilations
        )
    if input.ndim == dims + 1:
        return _conv_transpose(
            dims, input.unsqueeze(0), weight, bias, strides, pads, extra, groups, dilations
        ).squeeze(0)

    conv = ConvSpec(
        batch=input.shape[0],
        in_channels=in_channels,
        out_channels=weight.shape[1] * groups,
        input_size=tuple(input.shape[2:]),
        kernel_size=tuple(weight.shape[2:]),
        stride=strides,
        padding=tuple((pad, pad) for pad in pads),
        dilation=dilations,
        groups=int(groups),
        transposed=True,
        output_padding=extra,
    )
    return dispatch.choose(call, conv, input, weight, bias)(input, weight, bias)


def _call(
    input: Tensor, weight: Tensor, bias: Tensor | None, *arguments: Any
) -> dispatch.Signature | None:
    """What a choice can be remembered by; None where an argument only equals a legal one.

    ``True`` and ``1.0`` equal 1, and so would pass unchecked for a call that was legal before.
    """
    plain: list[Any] = []
    for value in arguments:
        if type(value) is tuple or type(value) is list:
            if not all(type(v) is int for v in value):
                return None
            plain.append(tuple(value))
        elif type(value) is int or type(value) is str:
            plain.append(value)
        else:
            return None
    return dispatch.signature(input, weight, bias, *plain)
