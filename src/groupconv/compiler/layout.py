"""Views and relayouts that are not needed, or can be had without moving anything."""

from dataclasses import replace

from groupconv.compiler.graph import Convolution, Graph, Node, Relayout, Value, View
from groupconv.compiler.weights import reads_planes


def settle_layouts(graph: Graph) -> Graph:
    """Read values where they lie: through views of views, and before their layout is changed;
    let convolutions write what is a view of their results."""
    producers, readers = graph.producers(), graph.readers()
    changed: dict[Node, list[Node]] = {}
    for old in graph.nodes:
        node = old
        if isinstance(node.operator, Relayout) and _lies_alike(node.inputs[0], node.output):
            node = replace(node, operator=View())
        before = producers.get(node.inputs[0]) if node.inputs else None
        if before is not None and before not in changed:
            alone = len(readers[before.output]) == 1 and before.output not in graph.outputs
            if alone and _is_written(before, node):
                changed[before] = []
                node = replace(before, output=node.output)
            elif _is_skipped(before, node, alone):
                node = replace(
                    node,
                    operator=_from_there(before, node),
                    inputs=(*before.inputs, *node.inputs[1:]),
                )
        if node is not old:
            changed[old] = [node]
    if not changed:
        return graph
    return graph.replace([new for old in graph.nodes for new in changed.get(old, [old])])


def _is_written(before: Node, node: Node) -> bool:
    """Whether a convolution can write the view of its result that ``node`` is: the same rows of
    channels under another shape."""
    return (
        isinstance(node.operator, View)
        and isinstance(before.operator, Convolution)
        and before.operator.residual is None
        and node.output.channels == before.output.channels
        and reads_planes(replace(before, output=node.output)) == reads_planes(before)
    )


def _is_skipped(before: Node, node: Node, alone: bool) -> bool:
    """Whether ``node`` can read what ``before`` reads; ``alone``, as the only one."""
    if type(before.operator) is type(node.operator):
        return isinstance(node.operator, (View, Relayout))
    # The kernel reads planes as well, but brings them into order anew for every reader.
    return (
        alone
        and isinstance(before.operator, Relayout)
        and isinstance(node.operator, Convolution)
        and node.inputs.count(before.output) == 1
        and (before.output.axis, node.output.axis) == (1, 1)
    )


def _from_there(before: Node, node: Node) -> View | Relayout | Convolution:
    """The operator of ``node`` on what ``before`` reads."""
    operator = node.operator
    assert isinstance(operator, (View, Relayout, Convolution))
    if isinstance(operator, Relayout) and before.inputs[0].axis == node.output.axis:
        # There and back: the same values in the same places.
        return View()
    return operator


def _lies_alike(a: Value, b: Value) -> bool:
    """Whether memory holds two values of one shape alike, which differ in the innermost axis."""
    return _order(a) == _order(b)


def _order(value: Value) -> list[int]:
    """The axes with more than one place, from the outermost in memory."""
    axes = [i for i in range(len(value.shape)) if i != value.axis] + [value.axis]
    return [i for i in axes if value.shape[i] != 1]
