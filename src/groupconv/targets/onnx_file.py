"""ONNX files, by PyTorch's exporter, which folds batch norms into convolutions."""

import logging
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from groupconv.errors import ExportError
from groupconv.targets.quiet import quiet

# The name of an axis of any size.
BATCH = "batch"
# Of a batch that stands for any other: a single image would be taken for the only batch there is.
_BATCH = 2


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

    try:
        model = _export(module, inputs, any_batch=True)
    except Exception as error:  # The exporter raises errors of many types, all for this reason.
        logging.getLogger(__name__).info("no file for any batch: %s", error)
        model = _export(module, inputs, any_batch=False)
    for key, value in (metadata or {}).items():
        model.metadata_props.add(key=key, value=value)
    onnx.save_model(model, path)


def nodes(path: Path) -> dict[str, int]:
    """Operators by type."""
    import onnx

    model = onnx.load_model(path, load_external_data=False)
    return dict(Counter(node.op_type for node in model.graph.node))


def _export(module: nn.Module, inputs: tuple[Tensor, ...], *, any_batch: bool):  # type: ignore[no-untyped-def]
    shapes = None
    if any_batch:
        inputs = tuple(_with_batch(x) for x in inputs)
        batch = torch.export.Dim(BATCH)
        shapes = tuple({0: batch} for _ in inputs)
    try:
        with quiet(), torch.no_grad():
            exported = torch.onnx.export(
                module, inputs, dynamo=True, dynamic_shapes=shapes, verbose=False
            )
    except Exception as error:  # As above.
        raise ExportError(f"PyTorch can't export the network to ONNX: {error}") from error
    assert exported is not None
    return exported.model_proto


def _with_batch(x: Tensor) -> Tensor:
    return x.expand(_BATCH, *x.shape[1:]) if len(x) == 1 else x
