"""What is known before the network runs, computed once."""

from collections.abc import Callable
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from groupconv.compiler import expression
from groupconv.compiler.expression import Operand
from groupconv.compiler.graph import Concat, Gather, Graph, Map, Node, Relayout, Value, View

# Where PyTorch's name is another one.
_NAMED: dict[str, Callable[..., Tensor]] = {
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "power": torch.pow,
    "prelu": lambda x, slope: torch.where(x > 0, x, slope * x),
}


def evaluate_constants(graph: Graph) -> Graph:
    """Compute nodes of nothing but constants, and give Maps their constants as their own."""
    known = dict(graph.constants)
    nodes: list[Node] = []
    changed = False
    for node in graph.nodes:
        found = _computed(node, known)
        if found is not None and node.output not in graph.outputs:
            known[node.output] = found
        else:
            new = _with_own(node, known) if isinstance(node.operator, Map) else node
            nodes.append(new)
            changed |= new is not node
    if not changed and len(nodes) == len(graph.nodes):
        return graph
    return Graph(graph.inputs, graph.outputs, nodes, known).replace(nodes)


def _computed(node: Node, known: dict[Value, Tensor]) -> Tensor | None:
    """The result of a node whose inputs are all known; None if they aren't."""
    if not node.inputs or any(v not in known for v in node.inputs):
        return None
    inputs, out = [known[v] for v in node.inputs], node.output
    match node.operator:
        case Map():
            return _map(node, known)
        case Relayout():
            return inputs[0]
        case Gather():
            return inputs[0].index_select(out.axis, torch.tensor(node.operator.order))
        case Concat():
            return torch.cat(inputs, out.axis)
        case View():
            rest = [n for i, n in enumerate(out.shape) if i != out.axis]
            lying = inputs[0].movedim(node.inputs[0].axis, -1)
            return lying.reshape(*rest, out.channels).movedim(-1, out.axis)
    return None


def _map(node: Node, known: dict[Value, Tensor]) -> Tensor:
    out = node.output
    results: list[Tensor] = []

    def tensor(operand: Operand) -> Tensor:
        if isinstance(operand, Value):
            return known[operand]
        if isinstance(operand, Tensor):
            return operand.reshape([-1 if i == out.axis else 1 for i in range(len(out.shape))])
        return torch.tensor(operand) if isinstance(operand, float) else results[operand]

    for term in expression.read(node):
        name = term.function
        function = _NAMED.get(name) or getattr(torch, name, None) or getattr(F, name)
        results.append(function(*map(tensor, term.operands), *term.parameters))
    return results[-1].expand(out.shape)


def _with_own(node: Node, known: dict[Value, Tensor]) -> Node:
    """A Map with one number for each channel, where it read them as a value, as its constant."""
    out = node.output
    own = {v: known[v].flatten() for v in node.inputs if v in known and v.pixels == 1}
    own = {v: numbers for v, numbers in own.items() if len(numbers) == out.channels}
    if not own or len(own) == len(node.inputs):
        return node
    terms = [
        term.moved(lambda o: own.get(o, o) if isinstance(o, Value) else o)
        for term in expression.read(node)
    ]
    operator, inputs = expression.write(terms, len(terms) - 1)
    return replace(node, operator=operator, inputs=inputs)
