"""Pads as the padding of what follows."""

import math
from dataclasses import replace

from groupconv.compiler.graph import Convolution, Graph, Operator, Pad, Pool, Sides


def absorb_padding(graph: Graph) -> Graph:
    """Let convolutions and pools pad their inputs themselves where that is the same."""
    producers = graph.producers()
    nodes = []
    for node in graph.nodes:
        x, *rest = node.inputs or (None,)
        before = producers.get(x) if x is not None and x not in rest else None
        if before is not None and isinstance(before.operator, Pad):
            operator = _padded(node.operator, before.operator, before.inputs[0].shape[2:])
            if operator is not None:
                node = replace(node, operator=operator, inputs=(*before.inputs, *rest))
        nodes.append(node)
    if all(new is old for new, old in zip(nodes, graph.nodes, strict=True)):
        return graph
    return graph.replace(nodes)


def _padded(operator: Operator, pad: Pad, size: tuple[int, ...]) -> Operator | None:
    """The operator for the input before it was padded, of ``size``; None where there is none."""
    if isinstance(operator, Convolution):
        conv = operator.conv
        both = _sum(pad.padding, conv.padding)
        if conv.transposed or both is None or (pad.value != 0 and _grows(pad.padding)):
            return None
        return replace(operator, conv=replace(conv, input_size=size, padding=both))
    if isinstance(operator, Pool):
        if any(end < 0 for pair in pad.padding for end in pair):
            return None
        both = _sum(pad.padding, operator.padding)
        assert both is not None
        if operator.kind == "max" and pad.value == -math.inf:
            return replace(operator, padding=both)
        counted = _sum(pad.padding, operator.counted)
        if operator.kind == "average" and pad.value == 0 and counted is not None:
            return replace(operator, padding=both, counted=counted)
    return None


def _grows(padding: Sides) -> bool:
    return any(end > 0 for pair in padding for end in pair)


def _sum(first: Sides, second: tuple[tuple[int, int], ...]) -> Sides | None:
    """One padding for two; None where what the first crops the second would not bring back."""
    if any(
        a < 0 < b for pair in zip(first, second, strict=True) for a, b in zip(*pair, strict=True)
    ):
        return None
    (top, left), (above, before) = first, second
    return (
        (top[0] + above[0], top[1] + above[1]),
        (left[0] + before[0], left[1] + before[1]),
    )
