"""INT8 ONNX files: static quantization by ONNX Runtime's own tool, with a scale per channel."""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from torch import Tensor

from groupconv.errors import ExportError
from groupconv.targets.quiet import quiet


def quantize(path: Path, batches: Iterable[tuple[Tensor, ...]], out: Path) -> list[str]:
    """Write the INT8 form of an ONNX file.

    Activations are unsigned, weights signed: on x86 ONNX Runtime has fast code for these alone.

    Args:
        path: of the float file.
        batches: its inputs, which give the ranges of the activations.
        out: of the new file.

    Returns:
        Names of the nodes that stay float: a transposed convolution in groups has an output channel
        in several places of its weight's axis, and the tool can't give each a scale.

    Raises:
        ExportError: the tool fails.
    """
    import onnx
    from onnxruntime import quantization

    graph = onnx.load(path).graph
    names = [end.name for end in graph.input]

    class Reader(quantization.CalibrationDataReader):
        def __init__(self) -> None:
            self.feeds = _feeds(names, batches)

        def get_next(self) -> Any:
            return next(self.feeds, None)

    kept = [
        node.name for node in graph.node if node.op_type == "ConvTranspose" and _groups(node) > 1
    ]
    try:
        with quiet():
            quantization.quantize_static(
                path,
                out,
                Reader(),
                quant_format=quantization.QuantFormat.QDQ,
                per_channel=True,
                activation_type=quantization.QuantType.QUInt8,
                weight_type=quantization.QuantType.QInt8,
                nodes_to_exclude=kept,
            )
    except Exception as error:  # Of many types.
        raise ExportError(f"ONNX Runtime can't quantize the network: {error}") from error
    return kept


def _feeds(names: list[str], batches: Iterable[tuple[Tensor, ...]]) -> Iterator[dict[str, Any]]:
    for inputs in batches:
        arrays = (x.detach().contiguous().numpy() for x in inputs)
        yield dict(zip(names, arrays, strict=True))


def _groups(node: Any) -> int:
    return next((a.i for a in node.attribute if a.name == "group"), 1)
