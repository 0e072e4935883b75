"""Several tensors side by side: cat, stack, and what is written into a part of a tensor."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx

from groupconv.compiler.arguments import shape_of
from groupconv.compiler.building import Builder, UnsupportedError
from groupconv.compiler.graph import Concat
from groupconv.compiler.views import Lazy

aten = torch.ops.aten


def cat(builder: Builder, node: fx.Node, tensors: Sequence[Any], dim: int = 0) -> Lazy:
    return _joined(builder, tensors, shape_of(node), dim)


def stack(builder: Builder, node: fx.Node, tensors: Sequence[Any], dim: int = 0) -> Lazy:
    """The channels of all side by side, and a view of that."""
    shape = [*tensors[0].shape]
    if len(shape) < 2:
        raise UnsupportedError("it is of numbers without channels")
    axis = 1 if len(shape) == 4 else len(shape) - 1
    apart = (len(tensors), shape[axis])
    shape[axis] *= len(tensors)
    whole = _joined(builder, tensors, shape, axis).seen(aten.unflatten.int, axis, apart)
    return whole.seen(aten.movedim.int, axis, dim % (len(shape) + 1))


def slice_scatter(
    builder: Builder, node: fx.Node, x: Any, part: Any, dim: int = 0, start: int | None = None,
    end: int | None = None, step: int = 1,
) -> Lazy:  # fmt: skip
    if step != 1:
        raise UnsupportedError(f"step={step}")
    first, stop, _ = slice(start, end).indices(x.shape[dim])
    around = [_slice(x, dim, 0, first), part, _slice(x, dim, stop, x.shape[dim])]
    return _joined(builder, around, shape_of(node), dim)


def select_scatter(builder: Builder, node: fx.Node, x: Any, part: Any, dim: int, at: int) -> Lazy:
    at %= x.shape[dim]
    whole = (
        part.seen(aten.unsqueeze.default, dim)
        if isinstance(part, Lazy)
        else part[None].movedim(0, dim)
    )
    return slice_scatter(builder, node, x, whole, dim, at, at + 1)


def _slice(x: Any, dim: int, start: int, stop: int) -> Any:
    if isinstance(x, Tensor):
        return aten.slice.Tensor(x, dim, start, stop)
    return x.seen(aten.slice.Tensor, dim, start, stop)


def _joined(builder: Builder, tensors: Sequence[Any], shape: Sequence[int], dim: int) -> Lazy:
    """Constants and tensors of the network, those that are empty left out."""
    axis = dim % len(shape)
    if axis == 0 or axis not in ((1,) if len(shape) == 4 else (1, len(shape) - 1)):
        raise UnsupportedError(f"it is along axis {dim}")
    values = [
        builder.constant(tensor, axis)
        if isinstance(tensor, Tensor)
        else builder.laid_out(builder.value(tensor), axis)
        for tensor in tensors
        if 0 not in tensor.shape
    ]
    return Lazy.of(builder.add("cat", Concat(), values, shape, axis))
