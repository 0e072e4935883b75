"""The graphs of a model, from torch.export; part by part where the whole can't be exported.

A detector is taken apart too: from the operator on that finds objects it runs on as many rows as it
found, which an example does not tell, and which are others when a layer has changed.
"""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram
from torch.utils._python_dispatch import TorchDispatchMode

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
        with torch.no_grad(), _Finding() as finding:
            model(*inputs)
        try:
            if finding.found:
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
    first: dict[str, tuple[tuple[Any, ...], dict[str, Any]]] = {}
    calls: Counter[str] = Counter()
    late: set[str] = set()
    finding = _Finding()
    hooks = []
    for name, module in model.named_modules():

        def note(_: nn.Module, args: Any, kwargs: Any, name: str = name) -> None:
            calls[name] += 1
            first.setdefault(name, (args, kwargs))

        def ended(module: nn.Module, args: Any, output: Any, name: str = name) -> None:
            if finding.found:
                late.add(name)

        hooks.append(module.register_forward_pre_hook(note, with_kwargs=True))
        hooks.append(module.register_forward_hook(ended))
    try:
        with torch.no_grad(), finding:
            model(*inputs)
    finally:
        for hook in hooks:
            hook.remove()
    regions = []
    waiting = [name for name, _ in model.named_children()]
    while waiting:
        name = waiting.pop(0)
        module = model.get_submodule(name)
        try:
            if name not in first:
                skipped[name] = "not called"
            elif name in late:
                skipped[name] = "runs on what was found in the images, not on whole images"
            else:
                regions.append(Region(name, _export(module, *first[name]), calls[name]))
                continue
        except GroupConvError as error:
            skipped[name] = str(error)
        waiting += [f"{name}.{child}" for child, _ in module.named_children()]
    ends = [region.name for region in regions if region.calls == 1] if finding.found else [""]
    return Captured(tuple(regions), skipped, tuple(ends))


class _Finding(TorchDispatchMode):
    """Whether an operator was run whose output is as large as what its input holds."""

    found = False

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        self.found = self.found or _finds(func)
        return func(*args, **(kwargs or {}))


def _finds(operator: Any) -> bool:
    # Indexing has the tag for its masks alone; it is mostly done by numbers.
    dynamic = torch.Tag.dynamic_output_shape in getattr(operator, "tags", ())
    return dynamic and operator is not torch.ops.aten.index.Tensor
