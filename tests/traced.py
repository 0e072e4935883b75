"""Networks written by hand, and their traces."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from groupconv.optimize.spaces import Axis, Space
from groupconv.optimize.trace import Trace, TracedConv, trace
from groupconv.optimize.visit import visit

X = torch.ones(2, 4, 8, 8)


class Net(nn.Module):
    """Named modules and a forward pass given as a function."""

    def __init__(self, forward: Callable[..., Tensor], **modules: nn.Module) -> None:
        super().__init__()
        self.function = forward
        for name, module in modules.items():
            self.add_module(name, module)

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x)


def conv(in_channels: int, out_channels: int, kernel: int = 1, **kwargs: object) -> nn.Conv2d:
    return nn.Conv2d(in_channels, out_channels, kernel, padding=kernel // 2, **kwargs)


def traced(forward: Callable[..., Tensor], **modules: nn.Module) -> Trace:
    return trace(Net(forward, **{"a": conv(4, 6), "b": conv(6, 2), **modules}), (X,))


def found(result: Trace, name: str) -> TracedConv:
    return next(c for c in result.convs if c.name == name)


def only(result: Trace, axis: Axis) -> Space:
    """The one space that stands on an axis."""
    (space,) = set(axis.spaces)
    return result.spaces[space]


def before(result: Trace, name: str) -> Space:
    return only(result, found(result, name).inputs)


def after(result: Trace, name: str) -> Space:
    return only(result, found(result, name).outputs)


def members(result: Trace, space: Space) -> set[tuple[str, str, int]]:
    return {
        (m.module, m.parameter, m.axis)
        for m in result.members
        if any(result.spaces[s] is space for s in m.runs.spaces)
    }


def capture(model: nn.Module, names: Sequence[str], x: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    """Inputs and outputs of the named modules, as they are before anything changes them."""
    seen: dict[str, tuple[Tensor, Tensor]] = {}

    def keep(name: str, module_input: Tensor, output: Tensor) -> None:
        seen[name] = (module_input.clone(), output.clone())

    with torch.no_grad():
        visit(model, names, x, keep)
    return seen
