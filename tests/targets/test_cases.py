"""What went wrong for others on the way to a runtime."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import groupconv
from groupconv import nn as gnn
from groupconv.errors import ArgumentError, ExportError
from groupconv.targets.base import FileTarget
from groupconv.targets.export import FILE_TARGETS
from groupconv.targets.verify import verify

GROUPED = ("CONV_2D", "DEPTHWISE_CONV_2D")
SPLITS = {"SPLIT", "SPLIT_V", "CONCATENATION", "SLICE", "STRIDED_SLICE"}


def numbers(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def usable(name: str) -> FileTarget:
    """A runtime, or the test is skipped."""
    target = next(t for t in FILE_TARGETS if t.name == name)
    reason = target.why_not()
    if reason is not None:
        pytest.skip(reason)
    return target


@pytest.fixture
def litert() -> FileTarget:
    return usable("litert")


def ranks(path: str) -> set[int]:
    """Of the tensors in a ``.tflite`` file."""
    from ai_edge_litert.interpreter import Interpreter

    interpreter = Interpreter(model_path=path)
    interpreter.allocate_tensors()
    return {len(tensor["shape"]) for tensor in interpreter.get_tensor_details()}


class AddThen(nn.Module):
    """A shape test of others failed after an addition."""

    def __init__(self, conv: nn.Module) -> None:
        super().__init__()
        self.conv = conv

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x + x.flip(1))


@pytest.mark.parametrize(
    ("layer", "x", "kind"),
    [
        (nn.Conv2d(8, 8, 3, groups=4), numbers(1, 8, 9, 9), "CONV_2D"),
        (
            AddThen(nn.Conv2d(120, 120, 3, padding=1, groups=120)),
            numbers(1, 120, 14, 14),
            "DEPTHWISE_CONV_2D",
        ),
        (nn.Conv2d(128, 128, 3, padding=1, groups=8), numbers(1, 128, 28, 28), "CONV_2D"),
    ],
    ids=["groups of two", "depthwise after an addition", "groups of sixteen"],
)
def test_litert_has_one_node_for_a_grouped_layer(
    litert: FileTarget, layer: nn.Module, x: Tensor, kind: str, tmp_path: Path
) -> None:
    found = groupconv.export(layer.eval(), x, tmp_path / "net.tflite")
    assert {name: n for name, n in found.nodes.items() if name in GROUPED} == {kind: 1}
    assert not SPLITS & found.nodes.keys()
    assert found.agreement.largest < 1e-5


class OffGpu(nn.Module):
    """Convolutions in groups of 4 and of 2 channels, of one, and an index of the largest."""

    def __init__(self) -> None:
        super().__init__()
        self.four = nn.Conv2d(16, 16, 3, padding=1, groups=4)
        self.two = nn.Conv2d(16, 16, 3, padding=1, groups=8)
        self.one = nn.Conv2d(16, 16, 3, padding=1, groups=16)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.one(self.two(self.four(x)))
        return y, y.argmax(1)


def test_what_litert_has_no_gpu_code_for(litert: FileTarget, tmp_path: Path) -> None:
    net, x = OffGpu().eval(), numbers(1, 16, 8, 8)
    found = groupconv.export(net, x, tmp_path / "net.tflite")
    split = "1 CONV_2D of groups that are no multiple of 4 channels"
    assert found.off_gpu == ("ARG_MAX", split)
    assert f"its GPU code does not run as they are: ARG_MAX, {split}" in str(found)
    dense = groupconv.export(net, x, tmp_path / "dense.tflite", dense=True)
    assert dense.off_gpu == ("ARG_MAX",)
    assert dense.nodes["CONV_2D"] == 2
    assert dense.bytes > found.bytes
    assert [net.four.groups, net.two.groups] == [4, 8]


@pytest.mark.parametrize(
    ("layer", "size"),
    [
        (nn.ConvTranspose2d(256, 256, 4, 2, 1, groups=256, bias=False), (1, 256, 6, 66)),
        (nn.ConvTranspose2d(16, 16, (1, 5), (1, 2), (0, 2), groups=2), (1, 16, 3, 65)),
    ],
    ids=["depthwise", "no padding on one axis"],
)
def test_transposed_convolutions_of_litert(
    litert: FileTarget, layer: nn.ConvTranspose2d, size: tuple[int, ...], tmp_path: Path
) -> None:
    x = numbers(1, layer.in_channels, 3, 33)
    found = groupconv.export(layer.eval(), x, tmp_path / "net.tflite")
    assert found.agreement.largest < 1e-4
    opened = litert.open(Path(found.path), (x,))
    opened.run()
    assert opened.outputs()[0].shape == size
    assert not SPLITS & found.nodes.keys()


def test_shuffles_of_litert_have_four_axes(litert: FileTarget, tmp_path: Path) -> None:
    found = groupconv.export(
        gnn.ChannelShuffle(2).eval(), numbers(1, 116, 28, 28), tmp_path / "net.tflite"
    )
    assert max(ranks(found.path)) == 4
    assert found.agreement.largest == 0


# How many convolutions each is made of.
BLOCKS: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "SeparableConv2d": (lambda: gnn.SeparableConv2d(16, 24, 3, padding=1), 2),
    "ShuffleUnit": (lambda: gnn.ShuffleUnit(16, 16, 4), 3),
    "ShuffleUnit of stride 2": (lambda: gnn.ShuffleUnit(16, 32, 4, stride=2), 3),
    "GroupedBottleneck": (lambda: gnn.GroupedBottleneck(16, 32, 4, 4), 4),
    "InvertedResidual": (lambda: gnn.InvertedResidual(16, 16), 3),
    "GroupConv1d": (lambda: gnn.GroupConv1d(16, 24, 3, groups=4), 1),
    "GroupConv2d": (lambda: gnn.GroupConv2d(16, 24, 3, groups=4), 1),
    "GroupConvTranspose1d": (lambda: gnn.GroupConvTranspose1d(16, 24, 3, 2, groups=4), 1),
    "GroupConvTranspose2d": (lambda: gnn.GroupConvTranspose2d(16, 24, 3, 2, groups=4), 1),
    "ChannelPermutation": (lambda: gnn.ChannelPermutation(torch.arange(16).flip(0)), 0),
}


@pytest.mark.parametrize("name", BLOCKS)
@pytest.mark.parametrize(
    "target", [t.name for t in FILE_TARGETS if t.name not in ("inductor", "executorch")]
)
def test_every_block_in_every_file(target: str, name: str, tmp_path: Path) -> None:
    runtime = usable(target)
    build, convolutions = BLOCKS[name]
    torch.manual_seed(0)
    block = build()
    x = numbers(2, 16, 9) if "1d" in name else numbers(2, 16, 8, 8)
    for module in block.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean)
            nn.init.uniform_(module.running_var, 0.5, 2.0)
            nn.init.uniform_(module.weight, 0.5, 2.0)
    found = groupconv.export(block.eval(), x, tmp_path / f"net{runtime.suffix}")
    assert found.agreement.largest < 1e-5
    assert sum(n for kind, n in found.nodes.items() if "conv" in kind.lower()) == convolutions
    if target == "litert":
        assert max(ranks(found.path)) <= 4


@pytest.mark.parametrize("target", ["eager", "onnxruntime", "openvino", "coreml"])
def test_a_shuffle_net_of_any_size(target: str, tmp_path: Path) -> None:
    from torchvision.models import shufflenet_v2_x0_5

    runtime, net = usable(target), shufflenet_v2_x0_5().eval()
    path = tmp_path / f"net{runtime.suffix}"
    found = groupconv.export(net, numbers(1, 3, 64, 64), path, any_size=True)
    assert sum(n for kind, n in found.nodes.items() if "conv" in kind.lower()) == 56
    for batch, *size in ((1, 64, 64), (3, 96, 80), (2, 65, 127)):
        x = numbers(batch if runtime.any_batch else 1, 3, *size)
        opened = runtime.open(path, (x,))
        opened.run()
        assert torch.allclose(opened.outputs()[0], net(x), atol=1e-5)
    assert net(x).abs().max() > 0.01


def test_any_size_where_there_is_none(tmp_path: Path) -> None:
    net, x = nn.Conv2d(4, 4, 3).eval(), numbers(1, 4, 8, 8)
    with pytest.raises(
        ArgumentError,
        match=r"\.groupconv files are for one size; write \.pt2, \.onnx, \.xml, \.mlpackage",
    ):
        groupconv.export(net, x, tmp_path / "net.groupconv", any_size=True)
    whole = nn.LayerNorm([4, 8, 8]).eval()
    with pytest.raises(ExportError, match="for images of any size"):
        groupconv.export(whole, x, tmp_path / "net.pt2", any_size=True)


def test_a_file_of_zero_groups_is_refused(tmp_path: Path) -> None:
    target = usable("onnxruntime")
    import onnx

    layer, x = nn.Conv2d(4, 4, 3, groups=2).eval(), numbers(1, 4, 5, 5)
    path = tmp_path / "net.onnx"
    groupconv.export(layer, x, path)
    model = onnx.load(path)
    (conv,) = (node for node in model.graph.node if node.op_type == "Conv")
    next(a for a in conv.attribute if a.name == "group").i = 0
    onnx.save(model, path)
    with pytest.raises(ExportError, match=r"onnxruntime can't run net\.onnx"):
        verify(target, path, layer, [(x,)])
