"""Gathers dissolved: values are kept in orders in which they are slices, or nothing at all."""

from collections.abc import Iterator

from groupconv.compiler.graph import (
    Concat,
    Convolution,
    Gather,
    Graph,
    Node,
    Value,
    View,
    consecutive,
)
from groupconv.compiler.reorder import Order, Reordering, sliced


def dissolve(graph: Graph) -> Graph:
    """Choose orders for values, as long as less has to be moved for it."""
    found = _better(graph)
    while found is not None:
        graph, found = found, _better(found)
    return graph


def moved(graph: Graph) -> int:
    """A measure of what a graph moves: four for each number that is copied, one for each that a
    convolution brings into its own order on the way."""
    producers = graph.producers()
    return sum(_moved_by(node, producers) for node in graph.nodes)


def _moved_by(node: Node, producers: dict[Value, Node]) -> int:
    operator, out = node.operator, node.output
    if isinstance(operator, Gather) and not consecutive(operator.order):
        return 4 * out.pixels * out.channels
    if isinstance(operator, Convolution) and operator.order is not None:
        return node.inputs[0].pixels * node.inputs[0].channels
    if isinstance(operator, Concat):
        # The others are written to their places when they are made.
        return sum(4 * v.pixels * v.channels for v in node.inputs if _lies_elsewhere(v, producers))
    return 0


def _lies_elsewhere(value: Value, producers: dict[Value, Node]) -> bool:
    """Whether it is a part of another value, or given from outside."""
    node = producers.get(value)
    if node is None or isinstance(node.operator, View):
        return True
    return isinstance(node.operator, Gather) and consecutive(node.operator.order)


def _better(graph: Graph) -> Graph | None:
    """A graph that moves less, if orders for it are found."""
    now = moved(graph)
    producers = graph.producers()
    for node in graph.nodes:
        if not isinstance(node.operator, Gather) or consecutive(node.operator.order):
            continue
        for value, order in _ideas(node, node.operator.order, producers):
            orders = Reordering(graph)
            if orders.assign(value, order):
                changed = orders.result()
                if moved(changed) < now:
                    return changed
    return None


def _ideas(node: Node, taken: Order, producers: dict[Value, Node]) -> Iterator[tuple[Value, Order]]:
    """Orders of values with which a gather is a slice, if their neighbours can do with them."""
    x = node.inputs[0]
    if sliced(taken):
        yield node.output, tuple(sorted(range(len(taken)), key=taken.__getitem__))
    if len(set(taken)) < len(taken):
        return
    before = producers.get(x)
    if before is not None and isinstance(before.operator, Concat):
        order = _neighbours(before, set(taken))
    else:
        order = (*taken, *(i for i in range(x.channels) if i not in set(taken)))
    if order is not None and order != tuple(range(x.channels)):
        yield x, order


def _neighbours(concat: Node, taken: set[int]) -> Order | None:
    """An order within each input that makes neighbours of the channels taken; None if they are
    spread over too many inputs."""
    parts, start = list[list[int]](), 0
    for value in concat.inputs:
        parts.append(list(range(start, start + value.channels)))
        start += value.channels
    touched = [i for i, part in enumerate(parts) if taken.intersection(part)]
    first, last = touched[0], touched[-1]
    if any(not taken.issuperset(parts[i]) for i in range(first + 1, last)):
        return None
    order: list[int] = []
    for i, part in enumerate(parts):
        inside = [c for c in part if c in taken]
        outside = [c for c in part if c not in taken]
        order += inside + outside if i == last and first != last else outside + inside
    return tuple(order)
