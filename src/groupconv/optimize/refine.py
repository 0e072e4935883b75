"""A partition improved step by step, each step exact: outputs reassigned, inputs swapped."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from groupconv.optimize.exchange import Group
from groupconv.optimize.partition import Partition, assign
from groupconv.optimize.schur import Regression

# Swaps at once, per group: their gains are exact one by one, not together.
_AT_ONCE = 0.125
# Pairs to choose disjoint ones from, for every swap.
_LOOKED_AT = 64
# Gains below this share of the total are noise.
_TOLERANCE = 1e-6
# Swaps made at once are kept if they gain this share of the sum of their own gains.
_KEPT = 0.5


@dataclass(frozen=True)
class Refined:
    """A partition, its loss and the steps it took.

    Args:
        partition: the groups.
        loss: see :meth:`Regression.loss`.
        swaps: pairs of input channels that changed their groups.
        converged: whether no swap was left that gains anything.
    """

    partition: Partition
    loss: float
    swaps: int
    converged: bool


def refine(
    problem: Regression,
    start: Partition,
    *,
    rounds: int,
    keep_in: bool = False,
    keep_out: bool = False,
) -> Refined:
    """Improve a partition until nothing does, or for so many rounds.

    A round assigns the outputs to the groups that explain them best, as balanced sets and exactly,
    and then swaps input channels between groups, those first that gain most. The loss never rises.

    Args:
        problem: of the layer.
        start: where to begin.
        rounds: of swaps, at most; with 0 only the outputs are assigned.
        keep_in, keep_out: leave the groups of the inputs or of the outputs as they are.
    """
    groups = start.groups
    width_in, width_out = problem.in_channels // groups, problem.out_channels // groups
    state = [
        Group(problem, start.in_order[q * width_in : (q + 1) * width_in]) for q in range(groups)
    ]
    labels = torch.empty(problem.out_channels, dtype=torch.int64)
    labels[list(start.out_order)] = torch.arange(groups).repeat_interleave(width_out)
    # Groups of one input and free outputs differ only in their numbers.
    keep_in = keep_in or groups == 1 or (width_in == 1 and not keep_out)
    limit, swaps, converged = max(1, int(_AT_ONCE * width_in) * groups), 0, keep_in
    for step in range(rounds + 1):
        if not keep_out:
            labels = _best_outputs(state, labels)
        if keep_in or step == rounds:
            break
        made = _swap(state, labels, limit, problem.total)
        swaps += made
        # What had to be halved this time begins lower the next.
        limit = min(limit, 2 * made)
        if made == 0:
            converged = True
            break
    orders = [
        torch.cat([group.channels.sort().values for group in state]),
        torch.argsort(labels, stable=True),
    ]
    if keep_in:
        orders[0] = torch.tensor(start.in_order)
    if keep_out:
        orders[1] = torch.tensor(start.out_order)
    in_order, out_order = (tuple(order.tolist()) for order in orders)
    partition = Partition(groups, in_order, out_order)
    # From fresh factors: those of the search carry the rounding of many updates.
    return Refined(partition, problem.loss(partition), swaps, converged)


def _best_outputs(state: list[Group], labels: Tensor) -> Tensor:
    """Outputs assigned to the groups that explain most of them; as they were if nothing is won."""
    each = torch.stack([group.explained() for group in state], 1)
    found = torch.from_numpy(assign(each.numpy(), len(state)))
    now, then = (float(each.gather(1, x[:, None]).sum()) for x in (labels, found))
    return found if then > now else labels


def _explained(state: list[Group], labels: Tensor) -> float:
    return sum(float(group.explained()[labels == q].sum()) for q, group in enumerate(state))


def _swap(state: list[Group], labels: Tensor, limit: int, total: float) -> int:
    """Swap the best disjoint pairs, at most ``limit`` of them; returns how many were swapped."""
    pairs = _best_swaps(state, labels, limit, total)
    before = _explained(state, labels)
    while pairs:
        exchange(state, [(a, b) for _, a, b in pairs])
        gained = _explained(state, labels) - before
        if gained >= _KEPT * sum(gain for gain, _, _ in pairs):
            return len(pairs)
        exchange(state, [(b, a) for _, a, b in pairs])
        pairs = pairs[: len(pairs) // 2]
    return 0


def _best_swaps(
    state: list[Group], labels: Tensor, limit: int, total: float
) -> list[tuple[float, int, int]]:
    """Gains and channels of the best swaps, no channel in two of them."""
    channels = state[0].problem.in_channels
    gains = torch.empty(channels, channels, dtype=torch.float64)
    for q, group in enumerate(state):
        gains[group.channels] = group.gains(torch.nonzero(labels == q)[:, 0])
    return disjoint(gains + gains.T, limit, _TOLERANCE * total)


def disjoint(gains: Tensor, limit: int, least: float) -> list[tuple[float, int, int]]:
    """Gains and items of the best pairs, no item in two of them.

    Args:
        gains: ``(n, n)``, symmetric.
        limit: at most so many pairs.
        least: only pairs that gain more.
    """
    upper = gains.triu(1).flatten()
    best = torch.topk(upper, min(len(upper), _LOOKED_AT * limit))
    pairs: list[tuple[float, int, int]] = []
    used: set[int] = set()
    for gain, index in zip(best.values.tolist(), best.indices.tolist(), strict=True):
        a, b = divmod(index, len(gains))
        if gain <= least or len(pairs) == limit:
            break
        if a not in used and b not in used:
            pairs.append((gain, a, b))
            used.update((a, b))
    return pairs


def exchange(state: Sequence[Group], pairs: Sequence[tuple[int, int]]) -> None:
    """Swap the channels of every pair between their groups."""
    place = {
        channel: (q, i)
        for q, group in enumerate(state)
        for i, channel in enumerate(group.channels.tolist())
    }
    changes: dict[int, list[tuple[int, int]]] = {}
    for pair in pairs:
        for leaving, entering in (pair, pair[::-1]):
            q, i = place[leaving]
            changes.setdefault(q, []).append((i, entering))
    for q, moves in changes.items():
        state[q].exchange(*zip(*moves, strict=True))
