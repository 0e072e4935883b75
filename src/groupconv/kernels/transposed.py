"""Transposed convolutions as plain ones: one for each phase of the stride.

Output ``o`` of a transposed convolution gathers ``input[i] * weight[k]`` over all
``o = i * stride - padding + k * dilation``. For the outputs of one phase, ``o = q * stride + r``,
the same taps ``k`` take part at the same distances ``i - q``: a plain convolution of stride 1 whose
results are written ``stride`` apart.
"""

import itertools
import math
from dataclasses import dataclass

from torch import Tensor

from groupconv.kernels.spec import ConvSpec


@dataclass(frozen=True)
class Phase:
    """A plain convolution that computes some outputs of a transposed one.

    Args:
        conv: the convolution.
        taps: for each axis which taps of the kernel it uses, in its own order.
        start: for each axis the first output that it computes.
    """

    conv: ConvSpec
    taps: tuple[tuple[int, ...], ...]
    start: tuple[int, ...]

    def weight(self, weight: Tensor) -> Tensor:
        """The weights of the phase, ``conv.weight_shape``, from those of the whole."""
        groups, dims = self.conv.groups, len(self.taps)
        into, out = weight.shape[0] // groups, weight.shape[1]
        split = weight.reshape(groups, into, out, *weight.shape[2:]).transpose(1, 2)
        picked = split.reshape(groups * out, into, *weight.shape[2:])
        for axis, taps in enumerate(self.taps):
            index = picked.new_tensor(taps).long()
            picked = picked.index_select(picked.ndim - dims + axis, index)
        return picked


def phases(conv: ConvSpec) -> list[Phase]:
    """The phases of ``conv`` (transposed); outputs that no tap reaches belong to none."""
    axes = zip(
        conv.input_size, conv.output_size, conv.kernel_size, conv.stride,
        (before for before, _ in conv.padding), conv.dilation, strict=True,
    )  # fmt: skip
    found = []
    for parts in itertools.product(*(_axis_phases(*axis) for axis in axes)):
        taps, start, padding, dilation = zip(*parts, strict=True)
        plain = ConvSpec(
            conv.batch,
            conv.in_channels,
            conv.out_channels,
            conv.input_size,
            tuple(len(t) for t in taps),
            (1,) * len(taps),
            padding,
            dilation,
            conv.groups,
        )
        found.append(Phase(plain, taps, start))
    return found


def _axis_phases(
    size: int, outputs: int, kernel: int, stride: int, padding: int, dilation: int
) -> list[tuple[tuple[int, ...], int, tuple[int, int], int]]:
    """Taps, first output, padding and dilation of every phase of one axis."""
    found = []
    apart = dilation // math.gcd(dilation, stride)
    for start in range(min(stride, outputs)):
        # Later taps reach earlier inputs: their order turns round.
        taps = [
            k for k in reversed(range(kernel)) if (start + padding - k * dilation) % stride == 0
        ]
        if not taps:
            continue
        count = -(-(outputs - start) // stride)
        first = (start + padding - taps[0] * dilation) // stride
        reach = count + (len(taps) - 1) * apart
        found.append((tuple(taps), start, (-first, reach - size + first), apart))
    return found
