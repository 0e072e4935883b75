"""ONNX's own test cases for Conv and ConvTranspose on native kernels.

The cases are those of its backend test suite: the ones that its Python code generates for each
operator, and those that were converted from PyTorch and lie in its package as files. The cases of
CausalConvWithState are left out: the operator is another one, and keeps a state.
"""

import copy
import functools
import math
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from compare import assert_close
from onnx import numpy_helper
from torch import Tensor

from groupconv.kernels.native import Native
from groupconv.kernels.request import Request
from groupconv.kernels.spec import ConvSpec

OPERATORS = ("Conv", "ConvTranspose")
NODES = [
    "test_basic_conv_with_padding",
    "test_basic_conv_without_padding",
    "test_conv_with_autopad_same",
    "test_conv_with_strides_and_asymmetric_padding",
    "test_conv_with_strides_no_padding",
    "test_conv_with_strides_padding",
    "test_convtranspose",
    "test_convtranspose_1d",
    "test_convtranspose_autopad_same",
    "test_convtranspose_dilations",
    "test_convtranspose_group_2",
    "test_convtranspose_group_2_image_3",
    "test_convtranspose_kernel_shape",
    "test_convtranspose_output_shape",
    "test_convtranspose_pad",
    "test_convtranspose_pads",
]
FILES = [
    "test_Conv1d",
    "test_Conv1d_dilated",
    "test_Conv1d_groups",
    "test_Conv1d_pad1",
    "test_Conv1d_pad1size1",
    "test_Conv1d_pad2",
    "test_Conv1d_pad2size1",
    "test_Conv1d_stride",
    "test_Conv2d",
    "test_Conv2d_depthwise",
    "test_Conv2d_depthwise_padded",
    "test_Conv2d_depthwise_strided",
    "test_Conv2d_depthwise_with_multiplier",
    "test_Conv2d_dilated",
    "test_Conv2d_groups",
    "test_Conv2d_groups_thnn",
    "test_Conv2d_no_bias",
    "test_Conv2d_padding",
    "test_Conv2d_strided",
    "test_ConvTranspose2d",
    "test_ConvTranspose2d_no_bias",
    "test_operator_conv",
    "test_operator_convtranspose",
]
# Kernels have 1 or 2 spatial axes; in 3-d the table of implementations leaves the call to PyTorch.
NOT_COVERED = {
    "test_Conv3d",
    "test_Conv3d_dilated",
    "test_Conv3d_dilated_strided",
    "test_Conv3d_groups",
    "test_Conv3d_no_bias",
    "test_Conv3d_stride",
    "test_Conv3d_stride_padding",
    "test_convtranspose_3d",
}


class Case:
    """One node, what goes into it and what must come out."""

    def __init__(self, node: onnx.NodeProto, inputs: Sequence[Any], expected: Any) -> None:
        self.transposed = node.op_type == "ConvTranspose"
        self.attributes = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
        tensors = [torch.from_numpy(np.array(value)) for value in inputs]
        self.x, self.weight, self.bias = (*tensors, None)[:3]
        self.expected = torch.from_numpy(np.array(expected))

    def spec(self) -> ConvSpec:
        """The convolution by the rules of the operators' documentation."""
        given, dims = self.attributes, self.x.ndim - 2
        groups = given.get("group", 1)
        kernel = tuple(given.get("kernel_shape", self.weight.shape[2:]))
        stride = tuple(given.get("strides", (1,) * dims))
        dilation = tuple(given.get("dilations", (1,) * dims))
        extra = tuple(given.get("output_padding", (0,) * dims))
        size = tuple(self.x.shape[2:])
        pads = given.get("pads", (0,) * (2 * dims))
        padding = tuple(zip(pads[:dims], pads[dims:], strict=True))
        auto = given.get("auto_pad", b"NOTSET").decode()
        wanted = given.get("output_shape")
        if auto.startswith("SAME") and wanted is None:
            wanted = [n * s if self.transposed else -(-n // s)
                      for n, s in zip(size, stride, strict=True)]  # fmt: skip
        if wanted is not None:
            axes = zip(size, kernel, stride, dilation, extra, wanted, strict=True)
            totals = [
                s * (n - 1) + e + d * (k - 1) + 1 - out
                if self.transposed
                else max(0, s * (out - 1) + d * (k - 1) + 1 - n)
                for n, k, s, d, e, out in axes
            ]
            # The odd one goes to the end only where that is asked for.
            halves = [(total // 2, total - total // 2) for total in totals]
            padding = tuple(
                (small, large) if auto == "SAME_UPPER" else (large, small)
                for small, large in halves
            )
        channels = self.weight.shape[1] * groups if self.transposed else self.weight.shape[0]
        return ConvSpec(
            self.x.shape[0], self.x.shape[1], channels, size, kernel, stride, padding, dilation,
            groups, self.transposed, extra if self.transposed else (),
        )  # fmt: skip


@functools.cache
def _generated() -> dict[str, Case]:
    """Cases that ONNX's Python code makes; to read one operator's is to run all of them."""
    random = np.random.get_state()  # noqa: NPY002
    with warnings.catch_warnings(action="ignore"):
        from onnx.backend.test.loader import load_model_tests

        tests = load_model_tests(kind="node")
    np.random.set_state(random)  # noqa: NPY002
    return {
        test.name: Case(test.model.graph.node[0], *_only(test.data_sets))
        for test in tests
        if [node.op_type for node in test.model.graph.node] in [[name] for name in OPERATORS]
    }


def _only(data_sets: Sequence[tuple[Sequence[Any], Sequence[Any]]]) -> tuple[Sequence[Any], Any]:
    ((inputs, (output,)),) = data_sets
    return inputs, output


@functools.cache
def _converted() -> dict[str, Case]:
    """Cases that lie in the package as files."""
    found = {}
    folder = Path(onnx.__file__).parent / "backend" / "test" / "data"
    for path in [*folder.glob("pytorch-converted/*"), *folder.glob("pytorch-operator/*")]:
        graph = onnx.load(path / "model.onnx").graph
        if [node.op_type for node in graph.node] not in [[name] for name in OPERATORS]:
            continue
        values = {i.name: numpy_helper.to_array(i) for i in graph.initializer}
        (data,) = path.glob("test_data_set_*")
        values[graph.input[0].name] = _tensor(data / "input_0.pb")
        inputs = [values[name] for name in graph.node[0].input]
        found[path.name] = Case(graph.node[0], inputs, _tensor(data / "output_0.pb"))
    return found


def _tensor(path: Path) -> np.ndarray:
    tensor = onnx.TensorProto()
    tensor.ParseFromString(path.read_bytes())
    return numpy_helper.to_array(tensor)


def _native(case: Case, channels_last: bool) -> Tensor:
    """What the kernels make of it, in memory that held NaN."""
    spec = case.spec()
    biased = case.bias is not None
    native = Native(Request(spec, torch.float32, channels_last, channels_last, True, biased))
    y = torch.full((spec.batch, spec.out_channels, *spec.output_size), math.nan)
    x, y = _laid_out(case.x, channels_last), _laid_out(y, channels_last)
    native.compute(x, native.pack(case.weight), case.bias, y)
    return y


def _laid_out(x: Tensor, channels_last: bool) -> Tensor:
    return x.movedim(1, -1).contiguous().movedim(-1, 1) if channels_last else x.contiguous()


def _check(case: Case, channels_last: bool) -> None:
    actual = _native(case, channels_last)
    scale = case.expected.abs().max().item()
    assert_close(actual, case.expected, rtol=1e-5, atol=1e-6 * scale)


both_layouts = pytest.mark.parametrize("channels_last", [False, True], ids=["NCHW", "NHWC"])


@both_layouts
@pytest.mark.parametrize("name", NODES)
def test_generated_cases(name: str, channels_last: bool) -> None:
    _check(_generated()[name], channels_last)


@both_layouts
@pytest.mark.parametrize("name", FILES)
def test_converted_cases(name: str, channels_last: bool) -> None:
    _check(_converted()[name], channels_last)


def test_no_case_is_left_out() -> None:
    """Cases that a later ONNX adds are run here, until they have a name above."""
    cases = {**_generated(), **_converted()}
    for name in NOT_COVERED:
        assert cases.pop(name).x.ndim == 5
    assert cases.keys() >= {*NODES, *FILES}
    for name in cases.keys() - {*NODES, *FILES}:
        _check(cases[name], channels_last=False)
    specs = [case.spec() for case in cases.values()]
    assert any(spec.padding[0][0] != spec.padding[0][1] for spec in specs)
    assert any(case.attributes.get("auto_pad") == b"SAME_LOWER" for case in cases.values())
    assert any("output_shape" in case.attributes for case in cases.values())


def test_padding_at_the_wrong_end_would_show() -> None:
    case = _generated()["test_convtranspose_autopad_same"]
    wrong = copy.copy(case)
    wrong.attributes = {**case.attributes, "auto_pad": b"SAME_LOWER"}
    _check(case, channels_last=False)
    with pytest.raises(AssertionError):
        _check(wrong, channels_last=False)
