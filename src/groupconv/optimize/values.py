"""Where the channels of a value stand, and how they move.

Operators that only move elements (views, transpositions, concatenation, slices, pixel shuffle) need
no rule each: they are run on tensors that hold, in place of every element, the cell it comes from.
What they return says where each channel went.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from groupconv.optimize.ties import Cells, Hashes, Ties, mix, ranks, sums

# In place of a cell: elements that come from no known channel, and elements that do not exist.
NOWHERE, NOTHING = -1, -2


@dataclass(frozen=True)
class Channels:
    """A value of which position ``p`` along ``axis`` is the channel ``cells[p]``."""

    axis: int
    cells: Cells


@dataclass(frozen=True)
class Layer:
    """For every element of a value one that it comes from: its cell, and its place in the cell."""

    cells: Tensor
    places: Tensor

    def map(self, function: Callable[[Tensor], Tensor]) -> "Layer":
        return Layer(function(self.cells), function(self.places))


@dataclass(frozen=True)
class Scattered:
    """A value whose channels lie along no single axis, such as one half of a channel shuffle."""

    layers: tuple[Layer, ...]


Value = Channels | Scattered | None


def spread(value: Channels | Scattered, shape: Sequence[int]) -> tuple[Layer, ...]:
    """The layers of a value of that shape."""
    if isinstance(value, Scattered):
        return value.layers
    ones = [1] * len(shape)
    ones[value.axis] = -1
    cells = torch.from_numpy(value.cells).view(ones)
    others = [1 if axis == value.axis else size for axis, size in enumerate(shape)]
    places = torch.arange(int(np.prod(others))).view(others)
    return (Layer(cells.expand(*shape), places.expand(*shape)),)


def settle(ties: Ties, layers: tuple[Layer, ...]) -> Value:
    """The value of these layers: along one axis if there is one, as it is otherwise."""
    shape = layers[0].cells.shape
    # The usual axis first: a single channel lies along any.
    for axis in sorted(range(len(shape)), key=lambda a: (shape[a] == 1, a != 1, a)):
        if all(_along(layer.cells, axis) for layer in layers):
            return Channels(axis, gather(ties, layers, axis))
    return Scattered(layers)


def gather(ties: Ties, layers: Sequence[Layer], axis: int) -> Cells:
    """New cells, one for each index of an axis, tied to all that their elements come from."""
    length = layers[0].cells.shape[axis]
    froms, labels, owners = [], [], []
    for number, layer in enumerate(layers):
        cells, places = (
            t.movedim(axis, 0).reshape(length, -1).numpy() for t in (layer.cells, layer.places)
        )
        if _along(layer.cells, axis):
            # One cell in each row: the hash of its row is the label.
            columns = mix(number, np.arange(cells.shape[1]), places)
            froms.append(cells[:, 0])
            labels.append(columns.sum(1, dtype=np.uint64))
            owners.append(np.arange(length))
        else:
            rows = np.repeat(np.arange(length), cells.shape[1])
            columns = np.tile(np.arange(cells.shape[1]), length)
            pairs = np.stack([rows, cells.ravel()], 1)
            unique, index = np.unique(pairs, axis=0, return_inverse=True)
            hashes = mix(number, columns, places.ravel())
            froms.append(unique[:, 1])
            labels.append(sums(index.ravel(), hashes, len(unique)))
            owners.append(unique[:, 0])
    source, label, owner = np.concatenate(froms), np.concatenate(labels), np.concatenate(owners)
    known = source >= 0
    new = tied(ties, length, source[known], label[known], owner[known])
    if (source == NOWHERE).any():
        lost = np.unique(owner[source == NOWHERE])
        ties.fix(new[lost], "holds elements that come from no known channel")
    return new


def tied(ties: Ties, length: int, sources: Cells, labels: Hashes, owner: Cells) -> Cells:
    """New cells, tied to sources by edges that the cells of index ``owner`` have.

    Cells that would be copies of each other are numbered; which copy is which is free.
    """
    new = ties.open(length)
    rows = sums(owner, mix(sources, labels), length)
    ties.tie(new[owner], sources, mix(labels, ranks(rows)[owner]))
    return new


def _along(cells: Tensor, axis: int) -> bool:
    """Whether the cells differ along this axis alone."""
    index = [slice(0, 1)] * cells.ndim
    index[axis] = slice(None)
    first = cells[tuple(index)]
    # Axes that were expanded have a stride of 0: no need to look.
    shrunk = cells[tuple(slice(0, 1) if s == 0 else slice(None) for s in cells.stride())]
    return bool((shrunk == first).all())
