"""StyleGAN2's convolutions: exact as dense ones, and in every file for any batch."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from compare import assert_close
from torch import Tensor, nn

import groupconv
from groupconv.targets.export import FILE_TARGETS
from groupconv.targets.modulated import replace_modulated
from groupconv.targets.program import exported

IN, OUT = 4, 6


def numbers(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


class Rosinality(nn.Module):
    """As in the popular PyTorch version: weights kept in five axes, views throughout."""

    def __init__(self, up: bool = False, demodulate: bool = True) -> None:
        super().__init__()
        self.up, self.demodulate = up, demodulate
        self.weight = nn.Parameter(numbers(1, OUT, IN, 3, 3))
        self.modulation = nn.Linear(IN, IN)

    def forward(self, x: Tensor, style: Tensor) -> Tensor:
        batch, channels, height, width = x.shape
        style = self.modulation(style).view(batch, 1, channels, 1, 1)
        weight = 0.3 * self.weight * style
        if self.demodulate:
            norm = torch.rsqrt(weight.pow(2).sum([2, 3, 4]) + 1e-8)
            weight = weight * norm.view(batch, OUT, 1, 1, 1)
        weight = weight.view(batch * OUT, channels, 3, 3)
        x = x.view(1, batch * channels, height, width)
        if self.up:
            weight = weight.view(batch, OUT, channels, 3, 3)
            weight = weight.transpose(1, 2).reshape(batch * channels, OUT, 3, 3)
            y = F.conv_transpose2d(x, weight, padding=0, stride=2, groups=batch)
        else:
            y = F.conv2d(x, weight, padding=1, groups=batch)
        return y.view(batch, OUT, *y.shape[2:])


class Original(nn.Module):
    """As in NVIDIA's: weights in four axes, sizes left to be found."""

    def __init__(self, up: bool = False, demodulate: bool = True) -> None:
        super().__init__()
        self.up, self.demodulate = up, demodulate
        self.weight = nn.Parameter(numbers(OUT, IN, 3, 3))

    def forward(self, x: Tensor, styles: Tensor) -> Tensor:
        batch = x.shape[0]
        w = self.weight.unsqueeze(0) * styles.reshape(batch, 1, -1, 1, 1)
        if self.demodulate:
            w = w * (w.square().sum(dim=[2, 3, 4]) + 1e-8).rsqrt().reshape(batch, -1, 1, 1, 1)
        x = x.reshape(1, -1, *x.shape[2:])
        if self.up:
            w = w.transpose(1, 2).reshape(-1, OUT, 3, 3)
            x = F.conv_transpose2d(x, w, stride=2, padding=1, output_padding=1, groups=batch)
        else:
            x = F.conv2d(x, w.reshape(-1, IN, 3, 3), padding=1, stride=2, groups=batch)
        return x.reshape(batch, -1, *x.shape[2:])


class Lucidrains(nn.Module):
    """Styles around one, the norm with axes for what was summed."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(numbers(OUT, IN, 3, 3))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        batch, _, height, width = x.shape
        weights = self.weight[None] * (y[:, None, :, None, None] + 1)
        weights = weights * torch.rsqrt((weights**2).sum(dim=(2, 3, 4), keepdim=True) + 1e-8)
        x = x.reshape(1, -1, height, width)
        x = F.conv2d(x, weights.reshape(batch * OUT, IN, 3, 3), padding=1, groups=batch)
        return x.reshape(-1, OUT, height, width)


class Generator(nn.Module):
    """Layers one after the other, with noise and biases between them."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = Rosinality(up=True), Rosinality(demodulate=False)
        self.between = nn.Conv2d(OUT, IN, 1)

    def forward(self, x: Tensor, style: Tensor) -> Tensor:
        x = F.leaky_relu(self.first(x, style), 0.2)
        return self.second(self.between(x), style)


LAYERS: dict[str, Callable[[], nn.Module]] = {
    "views": Rosinality,
    "views, up": lambda: Rosinality(up=True),
    "views, no norm": lambda: Rosinality(demodulate=False),
    "views, up, no norm": lambda: Rosinality(up=True, demodulate=False),
    "original": Original,
    "original, up": lambda: Original(up=True),
    "original, no norm": lambda: Original(demodulate=False),
    "around one": Lucidrains,
    "generator": Generator,
}


def layer(name: str) -> nn.Module:
    torch.manual_seed(0)
    return LAYERS[name]().eval()


@pytest.mark.parametrize("name", LAYERS)
def test_exact_at_every_batch(name: str) -> None:
    net = layer(name)
    program = exported(net, (numbers(2, IN, 8, 8), numbers(2, IN)))
    convolutions = [
        node
        for node in program.graph.nodes
        if node.op == "call_function" and "conv" in str(node.target)
    ]
    assert len(convolutions) == (3 if name == "generator" else 1)
    for node in convolutions:
        # An ordinary layer: weights that no node computes, one group.
        assert node.args[1].op == "placeholder"
        assert node.args[1].name not in ("x", "style", "styles", "y")
    # Nothing is computed for the weights of each image.
    most = max(len(n.meta["val"].shape) for n in program.graph.nodes if "val" in n.meta)
    assert most == (5 if name == "around one" else 4)
    for batch in (1, 2, 3):
        inputs = numbers(batch, IN, 8, 8), numbers(batch, IN)
        assert_close(program.module()(*inputs), net(*inputs), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["views", "views, up", "generator"])
@pytest.mark.parametrize("target", FILE_TARGETS, ids=lambda target: target.name)
def test_in_every_file(name: str, target, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    if target.name == "inductor":
        pytest.skip("it has no files of its own")
    if target.why_not() is not None:
        pytest.skip(target.why_not())
    net = layer(name)
    inputs = numbers(2, IN, 8, 8), numbers(2, IN)
    found = groupconv.export(net, inputs, tmp_path / f"net{target.suffix}")
    assert found.agreement.largest < 1e-5
    for batch in (1, 2, 3) if target.any_batch else ():
        inputs = numbers(batch, IN, 8, 8), numbers(batch, IN)
        opened = target.open(Path(found.path), inputs)
        opened.run()
        assert_close(opened.outputs()[0], net(*inputs), rtol=1e-5, atol=1e-5)


def test_constant_weights_in_the_file(tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    net = layer("views")
    groupconv.export(net, (numbers(2, IN, 8, 8), numbers(2, IN)), tmp_path / "net.onnx")
    graph = onnx.load(tmp_path / "net.onnx").graph
    (conv,) = (node for node in graph.node if node.op_type == "Conv")
    assert conv.input[1] in {constant.name for constant in graph.initializer}
    assert all(a.i == 1 for a in conv.attribute if a.name == "group")
    assert graph.input[0].type.tensor_type.shape.dim[0].dim_param == "batch"


class Function(nn.Module):
    def __init__(self, function: Callable[..., Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.function(*inputs)


SQUARE, KERNEL = numbers(1, IN, IN, 3, 3), numbers(1, OUT, IN, 3, 3)


def whole_kernels(x: Tensor, w: Tensor) -> Tensor:
    """Kernels that are no product of scales."""
    y = F.conv2d(x.reshape(1, -1, 8, 8), w.reshape(-1, IN, 3, 3), padding=1, groups=len(x))
    return y.reshape(len(x), -1, 8, 8)


def other_order(x: Tensor, style: Tensor) -> Tensor:
    """The groups are images, but channels were mixed on the way to the kernel."""
    w = SQUARE * style.view(-1, 1, IN, 1, 1)
    w = w.transpose(2, 3).reshape(-1, IN, 3, 3)
    y = F.conv2d(x.reshape(1, -1, 8, 8), w, padding=1, groups=len(x))
    return y.reshape(len(x), -1, 8, 8)


def drawn(x: Tensor, style: Tensor) -> Tensor:
    """Other kernels in every pass."""
    w = torch.randn(1, OUT, IN, 3, 3) * style.view(-1, 1, IN, 1, 1)
    y = F.conv2d(x.reshape(1, -1, 8, 8), w.reshape(-1, IN, 3, 3), padding=1, groups=len(x))
    return y.reshape(len(x), -1, 8, 8)


def pixels_scaled(x: Tensor, scale: Tensor) -> Tensor:
    """A factor for each tap."""
    w = KERNEL * scale.view(-1, 1, 1, 2, 2).repeat(1, 1, 1, 2, 2)[..., :3, :3]
    y = F.conv2d(x.reshape(1, -1, 8, 8), w.reshape(-1, IN, 3, 3), padding=1, groups=len(x))
    return y.reshape(len(x), -1, 8, 8)


@pytest.mark.parametrize(
    ("function", "size"),
    [
        (whole_kernels, (OUT, IN, 3, 3)),
        (other_order, (IN,)),
        (pixels_scaled, (IN,)),
        (drawn, (IN,)),
        (lambda x, w: F.conv2d(x, w[0], groups=IN), (IN, 1, 3, 3)),
        (lambda x, w: F.conv2d(x, w[0].mean() * KERNEL[0]), (IN,)),
    ],
    ids=["whole kernels", "other order", "factors of taps", "drawn", "depthwise", "one image's"],
)
def test_others_stay_as_they_are(function: Callable[..., Tensor], size: tuple[int, ...]) -> None:
    net, inputs = Function(function).eval(), (numbers(2, IN, 8, 8), numbers(2, *size))
    graph = torch.export.export(net, inputs).module()
    code = graph.code
    assert replace_modulated(graph) == 0
    assert graph.code == code
