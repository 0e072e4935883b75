"""The whole network as native code of the library's own, channels last in memory."""

from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from groupconv.compiler.compiled import compile, load_compiled
from groupconv.errors import ArgumentError, ExportError, GroupConvError
from groupconv.kernels.machine import runnable
from groupconv.targets.base import FileTarget, Opened, opened
from groupconv.version import __version__


class Native(FileTarget):
    """What :func:`groupconv.compile` makes of a network, on the CPU.

    Inputs are given channels last, and so are the outputs: a layer that is timed alone costs what
    it costs inside of a network.
    """

    name = "native"
    version = __version__
    suffix = ".groupconv"
    any_batch = False
    extra = ""
    modules = ()

    def why_not(self) -> str | None:
        return None if runnable() else "no code can be generated for this processor"

    def build(self, module: nn.Module, inputs: tuple[Tensor, ...]) -> Callable[[], object]:
        ordered = _ordered(inputs)
        net = compile(module, ordered)
        return lambda: net(*ordered)

    def export(
        self,
        module: nn.Module,
        inputs: tuple[Tensor, ...],
        path: Path,
        metadata: Mapping[str, str] | None = None,
    ) -> None:
        try:
            net = compile(module, inputs)
            net.program(*_ordered(inputs))
        except ArgumentError:
            raise
        except GroupConvError as error:
            raise ExportError(str(error)) from error
        net.save(path, metadata)

    def open(self, path: Path, inputs: tuple[Tensor, ...]) -> Opened:
        return opened(load_compiled(path), _ordered(inputs))

    def nodes(self, path: Path) -> dict[str, int]:
        program, _ = next(iter(load_compiled(path).programs.values()))
        return dict(Counter(type(node.operator).__name__ for node in program.graph.nodes))


def _ordered(inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(
        x.contiguous(memory_format=torch.channels_last) if x.ndim == 4 else x for x in inputs
    )
