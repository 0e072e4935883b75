"""LiteRT (TensorFlow Lite) with its XNNPACK delegate, fed with a model of one operator."""

import logging
import os
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.engine import Ready, as_2d, missing, padded, unsupported
from groupconv.kernels.spec import ConvSpec, same_padding


def litert(
    spec: ConvSpec, weight: Tensor, bias: Tensor | None, input: Tensor, threads: int
) -> Ready | str:
    """LiteRT; padding that its format has no word for is in the input already."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    reason = unsupported(spec) or missing("ai_edge_litert.interpreter", "tensorflow")
    if reason:
        return reason
    from ai_edge_litert.interpreter import Interpreter

    spec, weight, input = as_2d(spec, weight, input)
    padding = _padding(spec)
    if padding is None:
        padding = "VALID"
        spec, input = padded(spec, input)
    interpreter = Interpreter(
        model_content=_model(spec, weight, bias, padding), num_threads=threads
    )
    interpreter.allocate_tensors()
    if "DELEGATE" not in {op["op_name"] for op in interpreter._get_ops_details()}:
        return "XNNPACK doesn't take this convolution"
    interpreter.set_tensor(
        interpreter.get_input_details()[0]["index"], input.movedim(1, -1).contiguous().numpy()
    )
    y = interpreter.get_output_details()[0]["index"]

    def output() -> Tensor:
        interpreter.tensor(y)().fill(np.nan)
        interpreter.invoke()
        return torch.from_numpy(interpreter.get_tensor(y)).movedim(-1, 1)

    return Ready(
        run=interpreter.invoke,
        output=output,
        layout="NHWC" if padding == "SAME" or not _any(spec) else "NHWC, padded",
    )


def _padding(spec: ConvSpec) -> str | None:
    """The format's name for the padding, or None if it has none."""
    if not any(before or after for before, after in spec.padding):
        return "VALID"
    # At larger strides TensorFlow's SAME puts less before than PyTorch's numbers do.
    if set(spec.stride) == {1} and list(spec.padding) == same_padding(
        spec.kernel_size, spec.dilation
    ):
        return "SAME"
    return None


def _model(spec: ConvSpec, weight: Tensor, bias: Tensor | None, padding: str) -> bytes:
    """The .tflite file, by TensorFlow's converter."""
    import tensorflow as tf

    # The converter warns of every model.
    logging.getLogger("tensorflow").setLevel(logging.ERROR)
    logging.getLogger("absl").setLevel(logging.ERROR)
    per_group = spec.out_channels // spec.groups
    if spec.groups == spec.in_channels > 1:
        taps = weight.reshape(spec.in_channels, per_group, *spec.kernel_size)
        filters = taps.permute(2, 3, 0, 1).contiguous().numpy()

        def convolve(x: Any) -> Any:
            strides = (1, *spec.stride, 1)
            return tf.nn.depthwise_conv2d(
                x, filters, strides, padding, dilations=spec.dilation
            )
    else:
        filters = weight.permute(2, 3, 1, 0).contiguous().numpy()

        def convolve(x: Any) -> Any:
            return tf.nn.conv2d(x, filters, spec.stride, padding, dilations=spec.dilation)

    def layer(x: Any) -> Any:
        y = convolve(x)
        return y if bias is None else tf.nn.bias_add(y, bias.numpy())

    image = tf.TensorSpec((spec.batch, *spec.input_size, spec.in_channels), tf.float32)
    function = tf.function(layer, input_signature=[image]).get_concrete_function()
    converter = tf.lite.TFLiteConverter.from_concrete_functions([function], tf.Module())
    return bytes(converter.convert())
