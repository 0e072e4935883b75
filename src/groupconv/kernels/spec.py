"""ConvSpec: one convolution as a record of numbers, with its sizes, cost and legality."""

import math
import numbers
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from groupconv.errors import ArgumentError

Ints = int | Sequence[int]

ACTIVATIONS = ("relu", "relu6", "silu", "hardswish", "leaky_relu", "sigmoid")
# Where a residual is added: activation(conv + bias + residual), or activation(conv + bias) +
# residual.
RESIDUALS = ("before", "after")
# Products in one chain of sums, unless a kernel asks for shorter ones.
CHAIN = 128


def legal_groups(in_channels: int, out_channels: int) -> list[int]:
    """Every number of groups that divides both channel counts, ascending."""
    common = math.gcd(in_channels, out_channels)
    small = [d for d in range(1, math.isqrt(common) + 1) if common % d == 0]
    return sorted({*small, *(common // d for d in small)})


def check_groups(where: str, in_channels: int, out_channels: int | None, groups: int) -> None:
    """Raise ArgumentError unless ``groups`` is a positive divisor of both channel counts.

    Args:
        where: the layer or function to name in the message.
        out_channels: None where it is a multiple of groups, whatever groups is.
    """
    channels = {"in_channels": in_channels}
    if out_channels is not None:
        channels["out_channels"] = out_channels
    for name, value in (*channels.items(), ("groups", groups)):
        if not is_int(value) or value < 1:
            raise ArgumentError(f"{where}: {name}={value!r} must be a positive integer")
    uneven = [f"{name}={value}" for name, value in channels.items() if value % groups != 0]
    if uneven:
        legal = legal_groups(in_channels, out_channels or in_channels)
        nearest = [
            *[g for g in legal if g < groups][-1:],
            *[g for g in legal if g > groups][:1],
        ]
        raise ArgumentError(
            f"{where}: {' and '.join(uneven)} not divisible by groups={groups} "
            f"({', '.join(f'{name}={value}' for name, value in channels.items())}); "
            f"nearest legal groups: {', '.join(map(str, nearest))}"
        )


def to_tuple(where: str, name: str, value: Ints, dims: int, minimum: int) -> tuple[int, ...]:
    """``value`` as ``dims`` integers, each at least ``minimum``; a single one is repeated."""
    values = tuple(value) if isinstance(value, Sequence) else (value,)
    # NumPy's integers become Python's, which don't overflow.
    values = tuple(int(v) if isinstance(v, np.integer) else v for v in values)
    if len(values) == 1:
        values = values * dims
    if len(values) != dims or not all(is_int(v) and v >= minimum for v in values):
        raise ArgumentError(
            f"{where}: {name}={value!r} must be one integer >= {minimum}, or {dims} of them"
        )
    return values


def check_output_padding(
    where: str, output_padding: Sequence[int], stride: Sequence[int], dilation: Sequence[int]
) -> None:
    """Raise ArgumentError unless output_padding is below stride or dilation on every axis."""
    for extra, s, d in zip(output_padding, stride, dilation, strict=True):
        if extra >= max(s, d):
            raise ArgumentError(
                f"{where}: output_padding={tuple(output_padding)} must be smaller than "
                f"stride={tuple(stride)} or dilation={tuple(dilation)} on every axis"
            )


def same_padding(kernel_size: Sequence[int], dilation: Sequence[int]) -> list[tuple[int, int]]:
    """(before, after) per axis that keeps the size at stride 1; the odd one goes after."""
    totals = [d * (k - 1) for k, d in zip(kernel_size, dilation, strict=True)]
    return [(t // 2, t - t // 2) for t in totals]


def is_int(value: Any) -> bool:
    """Whether ``value`` is an integer: Python's or NumPy's, but not a bool, array or tensor."""
    # Under torch.compile sizes arrive as torch.SymInt, which stands for an integer.
    return not isinstance(value, bool) and (
        isinstance(value, numbers.Integral) or type(value).__name__ == "SymInt"
    )


@dataclass(frozen=True)
class ConvSpec:
    """A 1-d, 2-d or 3-d convolution, or transposed convolution, on one input size.

    A linear layer is one on no axes.

    Args:
        batch: images, N.
        in_channels, out_channels, groups: as in torch; groups divides both.
        input_size: spatial size of the input, one integer per axis.
        kernel_size, stride, dilation, output_padding: one integer per axis.
        padding: (before, after) per axis, a negative one crops; for a transposed convolution,
            what is cut off.
        transposed: whether this is a transposed convolution.

    Raises:
        ArgumentError: a number breaks a rule, or the output would be empty along an axis.
    """

    batch: int
    in_channels: int
    out_channels: int
    input_size: tuple[int, ...]
    kernel_size: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]
    dilation: tuple[int, ...]
    groups: int
    transposed: bool = False
    output_padding: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        where, dims = "ConvSpec", len(self.input_size)
        if dims > 3:
            raise ArgumentError(f"{where}: input_size={self.input_size} must have 0 to 3 axes")
        check_groups(where, self.in_channels, self.out_channels, self.groups)
        if not is_int(self.batch) or self.batch < 0:
            raise ArgumentError(f"{where}: batch={self.batch!r} must be an integer >= 0")
        for name in ("input_size", "kernel_size", "stride", "dilation"):
            _check_axes(where, name, getattr(self, name), dims, 1)
        _check_axes(where, "padding", self.padding, dims, None)
        for pair in self.padding:
            _check_axes(where, "padding", pair, 2, -sys.maxsize)
        if self.output_padding:
            if not self.transposed:
                raise ArgumentError(
                    f"{where}: output_padding={self.output_padding} needs transposed=True"
                )
            _check_axes(where, "output_padding", self.output_padding, dims, 0)
            check_output_padding(where, self.output_padding, self.stride, self.dilation)
        if min(self.output_size, default=1) < 1:
            raise ArgumentError(
                f"{where}: output size {self.output_size} is empty: input_size={self.input_size}, "
                f"kernel_size={self.kernel_size}, padding={self.padding}, dilation={self.dilation}"
            )

    @property
    def linear(self) -> bool:
        """Whether this is a linear layer."""
        return not self.input_size

    @property
    def output_size(self) -> tuple[int, ...]:
        """Spatial size of the output."""
        axes = zip(
            self.input_size, self.kernel_size, self.stride, self.padding, self.dilation, strict=True
        )
        if self.transposed:
            extra = self.output_padding or (0,) * len(self.input_size)
            return tuple(
                (n - 1) * s - a - b + d * (k - 1) + 1 + e
                for (n, k, s, (a, b), d), e in zip(axes, extra, strict=True)
            )
        return tuple((n + a + b - d * (k - 1) - 1) // s + 1 for n, k, s, (a, b), d in axes)

    @property
    def taps(self) -> int:
        """Positions of the kernel."""
        return math.prod(self.kernel_size)

    @property
    def fan_in(self) -> int:
        """Products that one output is the sum of."""
        return self.in_channels // self.groups * self.taps

    @property
    def weight_shape(self) -> tuple[int, ...]:
        """``[out, in/groups, *k]``, or ``[in, out/groups, *k]`` when transposed (torch's)."""
        if self.transposed:
            return (self.in_channels, self.out_channels // self.groups, *self.kernel_size)
        return (self.out_channels, self.in_channels // self.groups, *self.kernel_size)

    @property
    def even_padding(self) -> tuple[tuple[int, ...], list[int]]:
        """The padding that both ends of every axis share, and the rest as ``F.pad`` takes it.

        PyTorch's convolutions know one padding for both ends.
        """
        common = tuple(min(pair) for pair in self.padding)
        rest = [
            end - pad
            for pair, pad in reversed(list(zip(self.padding, common, strict=True)))
            for end in pair
        ]
        return common, rest

    @property
    def macs(self) -> int:
        """Multiply-adds of one forward pass; the bias is not counted.

        Every weight meets each position of the smaller of the two images once: the output of a
        convolution, the input of a transposed one. Taps that fall on padding are counted.
        """
        positions = self.input_size if self.transposed else self.output_size
        return self.batch * math.prod(self.weight_shape) * math.prod(positions)


@dataclass(frozen=True)
class KernelSpec:
    """What one generated kernel computes: a convolution, and what is done to its results.

    Args:
        conv: a 2-d convolution of one image, not transposed; a kernel takes any batch.
        channels_last_input, channels_last_output: NHWC in memory, else NCHW.
        bias: whether there is one.
        residual: whether another tensor is added ``before`` or ``after`` the activation, or None.
            It has the size and layout of the tensor that is written.
        activation: one of :data:`ACTIVATIONS`, or None.
        slope: of leaky_relu for negative values.
        ordered: whether the channels of the input are first put into an order given at run time.
        step: distance between neighbouring outputs, rows and columns, in the tensor that they
            are written to; above one where several kernels fill one tensor.
        written_size: spatial size of that tensor; the size of the output by default.
        input_pixel, output_pixel, residual_pixel: elements from one pixel to the next where they
            are more than the channels, as in a slice of a wider NHWC tensor. Rows and images then
            lie as in that tensor.
        chain: products of one chain of sums at most; a total of shorter ones is more accurate, and
            takes longer.

    Raises:
        ArgumentError: a value breaks a rule.
    """

    conv: ConvSpec
    channels_last_input: bool = True
    channels_last_output: bool = True
    bias: bool = False
    residual: str | None = None
    activation: str | None = None
    slope: float = 0.01
    ordered: bool = False
    step: tuple[int, int] = (1, 1)
    written_size: tuple[int, int] | None = None
    input_pixel: int | None = None
    output_pixel: int | None = None
    residual_pixel: int | None = None
    chain: int = CHAIN

    def __post_init__(self) -> None:
        if len(self.conv.input_size) != 2 or self.conv.transposed or self.conv.batch != 1:
            raise ArgumentError(f"KernelSpec: conv={self.conv} must be 2-d, plain, of one image")
        if self.activation is not None and self.activation not in ACTIVATIONS:
            raise ArgumentError(
                f"KernelSpec: activation={self.activation!r} must be None or one of "
                f"{', '.join(ACTIVATIONS)}"
            )
        if self.residual is not None and self.residual not in RESIDUALS:
            raise ArgumentError(
                f"KernelSpec: residual={self.residual!r} must be None or one of "
                f"{', '.join(RESIDUALS)}"
            )
        if self.residual_pixel is not None and self.residual is None:
            raise ArgumentError(
                f"KernelSpec: residual_pixel={self.residual_pixel!r} needs a residual"
            )
        into, out = self.conv.in_channels, self.conv.out_channels
        _check_pixel("input_pixel", self.input_pixel, into, self.channels_last_input)
        _check_pixel("output_pixel", self.output_pixel, out, self.channels_last_output)
        _check_pixel("residual_pixel", self.residual_pixel, out, self.channels_last_output)

    @property
    def input_stride(self) -> int:
        """Elements from one pixel of the input to the next; 1 in NCHW."""
        return (self.input_pixel or self.conv.in_channels) if self.channels_last_input else 1

    @property
    def output_stride(self) -> int:
        """The same of the tensor that is written."""
        return (self.output_pixel or self.conv.out_channels) if self.channels_last_output else 1

    @property
    def residual_stride(self) -> int:
        """The same of the residual."""
        return (self.residual_pixel or self.conv.out_channels) if self.channels_last_output else 1

    @property
    def input_image(self) -> int:
        """Elements from one image of the input to the next, where they lie side by side."""
        conv = self.conv
        return max(self.input_stride, conv.in_channels) * math.prod(conv.input_size)

    @property
    def output_image(self) -> int:
        """The same of the tensor that is written."""
        return max(self.output_stride, self.conv.out_channels) * math.prod(self.output_tensor_size)

    @property
    def residual_image(self) -> int:
        """The same of the residual."""
        size = math.prod(self.output_tensor_size)
        return max(self.residual_stride, self.conv.out_channels) * size

    @property
    def staged_input(self) -> bool:
        """Whether rows of the input are brought into another order before they are used."""
        return self.ordered or not self.channels_last_input

    @property
    def staged(self) -> bool:
        """Whether rows of input or output are."""
        return self.staged_input or not self.channels_last_output

    @property
    def output_tensor_size(self) -> tuple[int, ...]:
        """Spatial size of the tensor that is written."""
        return self.written_size or self.conv.output_size


def _check_pixel(name: str, value: int | None, channels: int, channels_last: bool) -> None:
    """Raise ArgumentError unless pixels of ``channels`` can lie ``value`` elements apart."""
    if value is None:
        return
    if not channels_last:
        raise ArgumentError(f"KernelSpec: {name}={value!r} needs channels last, not NCHW")
    if not is_int(value) or value < channels:
        raise ArgumentError(
            f"KernelSpec: {name}={value!r} must be an integer >= {channels}, "
            "the channels of a pixel"
        )


def _check_axes(where: str, name: str, value: Any, count: int, minimum: int | None) -> None:
    """Raise ArgumentError unless value holds ``count`` items, integers >= minimum if it is set."""
    if not isinstance(value, Sequence) or len(value) != count:
        raise ArgumentError(f"{where}: {name}={value!r} must have {count} items")
    if minimum is not None and not all(is_int(v) and v >= minimum for v in value):
        raise ArgumentError(f"{where}: {name}={value!r} must hold integers >= {minimum}")
