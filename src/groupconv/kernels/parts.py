"""Parts: the kernels that together compute one convolution, 1-d or 2-d, plain or transposed.

A plain convolution is one kernel, a transposed one a kernel for each phase of its stride, all of
which write into the same tensor.
"""

import math
from dataclasses import dataclass, replace

from torch import Tensor

from groupconv.kernels import tuning
from groupconv.kernels.kernel import Kernel
from groupconv.kernels.spec import ConvSpec, KernelSpec
from groupconv.kernels.transposed import Phase, phases

# Pixels that a row should have at least, where it may have any number.
_ROW = 96


@dataclass(frozen=True)
class Part:
    """What one kernel computes of a convolution.

    Args:
        spec: the kernel.
        phase: of the transposed convolution that this is a part of; None where it is the whole.
    """

    spec: KernelSpec
    phase: Phase | None = None

    @property
    def offset(self) -> int:
        """Element of an image of the output where the first result goes."""
        return self._pixel * self.spec.output_stride

    @property
    def residual_offset(self) -> int:
        """Element of an image of the residual that is added to it."""
        return self._pixel * self.spec.residual_stride

    @property
    def _pixel(self) -> int:
        row, column = self.phase.start if self.phase else (0, 0)
        return row * self.spec.output_tensor_size[1] + column

    def kernel(self, images: int) -> Kernel:
        """The kernel, tuned for about so many images."""
        return tuning.tuned(self.spec, images)

    def weight(self, weight: Tensor) -> Tensor:
        """What ``Kernel.pack`` takes, ``spec.conv.weight_shape``, from the weight of the whole."""
        if weight.ndim == 3:
            weight = weight.unsqueeze(2)
        return self.phase.weight(weight) if self.phase else weight


@dataclass(frozen=True)
class Parts:
    """A whole convolution.

    Args:
        parts: in any order; none writes what another one does.
        sparse: whether no tap reaches some of the outputs, as where stride exceeds the kernel of a
            transposed convolution. No part writes them: without an activation or residual they are
            the bias alone.
    """

    parts: tuple[Part, ...]
    sparse: bool


def parts(
    conv: ConvSpec,
    *,
    channels_last_input: bool = True,
    channels_last_output: bool = True,
    bias: bool = False,
    residual: str | None = None,
    activation: str | None = None,
    slope: float = 0.01,
    ordered: bool = False,
    input_pixel: int | None = None,
    output_pixel: int | None = None,
    residual_pixel: int | None = None,
) -> Parts:
    """The kernels that compute ``conv``, and what is done to its results.

    Args:
        conv: of one or two axes; any batch.

    The others are those of :class:`KernelSpec`, of the whole tensors; a pixel distance may also be
    given where it is the number of channels.

    Raises:
        ArgumentError: see :class:`KernelSpec`.
    """
    conv = _on_two_axes(replace(conv, batch=1))

    def part(plain: ConvSpec, phase: Phase | None = None) -> Part:
        spec = KernelSpec(
            plain,
            channels_last_input,
            channels_last_output,
            bias,
            residual,
            activation,
            slope,
            ordered,
            input_pixel=input_pixel,
            output_pixel=output_pixel,
            residual_pixel=residual_pixel,
        )
        if phase is not None:
            down, across = conv.stride
            height, width = conv.output_size
            spec = replace(spec, step=(down, across), written_size=(height, width))
        return Part(_dense(spec), phase)

    if not conv.transposed:
        return Parts((part(_in_long_rows(conv)),), sparse=False)
    found = phases(conv)
    reached = sum(math.prod(phase.conv.output_size) for phase in found)
    return Parts(
        tuple(part(phase.conv, phase) for phase in found), reached < math.prod(conv.output_size)
    )


def _dense(spec: KernelSpec) -> KernelSpec:
    """The same kernel, its pixel distances left out where pixels lie side by side: one code."""
    into, out = spec.conv.in_channels, spec.conv.out_channels
    return replace(
        spec,
        input_pixel=None if spec.input_pixel == into else spec.input_pixel,
        output_pixel=None if spec.output_pixel == out else spec.output_pixel,
        residual_pixel=None if spec.residual_pixel == out else spec.residual_pixel,
    )


def _on_two_axes(conv: ConvSpec) -> ConvSpec:
    """A 1-d convolution as a 2-d one on images of one row."""
    if len(conv.input_size) == 2:
        return conv
    return replace(
        conv,
        input_size=(1, *conv.input_size),
        kernel_size=(1, *conv.kernel_size),
        stride=(1, *conv.stride),
        padding=((0, 0), *conv.padding),
        dilation=(1, *conv.dilation),
        output_padding=(0, *conv.output_padding) if conv.output_padding else (),
    )


def _in_long_rows(conv: ConvSpec) -> ConvSpec:
    """Where pixels don't meet, rows become long enough for tiles."""
    height, width = conv.input_size
    alone = (1, 1) == conv.kernel_size == conv.stride and conv.output_size == conv.input_size
    if not alone or width >= _ROW or conv.padding != ((0, 0), (0, 0)):
        return conv
    pixels = height * width
    row = next(n for n in range(1, pixels + 1) if pixels % n == 0 and n >= min(_ROW, pixels))
    return replace(conv, input_size=(pixels // row, row))
