"""The graphs of a model, from torch.export; part by part where the whole can't be exported.

A detector is taken apart too: only what runs on whole images has a graph that holds for all images.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram

from groupconv.errors import GroupConvError
from groupconv.observe import finds_objects, observe


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


@dataclass(frozen=True)
class Captured:
    """What is known of a model from its graphs.

    Args:
        regions: that cover as much of the model as can be had.
        skipped: for each submodule that none covers, the reason.
        ends: modules whose outputs show what a change has done: the model itself, named "", or of a
            detector what is run once on whole images.
    """

    regions: tuple[Region, ...]
    skipped: dict[str, str]
    ends: tuple[str, ...]


def capture(model: nn.Module, inputs: tuple[Tensor, ...]) -> Captured:
    """Graphs of the model, or of its largest parts that have one.

    Args:
        model: left as it was.
        inputs: one example of the forward's arguments.

    Raises:
        GroupConvError: neither the model nor any of its parts has a graph.
    """
    with evaluation_mode(model):
        try:
            if finds_objects(model, inputs):
                raise GroupConvError(f"{type(model).__name__} finds objects in the images")
            return Captured((Region("", _export(model, inputs, {}), 1),), {}, ("",))
        except GroupConvError as error:
            captured = _parts(model, inputs, {type(model).__name__: str(error)})
            if not captured.regions:
                raise
            return captured


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


def _parts(model: nn.Module, inputs: tuple[Tensor, ...], skipped: dict[str, str]) -> Captured:
    """The largest submodules that can be exported and run on whole images."""
    seen = observe(model, inputs)
    regions = []
    waiting = [name for name, _ in model.named_children()]
    while waiting:
        name = waiting.pop(0)
        module = model.get_submodule(name)
        try:
            if name not in seen.first:
                skipped[name] = "not called"
            elif name in seen.late:
                skipped[name] = "runs on what was found in the images, not on whole images"
            else:
                regions.append(Region(name, _export(module, *seen.first[name]), seen.calls[name]))
                continue
        except GroupConvError as error:
            skipped[name] = str(error)
        waiting += [f"{name}.{child}" for child, _ in module.named_children()]
    ends = [region.name for region in regions if region.calls == 1] if seen.found else [""]
    return Captured(tuple(regions), skipped, tuple(ends))
