"""The rules for shapes that all grouped convolutions share, each with one error."""

from collections.abc import Sequence

import torch
from torch import Tensor

from groupconv.errors import ArgumentError


def traced() -> bool:
    """Whether sizes are symbols, or tensors: asking would fix them, and torch asks for itself."""
    return torch.compiler.is_compiling() or torch.jit.is_tracing()


def check_input(where: str, dims: int, input: Tensor, weight: Tensor) -> int:
    """The number of input channels, once both tensors have the right number of axes, none empty.

    The batch may be empty.
    """
    if weight.ndim != dims + 2 or input.ndim not in (dims + 1, dims + 2):
        raise ArgumentError(
            f"{where}: input has shape {tuple(input.shape)} and weight {tuple(weight.shape)}; "
            f"expected {dims + 2} axes for both, or {dims + 1} for an unbatched input"
        )
    if not traced() and min(*input.shape[-dims - 1 :], *weight.shape) < 1:
        raise ArgumentError(
            f"{where}: input has shape {tuple(input.shape)} and weight {tuple(weight.shape)}; "
            "only the batch may be empty"
        )
    return input.shape[-dims - 1]


def check_bias(where: str, bias: Tensor | None, out_channels: int) -> None:
    if bias is not None and (bias.ndim != 1 or bias.shape[0] != out_channels):
        raise ArgumentError(
            f"{where}: bias has shape {tuple(bias.shape)}; expected ({out_channels},)"
        )


def check_kernel_fits(
    where: str,
    size: Sequence[int],
    kernel_size: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> None:
    if traced():
        return
    for axis, (n, k, p, d) in enumerate(zip(size, kernel_size, padding, dilation, strict=True)):
        if n + 2 * p < d * (k - 1) + 1:
            raise ArgumentError(
                f"{where}: along spatial axis {axis} the kernel spans {d * (k - 1) + 1} pixels "
                f"(kernel_size={k}, dilation={d}) but the padded input has {n + 2 * p}"
            )


def check_output(
    where: str,
    size: Sequence[int],
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    output_padding: Sequence[int],
    dilation: Sequence[int],
) -> None:
    """Raise ArgumentError if a transposed convolution's padding cuts off the whole output."""
    if traced():
        return
    axes = zip(size, kernel_size, stride, padding, output_padding, dilation, strict=True)
    for axis, (n, k, s, p, extra, d) in enumerate(axes):
        full = (n - 1) * s + d * (k - 1) + 1 + extra
        if full <= 2 * p:
            raise ArgumentError(
                f"{where}: along spatial axis {axis} padding={p} cuts {2 * p} pixels off an "
                f"output of {full} (input {n}, kernel_size={k}, stride={s}, dilation={d})"
            )


def check_padding_name(where: str, padding: str, stride: Sequence[int]) -> None:
    """Raise ArgumentError unless ``padding`` is "valid", or "same" at stride 1."""
    if padding not in ("valid", "same"):
        raise ArgumentError(
            f'{where}: padding={padding!r} must be "valid", "same" or integers >= 0'
        )
    if padding == "same" and any(s != 1 for s in stride):
        raise ArgumentError(f"{where}: padding='same' needs stride=1, got stride={tuple(stride)}")
