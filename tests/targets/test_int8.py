"""INT8 files: as accurate as the float network, one scale for each output channel."""

import json
import sys
from pathlib import Path

import llvmlite.binding as llvm
import numpy as np
import pytest
import torch
from torch import Tensor, nn

import groupconv
from groupconv.cli import main
from groupconv.data.sample import fashion_mnist, trained_fashion_resnet
from groupconv.errors import ArgumentError, ExportError
from groupconv.targets.base import FileTarget
from groupconv.targets.export import FILE_TARGETS

QUANTIZED = ("onnxruntime", "litert")
# Without these instructions ONNX Runtime adds pairs of products in 16 bits, and some saturate: what
# the file says is then seen in floating point only.
VNNI = any(llvm.get_host_cpu_features().get(name) for name in ("avx512vnni", "avxvnni"))
every_target = pytest.mark.parametrize(
    "target",
    [
        pytest.param(
            target,
            id=target.name,
            marks=pytest.mark.skipif(target.why_not() is not None, reason=str(target.why_not())),
        )
        for target in FILE_TARGETS
        if target.name in QUANTIZED
    ],
)


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def quantized(target: FileTarget, folder: Path, net: nn.Module, *size: int) -> groupconv.Exported:
    return groupconv.export(
        net.eval(),
        numbers(1, *size),
        folder / f"net{target.suffix}",
        images=numbers(4, *size, seed=1),
        int8=numbers(64, *size, seed=2),
    )


def in_float(path: str, net: nn.Module, images: Tensor) -> tuple[float, float]:
    """Largest and mean difference, over the largest number, of a file whose INT8 nodes are run as
    they are written: back to floats, then convolved."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(path, options)
    (name,) = (x.name for x in session.get_inputs())
    found = torch.cat([torch.from_numpy(session.run(None, {name: x.numpy()})[0])
                       for x in images.split(1)])  # fmt: skip
    with torch.no_grad():
        right = net(images)
    error = (found - right).abs() / right.abs().max()
    return float(error.max()), float(error.mean())


@every_target
@pytest.mark.parametrize("groups", [1, 2, 16, 64])
def test_a_grouped_layer_is_still_one_node(target: FileTarget, groups: int, tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = nn.Conv2d(64, 64, 3, groups=groups)
    found = quantized(target, tmp_path, net, 64, 9, 8)
    assert sum(n for name, n in found.nodes.items() if "conv" in name.lower()) == 1
    assert found.before_int8 is not None
    assert found.before_int8.largest < 1e-5
    # Eight bits: some per mille, but more where what is beyond the calibrated range is cut.
    largest, mean = found.agreement.largest, found.agreement.mean
    if target.name == "onnxruntime" and not VNNI:
        largest, mean = in_float(found.path, net, numbers(4, 64, 9, 8, seed=1))
    assert 1e-3 < largest < 0.3
    assert mean < 0.01
    assert found.stay_float == ()
    assert [file.name for file in tmp_path.iterdir()] == [f"net{target.suffix}"]


@pytest.mark.parametrize(
    ("layer", "channels", "scales"),
    [
        (nn.Conv2d(8, 16, 3, groups=4), 8, (0, 16)),
        (nn.Conv2d(16, 16, 3, groups=16), 16, (0, 16)),
        (nn.ConvTranspose2d(3, 64, 3, padding=1), 3, (1, 64)),
        # An output channel of each group lies at one place of the axis: no scale of its own.
        (nn.ConvTranspose2d(8, 16, 3, padding=1, groups=2), 8, None),
    ],
    ids=["groups", "depthwise", "transposed", "transposed in groups"],
)
def test_scales_of_onnx(
    layer: nn.Module, channels: int, scales: tuple[int, int] | None, tmp_path: Path
) -> None:
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    target = next(t for t in FILE_TARGETS if t.name == "onnxruntime")
    found = quantized(target, tmp_path, layer, channels, 8, 8)
    graph = onnx.load(found.path).graph
    (conv,) = (node for node in graph.node if "Conv" in node.op_type)
    made = {node.output[0]: node for node in graph.node}
    constants = {constant.name: constant for constant in graph.initializer}
    weight = made.get(conv.input[1])
    if scales is None:
        assert weight is None
        assert constants[conv.input[1]].data_type == onnx.TensorProto.FLOAT
        assert found.stay_float == (conv.name,)
        assert conv.name in str(found)
    else:
        assert weight is not None
        axis = next(a.i for a in weight.attribute if a.name == "axis")
        assert (axis, *constants[weight.input[1]].dims) == scales
        assert constants[weight.input[0]].data_type == onnx.TensorProto.INT8
        assert found.stay_float == ()


@every_target
def test_a_trained_network(target: FileTarget, tmp_path: Path) -> None:
    calibration, test = fashion_mnist()
    net, images = trained_fashion_resnet(), test.images[:500]
    path = tmp_path / f"net{target.suffix}"
    whole = groupconv.export(net, images[:1], path).bytes
    found = groupconv.export(
        net, images[:1], path, images=images, labels=test.labels[:500],
        int8=calibration.images[:128],
    )  # fmt: skip
    assert found.before_int8 is not None
    assert found.before_int8.top1 == 1
    assert found.agreement.top1 is not None
    assert found.agreement.top1 > 0.97
    for agreement in (found.before_int8, found.agreement):
        assert agreement.accuracy is not None
        assert agreement.accuracy[1] > 0.92
        assert agreement.accuracy[0] > agreement.accuracy[1] - 0.012
    assert found.bytes < 0.3 * whole


@every_target
def test_what_was_calibrated_on_something_else_is_refused(
    target: FileTarget, tmp_path: Path
) -> None:
    net, x = (
        nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3)).eval(),
        numbers(2, 3, 9, 9),
    )
    path = tmp_path / f"net{target.suffix}"
    path.write_text("before")
    with pytest.raises(ExportError, match="differs from PyTorch by"):
        groupconv.export(net, x, path, int8=1e-3 * numbers(8, 3, 9, 9))
    assert path.read_text() == "before"
    assert len(list(tmp_path.iterdir())) == 1


def test_arguments(tmp_path: Path) -> None:
    net, x = nn.Conv2d(3, 8, 3).eval(), numbers(2, 3, 9, 9)
    with pytest.raises(
        ArgumentError, match=r"\.pt2 files have none here; write \.onnx or \.tflite"
    ):
        groupconv.export(net, x, tmp_path / "net.pt2", int8=x)
    with pytest.raises(ArgumentError, match="int8 of shape"):
        groupconv.export(net, x, tmp_path / "net.pt2", int8=x[:, :2])
    with pytest.raises(ArgumentError, match="int8: 1 images are less than one batch"):
        groupconv.export(net, x, tmp_path / "net.pt2", int8=x[:1])
    for labels, images in ((torch.zeros(2), None), (torch.zeros(3), x)):
        with pytest.raises(ArgumentError, match="labels of shape"):
            groupconv.export(net, x, tmp_path / "net.pt2", images=images, labels=labels)
    assert not list(tmp_path.iterdir())


def test_the_verb(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    _, test = fashion_mnist()
    np.savez(
        tmp_path / "data.npz", images=test.images[:48].numpy(), labels=test.labels[:48].numpy()
    )
    (tmp_path / "net.py").write_text(
        "from groupconv.data.sample import trained_fashion_resnet as build\n"
    )
    monkeypatch.chdir(tmp_path)

    def run(*more: str) -> tuple[int, str, str]:
        arguments = ["export", "net.py:build", "net.onnx", "--shape", "1,1,28,28", "--int8", *more]
        monkeypatch.setattr(sys, "argv", ["groupconv", *arguments])
        with pytest.raises(SystemExit) as caught:
            main()
        out, err = capsys.readouterr()
        return int(caught.value.code or 0), out, err

    code, out, _ = run("--data", "data.npz", "--calibrate", "32", "--json")
    found = json.loads(out)
    assert code == 0
    assert found["before_int8"]["top1"] == 1
    assert len(found["agreement"]["accuracy"]) == 2
    for more, message in (
        ((), "int8 needs images to calibrate on: give --data"),
        (("--data", "data.npz", "--calibrate", "48"), "calibrate=48 must be 1 or more and leave"),
    ):
        code, _, err = run(*more)
        assert code == 2
        assert message in " ".join(err.split())
