"""ONNX Runtime and OpenVINO, both fed with an ONNX model; for a convolution, of one node."""

import functools
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.engine import Ready, as_2d, fastest, missing, unsupported
from groupconv.kernels.spec import ConvSpec

# ONNX Runtime's threads spin for 31 ms after a pass, OpenVINO's for 1.
_ORT_SPIN, _OPENVINO_SPIN = 0.045, 0.003


def onnx_runtime(
    spec: ConvSpec, weight: Tensor, bias: Tensor | None, input: Tensor, threads: int
) -> Ready | str:
    """ONNX Runtime, free to choose the blocked layout that it has for 2-d convolutions."""
    reason = unsupported(spec) or missing("onnx", "onnxruntime")
    if reason:
        return reason
    variants = {"NCHW": _ort(*as_2d(spec, weight, input), bias, threads, "NCHW")}
    if len(spec.input_size) == 1:
        variants["NCL"] = _ort(spec, weight, input, bias, threads, "NCL")
    return fastest(variants)


def openvino(
    spec: ConvSpec, weight: Tensor, bias: Tensor | None, input: Tensor, threads: int
) -> Ready | str:
    """OpenVINO's CPU plugin, asked for either order of axes outside."""
    reason = unsupported(spec) or missing("onnx", "openvino")
    if reason:
        return reason
    lifted = as_2d(spec, weight, input)
    variants = {layout: _openvino(*lifted, bias, threads, layout) for layout in ("NHWC", "NCHW")}
    if len(spec.input_size) == 1:
        variants["NCL"] = _openvino(spec, weight, input, bias, threads, "NCL")
    return fastest(variants)


def _model(spec: ConvSpec, weight: Tensor, bias: Tensor | None) -> bytes:
    """``y = Conv(x)`` as a serialized ONNX model."""
    from onnx import TensorProto, helper, numpy_helper

    constants = {"w": weight} if bias is None else {"w": weight, "b": bias}
    node = helper.make_node(
        "Conv",
        ["x", *constants],
        ["y"],
        kernel_shape=spec.kernel_size,
        strides=spec.stride,
        dilations=spec.dilation,
        pads=[before for before, _ in spec.padding] + [after for _, after in spec.padding],
        group=spec.groups,
    )
    sizes = {"x": (spec.batch, spec.in_channels, *spec.input_size), "y": _output_shape(spec)}
    x, y = (
        helper.make_tensor_value_info(name, TensorProto.FLOAT, size) for name, size in sizes.items()
    )
    initializers = [
        numpy_helper.from_array(np.ascontiguousarray(value.numpy()), name)
        for name, value in constants.items()
    ]
    graph = helper.make_graph([node], "convolution", [x], [y], initializers)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    return bytes(model.SerializeToString())


def _output_shape(spec: ConvSpec) -> tuple[int, ...]:
    return (spec.batch, spec.out_channels, *spec.output_size)


def _ort(
    spec: ConvSpec, weight: Tensor, input: Tensor, bias: Tensor | None, threads: int, layout: str
) -> Ready:
    return ort_session(_model(spec, weight, bias), input, threads, layout)


def _openvino(
    spec: ConvSpec, weight: Tensor, input: Tensor, bias: Tensor | None, threads: int, layout: str
) -> Ready:
    return openvino_request(_model(spec, weight, bias), input, threads, layout)


def ort_session(model: bytes | str, input: Tensor, threads: int, layout: str) -> Ready:
    """ONNX Runtime with ``model``, a file or its content, of one input and one output."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    output_shape = tuple(session.get_outputs()[0].shape)
    # Both live in ONNX Runtime's own memory, aligned as it likes.
    x = onnxruntime.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(input.numpy()))
    y = onnxruntime.OrtValue.ortvalue_from_shape_and_type(output_shape, np.float32)
    binding = session.io_binding()
    binding.bind_ortvalue_input(session.get_inputs()[0].name, x)
    binding.bind_ortvalue_output(session.get_outputs()[0].name, y)

    def output() -> Tensor:
        y.update_inplace(np.full(output_shape, np.nan, np.float32))
        session.run_with_iobinding(binding)
        return torch.from_numpy(y.numpy())

    return Ready(
        run=lambda: session.run_with_iobinding(binding),
        output=output,
        layout=layout,
        spin=_ORT_SPIN if threads > 1 else 0.0,
    )


def openvino_request(model: bytes | str, input: Tensor, threads: int, layout: str) -> Ready:
    """OpenVINO with ``model``, a file or its content, of one input and one output.

    Args:
        layout: of the images outside; "NHWC", or that of the model.
    """
    import openvino

    network = _core().read_model(model=model)
    last = layout == "NHWC"
    last_out = last and len(network.output(0).shape) == 4
    if last:
        steps = openvino.preprocess.PrePostProcessor(network)
        for end in (steps.input(), steps.output()) if last_out else (steps.input(),):
            end.tensor().set_layout(openvino.Layout("NHWC"))
            end.model().set_layout(openvino.Layout("NCHW"))
        network = steps.build()
    settings = {
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_NUM_THREADS": threads,
        "INFERENCE_PRECISION_HINT": "f32",
    }
    compiled = _core().compile_model(network, "CPU", settings)
    request = compiled.create_infer_request()
    x = (input.movedim(1, -1) if last else input).contiguous().numpy()
    y = openvino.Tensor(openvino.Type.f32, compiled.output(0).shape)
    request.set_input_tensor(openvino.Tensor(x))
    request.set_output_tensor(y)

    def output() -> Tensor:
        y.data.fill(np.nan)
        request.infer(share_outputs=True)
        result = torch.from_numpy(y.data.copy())
        return result.movedim(-1, 1) if last_out else result

    return Ready(
        # Unless outputs are shared, a copy is made for Python.
        run=lambda: request.infer(share_outputs=True),
        output=output,
        layout=layout,
        spin=_OPENVINO_SPIN if threads > 1 else 0.0,
    )


@functools.cache
def _core() -> Any:
    import openvino

    return openvino.Core()
