"""Views and relayouts that are not needed, or can be had without moving anything."""

from dataclasses import replace

from groupconv.compiler.graph import Convolution, Graph, Node, Relayout, Value, View


def settle_layouts(graph: Graph) -> Graph:
    """Read values where they lie: through views of views, and before their layout is changed."""
    producers, readers = graph.producers(), graph.readers()
    nodes = []
    for old in graph.nodes:
        node = old
        if isinstance(node.operator, Relayout) and _lies_alike(node.inputs[0], node.output):
            node = replace(node, operator=View())
        before = producers.get(node.inputs[0]) if node.inputs else None
        if before is not None and _is_skipped(before, node, len(readers[before.output])):
            operator = node.operator
            if isinstance(operator, Relayout) and before.inputs[0].axis == node.output.axis:
                # There and back: the same values in the same places.
                operator = View()
            node = replace(node, operator=operator, inputs=(*before.inputs, *node.inputs[1:]))
        nodes.append(node)
    if all(new is old for new, old in zip(nodes, graph.nodes, strict=True)):
        return graph
    return graph.replace(nodes)


def _is_skipped(before: Node, node: Node, readers: int) -> bool:
    """Whether ``node`` can read what ``before`` reads."""
    if type(before.operator) is type(node.operator):
        return isinstance(node.operator, (View, Relayout))
    # The kernel reads planes as well, but brings them into order anew for every reader.
    return (
        isinstance(before.operator, Relayout)
        and isinstance(node.operator, Convolution)
        and node.inputs.count(before.output) == 1
        and (before.output.axis, node.output.axis) == (1, 1)
        and before.inputs[0].axis != 1
        and readers == 1
    )


def _lies_alike(a: Value, b: Value) -> bool:
    """Whether memory holds two values of one shape alike, which differ in the innermost axis."""
    return _order(a) == _order(b)


def _order(value: Value) -> list[int]:
    """The axes with more than one place, from the outermost in memory."""
    axes = [i for i in range(len(value.shape)) if i != value.axis] + [value.axis]
    return [i for i in axes if value.shape[i] != 1]
