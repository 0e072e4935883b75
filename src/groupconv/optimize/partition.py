"""Which channels share a group.

A partition names, for every group, as many input channels as for any other and as many output
channels. ``in_order`` lists the input channels of group 0, then of group 1, and so on.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

# Random starts: fewer for wide layers, whose assignments take longer.
_STARTS = 16
_STARTS_TIMES_CHANNELS = 2_048
_ROUNDS = 8
_PRICE_ROUNDS = 2
# Paths between few groups of many channels are faster than a general assignment: for 8 groups
# 2 to 4 times for 256 channels, 20 to 60 times for 1,024; for 128 it depends on the gains.
_FEW_GROUPS, _FEW_CHANNELS = 16, 64


@dataclass(frozen=True)
class Partition:
    """Input and output channels listed group by group; every group holds equally many."""

    groups: int
    in_order: tuple[int, ...]
    out_order: tuple[int, ...]

    @classmethod
    def identity(cls, groups: int, in_channels: int, out_channels: int) -> "Partition":
        """Channels in the given order, cut into equal runs."""
        return cls(groups, tuple(range(in_channels)), tuple(range(out_channels)))


def cluster(
    energy: NDArray[np.float64],
    groups: int,
    *,
    given_in: Sequence[int] | None = None,
    given_out: Sequence[int] | None = None,
    seed: int = 0,
) -> Partition:
    """Balanced co-clustering: keep as much energy as possible inside the groups.

    Outputs are assigned to the groups of inputs that feed them most, then inputs to the groups of
    outputs that use them most, in turn, each exactly (a balanced assignment problem); the best of
    several random starts is kept.

    Args:
        energy: ``(C_out, C_in)``, of every output through every input; not negative.
        groups: divides both.
        given_in: None, or the order of input channels to be kept and cut into equal runs.
        given_out: the same for output channels.
        seed: of the starts.
    """
    in_channels = energy.shape[1]
    rng = np.random.default_rng(seed)
    fixed_in = None if given_in is None else _labels_of(given_in, groups)
    fixed_out = None if given_out is None else _labels_of(given_out, groups)
    # With one side given, every start ends alike.
    starts = min(_STARTS, max(1, _STARTS_TIMES_CHANNELS // max(energy.shape)))
    if given_in is not None or given_out is not None:
        starts = 1
    results = []
    for _ in range(starts):
        start = rng.permutation(np.repeat(np.arange(groups), in_channels // groups))
        labels = _alternate(
            energy, groups, start if fixed_in is None else fixed_in, fixed_in, fixed_out
        )
        results.append(labels)
    best_in, best_out = max(
        results, key=lambda labels: energy[labels[1][:, None] == labels[0][None, :]].sum()
    )
    in_order = np.argsort(best_in, kind="stable") if given_in is None else np.array(given_in)
    out_order = np.argsort(best_out, kind="stable") if given_out is None else np.array(given_out)
    return Partition(groups, tuple(in_order.tolist()), tuple(out_order.tolist()))


def _alternate(
    energy: NDArray[np.float64],
    groups: int,
    in_labels: NDArray[np.int64],
    fixed_in: NDArray[np.int64] | None,
    fixed_out: NDArray[np.int64] | None,
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Labels of inputs and outputs, each side assigned in turn until nothing moves."""
    out_labels = np.empty(0, np.int64) if fixed_out is None else fixed_out
    for _ in range(_ROUNDS):
        if fixed_out is None:
            out_labels = assign(_sum_by_label(energy.T, in_labels, groups), groups)
        if fixed_in is not None:
            break
        moved = assign(_sum_by_label(energy, out_labels, groups), groups)
        if np.array_equal(moved, in_labels):
            break
        in_labels = moved
    return in_labels, out_labels


def _labels_of(order: Sequence[int], groups: int) -> NDArray[np.int64]:
    labels = np.empty(len(order), np.int64)
    labels[list(order)] = np.repeat(np.arange(groups), len(order) // groups)
    return labels


def _sum_by_label(
    energy: NDArray[np.float64], labels: NDArray[np.int64], groups: int
) -> NDArray[np.float64]:
    """``(columns, groups)``: for each column, the energy of the rows of every label."""
    return np.stack([energy[labels == q].sum(0) for q in range(groups)], 1)


def assign(gain: NDArray[np.float64], groups: int) -> NDArray[np.int64]:
    """Labels of equal count that maximise the summed gain; ``gain`` is ``(channels, groups)``."""
    if groups <= _FEW_GROUPS and len(gain) > _FEW_CHANNELS:
        return _transport(gain, groups)
    # Here, because scipy's own BLAS starts its threads when it is imported.
    from scipy.optimize import linear_sum_assignment

    room = len(gain) // groups
    rows, columns = linear_sum_assignment(np.repeat(gain, room, axis=1), maximize=True)
    labels = np.empty(len(gain), np.int64)
    labels[rows] = columns // room
    return labels


def _transport(gain: NDArray[np.float64], groups: int) -> NDArray[np.int64]:
    """The same by shortest augmenting paths between the groups, of which there are few.

    Every channel starts in the group where it gains most at prices that nearly fill the groups
    alike, which is the optimum for the counts that this gives. Then one at a time leaves a group
    that is too full, by the chain of moves that loses least and ends in a group with room; that
    keeps the labels optimal for the counts as they are (Ahuja, Magnanti and Orlin, *Network Flows*,
    1993, section 9.7).
    """
    assert np.isfinite(gain).all()
    room = len(gain) // groups
    labels = (gain - _prices(gain, groups)).argmax(1)
    counts = np.bincount(labels, minlength=groups)
    # Loss of the cheapest move from one group to another, and the channel that makes it.
    loss = np.full((groups, groups), np.inf)
    mover = np.zeros((groups, groups), np.int64)
    everyone = np.arange(groups)

    def look(group: int) -> None:
        members = np.flatnonzero(labels == group)
        loss[group] = np.inf
        if len(members):
            losses = gain[members, group, None] - gain[members]
            cheapest = losses.argmin(0)
            mover[group], loss[group] = members[cheapest], losses[cheapest, everyone]
            loss[group, group] = np.inf

    for group in range(groups):
        look(group)
    tolerance = 1e-12 * np.abs(gain).max()
    for _ in range(int((counts - room).clip(min=0).sum())):
        distance = np.where(counts > room, 0.0, np.inf)
        previous = np.full(groups, -1)
        while True:
            through = distance[:, None] + loss
            by = through.argmin(0)
            reached = through[by, everyone]
            shorter = reached < distance - tolerance
            if not shorter.any():
                break
            distance[shorter], previous[shorter] = reached[shorter], by[shorter]
        path = [int(np.where(counts < room, distance, np.inf).argmin())]
        while previous[path[-1]] >= 0:
            path.append(int(previous[path[-1]]))
        moved = [mover[source, target] for target, source in itertools.pairwise(path)]
        labels[moved] = path[:-1]
        counts[path[0]] += 1
        counts[path[-1]] -= 1
        for group in path:
            look(group)
    return labels


def _prices(gain: NDArray[np.float64], groups: int) -> NDArray[np.float64]:
    """What each group charges so that about equally many channels want it.

    Coordinate descent on the dual: in turn each takes what its ``room``-th keenest channel would
    just pay.
    """
    room = len(gain) // groups
    edge = [len(gain) - room - 1, len(gain) - room]
    prices = np.zeros(groups)
    for _ in range(_PRICE_ROUNDS):
        for group in range(groups):
            worth = gain - prices
            worth[:, group] = -np.inf
            keen = gain[:, group] - worth.max(1)
            # Between the last that gets in and the first that does not.
            prices[group] = np.partition(keen, edge)[edge].mean()
    return prices
