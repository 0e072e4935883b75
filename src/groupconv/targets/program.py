"""Networks as programs of ``torch.export``: for any batch where they allow it."""

import logging
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from groupconv.errors import ExportError
from groupconv.targets.modulated import replace_modulated

# The name of an axis of any size.
BATCH = "batch"
# Of a batch that stands for any other: a single image would be taken for the only batch there is.
_BATCH = 2


def exported(module: nn.Module, inputs: tuple[Tensor, ...]) -> ExportedProgram:
    """``module`` for any batch, or, where it depends on its batch, for that of ``inputs``.

    Convolutions with weights of their own for each image are rewritten: no format has them.

    Raises:
        ExportError: PyTorch can't export it.
    """
    some = tuple(x.expand(_BATCH, *x.shape[1:]) if len(x) == 1 else x for x in inputs)
    batch = torch.export.Dim(BATCH)
    try:
        return _rewritten(module, some, tuple({0: batch} for _ in inputs))
    except Exception as error:  # The exporter raises errors of many types, all for this reason.
        logging.getLogger(__name__).info("no program for any batch: %s", error)
    return exported_for(module, inputs)


def exported_for(module: nn.Module, inputs: tuple[Tensor, ...]) -> ExportedProgram:
    """The same for inputs of such shapes alone.

    Raises:
        ExportError: PyTorch can't export it.
    """
    try:
        return _rewritten(module, inputs, None)
    except Exception as error:  # As above.
        raise ExportError(f"PyTorch can't export the network: {error}") from error


def _rewritten(module: nn.Module, inputs: tuple[Tensor, ...], shapes: Any) -> ExportedProgram:
    program = torch.export.export(module, inputs, dynamic_shapes=shapes)
    graph = program.module()
    if replace_modulated(graph):
        program = torch.export.export(graph, inputs, dynamic_shapes=shapes)
    return program
