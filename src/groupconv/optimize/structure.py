"""The menu: what may stand in place of a dense convolution.

So far: the layer as it is, and a grouped layer for every legal number of groups, with the channels
in given order where nothing can absorb a permutation, or with explicit permutations.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from groupconv.kernels.spec import ConvSpec, legal_groups
from groupconv.optimize.covariance import Moments, SeparableMoments
from groupconv.optimize.orders import Orders
from groupconv.optimize.partition import Partition
from groupconv.optimize.schur import Regression
from groupconv.optimize.search import SCREEN, Search
from groupconv.optimize.trace import Trace, TracedConv


@dataclass(frozen=True)
class Candidate:
    """One entry of a layer's menu.

    Args:
        spec: of the convolution, with its number of groups.
        loss: predicted residual variance over output variance.
        start: what the partition comes from: "dense", or the start of :class:`Found`.
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
    """The candidates of one layer, dense first, and the search that partitions come from."""

    conv: TracedConv
    search: Search
    candidates: tuple[Candidate, ...]


def by_priority(convs: Sequence[TracedConv]) -> list[TracedConv]:
    """The order in which layers choose the order of the channels they touch: costly ones first."""
    return sorted(convs, key=lambda conv: -conv.spec.macs)


def freedom(trace: Trace, convs: Sequence[TracedConv]) -> dict[str, tuple[bool, bool]]:
    """For each layer, whether it may choose the order of its inputs and of its outputs.

    It may where the order can change at all and no layer of higher priority touches it.
    """
    orders = Orders(trace.spaces)
    free: dict[str, tuple[bool, bool]] = {}
    for conv in by_priority(convs):
        open_in, open_out = orders.free(conv.inputs), orders.free(conv.outputs)
        # A layer between two tensors of one space would need one order to serve both ends.
        free[conv.name] = (open_in, open_out and conv.inputs.space != conv.outputs.space)
        for axis in (conv.inputs, conv.outputs):
            orders.claim(axis, orders.channels(axis), 1)
    return free


def menu(
    conv: TracedConv,
    weight: Tensor,
    moments: Moments | SeparableMoments,
    free: tuple[bool, bool],
    seed: int,
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
    search = Search(Regression.of(moments, weight), seed)
    candidates = [Candidate(spec, 0.0, "dense")]
    given_in = None if free[0] else range(spec.in_channels)
    given_out = None if free[1] else range(spec.out_channels)
    for groups in legal_groups(spec.in_channels, spec.out_channels)[1:]:
        grouped = replace(spec, groups=groups)
        absorbed = search.find(groups, effort=SCREEN, given_in=given_in, given_out=given_out)
        candidates.append(Candidate(grouped, absorbed.loss, absorbed.start))
        if not all(free) and groups < spec.in_channels:
            explicit = search.find(groups, effort=SCREEN)
            candidates.append(
                Candidate(grouped, explicit.loss, explicit.start, not free[0], not free[1])
            )
    return Menu(conv, search, tuple(candidates))


def settle(
    trace: Trace, menus: Mapping[str, Menu], chosen: Mapping[str, Candidate]
) -> dict[str, Partition]:
    """Partitions of the chosen structures, each keeping the orders that others chose before it.

    Returns:
        layer name to partition, by priority; dense layers are left out.
    """
    orders = Orders(trace.spaces)
    grouped = [menus[name].conv for name, choice in chosen.items() if choice.spec.groups > 1]
    partitions: dict[str, Partition] = {}
    for conv in by_priority(grouped):
        choice = chosen[conv.name]
        given_in, given_out = orders.channels(conv.inputs), orders.channels(conv.outputs)
        chooses = choice.start != "identity"
        free_in = chooses and orders.free(conv.inputs)
        free_out = chooses and orders.free(conv.outputs) and conv.inputs.space != conv.outputs.space
        found = menus[conv.name].search.find(
            choice.spec.groups,
            given_in=None if choice.permute_in or free_in else given_in,
            given_out=None if choice.permute_out or free_out else given_out,
        )
        partitions[conv.name], _, _ = orders.place(conv, found.partition)
    return partitions
