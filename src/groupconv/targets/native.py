"""The whole network as native code of the library's own, channels last in memory."""

from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from groupconv.compiler.compiled import Compiled, compile, load_compiled
from groupconv.compiler.parts import compile_parts
from groupconv.errors import ArgumentError, ExportError, GroupConvError
from groupconv.kernels.machine import runnable
from groupconv.observe import finds_objects
from groupconv.targets.base import FileTarget, Opened, opened
from groupconv.version import __version__


class Native(FileTarget):
    """What :func:`groupconv.compile` makes of a network, on the CPU.

    Inputs are given channels last, and so are the outputs: a layer that is timed alone costs what
    it costs inside of a network. Of a detector the parts before any object is found are compiled;
    the rest runs in PyTorch.
    """

    name = "native"
    version = __version__
    suffix = ".groupconv"
    any_batch = any_size = False
    extra = ""
    modules = ()

    def why_not(self) -> str | None:
        return None if runnable() else "no code can be generated for this processor"

    def build(self, module: nn.Module, inputs: tuple[Tensor, ...]) -> Callable[[], object]:
        try:
            net = _compiled(module, inputs)
        except ArgumentError:
            raise
        except GroupConvError:
            if not finds_objects(module, inputs):
                raise
            parts = compile_parts(module, inputs)
            return lambda: parts(*inputs)
        ordered = _ordered(net, inputs)
        return lambda: net(*ordered)

    def export(
        self,
        module: nn.Module,
        inputs: tuple[Tensor, ...],
        path: Path,
        metadata: Mapping[str, str] | None = None,
        *,
        any_size: bool = False,
    ) -> None:
        """For inputs as they are, and channels last."""
        try:
            net = _compiled(module, inputs)
            net.program(*inputs)
        except ArgumentError:
            raise
        except GroupConvError as error:
            raise ExportError(str(error)) from error
        net.save(path, metadata)

    def open(self, path: Path, inputs: tuple[Tensor, ...]) -> Opened:
        net = load_compiled(path)
        return opened(net, _ordered(net, inputs))

    def nodes(self, path: Path) -> dict[str, int]:
        program, _ = next(iter(load_compiled(path).programs.values()))
        return dict(Counter(type(node.operator).__name__ for node in program.graph.nodes))


def _compiled(module: nn.Module, inputs: tuple[Tensor, ...]) -> Compiled:
    """For inputs that are channels last, unless the network only takes contiguous ones."""
    last = tuple(_channels_last(x) for x in inputs)
    try:
        return compile(module, last)
    except ArgumentError:
        raise
    except GroupConvError:
        # A network may look at its inputs by views that these have not.
        return compile(module, inputs)


def _ordered(net: Compiled, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """The inputs in the order that the network was first compiled for."""
    program, _ = next(iter(net.programs.values()))
    wanted = (value.contiguous for value in program.graph.inputs)
    return tuple(
        x.contiguous() if plain else _channels_last(x)
        for x, plain in zip(inputs, wanted, strict=True)
    )


def _channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last) if x.ndim == 4 else x
