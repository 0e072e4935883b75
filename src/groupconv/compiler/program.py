"""Program: an optimized graph with its places, its steps, and sessions to run it in."""

import math
from collections import defaultdict, deque
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from groupconv.compiler import lower, memory
from groupconv.compiler.graph import Bands, Convolution, Graph, Host, Node, Products, Value
from groupconv.compiler.library import Library
from groupconv.compiler.packed import Packed
from groupconv.compiler.session import Session
from groupconv.compiler.task import Task, empty
from groupconv.kernels import kernel, openmp
from groupconv.kernels.machine import Machine

# Seconds of work, all steps together, below which waking other threads costs more than they save.
_WORTH_WAKING = 20e-6


class Program:
    """Runs a graph on inputs of its own sizes. Safe to call from several threads at once.

    Its ``graph`` keeps of the weights of convolutions only their shapes, as tensors on the meta
    device: kernels have them in an order of their own.

    Args:
        graph: after all passes.
        library: where its native code comes from.
    """

    def __init__(self, graph: Graph, library: Library) -> None:
        # In memory as native code finds values there.
        constants = {value: empty(value).copy_(t) for value, t in graph.constants.items()}
        graph = replace(graph, constants=constants)
        self.library = library
        self.memory = memory.plan(graph)
        self.alone = _guess(graph, library.machine) < _WORTH_WAKING
        self.steps = lower.lower(graph, self.memory, library, self.alone)
        self.graph = replace(graph, nodes=[_without_weight(node) for node in graph.nodes])
        # Sessions that no call uses now; taking and giving back are atomic.
        self._free: deque[Session] = deque()

    def __call__(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        """The outputs for ``inputs``, dense float32 tensors laid out as the graph's inputs are."""
        session = self.session()
        try:
            return session(inputs)
        finally:
            self._free.append(session)

    @property
    def weights(self) -> int:
        """Bytes of all that steps read beside values: packed weights, biases, orders."""
        kept = {
            id(tensor): tensor.nbytes
            for step in self.steps
            if isinstance(step, Task)
            for tensor in step.tensors
        }
        return sum(kept.values())

    def graph_with_weights(self) -> Graph:
        """The graph, its weights unpacked. Those that no output depends on are 0."""
        packed: dict[Value, list[Packed]] = defaultdict(list)
        for step in self.steps:
            if isinstance(step, Task) and step.packed is not None:
                packed[step.output].append(step.packed)
        nodes = [_with_weight(node, packed[node.output]) for node in self.graph.nodes]
        return replace(self.graph, nodes=nodes)

    def example(self) -> tuple[Tensor, ...]:
        """Inputs of its sizes: random numbers, or zeros where they are integers."""
        return tuple(map(_example, self.graph.inputs))

    def session(self) -> Session:
        """One that nobody else uses."""
        threads = 1 if self.alone else openmp.threads()
        while self._free:
            try:
                session = self._free.pop()
            except IndexError:
                # Another thread took the last one just now.
                break
            if session.threads == threads:
                return session
        # Of use in other modes than that of this call, too.
        with torch.inference_mode(False):
            arena = torch.empty(self.memory.arena // 4)
            return Session(self.graph, self.memory, self.steps, threads, arena)


def _guess(graph: Graph, machine: Machine) -> float:
    """Of the seconds that one thread needs for all of it; infinite where PyTorch runs a part, as
    that is not known."""
    seconds = 0.0
    for node in graph.nodes:
        if isinstance(node.operator, Host):
            return math.inf
        if isinstance(node.operator, Convolution | Bands):
            conv = node.operator.conv
            seconds += conv.batch * kernel.guess(conv, machine)
        else:
            values = {*node.inputs, node.output}
            seconds += sum(4 * v.pixels * v.channels for v in values) / lower.BYTES
    return seconds


def _without_weight(node: Node) -> Node:
    if not isinstance(node.operator, Convolution | Products | Bands):
        return node
    shape = node.operator.weight.to("meta")
    return replace(node, operator=replace(node.operator, weight=shape))


def _with_weight(node: Node, packed: list[Packed]) -> Node:
    if not isinstance(node.operator, Convolution | Products | Bands):
        return node
    weight = torch.zeros(node.operator.weight.shape)
    for part in packed:
        part.unpack(weight)
    return replace(node, operator=replace(node.operator, weight=weight))


def _example(value: Value) -> Tensor:
    made = empty(value)
    return made.normal_() if value.dtype.is_floating_point else made.zero_()
