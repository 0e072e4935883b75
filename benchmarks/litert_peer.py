"""LiteRT (TensorFlow Lite); for a convolution, with a model of one operator."""

import logging
import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.engine import Ready, as_2d, fastest, missing, padded, unsupported
from groupconv.kernels.spec import ConvSpec, same_padding

# Seconds for which worker threads wait actively, and some.
_SPIN = 0.003


def litert(
    spec: ConvSpec, weight: Tensor, bias: Tensor | None, input: Tensor, threads: int
) -> Ready | str:
    """LiteRT; padding that its format has no word for is in the input already."""
    # TensorFlow only converts here, and has much to say about itself otherwise.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")
    reason = unsupported(spec) or missing("ai_edge_litert.interpreter", "tensorflow")
    if reason:
        return reason
    spec, weight, input = as_2d(spec, weight, input)
    padding = _padding(spec)
    if padding is None:
        padding = "VALID"
        spec, input = padded(spec, input)
    model = _model(spec, weight, bias, padding)
    x = input.movedim(1, -1).contiguous().numpy()
    variants = {"XNNPACK": interpret(model, x, threads, xnnpack=True)}
    # XNNPACK is several times slower than LiteRT's own kernels beyond 25 taps.
    if spec.groups == spec.in_channels > 1:
        variants["own"] = interpret(model, x, threads, xnnpack=False)
    return fastest(variants)


def interpret(model: bytes | Path, x: np.ndarray, threads: int, *, xnnpack: bool) -> Ready:
    """LiteRT with ``model``, a file or its content, of one input and one output.

    Args:
        x: the input as the model takes it: images are NHWC.
        xnnpack: whether XNNPACK's kernels are used, or LiteRT's own alone.
    """
    from ai_edge_litert.interpreter import Interpreter, OpResolverType

    resolver = (
        OpResolverType.BUILTIN if xnnpack else OpResolverType.BUILTIN_WITHOUT_DEFAULT_DELEGATES
    )
    interpreter = Interpreter(
        model_path=str(model) if isinstance(model, Path) else None,
        model_content=None if isinstance(model, Path) else model,
        num_threads=threads,
        experimental_op_resolver_type=resolver,
    )
    interpreter.allocate_tensors()
    interpreter.set_tensor(interpreter.get_input_details()[0]["index"], x)
    y = interpreter.get_output_details()[0]["index"]
    delegated = any(op["op_name"] == "DELEGATE" for op in interpreter._get_ops_details())

    def output() -> Tensor:
        interpreter.tensor(y)().fill(np.nan)
        interpreter.invoke()
        return torch.from_numpy(interpreter.get_tensor(y)).movedim(-1, 1)

    return Ready(
        run=interpreter.invoke,
        output=output,
        layout=f"NHWC, {'XNNPACK' if delegated else 'own kernels'}",
        spin=_SPIN if threads > 1 else 0.0,
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
            return tf.nn.depthwise_conv2d(x, filters, strides, padding, dilations=spec.dilation)
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
