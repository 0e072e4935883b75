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

    def seen(self, target: Callable[..., Any], *args: Any) -> "Lazy":
        """Through one more view."""
        like = target(torch.empty(self.shape, dtype=self.dtype, device="meta"), *args)
        return self.then(ViewOf(target, args, {}, None, like))

    def places(self) -> Tensor:
        """For each element where it lies in the memory of the base."""
        others = [n for i, n in enumerate(self.base.shape) if i != self.base.axis]
        numbers = torch.arange(self.base.pixels * self.base.channels)
        whole = numbers.view(*others, self.base.channels).movedim(-1, self.base.axis)
        return self.through(whole)

    def is_flat(self) -> bool:
        """Whether it is the base as ``(N, everything else)``, in PyTorch's order."""
        shape = self.base.shape
        if len(self.shape) != 2 or self.shape != (shape[0], math.prod(shape[1:])):
            return False
        numbers = torch.arange(math.prod(shape)).view(shape)
        return torch.equal(self.through(numbers), numbers.flatten(1))

    def through(self, tensor: Tensor) -> Tensor:
        """Another tensor seen as the base is."""
        for view in self.chain:
            tensor = view(tensor)
        return tensor


@dataclass(frozen=True)
class Seen:
    """What a chain of views amounts to: a gather, and the same memory under another shape.

    Args:
        order: channels that are taken of each pixel, in this order; None for all as they are.
        axis: of the channels in the result.
    """

    order: tuple[int, ...] | None
    axis: int


def recognise(lazy: Lazy) -> Seen | None:
    """The chain as a gather of channels; None where it moves numbers between pixels."""
    places, pixels, channels = lazy.places(), lazy.base.pixels, lazy.base.channels
    if not places.ndim or not places.numel() or places.numel() % pixels:
        return None
    starts = channels * torch.arange(pixels)[:, None]
    for axis in _axes(places.ndim):
        taken = places.movedim(axis, -1).reshape(pixels, -1) - starts
        order = taken[0]
        if int(order.max()) < channels and bool((taken == order).all()):
            whole = torch.equal(order, torch.arange(channels))
            return Seen(None if whole else tuple(order.tolist()), axis)
    return None


@dataclass(frozen=True)
class Cropped:
    """Some rows and columns of images; of each, rows first.

    Args:
        sides: how many are left out before and after.
        steps: from one that is taken to the next.
    """

    sides: tuple[tuple[int, int], tuple[int, int]]
    steps: tuple[int, int]


def cropped(lazy: Lazy) -> Cropped | None:
    """The chain as rows and columns of ``(N, C, H, W)``; None where it is anything else."""
    shape = lazy.base.shape
    if len(shape) != 4 or len(lazy.shape) != 4 or lazy.shape[:2] != shape[:2]:
        return None
    numbers = torch.arange(math.prod(shape)).view(shape)
    taken = lazy.through(numbers)
    first = divmod(int(taken[0, 0, 0, 0]), shape[3])
    if first[0] >= shape[2]:
        # Another channel comes first.
        return None
    sides, steps = [], []
    for axis, start in enumerate(first, 2):
        count = taken.shape[axis]
        second = taken.select(axis, min(1, count - 1))[0, 0, 0]
        step = max(1, int(second - taken[0, 0, 0, 0]) // (shape[3] if axis == 2 else 1))
        last = start + step * (count - 1)
        sides.append((start, shape[axis] - 1 - last))
        steps.append(step)
        numbers = numbers.narrow(axis, start, min(shape[axis], last + 1) - start)
    if not torch.equal(taken, numbers[:, :, :: steps[0], :: steps[1]]):
        return None
    return Cropped((sides[0], sides[1]), (steps[0], steps[1]))


def _axes(dims: int) -> list[int]:
    """Where channels may be, the likeliest first."""
    likely = [1, dims - 1] if dims == 4 else [dims - 1, 1]
    return [axis for axis in dict.fromkeys(likely) if axis < dims]
