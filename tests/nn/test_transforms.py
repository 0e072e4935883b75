"""Layers and functions under torch.compile, torch.export, vmap and repeated gradients."""

from collections.abc import Callable, Iterator

import pytest
import torch
from compare import assert_close
from torch import Tensor, nn
from torch.export import Dim

from groupconv import nn as our_nn
from groupconv.errors import ArgumentError
from groupconv.nn import functional

LAYERS = [
    our_nn.GroupConv1d,
    our_nn.GroupConv2d,
    our_nn.GroupConv3d,
    our_nn.GroupConvTranspose1d,
    our_nn.GroupConvTranspose2d,
    our_nn.GroupConvTranspose3d,
]
every_layer = pytest.mark.parametrize("cls", LAYERS)
every_backend = pytest.mark.parametrize(
    "backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)]
)


@pytest.fixture(autouse=True)
def _forget_compiled_code() -> Iterator[None]:
    torch.manual_seed(0)
    yield
    torch._dynamo.reset()


def gradients(function: Callable[[Tensor], Tensor], x: Tensor, layer: nn.Module) -> list[Tensor]:
    """Output, and the gradients of a weighted sum of it for the input and every parameter."""
    x = x.detach().clone().requires_grad_()
    out = function(x)
    weights = torch.linspace(-1, 1, out.numel()).reshape(out.shape)
    return [out, *torch.autograd.grad((out * weights).sum(), [x, *layer.parameters()])]


@every_backend
@pytest.mark.parametrize("mode", ["zeros", "circular"])
def test_compile(backend: str, mode: str) -> None:
    layer = our_nn.GroupConv2d(4, 8, 3, padding=1, groups=2, padding_mode=mode)
    compiled = torch.compile(layer, backend=backend, fullgraph=True)
    for shape in ((2, 4, 6, 7), (3, 4, 8, 7), (1, 4, 9, 9)):
        x = torch.randn(shape)
        expected = gradients(layer, x, layer)
        for mine, other in zip(gradients(compiled, x, layer), expected, strict=True):
            assert_close(mine, other, rtol=1e-4, atol=1e-5)


@every_layer
def test_compile_every_layer(cls: type[nn.Module]) -> None:
    layer = cls(4, 8, 3, stride=2, padding=1, groups=4)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True, dynamic=True)
    for size in (6, 9):
        x = torch.randn(2, 4, *[size] * layer._dims)
        expected = gradients(layer, x, layer)
        for mine, other in zip(gradients(compiled, x, layer), expected, strict=True):
            assert_close(mine, other, rtol=1e-5, atol=1e-6)


@every_backend
def test_compile_with_groups_from_a_shape(backend: str) -> None:
    def blur(x: Tensor) -> Tensor:
        channels = x.shape[1]
        weight = torch.arange(9 * channels, dtype=x.dtype).reshape(channels, 1, 3, 3)
        return functional.group_conv2d(x, weight, padding=1, groups=channels)

    compiled = torch.compile(blur, backend=backend, dynamic=True)
    for channels in (3, 4, 6):
        x = torch.randn(1, channels, 16, 16)
        assert_close(compiled(x), blur(x), rtol=1e-4, atol=1e-3)


def test_compile_still_refuses() -> None:
    compiled = torch.compile(functional.group_conv2d, backend="aot_eager")
    with pytest.raises(ArgumentError, match="groups=3"):
        compiled(torch.ones(1, 4, 5, 5), torch.ones(4, 1, 3, 3), groups=3)


def calls(program: torch.export.ExportedProgram) -> list[str]:
    return [str(n.target) for n in program.graph.nodes if n.op == "call_function"]


@every_layer
def test_export_is_one_node_for_any_size(cls: type[nn.Module]) -> None:
    layer = cls(4, 8, 3, padding=1, groups=4).eval()
    dims = layer._dims
    x = torch.randn(2, 4, *[7] * dims)
    free = {0: Dim("batch"), **{2 + i: Dim(f"size{i}", min=4) for i in range(dims)}}
    program = torch.export.export(layer, (x,), dynamic_shapes={"input": free})
    kind = f"conv_transpose{dims}d" if layer.transposed else f"conv{dims}d"
    overload = "input" if layer.transposed and dims > 1 else "default"
    assert calls(program) == [f"aten.{kind}.{overload}"]
    for batch, size in ((1, 5), (3, 10)):
        y = torch.randn(batch, 4, *range(size, size + dims))
        assert_close(program.module()(y), layer(y), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("padding", "name"), [("same", "padding"), ("valid", "default")])
def test_export_of_named_padding(padding: str, name: str) -> None:
    layer = our_nn.GroupConv2d(4, 8, 3, padding=padding, groups=2).eval()
    program = torch.export.export(layer, (torch.randn(2, 4, 7, 7),))
    assert calls(program) == [f"aten.conv2d.{name}"]


@pytest.mark.parametrize(
    ("layer", "nodes"),
    [
        (our_nn.ChannelShuffle(1), 0),
        (our_nn.ChannelShuffle(3), 1),
        (our_nn.ChannelPermutation(range(6)), 0),
        (our_nn.ChannelPermutation([5, 0, 4, 1, 3, 2]), 1),
    ],
    ids=str,
)
def test_export_of_moved_channels(layer: nn.Module, nodes: int) -> None:
    free = {0: Dim("batch"), 2: Dim("height"), 3: Dim("width")}
    program = torch.export.export(layer, (torch.randn(2, 6, 4, 5),), dynamic_shapes={"input": free})
    assert len(calls(program)) == nodes
    y = torch.randn(3, 6, 7, 8)
    assert_close(program.module()(y), layer(y), rtol=0, atol=0)


@pytest.mark.parametrize("groups", [1, 3])
@every_layer
def test_vmap_of_grad(cls: type[nn.Module], groups: int) -> None:
    """Gradients per sample add up to those of the batch, and equal them one by one."""
    layer = cls(6, 9, 3, padding=1, groups=groups, dtype=torch.float64)
    parameters = {name: p.detach() for name, p in layer.named_parameters()}
    x = torch.randn(5, 6, *[5] * layer._dims, dtype=torch.float64)

    def loss(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        return torch.func.functional_call(layer, parameters, (x,)).square().sum()

    each = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, x)
    whole = torch.func.grad(loss)(parameters, x)
    assert each.keys() == whole.keys() == {"weight", "bias"}
    for name, expected in whole.items():
        assert_close(each[name].sum(0), expected, rtol=1e-9, atol=1e-9)
        for i in range(5):
            alone = torch.func.grad(loss)(parameters, x[i])[name]
            assert_close(each[name][i], alone, rtol=1e-9, atol=1e-9)


@every_layer
def test_double_backward(cls: type[nn.Module]) -> None:
    layer = cls(4, 4, 2, stride=2, groups=2, dtype=torch.float64)
    x = torch.randn(2, 4, *[3] * layer._dims, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(
        lambda x, *_: layer(x), (x, *layer.parameters()), fast_mode=True
    )
    # The penalty on an input gradient, which trains the weights through it.
    (slope,) = torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)
    slope.square().sum().backward()
    assert layer.weight.grad.abs().min() > 0
