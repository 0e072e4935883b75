"""The engines of the comparison: PyTorch, the runtimes that serve convolutions, and ours."""

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.engine import OPENMP_SPIN, Prepare, Ready, padded, symmetric, unsupported
from benchmarks.litert_peer import litert
from benchmarks.onnx_peers import onnx_runtime, openvino
from groupconv.kernels.native import Native
from groupconv.kernels.request import Request
from groupconv.kernels.spec import ConvSpec
from groupconv.nn.functional import group_conv1d, group_conv2d


def eager(
    spec: ConvSpec, weight: Tensor, bias: Tensor | None, input: Tensor, threads: int
) -> Ready | str:
    """``torch.nn.functional.conv*d`` on contiguous tensors."""
    return _torch((F.conv1d, F.conv2d), spec, weight, bias, input, threads, last=False)


def eager_channels_last(
    spec: ConvSpec, weight: Tensor, bias: Tensor | None, input: Tensor, threads: int
) -> Ready | str:
    """``torch.nn.functional.conv2d`` on channels_last tensors."""
    if len(spec.input_size) != 2:
        return "torch has channels_last for 2-d convolutions only"
    return _torch((F.conv1d, F.conv2d), spec, weight, bias, input, threads, last=True)


def groupconv(
    spec: ConvSpec, weight: Tensor, bias: Tensor | None, input: Tensor, threads: int
) -> Ready | str:
    """Our kernel on channels_last tensors.

    As with the runtimes, the weights are constants, packed before, and the output lies ready.
    """
    return _kernel(spec, weight, bias, input, threads, last=True)


def groupconv_contiguous(
    spec: ConvSpec, weight: Tensor, bias: Tensor | None, input: Tensor, threads: int
) -> Ready | str:
    """Our kernel on contiguous tensors."""
    return _kernel(spec, weight, bias, input, threads, last=False)


def groupconv_eager(
    spec: ConvSpec, weight: Tensor, bias: Tensor | None, input: Tensor, threads: int
) -> Ready | str:
    """The function that layers call, on channels_last tensors (1-d: contiguous ones): it looks
    for changed weights and allocates its output, as eager PyTorch does."""
    last = len(spec.input_size) == 2
    return _torch((group_conv1d, group_conv2d), spec, weight, bias, input, threads, last=last)


OURS = "groupconv"
ENGINES: dict[str, Prepare] = {
    OURS: groupconv,
    "groupconv NCHW": groupconv_contiguous,
    "groupconv eager": groupconv_eager,
    "eager NCHW": eager,
    "eager channels_last": eager_channels_last,
    "ONNX Runtime": onnx_runtime,
    "OpenVINO": openvino,
    "LiteRT": litert,
}
PEERS = [name for name in ENGINES if not name.startswith(OURS)]
LIBRARIES = ("torch", "onnx", "onnxruntime", "openvino", "ai-edge-litert", "tensorflow-cpu")


def _kernel(
    spec: ConvSpec,
    weight: Tensor,
    bias: Tensor | None,
    input: Tensor,
    threads: int,
    *,
    last: bool,
) -> Ready | str:
    reason = unsupported(spec)
    if reason:
        return reason
    if torch.get_num_threads() != threads:
        torch.set_num_threads(threads)
    dims = len(spec.input_size)
    native = Native(Request(spec, torch.float32, last, last, dense=True, bias=bias is not None))
    x = _channels_last(input) if last else input.contiguous()
    y = torch.empty(spec.batch, spec.out_channels, *spec.output_size)
    y = _channels_last(y) if last else y
    weights = native.pack(weight)

    def output() -> Tensor:
        y.fill_(float("nan"))
        native.compute(x, weights, bias, y)
        return y.contiguous()

    (kernel,) = native.kernels
    record, buffer = kernel.arguments(x, weights[0], bias, y)

    layout = ("NLC" if dims == 1 else "NHWC") if last else ("NCL" if dims == 1 else "NCHW")
    return Ready(
        run=functools.partial(kernel.function, record),
        output=output,
        layout=layout,
        spin=OPENMP_SPIN if threads > 1 else 0.0,
        kept=buffer,
    )


def _torch(
    functions: tuple[Callable[..., Tensor], Callable[..., Tensor]],
    spec: ConvSpec,
    weight: Tensor,
    bias: Tensor | None,
    input: Tensor,
    threads: int,
    *,
    last: bool,
) -> Ready | str:
    reason = unsupported(spec)
    if reason:
        return reason
    if torch.get_num_threads() != threads:
        torch.set_num_threads(threads)
    if not symmetric(spec):
        spec, input = padded(spec, input)
    dims = len(spec.input_size)
    function = functions[dims - 1]
    if last:
        input = _channels_last(input)
        # Ours takes the weights as a module holds them.
        if function is F.conv2d:
            weight = _channels_last(weight)
    pads = tuple(before for before, _ in spec.padding)
    arguments = (input, weight, bias, spec.stride, pads, spec.dilation, spec.groups)
    layout = ("NLC" if dims == 1 else "NHWC") if last else ("NCL" if dims == 1 else "NCHW")
    return Ready(
        run=lambda: function(*arguments),
        output=lambda: function(*arguments).contiguous(),
        layout=layout,
        spin=OPENMP_SPIN if threads > 1 else 0.0,
    )


def _channels_last(tensor: Tensor) -> Tensor:
    """The same values with the channels innermost in memory."""
    return tensor.movedim(1, -1).contiguous().movedim(-1, 1)
