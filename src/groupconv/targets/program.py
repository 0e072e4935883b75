"""Networks as programs of ``torch.export``: for any batch where they allow it."""

import logging
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from groupconv.errors import ExportError
from groupconv.targets.modulated import replace_modulated

# The names of axes of any size.
BATCH, SIZES = "batch", ("depth", "height", "width")
_OF_ANY_SIZE = " for images of any size"
# Of a batch that stands for any other: a single image would be taken for the only batch there is.
_BATCH = 2


def exported(
    module: nn.Module, inputs: tuple[Tensor, ...], any_size: bool = False
) -> ExportedProgram:
    """``module`` for any batch, or, where it depends on its batch, for that of ``inputs``.

    Convolutions with weights of their own for each image are rewritten: no format has them.

    Args:
        any_size: whether it must be for images of any batch and size, too.

    Raises:
        ExportError: PyTorch can't export it.
    """
    some = tuple(x.expand(_BATCH, *x.shape[1:]) if len(x) == 1 else x for x in inputs)
    batch = torch.export.Dim(BATCH)
    shapes = tuple({0: batch} | sizes for sizes in _sizes(inputs, any_size))
    try:
        return _rewritten(module, some, shapes)
    except Exception as error:  # The exporter raises errors of many types, all for this reason.
        if any_size:
            raise ExportError(f"PyTorch can't export the network{_OF_ANY_SIZE}: {error}") from error
        logging.getLogger(__name__).info("no program for any batch: %s", error)
    return exported_for(module, inputs)


def exported_for(
    module: nn.Module, inputs: tuple[Tensor, ...], any_size: bool = False
) -> ExportedProgram:
    """The same for the batch of ``inputs`` alone.

    Raises:
        ExportError: PyTorch can't export it.
    """
    try:
        return _rewritten(module, inputs, _sizes(inputs, True) if any_size else None)
    except Exception as error:  # As above.
        size = _OF_ANY_SIZE if any_size else ""
        raise ExportError(f"PyTorch can't export the network{size}: {error}") from error


def _sizes(inputs: tuple[Tensor, ...], free: bool) -> tuple[dict[int, Any], ...]:
    """For each input the axes behind the channels, if their sizes are free."""
    free_size = torch.export.Dim.DYNAMIC
    return tuple({axis: free_size for axis in range(2, x.ndim) if free} for x in inputs)


def _rewritten(module: nn.Module, inputs: tuple[Tensor, ...], shapes: Any) -> ExportedProgram:
    program = torch.export.export(module, inputs, dynamic_shapes=shapes)
    graph = program.module()
    if replace_modulated(graph):
        program = torch.export.export(graph, inputs, dynamic_shapes=shapes)
    return program
