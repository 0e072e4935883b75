"""PyTorch as it is: eager mode, on the device of the inputs."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from groupconv.targets.base import Target


class Eager(Target):
    """Eager PyTorch under ``torch.inference_mode``."""

    name = "eager"
    version = torch.__version__

    def why_not(self) -> str | None:
        return None

    def build(self, module: nn.Module, inputs: tuple[Tensor, ...]) -> Callable[[], object]:
        def call() -> object:
            with torch.inference_mode():
                out = module(*inputs)
            # Without this a GPU would be timed for launching the work, not for doing it.
            if torch.cuda.is_available() and any(x.is_cuda for x in inputs):
                torch.cuda.synchronize()
            return out

        return call
