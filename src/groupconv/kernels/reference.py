"""The truth that every kernel is compared with: one dense convolution per group, in float64."""

import torch
import torch.nn.functional as F
from torch import Tensor

from groupconv.kernels.spec import ConvSpec

_CONV = (F.conv1d, F.conv2d, F.conv3d)
_CONV_TRANSPOSE = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)


def group_conv_reference(
    spec: ConvSpec, input: Tensor, weight: Tensor, bias: Tensor | None = None
) -> Tensor:
    """Split the channels into groups, convolve each on its own, concatenate.

    Args:
        spec: sizes of the convolution.
        input: ``(N, in_channels, *input_size)``.
        weight: ``spec.weight_shape``.
        bias: ``(out_channels,)``.

    Returns:
        ``(N, out_channels, *output_size)`` in float64.
    """
    dims = len(spec.input_size)
    outputs = []
    for x, w in zip(
        input.double().chunk(spec.groups, 1), weight.double().chunk(spec.groups, 0), strict=True
    ):
        if spec.transposed:
            before, after = zip(*spec.padding, strict=True)
            if before != after:
                raise ValueError(f"torch cuts both ends alike; got padding={spec.padding}")
            outputs.append(
                _CONV_TRANSPOSE[dims - 1](
                    x, w, None, spec.stride, before,
                    spec.output_padding or 0, 1, spec.dilation,
                )
            )  # fmt: skip
        else:
            pad = [n for pair in reversed(spec.padding) for n in pair]
            outputs.append(_CONV[dims - 1](F.pad(x, pad), w, None, spec.stride, 0, spec.dilation))
    out = torch.cat(outputs, 1)
    return out if bias is None else out + bias.double().reshape(1, -1, *[1] * dims)
