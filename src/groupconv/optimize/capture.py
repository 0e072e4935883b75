"""The graphs of a model, from torch.export; part by part where the whole can't be exported."""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram

from groupconv.errors import GroupConvError


@dataclass(frozen=True)
class Region:
    """A submodule with a graph of its own; the whole model is the region named "".

    Args:
        name: qualified name.
        program: its graph, in evaluation mode.
        calls: how often it runs in one pass of the model.
    """

    name: str
    program: ExportedProgram
    calls: int


def capture(model: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[list[Region], dict[str, str]]:
    """Graphs that cover as much of the model as can be had.

    Args:
        model: left as it was.
        inputs: one example of the forward's arguments.

    Returns:
        The regions, and for each submodule that none covers, the reason.

    Raises:
        GroupConvError: neither the model nor any of its parts has a graph.
    """
    with evaluation_mode(model):
        try:
            return [Region("", _export(model, inputs, {}), 1)], {}
        except GroupConvError as error:
            skipped = {type(model).__name__: str(error)}
            regions = list(_parts(model, inputs, skipped))
            if not regions:
                raise
            return regions, skipped


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Evaluation mode for the block; afterwards every module has its own mode again."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def _export(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> ExportedProgram:
    """The graph by torch.export, of the module or else of what torch.fx makes of it."""
    try:
        return torch.export.export(module, args, kwargs, strict=False)
    except Exception as refusal:  # whatever the user's forward may raise
        try:
            return torch.export.export(fx.symbolic_trace(module), args, kwargs, strict=False)
        except Exception as second:
            name = type(module).__name__
            raise GroupConvError(
                f"{name} can't be traced by torch.export: {_line(refusal)}; "
                f"nor by torch.fx: {_line(second)}"
            ) from refusal


def _line(error: Exception) -> str:
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)


def _parts(
    model: nn.Module, inputs: tuple[Tensor, ...], skipped: dict[str, str]
) -> Iterator[Region]:
    """The largest submodules that can be exported."""
    first: dict[str, tuple[tuple[Any, ...], dict[str, Any]]] = {}
    calls: Counter[str] = Counter()
    hooks = []
    for name, module in model.named_modules():

        def note(_: nn.Module, args: Any, kwargs: Any, name: str = name) -> None:
            calls[name] += 1
            first.setdefault(name, (args, kwargs))

        hooks.append(module.register_forward_pre_hook(note, with_kwargs=True))
    try:
        with torch.no_grad():
            model(*inputs)
    finally:
        for hook in hooks:
            hook.remove()
    waiting = [name for name, _ in model.named_children()]
    while waiting:
        name = waiting.pop(0)
        module = model.get_submodule(name)
        try:
            if name in first:
                yield Region(name, _export(module, *first[name]), calls[name])
                continue
            skipped[name] = "not called"
        except GroupConvError as error:
            skipped[name] = str(error)
        waiting += [f"{name}.{child}" for child, _ in module.named_children()]
