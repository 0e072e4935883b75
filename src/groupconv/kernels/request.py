"""Request: what is known of a call before it runs, and why a call must be left to PyTorch."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad

from groupconv.kernels.spec import ConvSpec


@dataclass(frozen=True)
class Request:
    """A convolution to be run, without its numbers.

    Args:
        conv: the convolution, of 1 to 3 axes.
        dtype: of the input.
        channels_last_input, channels_last_output: NHWC in memory; the output's as PyTorch has it.
        dense: whether the input's memory is in one of the two layouts.
        bias: whether there is one.
        mixed: whether weight or bias are of another dtype than the input.
    """

    conv: ConvSpec
    dtype: torch.dtype
    channels_last_input: bool
    channels_last_output: bool
    dense: bool
    bias: bool
    mixed: bool = False

    @classmethod
    def of(cls, conv: ConvSpec, input: Tensor, weight: Tensor, bias: Tensor | None) -> "Request":
        dense = input.is_contiguous() or is_channels_last(input)
        channels_last_output = _channels_last_output(conv, input, weight, bias)
        # What is neither is copied once, into the layout of the output.
        channels_last = is_channels_last(input) if dense else channels_last_output
        mixed = any(t is not None and t.dtype != input.dtype for t in (weight, bias))
        return cls(
            conv, input.dtype, channels_last, channels_last_output, dense, bias is not None, mixed
        )


def _channels_last_output(
    conv: ConvSpec, input: Tensor, weight: Tensor, bias: Tensor | None
) -> bool:
    """The layout that PyTorch's own convolution would give its output."""
    dims = len(conv.input_size)
    if dims == 3:
        return False
    stride, dilation, extra = conv.stride, conv.dilation, conv.output_padding or (0,) * dims
    padding, rest = conv.even_padding
    if any(rest):
        input = F.pad(input, rest)
    if dims == 1:
        # As PyTorch does: images of one row, the input contiguous, the weight as it is.
        if not input.is_contiguous():
            input = torch.empty(input.shape, dtype=input.dtype)
        input = input.unsqueeze(2)
        weight = weight.unsqueeze(2)
        stride, dilation, extra, padding = (1, *stride), (1, *dilation), (0, *extra), (0, *padding)
    backend = torch._C._select_conv_backend(
        input, weight, bias, stride, padding, dilation, conv.transposed, extra, conv.groups, None
    )
    format = torch._C._conv_determine_backend_memory_format(input, weight, backend)
    return format == torch.channels_last


def is_channels_last(x: Tensor) -> bool:
    """Whether the channels of ``x`` lie innermost in memory, and it can't be read otherwise."""
    if x.is_contiguous():
        return False
    if x.ndim == 4:
        return x.is_contiguous(memory_format=torch.channels_last)
    # torch has no name for it, but takes and returns such sequences all the same.
    return x.ndim == 3 and x.transpose(1, 2).is_contiguous()


def why_lowered(*tensors: Tensor | None) -> str | None:
    """Why this call is one ``aten.convolution`` for something that watches or rewrites PyTorch's
    operators, or None where nothing does."""
    if torch.compiler.is_compiling():
        return "torch.compile or torch.export is tracing"
    if torch._C._len_torch_dispatch_stack() or torch._C._len_torch_function_stack():
        return "a mode that watches PyTorch's operators is active"
    if torch._C._functorch.peek_interpreter_stack() is not None:
        return "a torch.func transform such as vmap is active"
    if torch._C._get_tracing_state() is not None:
        return "torch.jit is tracing"
    if torch.is_autocast_enabled("cpu"):
        return "autocast chooses the dtype"
    if forward_ad._current_level >= 0:
        return "forward-mode differentiation is active"
    for tensor in tensors:
        if tensor is None:
            continue
        if type(tensor) not in (Tensor, torch.nn.Parameter):
            return f"{type(tensor).__name__} is a subclass of Tensor"
        if not tensor.is_cpu:
            return f"a tensor is on {tensor.device}, kernels run on the CPU"
        if tensor.layout is not torch.strided or tensor.is_neg():
            return "a tensor does not hold its numbers as they are"
        if not tensor.data_ptr():
            return "a tensor is empty, or has no memory"
    return None
