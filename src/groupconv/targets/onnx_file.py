"""ONNX files, by PyTorch's exporter, which folds batch norms into convolutions."""

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from groupconv.errors import ExportError
from groupconv.targets.program import BATCH, exported
from groupconv.targets.quiet import quiet


def write(
    module: nn.Module,
    inputs: tuple[Tensor, ...],
    path: Path,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write ``module`` for any batch, or, where it depends on its batch, for that of ``inputs``.

    Raises:
        ExportError: PyTorch can't export it.
    """
    import onnx

    with quiet(), torch.no_grad():
        program = exported(module, inputs)
        try:
            model = torch.onnx.export(program, dynamo=True, verbose=False)
        except Exception as error:  # The exporter raises errors of many types.
            raise ExportError(f"PyTorch can't export the network to ONNX: {error}") from error
    assert model is not None
    proto = model.model_proto
    _name_batch(proto.graph)
    for key, value in (metadata or {}).items():
        proto.metadata_props.add(key=key, value=value)
    onnx.save_model(proto, path)


def nodes(path: Path) -> dict[str, int]:
    """Operators by type."""
    import onnx

    model = onnx.load_model(path, load_external_data=False)
    return dict(Counter(node.op_type for node in model.graph.node))


def _name_batch(graph: Any) -> None:
    """Call the axis of any size what users expect, where PyTorch has a number for it."""
    first = graph.input[0].type.tensor_type.shape.dim[0].dim_param
    if not first:
        return
    for value in (*graph.input, *graph.output, *graph.value_info):
        for axis in value.type.tensor_type.shape.dim:
            if axis.HasField("dim_param"):
                axis.dim_param = axis.dim_param.replace(first, BATCH)
