"""Operators of MIL as PyTorch's functions.

As coremltools documents them:
https://apple.github.io/coremltools/source/coremltools.converters.mil.mil.ops.defs.html.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from groupconv.errors import ExportError


def _pads(
    kind: str,
    pad: Sequence[int] | None,
    x: Tensor,
    window: Sequence[int],
    stride: Sequence[int],
) -> list[int]:
    """Before and after each spatial axis; ``window`` is what a kernel spans."""
    if kind == "custom":
        return list(pad or [0] * 2 * len(window))
    if kind == "valid":
        return [0] * 2 * len(window)
    if kind == "same":
        totals = [
            max((-(-n // step) - 1) * step + span - n, 0)
            for n, step, span in zip(x.shape[2:], stride, window, strict=True)
        ]
        return [end for total in totals for end in (total // 2, total - total // 2)]
    raise ExportError(f"padding of the kind {kind!r} can't be checked on this system")


def _reversed_pairs(ends: Sequence[int]) -> list[int]:
    """As ``torch.nn.functional.pad`` has them: the last axis first."""
    pairs = list(zip(ends[::2], ends[1::2], strict=True))
    return [end for pair in reversed(pairs) for end in pair]


def _conv(
    x: Tensor,
    weight: Tensor,
    strides: Sequence[int],
    dilations: Sequence[int],
    groups: int,
    pad_type: str,
    pad: Sequence[int] | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    spans = [d * (k - 1) + 1 for d, k in zip(dilations, weight.shape[2:], strict=True)]
    x = F.pad(x, _reversed_pairs(_pads(pad_type, pad, x, spans, strides)))
    convolve = (F.conv1d, F.conv2d, F.conv3d)[weight.ndim - 3]
    return convolve(x, weight, bias, strides, 0, dilations, groups)


def _conv_transpose(
    x: Tensor,
    weight: Tensor,
    strides: Sequence[int],
    dilations: Sequence[int],
    groups: int,
    pad_type: str,
    pad: Sequence[int] | None = None,
    output_shape: Sequence[int] | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    convolve = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)[weight.ndim - 3]
    y = convolve(x, weight, bias, strides, 0, 0, groups, dilations)
    if pad_type not in ("custom", "valid"):
        raise ExportError(f"padding of the kind {pad_type!r} can't be checked on this system")
    ends = list(pad or [0] * 2 * len(strides)) if pad_type == "custom" else [0] * 2 * len(strides)
    for axis, (first, last) in enumerate(zip(ends[::2], ends[1::2], strict=True)):
        size = y.shape[2 + axis] - first - last
        if output_shape is not None:
            size = output_shape[2 + axis]
        y = y.narrow(2 + axis, first, size)
    return y


def _pool(
    function: Callable[..., Tensor],
    filling: float,
    x: Tensor,
    kernel_sizes: Sequence[int],
    strides: Sequence[int],
    pad_type: str,
    pad: Sequence[int] | None,
    ceil_mode: bool,
) -> Tensor:
    ends = _pads(pad_type, pad, x, kernel_sizes, strides)
    if ceil_mode:
        # So far beyond the end that the last window is whole; no window begins in the padding.
        for axis, (kernel, stride) in enumerate(zip(kernel_sizes, strides, strict=True)):
            size = x.shape[2 + axis] + ends[2 * axis] + ends[2 * axis + 1]
            windows = -(-(size - kernel) // stride) + 1
            if (windows - 1) * stride >= x.shape[2 + axis] + ends[2 * axis]:
                windows -= 1
            ends[2 * axis + 1] += max((windows - 1) * stride + kernel - size, 0)
    return function(F.pad(x, _reversed_pairs(ends), value=filling), kernel_sizes, strides)


def _max_pool(
    x: Tensor,
    kernel_sizes: Sequence[int],
    strides: Sequence[int],
    pad_type: str,
    pad: Sequence[int] | None = None,
    ceil_mode: bool = False,
) -> Tensor:
    function = (F.max_pool1d, F.max_pool2d, F.max_pool3d)[x.ndim - 3]
    return _pool(function, -torch.inf, x, kernel_sizes, strides, pad_type, pad, ceil_mode)


def _avg_pool(
    x: Tensor,
    kernel_sizes: Sequence[int],
    strides: Sequence[int],
    pad_type: str,
    exclude_padding_from_average: bool,
    pad: Sequence[int] | None = None,
    ceil_mode: bool = False,
) -> Tensor:
    function = (F.avg_pool1d, F.avg_pool2d, F.avg_pool3d)[x.ndim - 3]
    arguments = (kernel_sizes, strides, pad_type, pad, ceil_mode)
    y = _pool(function, 0.0, x, *arguments)
    if exclude_padding_from_average:
        y = y / _pool(function, 0.0, torch.ones_like(x), *arguments)
    return y


def _batch_norm(
    x: Tensor,
    mean: Tensor,
    variance: Tensor,
    epsilon: float,
    gamma: Tensor | None = None,
    beta: Tensor | None = None,
) -> Tensor:
    return F.batch_norm(x, mean, variance, gamma, beta, False, 0.0, epsilon)


def _slice(
    x: Tensor,
    begin: Sequence[int],
    end: Sequence[int],
    stride: Sequence[int] | None = None,
    begin_mask: Sequence[bool] | None = None,
    end_mask: Sequence[bool] | None = None,
    squeeze_mask: Sequence[bool] | None = None,
) -> Tensor:
    plain = [False] * x.ndim
    array = x.numpy()
    places: list[Any] = []
    for axis in range(x.ndim):
        if (squeeze_mask or plain)[axis]:
            places.append(begin[axis])
            continue
        first = None if (begin_mask or plain)[axis] else begin[axis]
        last = None if (end_mask or plain)[axis] else end[axis]
        places.append(slice(first, last, stride[axis] if stride else 1))
    return torch.from_numpy(np.ascontiguousarray(array[tuple(places)]))


def _concat(values: Sequence[Tensor], axis: int, interleave: bool = False) -> Tensor:
    if not interleave:
        return torch.cat(list(values), axis)
    # A channel shuffle of as many groups as there are values.
    axis %= values[0].ndim
    return torch.stack(list(values), axis + 1).flatten(axis, axis + 1)


def _split(
    x: Tensor,
    axis: int,
    num_splits: int | None = None,
    split_sizes: Sequence[int] | None = None,
) -> list[Tensor]:
    if split_sizes is not None:
        return list(x.split(list(split_sizes), axis))
    assert num_splits is not None
    return list(x.chunk(num_splits, axis))


def _pad(
    x: Tensor, pad: Sequence[int], mode: str = "constant", constant_val: float = 0.0
) -> Tensor:
    modes = {"constant": "constant", "reflect": "reflect", "replicate": "replicate"}
    if mode == "constant":
        return F.pad(x, _reversed_pairs(pad), value=constant_val)
    # The axes in front are not padded in these modes.
    spatial = _reversed_pairs(pad)[: 2 * (x.ndim - 2)]
    return F.pad(x, spatial, mode=modes[mode])


def _crop(x: Tensor, crop_height: Sequence[int], crop_width: Sequence[int]) -> Tensor:
    return F.pad(x, [-n for n in (*crop_width, *crop_height)])


def _upsample(x: Tensor, scale_factor_height: float, scale_factor_width: float) -> Tensor:
    return F.interpolate(x, scale_factor=[float(scale_factor_height), float(scale_factor_width)])


def _gelu(x: Tensor, mode: str = "EXACT") -> Tensor:
    return F.gelu(x, approximate="none" if mode == "EXACT" else "tanh")


def _layer_norm(
    x: Tensor,
    axes: Sequence[int],
    epsilon: float,
    gamma: Tensor | None = None,
    beta: Tensor | None = None,
) -> Tensor:
    return F.layer_norm(x, [x.shape[axis] for axis in axes], gamma, beta, epsilon)


def _matmul(x: Tensor, y: Tensor, transpose_x: bool = False, transpose_y: bool = False) -> Tensor:
    return (x.mT if transpose_x else x) @ (y.mT if transpose_y else y)


def _mean(x: Tensor, keep_dims: bool, axes: Sequence[int] | None = None) -> Tensor:
    return x.mean(list(axes) if axes is not None else list(range(x.ndim)), keep_dims)


def _sum(x: Tensor, keep_dims: bool, axes: Sequence[int] | None = None) -> Tensor:
    return x.sum(list(axes) if axes is not None else list(range(x.ndim)), keep_dims)


def _clip(x: Tensor, alpha: float, beta: float) -> Tensor:
    return x.clamp(alpha, beta)


# By type of operator, with the names of its arguments.
FUNCTIONS: dict[str, Callable[..., Any]] = {
    "abs": lambda x: x.abs(),
    "add": lambda x, y: x + y,
    "avg_pool": _avg_pool,
    "batch_norm": _batch_norm,
    "clip": _clip,
    "concat": _concat,
    "conv": _conv,
    "conv_transpose": _conv_transpose,
    "crop": _crop,
    "exp": lambda x: x.exp(),
    "expand_dims": lambda x, axes: x.reshape(_expanded(x.shape, axes)),
    "gather": lambda x, indices, axis, **_: x.index_select(axis, torch.as_tensor(indices)),
    "gelu": _gelu,
    "identity": lambda x: x,
    "layer_norm": _layer_norm,
    "leaky_relu": lambda x, alpha: F.leaky_relu(x, alpha),
    "linear": lambda x, weight, bias=None: F.linear(x, weight, bias),
    "matmul": _matmul,
    "max_pool": _max_pool,
    "mul": lambda x, y: x * y,
    "pad": _pad,
    "pow": lambda x, y: x**y,
    "prelu": lambda x, alpha: F.prelu(x, alpha),
    "real_div": lambda x, y: x / y,
    "reduce_argmax": lambda x, axis, keep_dims=True, **_: x.argmax(axis, keep_dims),
    "reduce_mean": _mean,
    "reduce_sum": _sum,
    "relu": lambda x: F.relu(x),
    "relu6": lambda x: F.relu6(x),
    "reshape": lambda x, shape: x.reshape(shape),
    "rsqrt": lambda x, epsilon=0.0: (x + epsilon).rsqrt(),
    "sigmoid": lambda x: torch.sigmoid(x),
    "sigmoid_hard": lambda x, alpha, beta: (alpha * x + beta).clamp(0.0, 1.0),
    "silu": lambda x: F.silu(x),
    "slice_by_index": _slice,
    "softmax": lambda x, axis: x.softmax(axis),
    "split": _split,
    "sqrt": lambda x: x.sqrt(),
    "square": lambda x: x.square(),
    "squeeze": lambda x, axes: x.squeeze(tuple(axes)),
    "sub": lambda x, y: x - y,
    "tanh": lambda x: torch.tanh(x),
    "thresholded_relu": lambda x, alpha: torch.where(x >= alpha, x, 0.0),
    "transpose": lambda x, perm: x.permute(perm),
    "upsample_nearest_neighbor": _upsample,
}


def _expanded(shape: Sequence[int], axes: Sequence[int]) -> list[int]:
    sizes = list(shape)
    ndim = len(sizes) + len(axes)
    for axis in sorted(axis % ndim for axis in axes):
        sizes.insert(axis, 1)
    return sizes
