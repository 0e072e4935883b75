"""A pass of a network, watched: what runs on what, and what runs on objects that were found.

From the operator on that finds objects a detector runs on as many rows as it found, which an
example does not tell, and which are others when a layer has changed.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode


@dataclass(frozen=True)
class Pass:
    """What was seen in one pass.

    Args:
        first: module name to the arguments, positional and by name, of its first call.
        calls: module name to how often it was called.
        late: names of modules that ended after objects were found.
        found: whether any were looked for.
    """

    first: dict[str, tuple[tuple[Any, ...], dict[str, Any]]]
    calls: Counter[str]
    late: set[str]
    found: bool


def observe(model: nn.Module, inputs: Sequence[Tensor]) -> Pass:
    """Run a model, in evaluation mode, and note every call of its modules."""
    first: dict[str, tuple[tuple[Any, ...], dict[str, Any]]] = {}
    calls: Counter[str] = Counter()
    late: set[str] = set()
    finding = _Finding()
    hooks = []
    for name, module in model.named_modules():

        def start(_: nn.Module, args: Any, kwargs: Any, name: str = name) -> None:
            calls[name] += 1
            first.setdefault(name, (args, kwargs))

        def end(_: nn.Module, args: Any, output: Any, name: str = name) -> None:
            if finding.found:
                late.add(name)

        hooks.append(module.register_forward_pre_hook(start, with_kwargs=True))
        hooks.append(module.register_forward_hook(end))
    try:
        with torch.no_grad(), finding:
            model(*inputs)
    finally:
        for hook in hooks:
            hook.remove()
    return Pass(first, calls, late, finding.found)


def finds_objects(model: nn.Module, inputs: Sequence[Tensor]) -> bool:
    """Whether a model, in evaluation mode, runs on as many rows as it finds objects."""
    with torch.no_grad(), _Finding() as finding:
        model(*inputs)
    return finding.found


class _Finding(TorchDispatchMode):
    """Whether an operator was run whose output is as large as what its input holds."""

    found = False

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if torch.Tag.dynamic_output_shape in func.tags:
            # Indexing has the tag for its masks alone; it is mostly done by numbers.
            by_numbers = func is torch.ops.aten.index.Tensor and not any(map(_is_mask, args[1]))
            self.found = self.found or not by_numbers
        return func(*args, **(kwargs or {}))


def _is_mask(index: Tensor | None) -> bool:
    return index is not None and index.dtype in (torch.bool, torch.uint8)
