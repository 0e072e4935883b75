"""What is done to the results of a convolution, done by the convolution."""

from collections.abc import Iterator
from dataclasses import replace

from groupconv.compiler import expression
from groupconv.compiler.expression import Term
from groupconv.compiler.fold import affine
from groupconv.compiler.graph import Convolution, Graph, Map, Node, Value
from groupconv.compiler.weights import scale_outputs, shift_outputs
from groupconv.kernels.spec import ACTIVATIONS


def fuse(graph: Graph) -> Graph:
    """Move the first terms of Maps into the convolutions whose results nothing else reads.

    Factors and summands go into the weights; then a residual and an activation fit, in any order.
    """
    producers, readers = graph.producers(), graph.readers()
    positions = {node: i for i, node in enumerate(graph.nodes)}
    changed: dict[Node, list[Node]] = {}
    for node in graph.nodes:
        if not isinstance(node.operator, Map):
            continue
        made = [producers[v] for v in node.inputs if v in producers]
        # The latest first: a residual is there before it.
        for conv in sorted(made, key=lambda n: -positions[n]):
            x = conv.output
            if x in graph.outputs or len(readers[x]) > 1 or x.shape != node.output.shape:
                continue
            found = list(_absorbed(conv, node))
            if found:
                changed[conv], changed[node] = [], found
                break
    if not changed:
        return graph
    return graph.replace([new for old in graph.nodes for new in changed.get(old, [old])])


def _absorbed(conv: Node, node: Node) -> Iterator[Node]:
    """A convolution with terms of the Map that reads it, and what is left of the Map.

    Nothing where it can't take any. It runs at the place of the Map: the residual is made by then.
    """
    operator, x, terms = conv.operator, conv.output, expression.read(node)
    if not isinstance(operator, Convolution):
        return
    inputs, before = conv.inputs, operator
    while terms:
        using = [i for i, term in enumerate(terms) if any(o is x for o in term.operands)]
        if len(using) != 1:
            break
        found = _with_term(operator, terms[using[0]], x)
        if found is None:
            break
        operator, residual = found
        inputs += residual
        if using[0] == len(terms) - 1:
            yield replace(conv, operator=operator, inputs=inputs, output=node.output)
            return
        terms = expression.drop(terms, using[0], x)
    if operator is not before:
        yield replace(conv, operator=operator, inputs=inputs)
        rest, values = expression.write(terms, len(terms) - 1)
        yield replace(node, operator=rest, inputs=values)


def _with_term(
    operator: Convolution, term: Term, x: Value
) -> tuple[Convolution, tuple[Value, ...]] | None:
    """The convolution with ``term`` of its result x as well, and the residual that it then needs;
    None where it can't do that."""
    found = affine(term, x, x.channels)
    if found is not None:
        factor, amount = found
        if operator.activation or (factor is not None and operator.residual):
            return None
        if factor is not None:
            operator = scale_outputs(operator, factor)
        if amount is not None:
            operator = shift_outputs(operator, amount)
        return operator, ()
    if term.function in ACTIVATIONS:
        if operator.activation or operator.residual == "after":
            return None
        slope = term.parameters[0] if term.parameters else operator.slope
        return replace(operator, activation=term.function, slope=slope), ()
    if term.function == "add" and operator.residual is None:
        a, b = term.operands
        other = b if a is x else a
        if isinstance(other, Value) and other is not x and other.shape == x.shape:
            residual = "after" if operator.activation else "before"
            return replace(operator, residual=residual), (other,)
    return None
