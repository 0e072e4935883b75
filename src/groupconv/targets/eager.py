"""PyTorch as it is: eager mode, on the device of the inputs."""

from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from groupconv.targets.base import FileTarget, Opened, opened
from groupconv.targets.fold import fold_batch_norms
from groupconv.targets.program import exported
from groupconv.targets.quiet import quiet


class Eager(FileTarget):
    """Eager PyTorch under ``torch.inference_mode``; its files are programs of ``torch.export``."""

    name = "eager"
    version = torch.__version__
    suffix = ".pt2"
    extra = ""
    modules = ()

    def build(self, module: nn.Module, inputs: tuple[Tensor, ...]) -> Callable[[], object]:
        def call() -> object:
            with torch.inference_mode():
                out = module(*inputs)
            # Without this a GPU would be timed for launching the work, not for doing it.
            if torch.cuda.is_available() and any(x.is_cuda for x in inputs):
                torch.cuda.synchronize()
            return out

        return call

    def export(
        self,
        module: nn.Module,
        inputs: tuple[Tensor, ...],
        path: Path,
        metadata: Mapping[str, str] | None = None,
        *,
        any_size: bool = False,
    ) -> None:
        with quiet():
            graph = exported(module, inputs, any_size).module()
            fold_batch_norms(graph)
            program = exported(graph, inputs, any_size)
            torch.export.save(program, path, extra_files=dict(metadata or {}))

    def open(self, path: Path, inputs: tuple[Tensor, ...]) -> Opened:
        return opened(torch.export.load(path).module(), inputs)

    def nodes(self, path: Path) -> dict[str, int]:
        graph = torch.export.load(path).graph
        calls = (node for node in graph.nodes if node.op == "call_function")
        return dict(Counter(str(node.target) for node in calls))
