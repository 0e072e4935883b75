"""Values kept in other orders of their channels, and what their neighbours must do then."""

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from groupconv.compiler.graph import (
    AdaptivePool,
    Concat,
    Convolution,
    Gather,
    Graph,
    LayerNorm,
    Map,
    Node,
    Operator,
    Pad,
    Pool,
    Softmax,
    Upsample,
    Value,
    View,
    consecutive,
)
from groupconv.compiler.weights import (
    may_select,
    order_of_outputs,
    reads_planes,
    reorder_inputs,
    select_outputs,
)

Order = tuple[int, ...]


class Reordering:
    """Orders of values, found from the first one outwards until weights or gathers take them up.

    A value in the order ``o`` has in place i what was its channel ``o[i]``.
    """

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.producers, self.readers = graph.producers(), graph.readers()
        self.orders: dict[Value, Order] = {}
        self._fixed = {*graph.inputs, *graph.outputs}

    def assign(self, value: Value, order: Order) -> bool:
        """Keep ``value`` in ``order``; whether all its neighbours can cope with it.

        If not, the orders found on the way are useless: see :meth:`_try`.
        """
        if value in self.orders:
            return self.orders[value] == order
        if order == _identity(value):
            self.orders[value] = order
            return True
        if value in self._fixed:
            return False
        self.orders[value] = order
        producer = self.producers.get(value)
        if producer is not None and not self._makes(producer, order):
            return False
        return all(self._reads(node, value, order) for node in self.readers.get(value, ()))

    def _try(self, value: Value, order: Order) -> bool:
        """The same, but nothing is changed where it fails."""
        before = dict(self.orders)
        if self.assign(value, order):
            return True
        self.orders = before
        return False

    def _makes(self, node: Node, order: Order) -> bool:
        """Whether a node can make its output in this order."""
        operator = node.operator
        if isinstance(operator, Gather):
            return True
        if isinstance(operator, Convolution):
            residual = node.inputs[1:]
            if residual and not self.assign(residual[0], order):
                return False
            before = self.orders.get(node.inputs[0])
            if before is not None and order_of_outputs(operator, before) == order:
                return True
            if may_select(operator, order):
                return True
            conv = operator.conv
            depthwise = conv.groups == conv.in_channels == conv.out_channels
            return depthwise and not reads_planes(node) and self.assign(node.inputs[0], order)
        if isinstance(operator, Concat):
            return all(
                sorted(part) == list(range(value.channels)) and self.assign(value, part)
                for value, part in _parts(node, order)
            )
        return _keeps_channels(node) and self._assign_inputs(node, order)

    def _reads(self, node: Node, value: Value, order: Order) -> bool:
        """Whether a node can read a value in this order."""
        operator, out = node.operator, node.output
        if isinstance(operator, Gather):
            self._gathers(node, order)
            return True
        if isinstance(operator, Convolution):
            if value in node.inputs[1:] and not self.assign(out, order):
                return False
            if value is not node.inputs[0]:
                return True
            outputs = None if reads_planes(node) else order_of_outputs(operator, order)
            if outputs is None:
                return False
            # Outputs that stay in their groups may be reordered for reasons of their own.
            return outputs == _identity(out) or self.assign(out, outputs)
        if isinstance(operator, Concat):
            whole = self.orders.get(out)
            if whole is None:
                return self.assign(out, self._side_by_side(node))
            # Where the order of the whole came first, it decides on all the parts.
            return all(part == order for v, part in _parts(node, whole) if v is value)
        if not _keeps_channels(node):
            return False
        return self._assign_inputs(node, order) and self.assign(out, order)

    def _assign_inputs(self, node: Node, order: Order) -> bool:
        """One order for all inputs that have all the channels."""
        channels = node.output.channels
        return all(self.assign(v, order) for v in node.inputs if v.channels == channels)

    def _side_by_side(self, concat: Node) -> Order:
        joined: list[int] = []
        for value in concat.inputs:
            start = len(joined)
            joined += [start + i for i in self.orders.get(value, _identity(value))]
        return tuple(joined)

    def _gathers(self, node: Node, order: Order) -> None:
        """Make a slice of a gather, if what reads it can do with the order that it then has."""
        taken = self._taken(node, order)
        if node.output not in self.orders and sliced(taken):
            self._try(node.output, _ascending(taken))

    def _taken(self, node: Node, order: Order) -> Order:
        """What a gather takes from an input in this order."""
        operator = node.operator
        assert isinstance(operator, Gather)
        place = {old: new for new, old in enumerate(order)}
        return tuple(place[i] for i in operator.order)

    def _operator(self, node: Node) -> Operator:
        """What a node does now, given the orders of its values."""
        operator, x = node.operator, node.inputs[0]
        before, after = self.orders.get(x), self.orders.get(node.output, _identity(node.output))
        match operator:
            case Gather():
                taken = operator.order if before is None else self._taken(node, before)
                order = tuple(taken[i] for i in after)
                return operator if order == operator.order else Gather(order)
            case Convolution():
                return _convolution(operator, before, after)
            case _ if node.output not in self.orders:
                return operator
            case Map():
                return replace(
                    operator, constants=tuple(_picked(c, after) for c in operator.constants)
                )
            case LayerNorm():
                scale, shift = operator.weight, operator.bias
                return replace(
                    operator,
                    weight=None if scale is None else _picked(scale, after),
                    bias=None if shift is None else _picked(shift, after),
                )
        return operator

    def result(self) -> Graph:
        """The graph with all values in their orders."""
        nodes = []
        for node in self.graph.nodes:
            operator = self._operator(node) if node.inputs else node.operator
            same = operator is node.operator
            nodes.append(node if same else replace(node, operator=operator))
        constants = {
            v: tensor.index_select(v.axis, torch.tensor(self.orders[v]))
            if v in self.orders
            else tensor
            for v, tensor in self.graph.constants.items()
        }
        return Graph(self.graph.inputs, self.graph.outputs, nodes, constants)


def _parts(concat: Node, order: Order) -> Iterator[tuple[Value, Order]]:
    """The inputs of a concatenation and their parts of its order, counted from their first
    channels."""
    start = 0
    for value in concat.inputs:
        yield value, tuple(i - start for i in order[start : start + value.channels])
        start += value.channels


def sliced(order: Sequence[int]) -> bool:
    """Whether these are neighbouring channels, in whatever order."""
    return consecutive(tuple(sorted(order)))


def _ascending(order: Order) -> Order:
    return tuple(sorted(range(len(order)), key=order.__getitem__))


def _identity(value: Value) -> Order:
    return tuple(range(value.channels))


def _keeps_channels(node: Node) -> bool:
    """Whether channel i of the output comes from channel i of the inputs alone, or from all in a
    way that knows no order."""
    if isinstance(node.operator, View):
        return node.inputs[0].channels == node.output.channels
    kinds = (Map, Pool, AdaptivePool, Upsample, Pad, Softmax, LayerNorm)
    return isinstance(node.operator, kinds)


def _convolution(operator: Convolution, before: Order | None, after: Order) -> Convolution:
    """One that reads its input in the order ``before`` and makes its output in ``after``."""
    outputs: Order | None = tuple(range(operator.conv.out_channels))
    if before is not None and before != tuple(range(len(before))):
        outputs = order_of_outputs(operator, before)
        operator = reorder_inputs(operator, before)
    assert outputs is not None
    if outputs == after:
        return operator
    place = {old: new for new, old in enumerate(outputs)}
    return select_outputs(operator, [place[i] for i in after])


def _picked(tensor: Tensor, order: Order) -> Tensor:
    return tensor[torch.tensor(order)]
