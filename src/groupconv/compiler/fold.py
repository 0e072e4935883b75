"""Factors and summands of channels folded into the weights of the convolution that follows."""

from dataclasses import replace

import torch
from torch import Tensor

from groupconv.compiler import expression
from groupconv.compiler.expression import Operand, Term
from groupconv.compiler.graph import Convolution, Graph, Map, Node, Value
from groupconv.compiler.weights import reads_planes, scale_inputs, shift_inputs


def affine(term: Term, x: Operand, channels: int) -> tuple[Tensor | None, Tensor | None] | None:
    """``term`` as a factor of x and a summand, (channels,) in float64, each None where there is
    none; or None if it is something else."""
    at = [i for i, operand in enumerate(term.operands) if expression.same(operand, x)]
    if len(at) != 1:
        return None
    if term.function == "neg":
        return _numbers(-1.0, channels), None
    if len(term.operands) != 2:
        return None
    constant = _numbers(term.operands[1 - at[0]], channels)
    if constant is None:
        return None
    match term.function:
        case "add":
            return None, constant
        case "mul":
            return constant, None
        case "sub":
            return (None, -constant) if at == [0] else (_numbers(-1.0, channels), constant)
        case "div" if at == [0]:
            return 1 / constant, None
    return None


def _numbers(operand: Operand, channels: int) -> Tensor | None:
    if isinstance(operand, float):
        return torch.full((channels,), operand, dtype=torch.float64)
    return operand.double() if isinstance(operand, Tensor) else None


def fold(graph: Graph) -> Graph:
    """Cut what is affine off the ends of Maps that only one convolution reads.

    Factors always fold; summands only where there is no padding, to which nothing is added.
    """
    producers, readers = graph.producers(), graph.readers()
    changed: dict[Node, list[Node]] = {}
    for node in graph.nodes:
        if not isinstance(node.operator, Convolution) or node.inputs.count(node.inputs[0]) > 1:
            continue
        before = producers.get(node.inputs[0])
        if before is None or not isinstance(before.operator, Map) or reads_planes(node):
            continue
        if before.output in graph.outputs or len(readers[before.output]) > 1:
            continue
        operator, rest = _shortened(before, node.operator)
        if operator is node.operator:
            continue
        changed[before] = [rest] if isinstance(rest, Node) else []
        x = rest.output if isinstance(rest, Node) else rest
        changed[node] = [replace(node, operator=operator, inputs=(x, *node.inputs[1:]))]
    if not changed:
        return graph
    return graph.replace([new for old in graph.nodes for new in changed.get(old, [old])])


def _shortened(node: Node, operator: Convolution) -> tuple[Convolution, Node | Value]:
    """The convolution after a Map, with what it takes over, and the rest of the Map."""
    terms, value = expression.read(node), node.output
    result: Operand = len(terms) - 1
    while isinstance(result, int):
        found = _step(terms[result], operator, value)
        if found is None:
            break
        operator, result = found
    if isinstance(result, Value):
        return operator, result
    assert isinstance(result, int)
    short, inputs = expression.write(terms, result)
    return operator, replace(node, operator=short, inputs=inputs)


def _step(
    term: Term, operator: Convolution, value: Value
) -> tuple[Convolution, Value | int] | None:
    """The convolution after a term, with the term in its weights, and what it reads instead."""
    for x in term.operands:
        if not isinstance(x, (Value, int)) or (isinstance(x, Value) and x.shape != value.shape):
            continue
        found = affine(term, x, value.channels)
        if found is None:
            continue
        factor, amount = found
        if amount is not None:
            if operator.conv.transposed or any(
                e > 0 for pair in operator.conv.padding for e in pair
            ):
                return None
            operator = shift_inputs(operator, amount)
        if factor is not None:
            operator = scale_inputs(operator, factor)
        return operator, x
    return None
