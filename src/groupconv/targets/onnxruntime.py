"""ONNX Runtime on the CPU."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from groupconv.targets import onnx_file, onnx_int8
from groupconv.targets.base import FileTarget, Opened


class OnnxRuntime(FileTarget):
    """ONNX Runtime's CPU provider with all its rewritings."""

    name = "onnxruntime"
    spin = 0.045
    suffix = ".onnx"
    extra = "onnx"
    modules = ("onnx", "onnxscript", "onnxruntime")

    def export(
        self,
        module: nn.Module,
        inputs: tuple[Tensor, ...],
        path: Path,
        metadata: Mapping[str, str] | None = None,
        *,
        any_size: bool = False,
    ) -> None:
        onnx_file.write(module, inputs, path, metadata, any_size)

    def open(self, path: Path, inputs: tuple[Tensor, ...]) -> Opened:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.inter_op_num_threads = 1
        # What may be of any size is slower than what is known.
        for name, size in zip(onnx_file.names(inputs[0].shape), inputs[0].shape, strict=True):
            options.add_free_dimension_override_by_name(name, size)
        session = onnxruntime.InferenceSession(
            str(path), options, providers=["CPUExecutionProvider"]
        )
        arrays = {
            end.name: np.ascontiguousarray(x.detach().numpy())
            for end, x in zip(session.get_inputs(), inputs, strict=True)
        }
        # Inputs and outputs live in its own memory, so that a pass is only a pass.
        binding = session.io_binding()
        fed, results = [], []
        for name, array in arrays.items():
            fed.append(onnxruntime.OrtValue.ortvalue_from_numpy(array))
            binding.bind_ortvalue_input(name, fed[-1])
        for end, first in zip(session.get_outputs(), session.run(None, arrays), strict=True):
            results.append(
                onnxruntime.OrtValue.ortvalue_from_shape_and_type(first.shape, first.dtype)
            )
            binding.bind_ortvalue_output(end.name, results[-1])

        def feed(inputs: Sequence[Tensor]) -> None:
            for value, x in zip(fed, inputs, strict=True):
                value.update_inplace(np.ascontiguousarray(x.detach().numpy()))

        return Opened(
            feed=feed,
            run=lambda: session.run_with_iobinding(binding),
            outputs=lambda: [torch.from_numpy(value.numpy()) for value in results],
        )

    def quantize(self, path: Path, batches: Iterable[tuple[Tensor, ...]], out: Path) -> list[str]:
        return onnx_int8.quantize(path, batches, out)

    def nodes(self, path: Path) -> dict[str, int]:
        return onnx_file.nodes(path)
