"""The chosen grouped layers get their partitions, and the spaces between them their orders."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace

from groupconv.optimize.align import GroupedLayer, align
from groupconv.optimize.convert import Settled
from groupconv.optimize.menu import Candidate, by_priority, tied
from groupconv.optimize.orders import Orders
from groupconv.optimize.partition import Partition
from groupconv.optimize.search import Search
from groupconv.optimize.structure import DENSE, Grouped, unchanged
from groupconv.optimize.trace import Trace, TracedConv

# Gives the searches of some layers by their names.
FindSearches = Callable[[Iterable[str]], Mapping[str, Search]]

# Rounds of swaps in the separable problems, which are cheap, and then in the layers' own: at most
# so many that the cube of the inputs of the widest layer, times rounds, stays below the bound.
_SEPARABLE_ROUNDS, _EXACT_ROUNDS = 30, 30
_EXACT_WORK = 1.2e11


def sketch(trace: Trace, chosen: Mapping[str, Candidate]) -> dict[str, Settled]:
    """The chosen structures with any channels in their groups, enough to build and time them.

    Explicit permutations stand where the candidates have them and nowhere else; where a layer that
    was to choose an order does not, because it stays dense or is permuted itself, not even there.

    Returns:
        layer name to what stands there, by priority; unchanged layers are left out.
    """
    orders = Orders(trace.spaces)
    partitions = {}
    for conv in _grouped(trace, chosen):
        choice = chosen[conv.name]
        assert isinstance(choice.structure, Grouped)
        groups, sides = choice.structure.groups, []
        for axis, permuted in (
            (conv.inputs, choice.permute_in), (conv.outputs, choice.permute_out)
        ):  # fmt: skip
            order = orders.channels(axis)
            # Dealt out like cards, so that no group is as it was.
            sides.append(tuple(x for q in range(groups) for x in order[q::groups])
                         if permuted else order)  # fmt: skip
        partitions[conv.name], _, _ = orders.place(conv, Partition(groups, *sides))
    return _complete(trace, chosen, partitions)


def settle(
    trace: Trace,
    chosen: Mapping[str, Candidate],
    weights: Mapping[str, float],
    searches: FindSearches,
) -> dict[str, Settled]:
    """The chosen structures, the groups searched thoroughly and then improved together.

    Args:
        trace: of the network.
        chosen: layer name to its candidate.
        weights: layer name to what losing all of its variance costs the network.
        searches: of its layers.

    Returns:
        layer name to what stands there, by priority; unchanged layers are left out.
    """
    convs = _grouped(trace, chosen)
    found = searches([conv.name for conv in convs])
    orders = Orders(trace.spaces)
    layers = [_place(orders, conv, chosen[conv.name], found[conv.name]) for conv in convs]
    layers = [replace(layer, weight=weights[layer.name]) for layer in layers]
    if not layers:
        return _complete(trace, chosen, {})
    trial = Orders(trace.spaces, orders.orders)
    separable = [replace(layer, problem=found[layer.name].reduced) for layer in layers]
    moved = align(trial, separable, rounds=_SEPARABLE_ROUNDS)
    improved = [replace(layer, partition=moved[layer.name]) for layer in layers]
    if _loss(improved) < _loss(layers):
        layers, orders = improved, trial
    widest = max(len(layer.problem.system) for layer in layers)
    rounds = min(_EXACT_ROUNDS, int(_EXACT_WORK / widest**3))
    return _complete(trace, chosen, align(orders, layers, rounds=rounds))


def _grouped(trace: Trace, chosen: Mapping[str, Candidate]) -> list[TracedConv]:
    """The layers to be cut into groups, by priority."""
    return [
        conv
        for conv in by_priority(trace.convs)
        if _changed(conv, chosen) and searched(chosen[conv.name].structure)
    ]


def searched(settled: Settled) -> bool:
    """Whether the channels of its groups are yet to be found."""
    return isinstance(settled, Grouped) and settled != DENSE


def _place(orders: Orders, conv: TracedConv, choice: Candidate, search: Search) -> GroupedLayer:
    """A partition in the orders claimed so far; what is open still it claims."""
    assert isinstance(choice.structure, Grouped)
    chooses = choice.start != "identity"
    free_in = chooses and orders.free(conv.inputs) and (choice.permute_out or not tied(conv))
    free_out = chooses and orders.free(conv.outputs) and not tied(conv)
    found = search.find(
        choice.structure.groups,
        given_in=None if choice.permute_in or free_in else orders.channels(conv.inputs),
        given_out=None if choice.permute_out or free_out else orders.channels(conv.outputs),
    )
    partition, absorbed_in, absorbed_out = orders.place(conv, found.partition)
    return GroupedLayer(
        conv.name,
        search.problem,
        partition,
        conv.inputs if absorbed_in else None,
        conv.outputs if absorbed_out else None,
        weight=1.0,
    )


def _complete(
    trace: Trace, chosen: Mapping[str, Candidate], partitions: Mapping[str, Partition]
) -> dict[str, Settled]:
    return {
        conv.name: partitions.get(conv.name, chosen[conv.name].kept or chosen[conv.name].structure)
        for conv in by_priority(trace.convs)
        if _changed(conv, chosen)
    }


def _changed(conv: TracedConv, chosen: Mapping[str, Candidate]) -> bool:
    return conv.name in chosen and chosen[conv.name].structure != unchanged(conv.spec)


def _loss(layers: Sequence[GroupedLayer]) -> float:
    return sum(layer.weight * layer.problem.loss(layer.partition) for layer in layers)


def complete(
    trace: Trace, layers: Mapping[str, Settled], searches: FindSearches
) -> dict[str, Settled]:
    """Layers of a plan, every grouped one with the channels of its groups.

    Those that a person left out are searched, within the orders that the others want.
    """
    convs = {conv.name: conv for conv in trace.convs}
    orders = Orders(trace.spaces)
    changed = {n: x for n, x in layers.items() if x != unchanged(convs[n].spec)}
    missing = {n: x for n, x in changed.items() if isinstance(x, Grouped) and searched(x)}
    # The others claim their orders first.
    first = {name: settled for name, settled in changed.items() if name not in missing}
    for name, settled in first.items():
        if isinstance(settled, Partition):
            orders.place(convs[name], settled)
    found = searches(missing)
    return first | {
        name: _place(orders, convs[name], Candidate(grouped, 0.0), found[name]).partition
        for name, grouped in missing.items()
    }
