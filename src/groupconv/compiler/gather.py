"""Gathers of gathers as one each; what a concatenation or a convolution can do in their place."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

from groupconv.compiler.graph import Concat, Convolution, Gather, Graph, Node, Value, consecutive
from groupconv.compiler.weights import may_select, select_outputs


def gather_once(graph: Graph) -> Graph:
    """Take channels from where they first were, or have a convolution make no others."""
    producers, readers = graph.producers(), graph.readers()
    changed: dict[Node, list[Node]] = {}
    for node in graph.nodes:
        before = producers.get(node.inputs[0]) if node.inputs else None
        if before in changed:
            continue
        if isinstance(node.operator, Concat):
            joined = _joined(node, producers, readers)
            if joined is not None:
                changed[node] = [joined]
        if not isinstance(node.operator, Gather) or before is None:
            continue
        order = node.operator.order
        match before.operator:
            case Gather() if _is_shorter(before, readers[before.output], graph.outputs):
                composed = Gather(tuple(before.operator.order[i] for i in order))
                changed[node] = [replace(node, operator=composed, inputs=before.inputs)]
            case Concat():
                source = _source(before, order)
                if source is not None:
                    value, start = source
                    part = Gather(tuple(i - start for i in order))
                    changed[node] = [replace(node, operator=part, inputs=(value,))]
            case Convolution(residual=None) if len(readers[before.output]) == 1:
                if not may_select(before.operator, order) or before.output in graph.outputs:
                    continue
                if len(order) <= before.output.channels:
                    operator = select_outputs(before.operator, order)
                    changed[before] = []
                    changed[node] = [replace(before, operator=operator, output=node.output)]
    if not changed:
        return graph
    return graph.replace([new for old in graph.nodes for new in changed.get(old, [old])])


def _is_shorter(before: Node, readers: Sequence[Node], outputs: Sequence[Value]) -> bool:
    """Whether less is moved if all readers of a gather take channels from its input."""
    operator = before.operator
    assert isinstance(operator, Gather)
    if consecutive(operator.order):
        return True
    if before.output in outputs:
        return False
    orders = [reader.operator.order for reader in readers if isinstance(reader.operator, Gather)]
    moved = sum(len(order) for order in orders if not consecutive(order))
    later = sum(
        len(order) for order in orders if not consecutive(tuple(operator.order[i] for i in order))
    )
    return len(orders) == len(readers) and later <= len(operator.order) + moved


def _source(concat: Node, order: Sequence[int]) -> tuple[Value, int] | None:
    """The one input that all the channels come from, and its first channel."""
    start = 0
    for value in concat.inputs:
        if all(start <= i < start + value.channels for i in order):
            return value, start
        start += value.channels
    return None


def _joined(
    node: Node, producers: Mapping[Value, Node], readers: Mapping[Value, list[Node]]
) -> Node | None:
    """The gather that a concatenation of gathers of one value is."""
    made = [producers[v] for v in node.inputs if v in producers]
    orders = [
        before.operator.order
        for before in made
        if isinstance(before.operator, Gather)
        and (consecutive(before.operator.order) or len(readers[before.output]) == 1)
    ]
    if len(orders) < len(node.inputs) or len({before.inputs for before in made}) > 1:
        return None
    joined = Gather(tuple(i for order in orders for i in order))
    return replace(node, operator=joined, inputs=made[0].inputs)
