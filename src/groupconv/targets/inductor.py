"""PyTorch's own compiler, ``torch.compile``, with the weights frozen into its code."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from groupconv.targets.base import Opened, opened
from groupconv.targets.eager import Eager
from groupconv.targets.program import exported_for
from groupconv.targets.quiet import quiet


class Inductor(Eager):
    """What ``torch.compile`` makes of a network, on the CPU; it is made anew from the file."""

    name = "inductor"

    def why_not(self) -> str | None:
        compiler = os.environ.get("CXX", "g++")
        if shutil.which(compiler) is not None:
            return None
        return f"torch.compile needs a C++ compiler, and {compiler} isn't found"

    def build(self, module: nn.Module, inputs: tuple[Tensor, ...]) -> Callable[[], object]:
        # A graph has code of its own: torch.compile counts how often it met a piece of code, and
        # gives up on the forward of nn.Sequential after a few networks.
        return opened(_compiled(exported_for(module, inputs).module(), inputs), inputs).run

    def open(self, path: Path, inputs: tuple[Tensor, ...]) -> Opened:
        return opened(_compiled(torch.export.load(path).module(), inputs), inputs)


def _compiled(module: nn.Module, inputs: tuple[Tensor, ...]) -> Callable[..., object]:
    from torch._inductor import config

    compiled = torch.compile(module, dynamic=False)
    with quiet(), config.patch(freezing=True), torch.no_grad():
        compiled(*inputs)
    return compiled
