"""Chains of Maps as one Map each, and Maps as short as they can be."""

from dataclasses import replace

from groupconv.compiler import expression
from groupconv.compiler.graph import Graph, Map, Node


def merge(graph: Graph) -> Graph:
    """Compute Maps where their only reader, a Map of the same size, needs their results.

    One that makes a number for each channel or pixel stays: it would be computed anew for every
    element.
    """
    readers = graph.readers()
    # Maps before the one at hand, as they are by now.
    maps: dict[object, Node] = {}
    gone: set[Node] = set()
    nodes: list[Node] = []
    for node in graph.nodes:
        if isinstance(node.operator, Map):
            terms = expression.read(node)
            for value in node.inputs:
                before = maps.get(value)
                if before is None or value.shape != node.output.shape:
                    continue
                if len(readers[value]) == 1 and value not in graph.outputs:
                    terms = expression.join(expression.read(before), value, terms)
                    gone.add(before)
            terms = expression.simplify(terms)
            operator, inputs = expression.write(terms, len(terms) - 1)
            if inputs != node.inputs or operator.program != node.operator.program:
                node = replace(node, operator=operator, inputs=inputs)
            maps[node.output] = node
        nodes.append(node)
    if not gone and all(new is old for new, old in zip(nodes, graph.nodes, strict=True)):
        return graph
    return graph.replace([node for node in nodes if node not in gone])
