"""Nodes that do nothing, that nothing needs, or that do what another one does."""

from dataclasses import fields

from torch import Tensor

from groupconv.compiler.graph import (
    AdaptivePool,
    Concat,
    Gather,
    Graph,
    Host,
    Node,
    Operator,
    Pad,
    Pool,
    Upsample,
    Value,
    View,
)


def tidy(graph: Graph) -> Graph:
    """Without nodes that do nothing, whose results nothing reads, or that come twice."""
    values: dict[Value, Value] = {}
    known: dict[tuple[object, ...], Value] = {}
    # What the network returns are tensors of their own, each another one.
    taken = {*graph.inputs, *graph.constants, *graph.outputs}
    kept: list[Node] = []
    for node in graph.nodes:
        inputs = tuple(values.get(v, v) for v in node.inputs)
        key = _key(node, inputs)
        if _does_nothing(node) and (node.output not in graph.outputs or inputs[0] not in taken):
            values[node.output] = inputs[0]
            if node.output in graph.outputs:
                taken.add(inputs[0])
        elif key is not None and key in known and node.output not in graph.outputs:
            values[node.output] = known[key]
        else:
            kept.append(node)
            if key is not None:
                known.setdefault(key, node.output)
    used = {values.get(v, v) for v in graph.outputs}
    needed: list[Node] = []
    for node in reversed(kept):
        if node.output in used:
            used.update(values.get(v, v) for v in node.inputs)
            needed.append(node)
    if len(needed) == len(graph.nodes) and used.issuperset(graph.constants):
        return graph
    return graph.replace(needed[::-1], values)


def _does_nothing(node: Node) -> bool:
    """Whether the result is the input."""
    operator = node.operator
    if isinstance(operator, Host) or not node.inputs:
        return False
    x, y = node.inputs[0], node.output
    if (x.shape, x.axis) != (y.shape, y.axis):
        return False
    match operator:
        case View() | AdaptivePool():
            return True
        case Gather():
            return operator.order == tuple(range(x.channels))
        case Concat():
            return len(node.inputs) == 1
        case Pad():
            return not any(end for pair in operator.padding for end in pair)
        case Pool():
            return operator.kernel_size == operator.stride == (1, 1)
        case Upsample():
            return operator.scales in ((None, None), (1.0, 1.0))
    return False


def _key(node: Node, inputs: tuple[Value, ...]) -> tuple[object, ...] | None:
    """Equal for nodes that compute the same; None for what PyTorch runs, which may be random."""
    if isinstance(node.operator, Host):
        return None
    y = node.output
    return (type(node.operator), *_contents(node.operator), inputs, y.shape, y.axis, y.dtype)


def _contents(operator: Operator) -> list[object]:
    """The fields of an operator, with the identity of tensors for their numbers."""
    found: list[object] = []
    for field in fields(operator):
        value = getattr(operator, field.name)
        items = value if isinstance(value, tuple) else (value,)
        found.append(tuple(id(x) if isinstance(x, Tensor) else x for x in items))
    return found
