"""Target: a runtime where latency is measured and a network is sent."""

from abc import ABC, abstractmethod
from collections.abc import Callable

from torch import Tensor, nn


class Target(ABC):
    """One runtime on this machine."""

    name: str

    @abstractmethod
    def why_not(self) -> str | None:
        """Why the runtime can't be used here, or None when it can."""

    @abstractmethod
    def build(self, module: nn.Module, inputs: tuple[Tensor, ...]) -> Callable[[], object]:
        """Make ``module`` ready in the runtime; each call of the result is one forward pass."""
