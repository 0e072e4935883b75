"""The order of every space, chosen so that layers find their channels where they want them."""

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from groupconv.optimize.partition import Partition
from groupconv.optimize.spaces import Axis, Space
from groupconv.optimize.trace import TracedConv


class Orders:
    """Orders that layers claim one after the other; a claimed order stays.

    Args:
        spaces: of the trace.
        orders: space to the original strand in the place of each strand, so far.
    """

    def __init__(
        self, spaces: Sequence[Space], orders: Mapping[int, tuple[int, ...]] | None = None
    ) -> None:
        self.spaces = spaces
        self.orders = dict(orders or {})

    def channels(self, axis: Axis) -> tuple[int, ...]:
        """The original channel at each position of an axis."""
        return axis.channels(self.orders)

    def free(self, axis: Axis) -> bool:
        """Whether the axis may still take any order."""
        return axis.space is not None and not self._settled(axis.space)

    def claim(self, axis: Axis, order: Sequence[int], groups: int) -> bool:
        """Order what stands on an axis so that each group holds the channels that ``order`` lists.

        Args:
            axis: cut into equal runs, one for each group.
            order: original channels, group by group; their order within a group is only a wish.
            groups: divides the length of the axis.

        Returns:
            whether it could be done; nothing is claimed otherwise.
        """
        place = np.argsort(order)
        width = len(order) // groups
        here, wanted = np.arange(len(order)) // width, place // width
        claimed = {}
        for space, positions in axis.parts.items():
            has, wants = here[positions], wanted[positions]
            if self._settled(space):
                now = list(self.orders.get(space, range(len(positions))))
                if not np.array_equal(wants[now], has):
                    return False
                continue
            # Strands whose positions lie in the same groups as another's may take its place.
            seats = np.lexsort(has.T)
            guests = np.lexsort((place[positions[:, 0]], *wants.T))
            if not np.array_equal(has[seats], wants[guests]):
                return False
            chosen = np.empty(len(positions), dtype=np.int64)
            chosen[seats] = guests
            claimed[space] = tuple(chosen.tolist())
        self.orders |= claimed
        return True

    def place(self, conv: TracedConv, partition: Partition) -> tuple[Partition, bool, bool]:
        """Claim both sides of a layer, its groups numbered so that as much as can be is absorbed.

        Returns:
            the partition with its groups in that order, and whether its input and its output
            channels stand as it wants them.
        """
        tries = [partition]
        for axis, order in (
            (conv.inputs, partition.in_order),
            (conv.outputs, partition.out_order),
        ):
            tries.append(_renumbered(partition, self._numbers(axis, order, partition.groups)))
        best, held = (partition, False, False), self.orders
        for number, tried in enumerate(tries):
            trial = Orders(self.spaces, self.orders)
            absorbed_in = trial.claim(conv.inputs, tried.in_order, tried.groups)
            absorbed_out = trial.claim(conv.outputs, tried.out_order, tried.groups)
            if number == 0 or absorbed_in + absorbed_out > best[1] + best[2]:
                best, held = (tried, absorbed_in, absorbed_out), trial.orders
        self.orders = held
        return best

    def _settled(self, space: int) -> bool:
        return space in self.orders or self.spaces[space].fixed is not None

    def _numbers(self, axis: Axis, order: Sequence[int], groups: int) -> NDArray[np.int64]:
        """Which group of the partition the settled channels of each run speak for."""
        width = len(order) // groups
        wanted = (np.argsort(order) // width)[list(self.channels(axis))]
        settled = np.array([self._settled(space) for space in axis.spaces])
        votes = np.zeros((groups, groups))
        np.add.at(votes, (np.arange(len(order)) // width, wanted), settled)
        # Here, because scipy's own BLAS starts its threads when it is imported.
        from scipy.optimize import linear_sum_assignment

        return linear_sum_assignment(votes, maximize=True)[1]


def exact_orders(
    spaces: Sequence[Space], axis: Axis, wanted: Sequence[int]
) -> dict[int, tuple[int, ...]] | None:
    """Orders that put the original channel ``wanted[i]`` at position ``i``, if there are any."""
    want = np.asarray(wanted)
    orders = {}
    for index, positions in axis.parts.items():
        at = {tuple(row): strand for strand, row in enumerate(positions.tolist())}
        order = [at.get(tuple(row)) for row in want[positions].tolist()]
        moved = order != list(range(len(order)))
        if None in order or (moved and spaces[index].fixed is not None):
            return None
        orders[index] = tuple(strand for strand in order if strand is not None)
    return orders


def _renumbered(partition: Partition, numbers: NDArray[np.int64]) -> Partition:
    """The same groups in another order."""
    sides = (
        tuple(np.reshape(order, (partition.groups, -1))[numbers].ravel().tolist())
        for order in (partition.in_order, partition.out_order)
    )
    return Partition(partition.groups, *sides)
