"""The best partition of a layer: several starts, improved by swaps, judged by the exact loss.

The best map of each group is refitted, so what a cut costs is what the kept inputs can't predict of
the cut ones. Channels that feed the same outputs belong together; channels that predict each other
do not, as one of them speaks for both.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from groupconv.optimize.partition import Partition, cluster
from groupconv.optimize.refine import refine
from groupconv.optimize.schur import Regression

Order = tuple[int, ...]


@dataclass(frozen=True)
class Effort:
    """How long to search, in steps, so that the same data give the same partition.

    Args:
        starts: how many, of "energy", "spread", "improved identity", "random", "random 1" and so
            on; each is improved by swaps.
        reduced: rounds of swaps for each of them, in the problem of one number per channel.
        exact: rounds of swaps for the best of them, in the layer's own problem.
        finalists: how many are the best of them.
    """

    starts: int
    reduced: int
    exact: int
    finalists: int


# To judge the order given, to compare structures of all layers, and to settle the chosen ones.
GIVEN = Effort(starts=0, reduced=0, exact=0, finalists=0)
SCREEN = Effort(starts=1, reduced=4, exact=0, finalists=0)
THOROUGH = Effort(starts=6, reduced=30, exact=2, finalists=2)


@dataclass(frozen=True)
class Found:
    """The best partition and how it was found.

    Args:
        partition: the groups.
        loss: share of the layer's variance that is lost, see :meth:`Regression.loss`.
        start: the start that it comes from: "identity", the given order as it is; "improved
            identity", "energy", "spread", "random", "random 1" and so on, improved.
        losses: start to the exact loss that it came to in the reduced problem; the best of them
            were then improved in the layer's own.
    """

    partition: Partition
    loss: float
    start: str
    losses: dict[str, float]


class Search:
    """Partitions of one layer into any number of groups; what they share is computed once.

    Args:
        problem: of the layer.
        seed: of the random starts.
    """

    def __init__(self, problem: Regression, seed: int) -> None:
        self.problem, self.seed = problem, seed
        self.reduced = problem if problem.taps == 1 else problem.separable()
        h = self.reduced.h
        # Energy of an output through one channel alone.
        through = self.reduced.best.square() * h.diagonal()
        self.energy = through.reshape(problem.out_channels, -1, problem.in_channels).sum(1).numpy()
        deviation = h.diagonal().sqrt()
        self._found: dict[tuple[int, Effort, Order | None, Order | None], Found] = {}
        self.chain = _chain((h / torch.outer(deviation, deviation)).abs().numpy())

    def find(
        self,
        groups: int,
        *,
        effort: Effort = THOROUGH,
        given_in: Sequence[int] | None = None,
        given_out: Sequence[int] | None = None,
    ) -> Found:
        """The best balanced partition into so many groups; asked again, it is remembered.

        Args:
            groups: divides both channel counts.
            effort: see :class:`Effort`.
            given_in: None, or the order of input channels to be kept and cut into equal runs.
            given_out: the same for output channels.
        """
        sides = [None if order is None else tuple(order) for order in (given_in, given_out)]
        question = (groups, effort, sides[0], sides[1])
        if question not in self._found:
            self._found[question] = self._find(*question)
        return self._found[question]

    def _find(
        self, groups: int, effort: Effort, given_in: Order | None, given_out: Order | None
    ) -> Found:
        keep = {"keep_in": given_in is not None, "keep_out": given_out is not None}
        identity = Partition(
            groups,
            given_in or tuple(range(self.problem.in_channels)),
            given_out or tuple(range(self.problem.out_channels)),
        )
        found = {"identity": (self.problem.loss(identity), identity)}
        if not all(keep.values()):
            for name, start in self._starts(groups, identity, given_in, given_out, effort).items():
                improved = refine(self.reduced, start, rounds=effort.reduced, **keep).partition
                found[name] = (self.problem.loss(improved), improved)
        losses = {name: loss for name, (loss, _) in found.items()}
        improved_ones = sorted(losses.keys() - {"identity"}, key=lambda name: (losses[name], name))
        for name in improved_ones[: effort.finalists]:
            refined = refine(self.problem, found[name][1], rounds=effort.exact, **keep)
            if refined.loss < losses[name]:
                found[name] = (refined.loss, refined.partition)
        won = min(found, key=lambda name: found[name][0])
        return Found(found[won][1], found[won][0], won, losses)

    def _starts(
        self,
        groups: int,
        identity: Partition,
        given_in: Order | None,
        given_out: Order | None,
        effort: Effort,
    ) -> dict[str, Partition]:
        """Partitions to begin from; the outputs of most are yet to be assigned."""
        clustered = cluster(
            self.energy, groups, given_in=given_in, given_out=given_out, seed=self.seed
        )
        if given_in is not None:
            return {"energy": clustered}
        # Dealt out like cards: neighbours in the chain come to different groups.
        orders = {"spread": self.chain.reshape(-1, groups).T.flatten()}
        orders["improved identity"] = np.arange(self.problem.in_channels)
        rng = np.random.default_rng(self.seed)
        for i in range(effort.starts - 3):
            orders[f"random {i}" if i else "random"] = rng.permutation(self.problem.in_channels)
        starts = {"energy": clustered} | {
            name: Partition(groups, tuple(order.tolist()), identity.out_order)
            for name, order in orders.items()
        }
        return dict(list(starts.items())[: effort.starts])


def _chain(likeness: NDArray[np.float64]) -> NDArray[np.int64]:
    """An order in which each item is followed by the one most like it of those left."""
    left = likeness.copy()
    np.fill_diagonal(left, -1)
    order = [int(left.max(1).argmax())]
    for _ in range(len(left) - 1):
        left[:, order[-1]] = -1
        order.append(int(left[order[-1]].argmax()))
    return np.array(order)
