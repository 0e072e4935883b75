"""ExecuTorch with XNNPACK, on the CPU."""

from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from groupconv.errors import ExportError
from groupconv.targets.base import FileTarget, Opened, opened
from groupconv.targets.fold import fold_batch_norms
from groupconv.targets.program import exported_for
from groupconv.targets.quiet import quiet


class ExecuTorch(FileTarget):
    """ExecuTorch's runtime: XNNPACK where it has the operator, else plain kernels.

    A file is for one batch.
    """

    name = "executorch"
    spin = 0.003
    suffix = ".pte"
    any_batch = any_size = False
    extra = "executorch"
    modules = ("executorch",)

    def export(
        self,
        module: nn.Module,
        inputs: tuple[Tensor, ...],
        path: Path,
        metadata: Mapping[str, str] | None = None,
        *,
        any_size: bool = False,
    ) -> None:
        """The metadata are methods of the program that return them."""
        with quiet():
            from executorch.backends.xnnpack.partition.xnnpack_partitioner import (
                XnnpackPartitioner,
            )
            from executorch.exir import to_edge_transform_and_lower

            graph = exported_for(module, inputs).module()
            fold_batch_norms(graph)
            program = exported_for(graph, inputs)
            try:
                lowered = to_edge_transform_and_lower(
                    program,
                    partitioner=[XnnpackPartitioner()],
                    constant_methods=dict(metadata or {}),
                ).to_executorch()
            except Exception as error:  # Of many types.
                raise ExportError(f"ExecuTorch can't hold the network: {error}") from error
        path.write_bytes(lowered.buffer)

    def open(self, path: Path, inputs: tuple[Tensor, ...]) -> Opened:
        with quiet():
            from executorch.extension.pybindings import portable_lib
            from executorch.runtime import Runtime

            if portable_lib._threadpool_get_thread_count() != torch.get_num_threads():
                portable_lib._unsafe_reset_threadpool(torch.get_num_threads())
            method = Runtime.get().load_program(path).load_method("forward")
        assert method is not None
        return opened(lambda *x: method.execute(x), inputs)

    def nodes(self, path: Path) -> dict[str, int]:
        """Calls of kernels, and of delegates, each of which is a part of the network."""
        from executorch.exir._serialize._program import deserialize_pte_binary
        from executorch.exir.schema import DelegateCall, KernelCall

        (plan, *_) = deserialize_pte_binary(path.read_bytes()).program.execution_plan
        steps = [step.instr_args for chain in plan.chains for step in chain.instructions]
        kernels = [plan.operators[s.op_index].name for s in steps if isinstance(s, KernelCall)]
        parts = [plan.delegates[s.delegate_index].id for s in steps if isinstance(s, DelegateCall)]
        return dict(Counter([*kernels, *parts]))
