"""``torch.compile(model, backend="groupconv")``: found by its entry point, nothing to import."""

import logging
import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from groupconv.compiler.compiled import Compiled, compile
from groupconv.compiler.watch import Watch
from groupconv.errors import GroupConvError
from groupconv.kernels.machine import runnable

# Sizes that PyTorch gives as numbers for which a network is kept.
_MOST_NETWORKS = 8
_log = logging.getLogger("groupconv")


def groupconv(graph: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
    """A backend of torch.compile.

    What can't be compiled runs as PyTorch would run it, and the reason is logged (logger
    ``groupconv``): gradients, layers in training mode, other devices, processors for which no code
    can be generated.
    """
    reason = _why_not(example_inputs)
    if reason is not None:
        return _left(graph, reason)
    return _Network(graph)


def _left(graph: fx.GraphModule, reason: object) -> Callable[..., Any]:
    """The graph as it is."""
    _log.warning("torch.compile(backend='groupconv') leaves a graph to PyTorch: %s", reason)
    return graph.forward


def _why_not(inputs: Sequence[Any]) -> str | None:
    if not runnable():
        return "no code can be generated for this processor"
    tensors = [x for x in inputs if isinstance(x, Tensor)]
    if torch.is_grad_enabled() and any(x.requires_grad for x in tensors):
        return "gradients are recorded; call the model under torch.no_grad()"
    elsewhere = next((x.device for x in tensors if x.device.type != "cpu"), None)
    return None if elsewhere is None else f"an input is on {elsewhere}"


class _Network:
    """A graph whose weights are arguments, compiled for those that it is called with.

    The weights are looked at in every call, and the graph is compiled anew when they have changed,
    in whatever way; and for each size that PyTorch gives as a number.
    """

    def __init__(self, graph: fx.GraphModule) -> None:
        self.graph = graph
        nodes = graph.graph.find_nodes(op="placeholder")
        self.weights = [i for i, node in enumerate(nodes) if _is_weight(node)]
        self.numbers = [i for i, node in enumerate(nodes) if _is_number(node)]
        self.moving = sorted({*range(len(nodes))} - {*self.weights, *self.numbers})
        self._lock = threading.Lock()
        self._watch: Watch | None = None
        self._networks: dict[tuple[Any, ...], Compiled] = {}
        self._refused = False

    def __call__(self, *args: Any) -> Any:
        if not self._refused:
            try:
                network = self._network(args)
            except GroupConvError as error:
                self._refused = True
                _left(self.graph, error)
            else:
                return network(*(args[i] for i in self.moving))
        return self.graph(*args)

    def _network(self, args: tuple[Any, ...]) -> Compiled:
        numbers = tuple(x.item() if isinstance(x, Tensor) else x
                        for x in (args[i] for i in self.numbers))  # fmt: skip
        # Those that the graph holds itself, and those that it is given.
        weights = [*self.graph.parameters(), *self.graph.buffers()]
        weights += [args[i] for i in self.weights]
        with self._lock:
            if self._watch is None or not self._watch.holds(weights):
                self._networks.clear()
                self._watch = Watch(weights)
            if numbers not in self._networks:
                while len(self._networks) >= _MOST_NETWORKS:
                    self._networks.pop(next(iter(self._networks)))
                bound = _Bound(self.graph, args, self.moving)
                self._networks[numbers] = compile(bound, [args[i] for i in self.moving])
            return self._networks[numbers]


def _is_weight(node: fx.Node) -> bool:
    """Whether an argument is a parameter or a buffer: PyTorch marks them so."""
    return "_dynamo_static_input_type" in node.meta.get("tensor_dict", {})


def _is_number(node: fx.Node) -> bool:
    """Whether an argument is a size, or a float that PyTorch has put into a tensor."""
    source = node.meta.get("grapharg")
    example = node.meta.get("example_value")
    return not isinstance(example, Tensor) or (source is not None and source.pass_arg_as_tensor)


class _Bound(nn.Module):
    """The graph as a network of the arguments that move; the others are part of it."""

    def __init__(self, graph: fx.GraphModule, args: tuple[Any, ...], moving: list[int]) -> None:
        super().__init__()
        self.graph, self.moving = graph, moving
        fixed = {i: arg for i, arg in enumerate(args) if i not in moving}
        self.numbers = {i: arg for i, arg in fixed.items() if not isinstance(arg, Tensor)}
        self.tensors = {i: f"argument{i}" for i in fixed if i not in self.numbers}
        for i, name in self.tensors.items():
            self.register_buffer(name, fixed[i])
        # Not of the layers inside: those in training mode stay so, and are refused.
        self.training = graph.training = False

    def forward(self, *inputs: Tensor) -> Any:
        args = self.numbers | {i: self.get_buffer(name) for i, name in self.tensors.items()}
        args.update(zip(self.moving, inputs, strict=True))
        return self.graph(*(args[i] for i in sorted(args)))
