"""The whole network as native code of the library's own, channels last in memory."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from groupconv.compiler.compiled import compile
from groupconv.kernels.machine import runnable
from groupconv.targets.base import Target
from groupconv.version import __version__


class Native(Target):
    """What :func:`groupconv.compile` makes of a network, on the CPU.

    Inputs are given channels last, and so are the outputs: a layer that is timed alone costs what
    it costs inside of a network.
    """

    name = "native"
    version = __version__

    def why_not(self) -> str | None:
        return None if runnable() else "no code can be generated for this processor"

    def build(self, module: nn.Module, inputs: tuple[Tensor, ...]) -> Callable[[], object]:
        ordered = tuple(
            x.contiguous(memory_format=torch.channels_last) if x.ndim == 4 else x for x in inputs
        )
        net = compile(module, ordered)
        return lambda: net(*ordered)
