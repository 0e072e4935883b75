"""OpenVINO on the CPU."""

import functools
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from groupconv.targets import onnx_file
from groupconv.targets.base import FileTarget, Opened

# Ends of a graph, and numbers: no operators.
_ENDS = {"Parameter", "Result", "Constant"}


class OpenVino(FileTarget):
    """OpenVINO's CPU plugin in float32, asked for low latency."""

    name = "openvino"
    spin = 0.003
    suffix = ".xml"
    beside = (".bin",)
    extra = "openvino"
    modules = ("onnx", "onnxscript", "openvino")

    def export(
        self,
        module: nn.Module,
        inputs: tuple[Tensor, ...],
        path: Path,
        metadata: Mapping[str, str] | None = None,
        *,
        any_size: bool = False,
    ) -> None:
        """By way of ONNX; the weights lie in ``.bin`` beside the file."""
        import openvino

        with tempfile.TemporaryDirectory(prefix="groupconv-") as folder:
            file = Path(folder) / "network.onnx"
            onnx_file.write(module, inputs, file, any_size=any_size)
            network = openvino.convert_model(file)
        for key, value in (metadata or {}).items():
            network.set_rt_info(value, key)
        openvino.save_model(network, path, compress_to_fp16=False)

    def open(self, path: Path, inputs: tuple[Tensor, ...]) -> Opened:
        import openvino

        settings = {
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_NUM_THREADS": torch.get_num_threads(),
            "INFERENCE_PRECISION_HINT": "f32",
        }
        network = _core().read_model(path)
        # What may be any batch is slower than one that is known.
        network.reshape({end: list(x.shape) for end, x in zip(network.inputs, inputs, strict=True)})
        compiled = _core().compile_model(network, "CPU", settings)
        request = compiled.create_infer_request()
        # In memory of ours, so that a pass is only a pass.
        fed = [x.detach().clone(memory_format=torch.contiguous_format) for x in inputs]
        for number, x in enumerate(fed):
            request.set_input_tensor(number, openvino.Tensor(x.numpy(), shared_memory=True))

        def feed(inputs: Sequence[Tensor]) -> None:
            for place, x in zip(fed, inputs, strict=True):
                place.copy_(x)

        return Opened(
            feed=feed,
            # Unless outputs are shared, a copy is made for Python.
            run=lambda: request.infer(share_outputs=True),
            outputs=lambda: [
                torch.from_numpy(request.get_output_tensor(i).data.copy())
                for i in range(len(compiled.outputs))
            ],
        )

    def nodes(self, path: Path) -> dict[str, int]:
        network = _core().read_model(path)
        names = [node.get_type_name() for node in network.get_ops()]
        return dict(Counter(name for name in names if name not in _ENDS))


@functools.cache
def _core() -> Any:
    import openvino

    return openvino.Core()
