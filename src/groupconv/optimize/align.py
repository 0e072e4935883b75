"""One order for all layers that share a space of channels, improved by swaps that help them all.

The output channels of one layer are the input channels of others, and a residual sum ties many
layers to one order. Swapping two strands of a space moves a channel of every layer that reads it
and an output of every layer that writes it; the gains of the layers add up, each weighted by what
its loss costs the network.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from groupconv.optimize.exchange import Group
from groupconv.optimize.orders import Orders
from groupconv.optimize.partition import Partition
from groupconv.optimize.refine import disjoint, exchange
from groupconv.optimize.schur import Regression
from groupconv.optimize.spaces import Axis

# Swaps at once, as a share of the strands: their gains are exact one by one, not together.
_AT_ONCE = 0.125
# Swaps made at once are kept if they gain this share of the sum of their own gains.
_KEPT = 0.5
# Gains below this share of the weighted total are noise.
_TOLERANCE = 1e-6


@dataclass(frozen=True)
class GroupedLayer:
    """A layer whose groups follow the orders of the spaces.

    Args:
        name: of the layer.
        problem: its regression, or the separable one in its place.
        partition: its groups, consistent with the orders on the sides that follow them.
        inputs, outputs: the axes that follow the orders; None for a side that has an explicit
            permutation of its own.
        weight: what losing all of the layer's variance costs the network.
    """

    name: str
    problem: Regression
    partition: Partition
    inputs: Axis | None
    outputs: Axis | None
    weight: float


class _Layer:
    """The groups of a layer while its channels are moved."""

    def __init__(self, layer: GroupedLayer) -> None:
        self.problem, partition = layer.problem, layer.partition
        self.weight = layer.weight / max(layer.problem.total, 1e-300)
        inputs, outputs = (
            torch.tensor(order).chunk(partition.groups)
            for order in (partition.in_order, partition.out_order)
        )
        self.groups = [Group(layer.problem, channels.tolist()) for channels in inputs]
        self.labels = torch.empty(len(partition.out_order), dtype=torch.int64)
        for q, channels in enumerate(outputs):
            self.labels[channels] = q

    def explained(self) -> float:
        """Weighted variance that the groups explain."""
        each = (group.explained()[self.labels == q].sum() for q, group in enumerate(self.groups))
        return self.weight * sum(float(part) for part in each)


class _Input:
    """The input side of a layer on a space."""

    def __init__(self, layer: _Layer, channels: Tensor) -> None:
        self.layer, self.channels = layer, channels

    def gains(self, order: Tensor) -> Tensor:
        """``(n, n)``: what swapping the strands at two places of the space gains."""
        layer = self.layer
        by_channel = torch.empty((layer.problem.in_channels,) * 2, dtype=torch.float64)
        for q, group in enumerate(layer.groups):
            by_channel[group.channels] = group.gains(torch.nonzero(layer.labels == q)[:, 0])
        at = self.channels[order]
        pairs = by_channel[at[:, None], at]
        # Two channels of one group: nothing moves.
        return layer.weight * torch.where(pairs.isinf(), 0.0, pairs + pairs.T)

    def swap(self, pairs: Sequence[tuple[int, int]]) -> None:
        """Swap pairs of strands."""
        of_group = torch.empty(self.layer.problem.in_channels, dtype=torch.int64)
        for q, group in enumerate(self.layer.groups):
            of_group[group.channels] = q
        moved = [(int(self.channels[a]), int(self.channels[b])) for a, b in pairs]
        exchange(self.layer.groups, [(a, b) for a, b in moved if of_group[a] != of_group[b]])


class _Output:
    """The output side of a layer on a space."""

    def __init__(self, layer: _Layer, channels: Tensor) -> None:
        self.layer, self.channels = layer, channels

    def gains(self, order: Tensor) -> Tensor:
        """``(n, n)``: what swapping the strands at two places of the space gains."""
        layer, at = self.layer, self.channels[order]
        each = torch.stack([group.explained() for group in layer.groups], 1)[at]
        there = each[:, layer.labels[at]]
        moved = there - there.diagonal()[:, None]
        return layer.weight * (moved + moved.T)

    def swap(self, pairs: Sequence[tuple[int, int]]) -> None:
        """Swap pairs of strands."""
        a, b = self.channels[torch.tensor(pairs)].T
        labels = self.layer.labels.clone()
        self.layer.labels[a], self.layer.labels[b] = labels[b], labels[a]


def align(orders: Orders, layers: Sequence[GroupedLayer], *, rounds: int) -> dict[str, Partition]:
    """Improve the orders of all spaces that grouped layers touch.

    A round swaps strands in every space; the weighted loss never rises.

    Args:
        orders: claimed by the layers already; improved in place.
        layers: in any order.
        rounds: at most so many.

    Returns:
        layer name to its partition in the new orders.
    """
    shared = _sides(orders, layers)
    for _ in range(rounds):
        made = [_improve(orders, space, sides) for space, sides in shared.items()]
        if not any(made):
            break
    return {
        layer.name: Partition(
            layer.partition.groups,
            layer.partition.in_order if layer.inputs is None else orders.channels(layer.inputs),
            layer.partition.out_order if layer.outputs is None else orders.channels(layer.outputs),
        )
        for layer in layers
    }


def _sides(orders: Orders, layers: Sequence[GroupedLayer]) -> dict[int, list[_Input | _Output]]:
    """The sides of layers on every space that may change."""
    shared: dict[int, list[_Input | _Output]] = {}
    several: set[int] = set()
    for layer in layers:
        state = _Layer(layer)
        for axis, kind in ((layer.inputs, _Input), (layer.outputs, _Output)):
            for space, positions in (axis.parts if axis is not None else {}).items():
                side = kind(state, torch.from_numpy(positions[:, 0].copy()))
                shared.setdefault(space, []).append(side)
                if positions.shape[1] > 1:
                    several.add(space)
    # A strand of several channels would move them all at once: such spaces stay as claimed.
    return {
        space: sides
        for space, sides in sorted(shared.items())
        if space not in several and orders.spaces[space].fixed is None
    }


def _improve(orders: Orders, space: int, sides: Sequence[_Input | _Output]) -> int:
    """Swap the best disjoint pairs of strands of one space; returns how many were swapped."""
    count = orders.spaces[space].channels
    order = torch.tensor(orders.orders.get(space, range(count)))
    layers = {id(side.layer): side.layer for side in sides}.values()
    scale = sum(layer.weight * layer.problem.total for layer in layers)
    gains = torch.stack([side.gains(order) for side in sides]).sum(0)
    # Where a layer has both its ends on the space, even the gain of one pair is not exact: if the
    # best comes to nothing, the others have their turn, one by one.
    pairs = disjoint(gains, max(1, count // 2), _TOLERANCE * scale)
    found, others = pairs[: max(1, int(_AT_ONCE * count))], pairs[1:]
    before = sum(layer.explained() for layer in layers)
    while found:
        i, j = torch.tensor([(i, j) for _, i, j in found]).T
        strands = list(zip(order[i].tolist(), order[j].tolist(), strict=True))
        for side in sides:
            side.swap(strands)
        gained = sum(layer.explained() for layer in layers) - before
        if gained >= _KEPT * sum(gain for gain, _, _ in found):
            order[i], order[j] = order[j], order[i].clone()
            orders.orders[space] = tuple(order.tolist())
            return len(found)
        for side in sides:
            side.swap([(b, a) for a, b in strands])
        found = found[: len(found) // 2]
        if not found:
            found, others = others[:1], others[1:]
    return 0
