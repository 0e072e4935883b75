"""explain(): which implementation runs each convolution of a module, and why the others don't."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.modules.conv import _ConvNd

from groupconv.errors import ArgumentError
from groupconv.kernels import dispatch
from groupconv.nn.conv import LAYERS


@dataclass(frozen=True)
class Explained:
    """One call of a convolution.

    Args:
        layer: name of the layer in the module; empty for the module itself.
        description: the layer as it prints itself.
        chosen: the implementation that ran.
        refused: every other implementation, with the reason why it did not.
    """

    layer: str
    description: str
    chosen: str
    refused: dict[str, str]


@dataclass(frozen=True)
class Explanation:
    """What :func:`explain` found; prints as text for people."""

    calls: tuple[Explained, ...]

    def __str__(self) -> str:
        lines = []
        for call in self.calls:
            lines.append(f"{call.layer or '(the module)'}: {call.description}")
            lines.append(f"  runs on {call.chosen}")
            lines += [f"  not on {name}: {reason}" for name, reason in call.refused.items()]
        return "\n".join(lines) if lines else "no convolution was called"

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as the command line prints them."""
        return {"calls": [vars(call) for call in self.calls]}


def explain(module: nn.Module, example_input: Any) -> Explanation:
    """Run a module once, and tell of each convolution which implementation ran it.

    Args:
        module: any module; those of :mod:`groupconv.nn` can run on generated kernels.
        example_input: what the module takes; a tuple is passed as several arguments.

    Returns:
        :class:`Explanation`, with one entry for each call in the order of the calls.

    The module runs in evaluation mode, so that nothing in it changes.

    Raises:
        ArgumentError: module is not a module, or is the result of torch.compile.
    """
    if not isinstance(module, nn.Module):
        raise ArgumentError(f"explain: module={module!r} must be a torch.nn.Module")
    if type(module).__name__ == "OptimizedModule":
        raise ArgumentError(
            "explain: module is the result of torch.compile, where every layer is one "
            "aten.convolution; pass the module that was compiled"
        )
    inputs = example_input if isinstance(example_input, tuple) else (example_input,)
    calls: list[Explained] = []
    with _hooked(module, calls), torch.no_grad():
        module(*inputs)
    return Explanation(tuple(calls))


@contextmanager
def _hooked(module: nn.Module, calls: list[Explained]) -> Iterator[None]:
    """While the block runs, note the calls of every convolution of ``module``."""
    stack: list[str] = []
    thread = threading.get_ident()

    def note(choice: str, refused: dict[str, str]) -> None:
        if threading.get_ident() != thread:
            return
        layer = module.get_submodule(stack[-1]) if stack else module
        calls.append(Explained(stack[-1] if stack else "", str(layer), choice, refused))

    def enter(name: str, layer: nn.Module) -> None:
        stack.append(name)
        if isinstance(layer, _ConvNd) and not isinstance(layer, LAYERS):
            kind = type(layer).__name__
            reason = f"the layer is a {kind} of torch; groupconv.nn has layers that use it"
            note("aten", {"native": reason})

    def leave(name: str) -> None:
        # Another's hook may have ended the call before ours noted its begin.
        if stack and stack[-1] == name:
            stack.pop()

    training = {layer: layer.training for layer in module.modules()}
    module.eval()
    hooks = []
    for name, layer in module.named_modules(remove_duplicate=True):
        hooks.append(layer.register_forward_pre_hook(lambda m, _, n=name: enter(n, m)))
        hooks.append(layer.register_forward_hook(lambda *_, n=name: leave(n), always_call=True))
    try:
        with dispatch.listening(note):
            yield
    finally:
        for hook in hooks:
            hook.remove()
        for layer, mode in training.items():
            layer.training = mode
