"""Networks in files of other runtimes: what they compute there, of what they are made."""

import importlib.util
import json
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import groupconv
from groupconv import nn as gnn
from groupconv.errors import ArgumentError, DataError, ExportError
from groupconv.targets import get_target
from groupconv.targets.base import FileTarget
from groupconv.targets.export import FILE_TARGETS

every_target = pytest.mark.parametrize(
    "target",
    [
        pytest.param(
            target,
            id=target.name,
            marks=pytest.mark.skipif(target.why_not() is not None, reason=str(target.why_not())),
        )
        for target in FILE_TARGETS
        # The first has no files of its own, and compiles C++ for every one of them; what is in the
        # second's can't be looked at.
        if target.name not in ("inductor", "executorch")
    ],
)
# What stands for a convolution in a file.
CONVOLUTIONS = (
    "Conv", "Convolution", "GroupConvolution", "CONV_2D", "DEPTHWISE_CONV_2D",
    "conv", "aten.conv1d.default", "aten.conv2d.default", "aten.conv2d.padding",
)  # fmt: skip
TRANSPOSED = (
    "ConvTranspose", "ConvolutionBackpropData", "GroupConvolutionBackpropData", "TRANSPOSE_CONV",
    "conv_transpose", "aten.conv_transpose2d.input",
)  # fmt: skip
# What changes the order of axes at both ends of a file whose images are channels last inside.
ENDS = {"litert": 2}


def written(
    target: FileTarget, folder: Path, module: nn.Module, *inputs: Tensor
) -> groupconv.Exported:
    """The checked file of a module in evaluation mode."""
    return groupconv.export(module.eval(), inputs, folder / f"net{target.suffix}")


def count(found: groupconv.Exported, names: tuple[str, ...]) -> int:
    return sum(found.nodes.get(name, 0) for name in names)


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


LAYERS: dict[str, Callable[[], tuple[nn.Module, Tensor]]] = {
    **{
        f"width {width}": lambda width=width: (
            nn.Conv2d(64, 64, 3, padding=1, groups=64 // width),
            numbers(2, 64, 9, 8),
        )
        for width in (1, 2, 4, 8, 32)
    },
    "more outputs": lambda: (nn.Conv2d(12, 40, 3, groups=4), numbers(2, 12, 9, 8)),
    "fewer outputs": lambda: (nn.Conv2d(40, 12, 3, groups=4), numbers(2, 40, 9, 8)),
    "multiplier": lambda: (nn.Conv2d(6, 18, 3, groups=6), numbers(2, 6, 9, 8)),
    "stride": lambda: (nn.Conv2d(16, 16, 3, (2, 3), (1, 0), groups=4), numbers(2, 16, 9, 8)),
    "dilation": lambda: (nn.Conv2d(16, 16, 3, 1, 2, (2, 1), groups=2), numbers(2, 16, 9, 8)),
    "same": lambda: (nn.Conv2d(16, 16, (4, 3), padding="same", groups=4), numbers(2, 16, 9, 8)),
    "1-d": lambda: (nn.Conv1d(24, 24, 5, padding=2, groups=6), numbers(2, 24, 17)),
    "own layer": lambda: (gnn.GroupConv2d(16, 16, 3, padding=1, groups=4), numbers(2, 16, 9, 8)),
}


@every_target
@pytest.mark.parametrize("name", LAYERS)
def test_a_grouped_layer_is_one_node(target: FileTarget, name: str, tmp_path: Path) -> None:
    layer, x = LAYERS[name]()
    found = written(target, tmp_path, layer, x)
    assert count(found, CONVOLUTIONS) == 1
    assert not {"Split", "VariadicSplit", "Concat", "Slice"} & found.nodes.keys()
    assert found.agreement.largest < 1e-5


@every_target
@pytest.mark.parametrize("groups", [1, 2, 8])
@pytest.mark.parametrize("stride", [1, 2])
def test_transposed(target: FileTarget, groups: int, stride: int, tmp_path: Path) -> None:
    layer = nn.ConvTranspose2d(8, 16, 3, stride, 1, stride - 1, groups=groups)
    found = written(target, tmp_path, layer, numbers(2, 8, 7, 6))
    # LiteRT's own operator has neither groups nor this padding; native code knows no other.
    rewritten = target.name in ("litert", "native")
    assert count(found, CONVOLUTIONS if rewritten else TRANSPOSED) == 1


@every_target
def test_transposed_without_a_rewriting(target: FileTarget, tmp_path: Path) -> None:
    found = written(target, tmp_path, nn.ConvTranspose2d(8, 16, 3, 2), numbers(2, 8, 7, 6))
    assert count(found, CONVOLUTIONS if target.name == "native" else TRANSPOSED) == 1


class Shuffled(nn.Module):
    """A shuffle between convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(8, 12, 3, padding=1, groups=4)
        self.shuffle = gnn.ChannelShuffle(4)
        self.second = nn.Conv2d(12, 12, 1, groups=4)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.shuffle(self.first(x)))


@every_target
def test_a_shuffle_is_three_nodes_at_most(target: FileTarget, tmp_path: Path) -> None:
    found = written(target, tmp_path, Shuffled(), numbers(2, 8, 7, 6))
    moved = count(
        found,
        (
            "Reshape",
            "Transpose",
            "RESHAPE",
            "TRANSPOSE",
            "reshape",
            "transpose",
            "aten.channel_shuffle.default",
            "Gather",
        ),
    )
    own = {"eager": 1, "native": 0}
    assert moved - ENDS.get(target.name, 0) == own.get(target.name, 3)


@every_target
def test_batch_norms_are_folded(target: FileTarget, tmp_path: Path) -> None:
    net = nn.Sequential(nn.Conv2d(8, 8, 3, groups=4, bias=False), nn.BatchNorm2d(8), nn.ReLU())
    net.train()(3 + 2 * numbers(16, 8, 7, 6))
    found = written(target, tmp_path, net, numbers(2, 8, 7, 6))
    assert set(found.nodes) <= {
        *CONVOLUTIONS,
        "Relu",
        "Add",
        "TRANSPOSE",
        "Relayout",
        "relu",
        "aten.relu.default",
    }


@every_target
def test_any_batch(target: FileTarget, tmp_path: Path) -> None:
    net = nn.Sequential(Shuffled(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, 5))
    found = written(target, tmp_path, net, numbers(1, 8, 7, 6))
    for batch in (1, 2, 5) if target.any_batch else (1,):
        x = numbers(batch, 8, 7, 6, seed=batch)
        opened = target.open(Path(found.path), (x,))
        opened.run()
        (y,) = opened.outputs()
        assert torch.allclose(y, net(x), atol=1e-5)


class OneBatch(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.reshape(6, -1).softmax(1)


@every_target
def test_one_batch_where_the_network_knows_no_other(target: FileTarget, tmp_path: Path) -> None:
    written(target, tmp_path, OneBatch(), numbers(1, 3, 4, 5))
    written(target, tmp_path, OneBatch(), numbers(3, 2, 4, 5))


class Several(nn.Module):
    """Two inputs, nested outputs of two types."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1, groups=2)

    def forward(self, x: Tensor, y: Tensor) -> Any:
        z = self.conv(x) + y
        return {"sum": z, "more": (z.argmax(1), x - y)}


@every_target
def test_several_inputs_and_outputs(target: FileTarget, tmp_path: Path) -> None:
    inputs = numbers(2, 4, 5, 6), numbers(2, 4, 5, 6, seed=1)
    assert written(target, tmp_path, Several(), *inputs).agreement.top1 is None


@every_target
def test_compared_on_images(target: FileTarget, tmp_path: Path) -> None:
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.LazyLinear(4)).eval()
    x = numbers(2, 3, 6, 6)
    net(x)
    found = groupconv.export(net, x, tmp_path / f"a{target.suffix}", images=numbers(9, 3, 6, 6))
    assert found.agreement.top1 == 1
    with pytest.raises(ArgumentError, match="like the only input"):
        groupconv.export(net, x, tmp_path / f"b{target.suffix}", images=numbers(9, 3, 6, 7))
    with pytest.raises(ArgumentError, match="less than one batch"):
        groupconv.export(net, x, tmp_path / f"b{target.suffix}", images=numbers(1, 3, 6, 6))


@every_target
def test_time_is_measured_through_the_file(target: FileTarget) -> None:
    reason = target.why_not_timed()
    if reason is not None:
        with pytest.raises(
            ArgumentError, match=f"target='{target.name}' can't be used here: {reason}"
        ):
            get_target(target.name)
        return
    run = get_target(target.name).build(Shuffled().eval(), (numbers(2, 8, 7, 6),))
    run()


NETWORKS = {
    # Convolutions of each, as the papers' and torchvision's definitions have them.
    "shufflenet_v2_x0_5": 56,
    "mobilenet_v2": 52,
    "mobilenet_v3_small": 52,
    "resnext50_32x4d": 53,
    "regnet_x_400mf": 71,
    "squeezenet1_1": 26,
}


@pytest.mark.slow
@every_target
@pytest.mark.parametrize("name", NETWORKS)
def test_networks(target: FileTarget, name: str, tmp_path: Path) -> None:
    models = pytest.importorskip("torchvision.models")
    net = models.get_model(name, weights=None)
    found = written(target, tmp_path, net, numbers(2, 3, 64, 64))
    # In native code a linear layer is a pointwise convolution.
    linear = sum(isinstance(module, nn.Linear) for module in net.modules())
    assert count(found, CONVOLUTIONS) == NETWORKS[name] + linear * (target.name == "native")
    assert "BatchNormalization" not in found.nodes
    assert found.agreement.top1 == 1


# What is refused.


@every_target
def test_a_file_that_computes_something_else_is_removed(
    target: FileTarget, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    export, other = type(target).export, nn.Conv2d(4, 4, 1, groups=2).eval()
    monkeypatch.setattr(
        type(target),
        "export",
        lambda self, module, *rest, **options: export(self, other, *rest, **options),
    )
    with pytest.raises(ExportError, match="differs from PyTorch"):
        written(target, tmp_path, nn.Conv2d(4, 4, 1, groups=2), numbers(2, 4, 3, 3))
    other = nn.Conv2d(4, 8, 1, groups=2).eval()
    with pytest.raises(ExportError, match=r"shapes \[\(2, 8, 3, 3\)\], not \[\(2, 4, 3, 3\)\]"):
        written(target, tmp_path, nn.Conv2d(4, 4, 1, groups=2), numbers(2, 4, 3, 3))
    assert not list(tmp_path.iterdir())
    # What was there before is kept.
    (tmp_path / f"net{target.suffix}").write_text("before")
    with pytest.raises(ExportError):
        written(target, tmp_path, nn.Conv2d(4, 4, 1, groups=2), numbers(2, 4, 3, 3))
    (kept,) = tmp_path.iterdir()
    assert kept.read_text() == "before"


def notes(path: Path) -> dict[str, str]:
    """The metadata of a file."""
    if path.suffix == ".onnx":
        import onnx

        return {entry.key: entry.value for entry in onnx.load(path).metadata_props}
    if path.suffix == ".xml":
        import openvino

        found = openvino.Core().read_model(path).get_rt_info()
        return {name: value.astype(str) for name, value in found.items() if name == "plan"}
    if path.suffix == ".tflite":
        from ai_edge_litert import schema_py_generated as schema

        model = schema.ModelT.InitFromPackedBuf(path.read_bytes(), 0)
        return {
            entry.name.decode(): bytes(model.buffers[entry.buffer].data).decode(errors="replace")
            for entry in model.metadata
        }
    if path.suffix == ".mlpackage":
        from coremltools.models import MLModel

        return dict(MLModel(str(path), skip_model_load=True).user_defined_metadata)
    if path.suffix == ".pt2":
        kept = {"plan": ""}
        torch.export.load(path, extra_files=kept)
        return {name: value for name, value in kept.items() if value}
    with zipfile.ZipFile(path) as archive:
        return dict(json.loads(archive.read("program.json"))["metadata"])


@every_target
@pytest.mark.parametrize("int8", [False, True])
def test_metadata(target: FileTarget, int8: bool, tmp_path: Path) -> None:
    if int8 and type(target).quantize is FileTarget.quantize:
        pytest.skip("it has no INT8")
    net, x = nn.Conv2d(4, 4, 3, groups=2).eval(), numbers(2, 4, 5, 5)
    path = tmp_path / f"net{target.suffix}"
    groupconv.export(
        net, x, path, metadata={"plan": "cafe"}, int8=numbers(8, 4, 5, 5) if int8 else None
    )
    assert notes(path).get("plan") == "cafe"


@every_target
def test_what_pytorch_can_not_export(target: FileTarget, tmp_path: Path) -> None:
    class Choice(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x + 1 if x.sum() > 0 else x - 1

    with pytest.raises(ExportError, match=r"can't (export|be recorded)"):
        written(target, tmp_path, Choice(), numbers(2, 3))
    assert not list(tmp_path.iterdir())


@every_target
def test_a_damaged_file_and_a_wrong_shape(target: FileTarget, tmp_path: Path) -> None:
    from groupconv.targets.verify import verify

    net = nn.Conv2d(4, 4, 3, groups=2).eval()
    path = Path(written(target, tmp_path, net, numbers(2, 4, 5, 5)).path)
    with pytest.raises(ExportError, match=f"{target.name} can't run"):
        verify(target, path, net, [(numbers(2, 6, 5, 5),)])
    part = path if path.is_file() else next(path.rglob("*.mlmodel"))
    part.write_bytes(part.read_bytes()[:100])
    with pytest.raises(ExportError, match=f"{target.name} can't run"):
        verify(target, path, net, [(numbers(2, 4, 5, 5),)])


@every_target
def test_arguments(target: FileTarget, tmp_path: Path) -> None:
    net, x = nn.Conv2d(4, 4, 1), numbers(1, 4, 2, 2)
    path = tmp_path / f"net{target.suffix}"
    with pytest.raises(ArgumentError, match="training mode"):
        groupconv.export(net, x, path)
    with pytest.raises(ArgumentError, match="there is no folder"):
        groupconv.export(net.eval(), x, tmp_path / "none" / path.name)
    path.mkdir()
    (path / "mine").touch()
    with pytest.raises(DataError, match="can't be written"):
        groupconv.export(net, x, path)
    assert [file.name for file in path.iterdir()] == ["mine"]


def test_unknown_suffixes(tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match=r"\.onnx \(onnxruntime\), \.xml \(openvino\), \.tf"):
        groupconv.export(nn.Conv2d(4, 4, 1).eval(), numbers(1, 4, 2, 2), tmp_path / "net.pb")


def test_missing_libraries_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    message = r"onnx and onnxscript and openvino are missing: pip install 'groupconv\[openvino\]'"
    with pytest.raises(ArgumentError, match=message):
        groupconv.export(nn.Conv2d(4, 4, 1).eval(), numbers(1, 4, 2, 2), tmp_path / "net.xml")
    with pytest.raises(ArgumentError, match="onnxruntime"):
        get_target("onnxruntime")
