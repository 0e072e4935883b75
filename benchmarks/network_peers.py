"""The engines that run whole networks: ours, PyTorch's, and the runtimes that serve networks.

A network is given to each as float32 with constant weights. Images come in the order of axes that
the engine likes best; classes come out.
"""

import copy
import functools
import importlib.util
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import groupconv
from benchmarks import zoo
from benchmarks.engine import OPENMP_SPIN, Ready, missing
from benchmarks.litert_peer import interpret
from benchmarks.onnx_peers import openvino_request, ort_session


class Source:
    """One network in the forms that engines take; each form is made when it is first asked for.

    Args:
        name: of :mod:`benchmarks.zoo`.
        batch: images.
        folder: where files of the network lie; those there already are used as they are.
    """

    def __init__(self, name: str, batch: int, folder: Path) -> None:
        self.name, self.batch, self.folder = name, batch, folder

    @functools.cached_property
    def model(self) -> nn.Module:
        return zoo.build(self.name)

    @functools.cached_property
    def input(self) -> Tensor:
        return zoo.images(self.name, self.batch)

    @functools.cached_property
    def compiled(self) -> Path:
        """By ``groupconv.compile``, for the number of threads at that time."""
        path = self.folder / f"{self.name}.groupconv"
        if not path.exists():
            groupconv.compile(self.model, (self.input,)).save(path)
        return path

    @functools.cached_property
    def onnx(self) -> Path:
        """By PyTorch's exporter."""
        path = self.folder / f"{self.name}.onnx"
        if not path.exists():
            torch.onnx.export(
                self.model, (self.input,), path, dynamo=True, external_data=False, verbose=False
            )
        return path

    @functools.cached_property
    def tflite(self) -> Path:
        """By LiteRT's converter, in a process of its own."""
        path = self.folder / f"{self.name}.tflite"
        if not path.exists():
            command = [sys.executable, "-m", "benchmarks.litert_network"]
            done = subprocess.run(
                [*command, self.name, str(self.batch), str(path)],
                cwd=Path(__file__).parents[1],
                capture_output=True,
                text=True,
                check=False,
            )
            if done.returncode:
                last = (done.stderr.strip().splitlines() or ["nothing"])[-1]
                raise RuntimeError(f"the converter ended with {done.returncode}: {last}")
        return path


@dataclass(frozen=True)
class Engine:
    """How a network gets into an engine.

    Args:
        form: the attribute of :class:`Source` that it is made from.
        prepare: (source, threads) -> the engine, or why it can't run.
    """

    form: str
    prepare: Callable[[Source, int], Ready | str]


def ours(source: Source, threads: int) -> Ready | str:
    """``groupconv.compile``."""
    if not hasattr(groupconv, "compile"):
        return "groupconv.compile is missing"
    return _module(groupconv.compile(source.model, (source.input,)), source.input, "NCHW", threads)


def ours_from_file(source: Source, threads: int) -> Ready | str:
    """``groupconv.load_compiled``."""
    return _module(groupconv.load_compiled(source.compiled), source.input, "NCHW", threads)


def eager(source: Source, threads: int) -> Ready | str:
    """The module as it is, on contiguous tensors."""
    return _module(source.model, source.input, "NCHW", threads)


def eager_channels_last(source: Source, threads: int) -> Ready | str:
    """The module and its images in ``torch.channels_last``."""
    model = copy.deepcopy(source.model).to(memory_format=torch.channels_last)
    x = source.input.contiguous(memory_format=torch.channels_last)
    return _module(model, x, "NHWC", threads)


def inductor(source: Source, threads: int) -> Ready | str:
    """``torch.compile`` with weights frozen into the code."""
    compiler = os.environ.get("CXX", "g++")
    if shutil.which(compiler) is None:
        return f"torch.compile needs a C++ compiler, and {compiler} isn't found"
    from torch._inductor import config

    # Models of one class share their code, and its count of compilations.
    torch.compiler.reset()
    compiled = torch.compile(source.model)
    with config.patch(freezing=True), torch.no_grad():
        compiled(source.input)
    return _module(compiled, source.input, "NCHW", threads, mode=torch.no_grad)


def onnx_runtime(source: Source, threads: int) -> Ready | str:
    """ONNX Runtime with all its rewritings."""
    reason = missing("onnxscript", "onnxruntime")
    if reason:
        return reason
    return ort_session(str(source.onnx), source.input, threads, "NCHW")


def openvino(source: Source, threads: int) -> Ready | str:
    """OpenVINO's CPU plugin, asked for low latency."""
    reason = missing("onnxscript", "openvino")
    if reason:
        return reason
    return openvino_request(str(source.onnx), source.input, threads, "NHWC")


def litert(source: Source, threads: int) -> Ready | str:
    """LiteRT with XNNPACK."""
    reason = missing("ai_edge_litert.interpreter")
    if reason:
        return reason
    # It isn't imported here: it brings libraries with threads of their own.
    if importlib.util.find_spec("litert_torch") is None:
        return "litert_torch, which converts networks, is not installed"
    x = source.input.movedim(1, -1).contiguous().numpy()
    return interpret(source.tflite, x, threads, xnnpack=True)


OURS, OURS_FROM_FILE = "groupconv", "groupconv from a file"
ENGINES: dict[str, Engine] = {
    OURS: Engine("model", ours),
    "eager NCHW": Engine("model", eager),
    "eager channels_last": Engine("model", eager_channels_last),
    "inductor": Engine("model", inductor),
    "ONNX Runtime": Engine("onnx", onnx_runtime),
    "OpenVINO": Engine("onnx", openvino),
    "LiteRT": Engine("tflite", litert),
}
# The form in which ours is deployed: nothing is built, and the module isn't there.
FROM_FILE = Engine("compiled", ours_from_file)
LIBRARIES = (
    "torch", "torchvision", "timm", "onnx", "onnxscript", "onnxruntime", "openvino",
    "ai-edge-litert", "litert-torch",
)  # fmt: skip


def _module(
    model: Callable[[Tensor], Tensor],
    x: Tensor,
    layout: str,
    threads: int,
    mode: Callable[[], Any] = torch.inference_mode,
) -> Ready:
    """A module of PyTorch's, called in ``mode``."""

    def run() -> Tensor:
        with mode():
            return model(x)

    return Ready(
        run=run,
        # A copy: the next pass may write its result to the same place.
        output=lambda: run().clone(),
        layout=layout,
        spin=OPENMP_SPIN if threads > 1 else 0.0,
    )
