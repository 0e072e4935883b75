"""The menu: what may stand in place of a dense convolution.

So far: the layer as it is, and a grouped layer for every legal number of groups, with the channels
in given order where nothing can absorb a permutation, or with explicit permutations.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from groupconv.kernels.spec import ConvSpec, legal_groups
from groupconv.optimize.fit import fit
from groupconv.optimize.moments import Moments
from groupconv.optimize.partition import Partition, cluster, energy
from groupconv.optimize.trace import Trace, TracedConv


@dataclass(frozen=True)
class Candidate:
    """One entry of a layer's menu.

    Args:
        spec: of the convolution, with its number of groups.
        loss: predicted residual variance over output variance.
        start: what the partition comes from: "dense", "identity" or "energy".
        permute_in, permute_out: whether an explicit permutation stands before or after it.
    """

    spec: ConvSpec
    loss: float
    start: str
    permute_in: bool = False
    permute_out: bool = False

    @property
    def permuted(self) -> bool:
        """Whether it carries an explicit permutation."""
        return self.permute_in or self.permute_out


@dataclass(frozen=True)
class Menu:
    """The candidates of one layer, dense first, and the energies that partitions come from."""

    conv: TracedConv
    energy: NDArray[np.float64]
    candidates: tuple[Candidate, ...]


def by_priority(convs: Sequence[TracedConv]) -> list[TracedConv]:
    """The order in which layers choose the order of the channels they touch: costly ones first."""
    return sorted(convs, key=lambda conv: -conv.spec.macs)


def freedom(trace: Trace, convs: Sequence[TracedConv]) -> dict[str, tuple[bool, bool]]:
    """For each layer, whether it may choose the order of its inputs and of its outputs.

    It may where the order can change at all and no layer of higher priority touches it.
    """
    taken: set[int] = set()
    free: dict[str, tuple[bool, bool]] = {}
    for conv in by_priority(convs):
        sides = (conv.input_space, conv.output_space)
        open_in, open_out = (
            trace.spaces[space].fixed is None and space not in taken for space in sides
        )
        # A layer between two tensors of one space would need one order to serve both ends.
        free[conv.name] = (open_in, open_out and sides[0] != sides[1])
        taken.update(sides)
    return free


def menu(
    conv: TracedConv, weight: Tensor, moments: Moments, free: tuple[bool, bool], seed: int
) -> Menu:
    """Every structure for one dense layer, with its predicted loss.

    Args:
        conv: the dense layer.
        weight: ``(C_out, C_in, *k)``, trained.
        moments: of the layer in the original network.
        free: whether it may choose the order of its inputs and of its outputs.
        seed: of the partitions.
    """
    spec = conv.spec
    strength = energy(weight, moments)
    candidates = [Candidate(spec, 0.0, "dense")]
    given_in = None if free[0] else range(spec.in_channels)
    given_out = None if free[1] else range(spec.out_channels)
    for groups in legal_groups(spec.in_channels, spec.out_channels)[1:]:
        grouped = replace(spec, groups=groups)
        identity = Partition.identity(groups, spec.in_channels, spec.out_channels)
        absorbed = [(fit(moments, weight, identity).loss, "identity")]
        if any(free):
            clustered = cluster(strength, groups, given_in=given_in, given_out=given_out, seed=seed)
            absorbed.append((fit(moments, weight, clustered).loss, "energy"))
        candidates.append(Candidate(grouped, *min(absorbed)))
        if not all(free) and groups < spec.in_channels:
            explicit = fit(moments, weight, cluster(strength, groups, seed=seed))
            candidates.append(Candidate(grouped, explicit.loss, "energy", not free[0], not free[1]))
    return Menu(conv, strength, tuple(candidates))


def settle(
    trace: Trace, menus: Mapping[str, Menu], chosen: Mapping[str, Candidate], seed: int
) -> dict[str, Partition]:
    """Partitions of the chosen structures, each keeping the orders that others chose before it.

    Returns:
        layer name to partition, by priority; dense layers are left out.
    """
    orders: dict[int, Sequence[int]] = {
        index: range(space.channels)
        for index, space in enumerate(trace.spaces)
        if space.fixed is not None
    }
    grouped = [menus[name].conv for name, choice in chosen.items() if choice.spec.groups > 1]
    partitions: dict[str, Partition] = {}
    for conv in by_priority(grouped):
        choice, strength = chosen[conv.name], menus[conv.name].energy
        groups = choice.spec.groups
        given_in = None if choice.permute_in else orders.get(conv.input_space)
        given_out = None if choice.permute_out else orders.get(conv.output_space)
        if choice.start == "identity":
            given_in = given_in or range(conv.spec.in_channels)
            given_out = given_out or range(conv.spec.out_channels)
        elif conv.input_space == conv.output_space and given_out is None:
            given_out = range(conv.spec.out_channels)
        partition = cluster(strength, groups, given_in=given_in, given_out=given_out, seed=seed)
        partitions[conv.name] = partition
        orders.setdefault(conv.input_space, partition.in_order)
        orders.setdefault(conv.output_space, partition.out_order)
    return partitions
