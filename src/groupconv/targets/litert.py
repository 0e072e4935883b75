"""LiteRT (TensorFlow Lite) with XNNPACK, on the CPU."""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from groupconv.targets import litert_convert, litert_int8, rewrites
from groupconv.targets.base import FileTarget, Opened
from groupconv.targets.program import exported_for
from groupconv.targets.quiet import quiet

# Steps that the interpreter adds to those of a file.
_ADDED = {"DELEGATE"}
# Operators that its GPU delegate has: tensorflow/lite/tools/versioning/gpu_compatibility.cc.
_GPU = {
    "ABS", "ADD", "ADD_N", "AVERAGE_POOL_2D", "BATCH_MATMUL", "CAST", "CONCATENATION", "CONV_2D",
    "COS", "CUMSUM", "DENSIFY", "DEPTHWISE_CONV_2D", "DEPTH_TO_SPACE", "DEQUANTIZE", "DIV", "ELU",
    "EQUAL", "EXP", "FLOOR", "FLOOR_DIV", "FLOOR_MOD", "FULLY_CONNECTED", "GATHER", "GELU",
    "GREATER", "GREATER_EQUAL", "HARD_SWISH", "LEAKY_RELU", "LESS", "LESS_EQUAL", "LOG",
    "LOGICAL_AND", "LOGISTIC", "LSTM", "MAXIMUM", "MAX_POOL_2D", "MEAN", "MINIMUM", "MIRROR_PAD",
    "MUL", "NEG", "NOT_EQUAL", "ONE_HOT", "PACK", "PAD", "PADV2", "POW", "PRELU", "QUANTIZE",
    "REDUCE_MAX", "REDUCE_MIN", "REDUCE_PROD", "RELU", "RELU6", "RELU_N1_TO_1", "RESHAPE",
    "RESIZE_BILINEAR", "RESIZE_NEAREST_NEIGHBOR", "RSQRT", "SELECT", "SELECT_V2", "SIGN", "SIN",
    "SLICE", "SOFTMAX", "SPACE_TO_DEPTH", "SPLIT", "SPLIT_V", "SQRT", "SQUARE",
    "SQUARED_DIFFERENCE", "STRIDED_SLICE", "SUB", "SUM", "TANH", "TILE", "TRANSPOSE",
    "TRANSPOSE_CONV",
}  # fmt: skip
# Channels that each group of a convolution must be a multiple of there. Others are split: one
# convolution for each group (tensorflow/lite/delegates/gpu/common/model_builder.cc).
_GPU_CHANNELS = 4


class LiteRt(FileTarget):
    """LiteRT's interpreter, with XNNPACK where it has the operator. A file is for one batch."""

    name = "litert"
    spin = 0.003
    suffix = ".tflite"
    any_batch = any_size = False
    extra = "litert"
    modules = ("litert_torch", "ai_edge_litert")

    def export(
        self,
        module: nn.Module,
        inputs: tuple[Tensor, ...],
        path: Path,
        metadata: Mapping[str, str] | None = None,
        *,
        any_size: bool = False,
    ) -> None:
        graph = exported_for(module, inputs).module()
        rewrites.replace_shuffles(graph)
        rewrites.replace_transposed(graph)
        litert_convert.convert(exported_for(graph, inputs), path)
        if metadata:
            _note(path, metadata)

    def open(self, path: Path, inputs: tuple[Tensor, ...]) -> Opened:
        interpreter = _interpreter(path)
        ends = interpreter.get_input_details()
        results = [end["index"] for end in interpreter.get_output_details()]

        def feed(inputs: Sequence[Tensor]) -> None:
            for end, x in zip(ends, inputs, strict=True):
                interpreter.set_tensor(end["index"], x.detach().contiguous().numpy())

        feed(inputs)
        return Opened(
            feed=feed,
            run=interpreter.invoke,
            outputs=lambda: [torch.from_numpy(interpreter.get_tensor(i)) for i in results],
        )

    def quantize(self, path: Path, batches: Iterable[tuple[Tensor, ...]], out: Path) -> list[str]:
        return litert_int8.quantize(path, batches, out)

    def off_gpu(self, path: Path) -> list[str]:
        interpreter = _interpreter(path)
        missing = sorted(_names(interpreter).keys() - _GPU)
        split = sum(any(n % _GPU_CHANNELS for n in sizes) for sizes in _group_sizes(interpreter))
        several = f"{split} CONV_2D of groups that are no multiple of {_GPU_CHANNELS} channels"
        return [*missing, several] if split else missing

    def nodes(self, path: Path) -> dict[str, int]:
        return _names(_interpreter(path))


def _names(interpreter: Any) -> dict[str, int]:
    """The operators of a file, with how many there are."""
    names = [step["op_name"] for step in interpreter._get_ops_details()]
    return dict(Counter(name for name in names if name not in _ADDED))


def _group_sizes(interpreter: Any) -> Iterator[tuple[int, int]]:
    """Channels of a group, before and after, of every convolution in groups."""
    shapes = {t["index"]: t["shape"].tolist() for t in interpreter.get_tensor_details()}
    for step in interpreter._get_ops_details():
        if step["op_name"] == "CONV_2D":
            x, weight = (shapes[index] for index in step["inputs"][:2])
            groups = x[-1] // weight[-1]
            if groups > 1:
                yield weight[-1], weight[0] // groups


def _note(path: Path, metadata: Mapping[str, str]) -> None:
    """Add entries to the metadata of a file, each a buffer with a name."""
    import flatbuffers
    from ai_edge_litert import schema_py_generated as schema

    model = schema.ModelT.InitFromPackedBuf(path.read_bytes(), 0)
    for name, value in metadata.items():
        entry, buffer = schema.MetadataT(), schema.BufferT()
        buffer.data = list(value.encode())
        entry.name, entry.buffer = name, len(model.buffers)
        model.buffers.append(buffer)
        model.metadata = [*(model.metadata or []), entry]
    builder = flatbuffers.Builder(0)
    builder.Finish(model.Pack(builder), b"TFL3")
    path.write_bytes(builder.Output())


def _interpreter(path: Path) -> Any:
    with quiet():
        from ai_edge_litert.interpreter import Interpreter

        interpreter = Interpreter(model_path=str(path), num_threads=torch.get_num_threads())
        interpreter.allocate_tensors()
    return interpreter
