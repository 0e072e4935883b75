"""Target: a runtime where latency is measured and a network is sent."""

import importlib.metadata
import importlib.util
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from groupconv.errors import ArgumentError


class Target(ABC):
    """One runtime on this machine.

    Attributes:
        name: what users call it.
        spin: seconds for which the worker threads of what was built keep their cores busy after a
            pass, and some; 0 where all that is built shares its workers.
    """

    name: str
    spin: float = 0.0

    @property
    def rest(self) -> float:
        """Seconds after which nothing that was built disturbs another; without workers, none."""
        return self.spin if torch.get_num_threads() > 1 else 0.0

    @abstractmethod
    def why_not(self) -> str | None:
        """Why nothing can be written for the runtime here, or None when it can."""

    def why_not_timed(self) -> str | None:
        """Why time can't be measured here, or None when it can."""
        return self.why_not()

    @property
    @abstractmethod
    def version(self) -> str:
        """Of the runtime: measured times are those of one version."""

    @abstractmethod
    def build(self, module: nn.Module, inputs: tuple[Tensor, ...]) -> Callable[[], object]:
        """Make ``module`` ready in the runtime; each call of the result is one forward pass."""


@dataclass(frozen=True)
class Opened:
    """A file that is ready in its runtime.

    Args:
        feed: what the next passes read, of the shapes that it was opened for.
        run: one forward pass.
        outputs: what the last one returned, flat.
    """

    feed: Callable[[Sequence[Tensor]], None]
    run: Callable[[], object]
    outputs: Callable[[], list[Tensor]]


def opened(function: Callable[..., object], inputs: Sequence[Tensor]) -> Opened:
    """A function of tensors, made ready: it reads copies of ``inputs``, laid out as they are."""
    fed = [x.detach().clone() for x in inputs]
    latest: list[object] = []

    def feed(inputs: Sequence[Tensor]) -> None:
        for place, x in zip(fed, inputs, strict=True):
            place.copy_(x)

    def run() -> object:
        latest.clear()
        with torch.inference_mode():
            latest.append(function(*fed))
        return latest[0]

    return Opened(
        feed=feed,
        run=run,
        outputs=lambda: [x for x in pytree.tree_leaves(latest) if isinstance(x, Tensor)],
    )


class FileTarget(Target):
    """A runtime that takes networks from files.

    Attributes:
        suffix: of its files.
        beside: suffixes of other files that are written beside them.
        any_batch: whether a file can run batches of any number of images.
        any_size: whether a file can be for images of any size.
        extra: the extra of groupconv that brings what it needs.
        modules: what it needs, the runtime last.
    """

    suffix: str
    beside: tuple[str, ...] = ()
    any_batch: bool = True
    any_size: bool = True
    extra: str
    modules: tuple[str, ...]

    def why_not(self) -> str | None:
        missing = [name for name in self.modules if importlib.util.find_spec(name) is None]
        if not missing:
            return None
        verb = "is" if len(missing) == 1 else "are"
        return f"{' and '.join(missing)} {verb} missing: pip install 'groupconv[{self.extra}]'"

    @property
    def version(self) -> str:
        return importlib.metadata.version(self.modules[-1].replace("_", "-"))

    @abstractmethod
    def export(
        self,
        module: nn.Module,
        inputs: tuple[Tensor, ...],
        path: Path,
        metadata: Mapping[str, str] | None = None,
        *,
        any_size: bool = False,
    ) -> None:
        """Write ``module``, for inputs of such shapes, and any batch where format and network
        allow.

        Args:
            metadata: kept in the file.
            any_size: for images of any size, and any batch where ``any_batch`` holds.

        Raises:
            ExportError: the format can't hold it.
        """

    @abstractmethod
    def open(self, path: Path, inputs: tuple[Tensor, ...]) -> Opened:
        """Make a file ready for ``inputs``, with as many threads as PyTorch uses."""

    @abstractmethod
    def nodes(self, path: Path) -> dict[str, int]:
        """The operators of a file, by their names in its format, with how many there are."""

    def off_gpu(self, path: Path) -> list[str]:
        """What the runtime's GPU code doesn't run as the file has it, as far as that is known."""
        return []

    def quantize(self, path: Path, batches: Iterable[tuple[Tensor, ...]], out: Path) -> list[str]:
        """Write the INT8 form of a file.

        Args:
            path: of the float file.
            batches: inputs to calibrate on.
            out: of the new file.

        Returns:
            Names of the operators that stay float.

        Raises:
            ArgumentError: the format has no INT8 here.
            ExportError: the network can't be quantized.
        """
        raise ArgumentError(f"int8: {self.suffix} files have none here; write .onnx or .tflite")

    def build(self, module: nn.Module, inputs: tuple[Tensor, ...]) -> Callable[[], object]:
        with tempfile.TemporaryDirectory(prefix="groupconv-") as folder:
            path = Path(folder) / f"network{self.suffix}"
            self.export(module, inputs, path)
            return self.open(path, inputs).run
