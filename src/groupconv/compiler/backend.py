"""``torch.compile(model, backend="groupconv")``: found by its entry point, nothing to import."""

import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from groupconv.compiler.compiled import compile
from groupconv.errors import GroupConvError
from groupconv.kernels.machine import runnable

# Sizes that PyTorch gives as numbers for which a network is kept.
_MOST_NETWORKS = 8
_log = logging.getLogger("groupconv")


def groupconv(graph: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
    """A backend of torch.compile.

    What can't be compiled runs as PyTorch would run it, and the reason is logged (logger
    ``groupconv``): gradients, other devices, processors for which no code can be generated.
    """
    reason = _why_not(example_inputs)
    if reason is not None:
        _log.warning("torch.compile(backend='groupconv') leaves a graph to PyTorch: %s", reason)
        return graph.forward
    return _Frozen(graph)


def _why_not(inputs: Sequence[Any]) -> str | None:
    if not runnable():
        return "no code can be generated for this processor"
    tensors = [x for x in inputs if isinstance(x, Tensor)]
    if torch.is_grad_enabled() and any(x.requires_grad for x in tensors):
        return "gradients are recorded; call the model under torch.no_grad()"
    elsewhere = next((x.device for x in tensors if x.device.type != "cpu"), None)
    return None if elsewhere is None else f"an input is on {elsewhere}"


class _Frozen:
    """A graph whose parameters are arguments, compiled for those that it is called with.

    Compiled anew when they have changed, as an optimizer or ``load_state_dict`` changes them, and
    for each size that PyTorch gives as a number.
    """

    def __init__(self, graph: fx.GraphModule) -> None:
        self.graph = graph
        self.parameters: tuple[tuple[int, int], ...] = ()
        self.networks: dict[tuple[Any, ...], Callable[..., Any]] = {}

    def __call__(self, *args: Any) -> Any:
        parameters = tuple((x.data_ptr(), x._version) for x in args if isinstance(x, nn.Parameter))
        numbers = tuple(x for x in args if not isinstance(x, Tensor))
        if parameters != self.parameters or len(self.networks) > _MOST_NETWORKS:
            self.networks.clear()
            self.parameters = parameters
        if numbers not in self.networks:
            self.networks[numbers] = self._compile(args)
        return self.networks[numbers](*args)

    def _compile(self, args: tuple[Any, ...]) -> Callable[..., Any]:
        moving = [
            i for i, x in enumerate(args)
            if isinstance(x, Tensor) and not isinstance(x, nn.Parameter)
        ]  # fmt: skip
        try:
            compiled = compile(_Bound(self.graph, args, moving), [args[i] for i in moving])
        except GroupConvError as error:
            _log.warning("torch.compile(backend='groupconv') leaves a graph to PyTorch: %s", error)
            return self.graph.forward
        return lambda *args: compiled(*(args[i] for i in moving))


class _Bound(nn.Module):
    """The graph as a network of the arguments that change; the others are part of it."""

    def __init__(self, graph: fx.GraphModule, args: tuple[Any, ...], moving: list[int]) -> None:
        super().__init__()
        self.graph, self.args, self.moving = graph, args, moving
        self.eval()

    def forward(self, *inputs: Tensor) -> Any:
        args = list(self.args)
        for i, x in zip(self.moving, inputs, strict=True):
            args[i] = x
        return self.graph(*args)
