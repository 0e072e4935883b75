"""Networks as programs of ``torch.export``: for any batch where they allow it."""

import logging

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from groupconv.errors import ExportError

# The name of an axis of any size.
BATCH = "batch"
# Of a batch that stands for any other: a single image would be taken for the only batch there is.
_BATCH = 2


def exported(module: nn.Module, inputs: tuple[Tensor, ...]) -> ExportedProgram:
    """``module`` for any batch, or, where it depends on its batch, for that of ``inputs``.

    Raises:
        ExportError: PyTorch can't export it.
    """
    some = tuple(x.expand(_BATCH, *x.shape[1:]) if len(x) == 1 else x for x in inputs)
    batch = torch.export.Dim(BATCH)
    try:
        return torch.export.export(module, some, dynamic_shapes=tuple({0: batch} for _ in inputs))
    except Exception as error:  # The exporter raises errors of many types, all for this reason.
        logging.getLogger(__name__).info("no program for any batch: %s", error)
    return exported_for(module, inputs)


def exported_for(module: nn.Module, inputs: tuple[Tensor, ...]) -> ExportedProgram:
    """``module`` for inputs of such shapes.

    Raises:
        ExportError: PyTorch can't export it.
    """
    try:
        return torch.export.export(module, inputs)
    except Exception as error:  # As above.
        raise ExportError(f"PyTorch can't export the network: {error}") from error
