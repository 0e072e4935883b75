"""INT8 TFLite files: static quantization by Google's quantizer, scales per channel."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from torch import Tensor

from groupconv.errors import ExportError
from groupconv.targets.quiet import quiet


def quantize(path: Path, batches: Iterable[tuple[Tensor, ...]], out: Path) -> list[str]:
    """Write the INT8 form of a TFLite file, which still takes and gives float numbers.

    Args:
        path: of the float file.
        batches: its inputs, which give the ranges of the activations.
        out: of the new file.

    Returns:
        Names of the nodes that stay float: none.

    Raises:
        ExportError: the quantizer fails.
    """
    try:
        with quiet():
            from ai_edge_litert.interpreter import Interpreter
            from ai_edge_quantizer import quantizer, recipe

            ends: list[Any] = [
                {"regex": ".*", "operation": end, "algorithm_key": "no_quantize"}
                for end in ("INPUT", "OUTPUT")
            ]
            tool = quantizer.Quantizer(str(path), [*recipe.static_wi8_ai8(), *ends])
            ((key, signature),) = Interpreter(str(path)).get_signature_list().items()
            feeds = [
                {
                    name: x.detach().contiguous().numpy()
                    for name, x in zip(signature["inputs"], inputs, strict=True)
                }
                for inputs in batches
            ]
            tool.quantize(tool.calibrate({key: feeds})).export_model(str(out))
    except Exception as error:  # Of many types.
        raise ExportError(f"LiteRT's quantizer can't quantize the network: {error}") from error
    return []
