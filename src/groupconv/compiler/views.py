"""Views: what a chain of PyTorch's view operators makes of a value, found by running it once on the
numbers of its elements."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from groupconv.compiler.graph import Value


@dataclass(frozen=True, eq=False)
class ViewOf:
    """One view operator with its arguments.

    Args:
        target: of PyTorch; its first argument is the tensor.
        args, kwargs: the other arguments.
        item: which of the results is meant, where there are several.
        like: a tensor of the result's shape and dtype.
    """

    target: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    item: int | None
    like: Tensor

    def __call__(self, tensor: Tensor) -> Tensor:
        result = self.target(tensor, *self.args, **self.kwargs)
        return result if self.item is None else result[self.item]


@dataclass(frozen=True, eq=False)
class Lazy:
    """A tensor of the network: a value seen through views that nothing has asked for yet.

    Args:
        base: the value.
        chain: the views, first to last.
        shape: after all of them.
    """

    base: Value
    chain: tuple[ViewOf, ...]
    shape: tuple[int, ...]

    @property
    def dtype(self) -> torch.dtype:
        return self.base.dtype

    @classmethod
    def of(cls, value: Value) -> "Lazy":
        return cls(value, (), value.shape)

    def then(self, view: ViewOf) -> "Lazy":
        return Lazy(self.base, (*self.chain, view), tuple(view.like.shape))

    def places(self) -> Tensor:
        """For each element where it lies in the memory of the base."""
        others = [n for i, n in enumerate(self.base.shape) if i != self.base.axis]
        numbers = torch.arange(self.base.pixels * self.base.channels)
        return self._seen(numbers.view(*others, self.base.channels).movedim(-1, self.base.axis))

    def is_flat(self) -> bool:
        """Whether it is the base as ``(N, everything else)``, in PyTorch's order."""
        shape = self.base.shape
        if len(self.shape) != 2 or self.shape != (shape[0], math.prod(shape[1:])):
            return False
        numbers = torch.arange(math.prod(shape)).view(shape)
        return torch.equal(self._seen(numbers), numbers.flatten(1))

    def _seen(self, tensor: Tensor) -> Tensor:
        for view in self.chain:
            tensor = view(tensor)
        return tensor


@dataclass(frozen=True)
class Seen:
    """What a chain of views amounts to.

    Args:
        order: channels that are taken, in this order; None for all as they are.
        axis: of the channels in the result.
    """

    order: tuple[int, ...] | None
    axis: int


def recognise(lazy: Lazy) -> Seen | None:
    """The chain as a gather of channels, and the same memory under another shape; None where it is
    anything else."""
    if not lazy.shape or not all(lazy.shape):
        return None
    places, channels = lazy.places(), lazy.base.channels
    for axis in _axes(len(lazy.shape)):
        rows = places.movedim(axis, -1).reshape(-1, lazy.shape[axis])
        flat = rows.reshape(-1)
        if len(flat) == lazy.base.pixels * channels and _counts(flat):
            return Seen(None, axis)
        if len(rows) == lazy.base.pixels and int(rows[0].max()) < channels:
            steps = rows - channels * torch.arange(len(rows))[:, None]
            if bool((steps == rows[0]).all()):
                return Seen(tuple(rows[0].tolist()), axis)
    return None


def _axes(dims: int) -> list[int]:
    """Where channels may be, the likeliest first."""
    likely = [1, dims - 1] if dims == 4 else [dims - 1, 1]
    return [axis for axis in dict.fromkeys(likely) if axis < dims]


def _counts(numbers: Tensor) -> bool:
    return torch.equal(numbers, torch.arange(len(numbers)))
