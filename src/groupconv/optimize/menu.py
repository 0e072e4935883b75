"""The menu of a layer: every structure that may stand in its place, with what it loses.

The channels of a grouped candidate are in given order where nothing can absorb a permutation, or
brought into another by explicit permutations, which cost time. A layer that has groups already may
get more of them, or fewer, which loses nothing: some runtimes are faster so.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from groupconv.kernels.spec import ConvSpec, legal_groups
from groupconv.optimize.kept import Kept
from groupconv.optimize.orders import Orders
from groupconv.optimize.pair import fit_pair, pair_shapes
from groupconv.optimize.partition import Partition
from groupconv.optimize.search import GIVEN, SCREEN, Search
from groupconv.optimize.structure import Grouped, Structure, from_dict, to_dict, unchanged
from groupconv.optimize.trace import Trace, TracedConv

# Of the alternating fit of a pair, to compare it with the other structures.
SWEEPS = 5
# A loss that no network survives.
_HOPELESS = 0.5


@dataclass(frozen=True)
class Candidate:
    """One entry of a layer's menu.

    Args:
        structure: what stands in place of the layer.
        loss: predicted residual variance over output variance.
        partition: the groups of a grouped convolution as far as they were searched, or None.
        start: what they come from, see :class:`Found`; empty for other structures.
        permute_in, permute_out: whether an explicit permutation stands before or after it.
        kept: the channels that stay of a layer with fewer of them, or None.
    """

    structure: Structure
    loss: float
    partition: Partition | None = None
    start: str = ""
    permute_in: bool = False
    permute_out: bool = False
    kept: Kept | None = None

    def __str__(self) -> str:
        return f"{self.structure}{' permuted' * (self.permute_in or self.permute_out)}"

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self) | {"structure": to_dict(self.structure)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Candidate":
        """What :meth:`to_dict` wrote."""
        partition, kept = values["partition"], values["kept"]
        if partition is not None:
            orders = (tuple(partition[key]) for key in ("in_order", "out_order"))
            partition = Partition(partition["groups"], *orders)
        read = {
            "structure": from_dict(values["structure"]),
            "partition": partition,
            "kept": None if kept is None else Kept.from_dict(kept),
        }
        return cls(**{**values, **read})


def by_priority(convs: Sequence[TracedConv]) -> list[TracedConv]:
    """The order in which layers choose the order of the channels they touch: costly ones first."""
    return sorted(convs, key=lambda conv: -conv.spec.macs)


def tied(conv: TracedConv) -> bool:
    """Whether the order of a layer's inputs is, in part at least, that of its outputs."""
    return not set(conv.inputs.spaces).isdisjoint(conv.outputs.spaces)


def freedom(trace: Trace, convs: Sequence[TracedConv]) -> dict[str, tuple[bool, bool]]:
    """For each layer, whether it may choose the order of its inputs and of its outputs.

    It may where the order can change at all and no layer of higher priority touches it. Of a tied
    layer, whose two ends share one order, the inputs are free only if the outputs are permuted.
    """
    orders = Orders(trace.spaces)
    free: dict[str, tuple[bool, bool]] = {}
    for conv in by_priority(convs):
        open_in, open_out = orders.free(conv.inputs), orders.free(conv.outputs)
        free[conv.name] = (open_in, open_out and not tied(conv))
        for axis in (conv.inputs, conv.outputs):
            orders.claim(axis, orders.channels(axis), 1)
    return free


def menu(
    conv: TracedConv, search: Search, free: tuple[bool, bool], *, round_to: int
) -> list[Candidate]:
    """Every structure for one layer, with its predicted loss; the layer as it is first.

    Args:
        conv: the layer.
        search: for its partitions.
        free: whether it may choose the order of its inputs and of its outputs.
        round_to: channels per group, and between the two convolutions of a pair, are multiples of
            it; depthwise convolutions are exempt.
    """
    candidates = [Candidate(unchanged(conv.spec), 0.0)]
    candidates += _grouped(conv, search, free, round_to)
    # A pair is fitted to the layer's own moments, which a very wide layer has not.
    if search.problem.exact:
        for shape in pair_shapes(conv.spec):
            if all(_rounded(spec, round_to) for spec in shape.specs(conv.spec)):
                fitted = fit_pair(search.problem, shape, sweeps=SWEEPS)
                candidates.append(Candidate(shape, fitted.loss))
    return candidates


def _grouped(
    conv: TracedConv, search: Search, free: tuple[bool, bool], round_to: int
) -> list[Candidate]:
    spec = conv.spec
    if spec.linear:
        return []
    given_in = None if free[0] and not tied(conv) else range(spec.in_channels)
    given_out = None if free[1] else range(spec.out_channels)
    candidates: list[Candidate] = []
    least = 0.0
    for groups in legal_groups(spec.in_channels, spec.out_channels):
        structure = Grouped(groups)
        if groups == spec.groups or not all(_rounded(x, round_to) for x in structure.specs(spec)):
            continue
        if spec.groups % groups == 0:
            # Zeros between the groups that share one now.
            candidates.append(Candidate(structure, 0.0, start="identity"))
            continue
        asked = [(given_in, given_out, (False, False))]
        # Groups of one channel are only numbered otherwise.
        moved = (
            not free[0] and groups < spec.in_channels,
            not free[1] and groups < spec.out_channels,
        )
        if any(moved) and least < _HOPELESS:
            asked.append((None, None, moved))
        # What loses so much with fewer groups is not worth a search with more.
        effort = SCREEN if least < _HOPELESS else GIVEN
        for order_in, order_out, permuted in asked:
            found = search.find(groups, effort=effort, given_in=order_in, given_out=order_out)
            candidates.append(
                Candidate(structure, found.loss, found.partition, found.start, *permuted)
            )
        least = min(candidate.loss for candidate in candidates[-len(asked) :])
    return candidates


def _rounded(spec: ConvSpec, round_to: int) -> bool:
    """Whether the channels per group are multiples of a number, or the layer is depthwise."""
    widths = (spec.in_channels // spec.groups, spec.out_channels // spec.groups)
    return widths[0] == 1 or not any(width % round_to for width in widths)
