"""ONNX files, by PyTorch's exporter, which folds batch norms into convolutions."""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from groupconv.errors import ExportError
from groupconv.targets.program import BATCH, SIZES, exported
from groupconv.targets.quiet import quiet


def write(
    module: nn.Module,
    inputs: tuple[Tensor, ...],
    path: Path,
    metadata: Mapping[str, str] | None = None,
    any_size: bool = False,
) -> None:
    """Write ``module``, see :func:`groupconv.targets.program.exported`.

    Raises:
        ExportError: PyTorch can't export it.
    """
    import onnx

    with quiet(), torch.no_grad():
        program = exported(module, inputs, any_size)
        try:
            model = torch.onnx.export(program, dynamo=True, verbose=False)
        except Exception as error:  # The exporter raises errors of many types.
            raise ExportError(f"PyTorch can't export the network to ONNX: {error}") from error
    assert model is not None
    proto = model.model_proto
    _name_axes(proto.graph)
    for key, value in (metadata or {}).items():
        proto.metadata_props.add(key=key, value=value)
    onnx.save_model(proto, path)


def nodes(path: Path) -> dict[str, int]:
    """Operators by type."""
    import onnx

    model = onnx.load_model(path, load_external_data=False)
    return dict(Counter(node.op_type for node in model.graph.node))


def names(shape: Sequence[Any]) -> list[str]:
    """What axes of any size are called: of an image the last two, of a row its last."""
    return [BATCH, "channels", *SIZES[-max(len(shape) - 2, 0) :]][: len(shape)]


def _name_axes(graph: Any) -> None:
    """Call axes of any size what users expect, where PyTorch has a number for them."""
    first = graph.input[0].type.tensor_type.shape.dim
    new = {
        axis.dim_param: name
        for axis, name in zip(first, names(first), strict=True)
        if axis.HasField("dim_param")
    }
    for value in (*graph.input, *graph.output, *graph.value_info):
        for axis in value.type.tensor_type.shape.dim:
            if axis.HasField("dim_param"):
                # Some are formulas of others.
                axis.dim_param = re.sub(r"\w+", lambda m: new.get(m[0], m[0]), axis.dim_param)
