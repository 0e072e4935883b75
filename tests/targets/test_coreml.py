"""Core ML packages: what their programs are made of, what they compute, what is rewritten."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from compare import assert_close
from torch import Tensor, nn

import groupconv
from groupconv.errors import ExportError
from groupconv.targets import rewrites
from groupconv.targets.program import exported_for

pytest.importorskip("coremltools")
from groupconv.targets.mil import Program


def numbers(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def program(folder: Path, net: nn.Module, *inputs: Tensor) -> Program:
    """The program of a checked package."""
    found = groupconv.export(net.eval(), inputs, folder / "net.mlpackage")
    assert found.agreement.largest < 1e-5
    return Program(Path(found.path))


@pytest.mark.parametrize(
    ("layer", "groups", "weight"),
    [
        (nn.Conv2d(64, 64, 3, groups=64), 64, (64, 1, 3, 3)),
        (nn.Conv2d(64, 64, 3, groups=32), 32, (64, 2, 3, 3)),
        (nn.Conv2d(64, 64, 3, groups=16), 16, (64, 4, 3, 3)),
        (nn.Conv2d(64, 64, 3, groups=8), 8, (64, 8, 3, 3)),
        (nn.Conv2d(64, 64, 3, groups=2), 2, (64, 32, 3, 3)),
        (nn.Conv2d(64, 24, (1, 3), (2, 1), (0, 2), (1, 2), groups=4), 4, (24, 16, 1, 3)),
        (nn.Conv2d(64, 96, 3, padding="same", dilation=2, groups=8), 8, (96, 8, 3, 3)),
    ],
    ids=str,
)
def test_grouped_layers(
    layer: nn.Module, groups: int, weight: tuple[int, ...], tmp_path: Path
) -> None:
    found = program(tmp_path, nn.Sequential(layer, nn.ReLU()), numbers(2, 64, 9, 8))
    conv, relu = found.operations
    assert (conv.op_type, relu.op_type) == ("conv", "relu")
    assert int(conv.groups.val) == groups
    assert conv.weight.shape == weight


def test_a_convolution_in_one_axis(tmp_path: Path) -> None:
    found = program(tmp_path, nn.Conv1d(24, 24, 5, padding=2, groups=6), numbers(2, 24, 17))
    assert found.nodes().get("conv") == 1


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize(
    ("kind", "arguments", "size"),
    [
        (nn.ConvTranspose1d, {"stride": 2, "padding": 0, "output_padding": 1}, (9,)),
        (nn.ConvTranspose2d, {"stride": 2, "padding": 0, "output_padding": 1}, (7, 6)),
        (nn.ConvTranspose2d, {"stride": 3, "padding": (1, 0), "output_padding": 2}, (7, 6)),
        (nn.ConvTranspose2d, {"stride": 2, "padding": 1, "output_padding": 1}, (7, 6)),
        (nn.ConvTranspose3d, {"stride": 2, "padding": 1, "output_padding": 1}, (4, 5, 3)),
    ],
    ids=["1-d", "2-d", "uneven", "as much padding", "3-d"],
)
def test_output_padding(
    kind: Callable[..., nn.Module], arguments: dict[str, Any], size: tuple[int, ...], groups: int,
    tmp_path: Path,
) -> None:  # fmt: skip
    torch.manual_seed(0)
    layer = kind(4, 4, 3, groups=groups, **arguments)
    found = program(tmp_path, layer, numbers(1, 4, *size))
    assert found.nodes()["conv_transpose"] == 1


def test_circular_padding(tmp_path: Path) -> None:
    layer = nn.Conv2d(4, 4, 3, padding=(0, 1), padding_mode="circular", groups=2)
    found = program(tmp_path, layer, numbers(1, 4, 6, 7))
    assert found.nodes()["conv"] == 1
    assert found.nodes()["concat"] == 1


@pytest.mark.parametrize("sides", [(1, 2), (0, 3, 2, 0), (2, 2, 1, 1, 0, 3)], ids=str)
def test_circular_padding_is_exact(sides: tuple[int, ...]) -> None:
    class Padded(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return F.pad(x, sides, mode="circular")

    x = numbers(2, 3, *[4, 5, 6][: len(sides) // 2])
    graph = exported_for(Padded().eval(), (x,)).module()
    assert rewrites.replace_circular_padding(graph) == 1
    assert torch.equal(graph(x), Padded()(x))


class Function(nn.Module):
    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *inputs: Tensor) -> Any:
        return self.function(*inputs)


IMAGE = numbers(2, 8, 9, 7)
OPERATORS: dict[str, Callable[[Tensor], Any]] = {
    "max pool": lambda x: F.max_pool2d(x, 3, 2, 1),
    "max pool, whole windows": lambda x: F.max_pool2d(x, 3, 2, 1, ceil_mode=True),
    "max pool, uneven": lambda x: F.max_pool2d(x, (2, 3), (2, 1), (1, 0), ceil_mode=True),
    "average pool": lambda x: F.avg_pool2d(x, 3, 2, 1),
    "average of pixels": lambda x: F.avg_pool2d(x, 3, 2, 1, count_include_pad=False),
    "average, whole windows": lambda x: F.avg_pool2d(
        x, 2, 2, ceil_mode=True, count_include_pad=False
    ),
    "activations": lambda x: F.silu(x) + F.hardswish(x) + F.gelu(x) + F.relu6(x) + x.tanh(),
    "leaky": lambda x: F.leaky_relu(x, 0.2) * torch.sigmoid(x) - F.hardsigmoid(x),
    "softmax": lambda x: x.softmax(1),
    "slices": lambda x: x[:, 1:7:2, -3:] * x[:, 0, 3:6, None].mean((1, 2), keepdim=True)[:, None],
    "split": lambda x: torch.cat([x.split([3, 5], 1)[1], x.chunk(2, 1)[0]], 1),
    "shuffled": lambda x: F.channel_shuffle(torch.cat([x.relu(), x.tanh()], 1), 2),
    "views": lambda x: x.flatten(2).transpose(1, 2).unsqueeze(1).squeeze(1),
    "matrices": lambda x: x @ x.mT / (x.square().sum(dim=(2, 3), keepdim=True) + 1.0).sqrt(),
    "layer norm": lambda x: F.layer_norm(x, [7]),
    "upsampled": lambda x: F.interpolate(x, scale_factor=2.0, mode="nearest"),
    "reflected": lambda x: F.pad(x, (1, 2, 3, 0), mode="reflect"),
    "filled": lambda x: F.pad(x, (1, 2, 3, 0), value=0.5),
    "powers": lambda x: (x.abs() + 1.0) ** 1.5 + (x.abs() + 0.1).rsqrt() + x.exp(),
}  # fmt: skip


@pytest.mark.parametrize("name", OPERATORS)
def test_operators(name: str, tmp_path: Path) -> None:
    program(tmp_path, Function(OPERATORS[name]), IMAGE)


def test_another_weight_is_noticed(tmp_path: Path) -> None:
    """The package itself is run, and not what was converted."""
    from groupconv.targets.coreml import CoreMl
    from groupconv.targets.verify import verify

    target = CoreMl()
    right, wrong = (nn.Conv2d(4, 4, 3, groups=2).eval() for _ in range(2))
    wrong.load_state_dict(right.state_dict())
    with torch.no_grad():
        wrong.weight[3, 1, 2, 2] += 0.1
    x = numbers(1, 4, 6, 6)
    target.export(wrong, (x,), tmp_path / "net.mlpackage")
    verify(target, tmp_path / "net.mlpackage", wrong, [(x,)])
    with pytest.raises(ExportError, match=r"differs from PyTorch by .* \(channel 3\)"):
        verify(target, tmp_path / "net.mlpackage", right, [(x,)])


def test_a_package_takes_the_place_of_another(tmp_path: Path) -> None:
    net, other, x = nn.Conv2d(4, 4, 3), nn.Conv2d(4, 6, 3, groups=2), numbers(1, 4, 6, 6)
    for each in (net, other):
        found = groupconv.export(each.eval(), x, tmp_path / "net.mlpackage", metadata={"a": "b"})
    assert Program(Path(found.path)).operations[0].weight.shape == (6, 2, 3, 3)
    assert [file.name for file in tmp_path.iterdir()] == ["net.mlpackage"]
    assert found.bytes > 4 * 6 * 2 * 9


# coremltools forgets a folder when a conversion fails.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_what_it_can_not_hold_is_named(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="Core ML can't hold the network"):
        groupconv.export(
            Function(torch.linalg.inv).eval(), numbers(1, 4, 4), tmp_path / "a.mlpackage"
        )
    with pytest.raises(ExportError, match="can't be checked on this system: there is no cumsum"):
        groupconv.export(
            Function(lambda x: x.cumsum(1)).eval(), numbers(1, 4, 4), tmp_path / "a.mlpackage"
        )
    assert not list(tmp_path.iterdir())


def test_kernels_that_are_inputs(tmp_path: Path) -> None:
    net = Function(lambda x, w: F.conv2d(x, w, padding=3, groups=8)).eval()
    inputs = numbers(1, 8, 16, 16), numbers(8, 1, 7, 7)
    found = groupconv.export(net, inputs, tmp_path / "net.mlpackage")
    assert found.nodes["conv"] == 1
    assert_close(Program(Path(found.path))(*inputs)[0], net(*inputs), rtol=1e-4, atol=1e-4)
