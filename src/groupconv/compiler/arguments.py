"""What PyTorch's operators are given, in the forms that lowering them needs."""

from typing import Any

from torch import Tensor, fx

from groupconv.compiler.building import Builder, UnsupportedError
from groupconv.compiler.graph import Value
from groupconv.compiler.views import Lazy


def images(builder: Builder, held: Lazy) -> Value:
    """``(N, C, H, W)`` with its channels innermost."""
    value = builder.value(held)
    if len(value.shape) != 4:
        raise UnsupportedError(f"the input has {len(value.shape)} axes, not 4")
    return builder.laid_out(value, 1)


def fixed(tensor: Any, what: str) -> Tensor:
    """A constant tensor."""
    if not isinstance(tensor, Tensor):
        raise UnsupportedError(f"the {what} is computed by the network")
    return tensor.detach()


def named(builder: Builder, node: fx.Node, *tensors: Any) -> str:
    """The module that owns one of ``tensors``, else the operator's name."""
    for tensor in tensors:
        name = builder.names.get(tensor.data_ptr()) if isinstance(tensor, Tensor) else None
        if name is not None:
            return name.rpartition(".")[0] or name
    return str(node.target).removeprefix("aten.").partition(".")[0]


def each(value: Any, dims: int | None) -> tuple[int, ...]:
    """A number for each axis."""
    values = tuple(value) if isinstance(value, list | tuple) else (value,)
    return values * dims if dims is not None and len(values) == 1 else values


def both(value: Any) -> tuple[int, int]:
    """A number for rows and one for columns."""
    rows, columns = each(value, 2)
    return rows, columns


def shape_of(node: fx.Node) -> tuple[int, ...]:
    """Of what an operator returns."""
    return tuple(node.meta["val"].shape)
