"""Builder: a graph under construction, and values brought to the layout that an operator needs."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from groupconv.compiler.graph import (
    Gather,
    Graph,
    Host,
    Input,
    Node,
    Operator,
    Pad,
    Pool,
    Relayout,
    Value,
    View,
)
from groupconv.compiler.views import Cropped, Lazy, cropped, recognise
from groupconv.errors import GroupConvError


class UnsupportedError(Exception):
    """Raised where an operator's arguments have no native form; the text says why."""


class Builder:
    """Adds nodes one after another.

    Args:
        names: of parameters, by the address of their data.
    """

    def __init__(self, names: dict[int, str]) -> None:
        self.names = names
        self.inputs: list[Value] = []
        self.constants: dict[Value, Tensor] = {}
        self.nodes: list[Node] = []
        self._used: dict[str, int] = {}
        self._resolved: dict[Lazy, Value] = {}

    def input(self, x: Tensor) -> Lazy:
        """The next input of the network."""
        planes = x.is_contiguous() or not (
            x.ndim == 4 and x.is_contiguous(memory_format=torch.channels_last)
        )
        axis = _last(x.ndim) if planes else 1
        self.inputs.append(Value(self._name("input"), tuple(x.shape), axis, x.dtype))
        return Lazy.of(self.inputs[-1])

    def constant(self, tensor: Tensor, axis: int) -> Value:
        """A tensor that never changes as a value."""
        value = Value(self._name("constant"), tuple(tensor.shape), axis, tensor.dtype)
        self.constants[value] = tensor
        return value

    def add(
        self,
        name: str,
        operator: Operator,
        inputs: Sequence[Value],
        shape: Sequence[int],
        axis: int = 1,
        dtype: torch.dtype = torch.float32,
    ) -> Value:
        """The output of a new node."""
        name = self._name(name)
        value = Value(name, tuple(shape), axis, dtype)
        self.nodes.append(Node(name, operator, tuple(inputs), value))
        return value

    def value(self, held: Lazy) -> Value:
        """A tensor of the network as a value: views are nodes from here on."""
        if not held.chain:
            return held.base
        if held not in self._resolved:
            self._resolved[held] = self._resolve(held)
        return self._resolved[held]

    def _resolve(self, held: Lazy) -> Value:
        base = held.base
        if base.dtype != torch.float32 or not base.shape or not all(held.shape):
            return self._copied(held)
        seen = recognise(held)
        if seen is None and (crop := cropped(held)):
            return self._cropped(held, crop)
        if seen is None and len(base.shape) > 2 and base.axis in (1, len(base.shape) - 1):
            # As it would be with the other axis innermost.
            other = replace(base, axis=len(base.shape) - base.axis)
            seen = recognise(Lazy(other, held.chain, held.shape))
            if seen is not None:
                base = self.laid_out(base, other.axis)
        if seen is None:
            return self._copied(held)
        if seen.order is not None:
            shape = [*base.shape]
            shape[base.axis] = len(seen.order)
            base = self.add("gather", Gather(seen.order), [base], shape, base.axis)
        if (base.shape, base.axis) == (held.shape, seen.axis):
            return base
        return self.add("view", View(), [base], held.shape, seen.axis)

    def _cropped(self, held: Lazy, crop: Cropped) -> Value:
        """Some rows and columns: a crop, and the pooling of single pixels."""
        (top, bottom), (left, right) = crop.sides
        size = [n - a - b for n, (a, b) in zip(held.base.shape[2:], crop.sides, strict=True)]
        value, shape = self.laid_out(held.base, 1), (*held.shape[:2], *size)
        value = self.add("crop", Pad(((-top, -bottom), (-left, -right))), [value], shape)
        pool = Pool("max", (1, 1), crop.steps, ((0, 0), (0, 0)))
        return self.add("crop", pool, [value], held.shape)

    def _copied(self, held: Lazy) -> Value:
        """What no gather of channels makes, computed by PyTorch view by view."""
        found = Lazy.of(held.base)
        for view in held.chain:
            args = (found, *view.args)
            reason = "moves numbers between pixels"
            found = self.host(view.target, args, view.kwargs, view.like, reason, view.item)
        return found.base

    def laid_out(self, value: Value, axis: int) -> Value:
        """The same tensor with another axis innermost."""
        if value.axis == axis:
            return value
        if 0 in value.shape or _order(value.shape, axis) == _order(value.shape, value.axis):
            return self.add("view", View(), [value], value.shape, axis)
        if {value.axis, axis} == {1, len(value.shape) - 1}:
            return self.add("layout", Relayout(), [value], value.shape, axis)
        raise UnsupportedError(f"axis {axis} of {list(value.shape)} can't lie innermost")

    def host(
        self, target: Any, args: Any, kwargs: Any, like: Tensor,
        reason: str, item: int | None = None,
    ) -> Lazy:  # fmt: skip
        """What PyTorch computes.

        Args:
            like: a tensor of the result's shape and dtype.
        """
        inputs: list[Value] = []

        def plain(part: Any) -> Any:
            if isinstance(part, Lazy):
                inputs.append(self.value(part))
                return Input(len(inputs) - 1)
            if isinstance(part, Tensor) and part.ndim:
                inputs.append(self.constant(part, part.ndim - 1))
                return Input(len(inputs) - 1)
            if isinstance(part, Tensor):
                return part
            if isinstance(part, list | tuple):
                return tuple(map(plain, part))
            return part

        operator = Host(
            target, plain(args), {key: plain(part) for key, part in kwargs.items()}, item, reason
        )
        name = str(target).removeprefix("aten.").partition(".")[0]
        shape = tuple(like.shape)
        return Lazy.of(self.add(name, operator, inputs, shape, _last(len(shape)), like.dtype))

    def finish(self, leaves: Sequence[Any]) -> Graph:
        """The graph that returns ``leaves``: contiguous, but images channels last where an input
        is, as PyTorch would give them."""
        outputs = []
        for leaf in leaves:
            if isinstance(leaf, Tensor):
                outputs.append(self.constant(leaf, _last(leaf.ndim)))
            elif isinstance(leaf, Lazy):
                outputs.append(self._returned(self.value(leaf)))
            else:
                raise GroupConvError(
                    f"compile: the network returns {leaf!r}; it must return tensors only"
                )
        return Graph(tuple(self.inputs), tuple(outputs), self.nodes, self.constants)

    def _returned(self, value: Value) -> Value:
        dims = len(value.shape)
        if value.dtype != torch.float32:
            return value
        if dims == 4 and any(len(x.shape) == 4 and x.axis == 1 for x in self.inputs):
            return self.laid_out(value, 1)
        return self.laid_out(value, _last(dims))

    def _name(self, name: str) -> str:
        number = self._used[name] = self._used.get(name, 0) + 1
        return name if number == 1 else f"{name}.{number}"


def _last(dims: int) -> int:
    """The channel axis of a contiguous tensor."""
    return max(0, dims - 1)


def _order(shape: tuple[int, ...], axis: int) -> list[int]:
    """Axes as memory has them, those of one element left out."""
    axes = [*(i for i in range(len(shape)) if i != axis), axis]
    return [i for i in axes if shape[i] != 1]
