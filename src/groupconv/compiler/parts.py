"""A detector of which native code runs what comes before any object is found."""

import copy
import logging
from collections.abc import Sequence

from torch import Tensor, nn

from groupconv.compiler.compiled import check, compile
from groupconv.errors import GroupConvError
from groupconv.observe import observe

log = logging.getLogger(__name__)

_HEAVY = (nn.modules.conv._ConvNd, nn.Linear)


def compile_parts(model: nn.Module, example_inputs: Tensor | Sequence[Tensor]) -> nn.Module:
    """Turn those parts of an inference network into native code that can be.

    For networks that :func:`groupconv.compile` refuses as a whole, as detectors, which run on as
    many rows as they find objects: the largest submodules that run before that, on tensors, and
    have layers to speak of.

    Args:
        model: as for :func:`groupconv.compile`.
        example_inputs: the network's arguments.

    Returns:
        A copy of the model with :class:`~groupconv.compiler.compiled.Compiled` in their places.

    Raises:
        ArgumentError: as :func:`groupconv.compile`.
        GroupConvError: no part can be compiled.
    """
    inputs = (example_inputs,) if isinstance(example_inputs, Tensor) else tuple(example_inputs)
    check(model)
    seen, net = observe(model, inputs), copy.deepcopy(model)
    reasons, done = list[str](), list[str]()
    waiting = [name for name, _ in model.named_children()]
    while waiting:
        name = waiting.pop(0)
        part = model.get_submodule(name)
        args, named = seen.first.get(name, ((), {}))
        tensors = bool(args) and not named and all(isinstance(x, Tensor) for x in args)
        if tensors and name not in seen.late and any(isinstance(m, _HEAVY) for m in part.modules()):
            try:
                net.set_submodule(name, compile(part, args))
                done.append(name)
                continue
            except GroupConvError as error:
                reasons.append(f"{name}: {error}")
        waiting += [f"{name}.{child}" for child, _ in part.named_children()]
    if not done:
        why = "; ".join(reasons) or "no layer runs on tensors before objects are found"
        raise GroupConvError(f"compile_parts: no part of {type(model).__name__} can be: {why}")
    log.info("native code in place of %s", ", ".join(done))
    return net
