"""ExecuTorch's files: what XNNPACK takes over, and what is computed."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import groupconv
from groupconv import nn as gnn
from groupconv.errors import ExportError

pytest.importorskip("executorch")
from groupconv.targets.executorch import ExecuTorch
from groupconv.targets.verify import verify


def numbers(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


LAYERS: dict[str, Callable[[], tuple[nn.Module, Tensor]]] = {
    **{
        f"width {width}": lambda width=width: (
            nn.Conv2d(64, 64, 3, padding=1, groups=64 // width),
            numbers(2, 64, 9, 8),
        )
        for width in (1, 2, 4, 8, 32)
    },
    "fewer outputs": lambda: (nn.Conv2d(40, 12, 3, groups=4), numbers(2, 40, 9, 8)),
    "stride": lambda: (nn.Conv2d(16, 16, 3, (2, 3), (1, 0), groups=4), numbers(2, 16, 9, 8)),
    "dilation": lambda: (nn.Conv2d(16, 16, 3, 1, 2, (2, 1), groups=2), numbers(2, 16, 9, 8)),
    "1-d": lambda: (nn.Conv1d(24, 24, 5, padding=2, groups=6), numbers(2, 24, 17)),
    "norm and activation": lambda: (
        nn.Sequential(gnn.GroupConv2d(16, 16, 3, groups=4), nn.BatchNorm2d(16), nn.ReLU()),
        numbers(2, 16, 9, 8),
    ),
}


@pytest.mark.parametrize("name", LAYERS)
def test_one_part_for_xnnpack(name: str, tmp_path: Path) -> None:
    layer, x = LAYERS[name]()
    found = groupconv.export(layer.eval(), x, tmp_path / "net.pte")
    assert found.nodes == {"XnnpackBackend": 1}
    assert found.agreement.largest < 1e-5


@pytest.mark.parametrize("groups", [1, 2, 8])
@pytest.mark.parametrize("stride", [1, 2])
def test_transposed(groups: int, stride: int, tmp_path: Path) -> None:
    layer = nn.ConvTranspose2d(8, 16, 3, stride, 1, stride - 1, groups=groups)
    found = groupconv.export(layer.eval(), numbers(2, 8, 7, 6), tmp_path / "net.pte")
    assert found.agreement.largest < 1e-5
    assert found.nodes == {"XnnpackBackend": 1}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["shufflenet_v2_x0_5", "mobilenet_v3_small", "squeezenet1_1"])
def test_networks(name: str, tmp_path: Path) -> None:
    from torchvision import models

    net = getattr(models, name)().eval()
    found = groupconv.export(net, numbers(1, 3, 64, 64), tmp_path / "net.pte")
    assert found.agreement.largest < 1e-4
    assert "aten::convolution" not in found.nodes


def test_metadata_and_damage(tmp_path: Path) -> None:
    from executorch.runtime import Runtime

    net, x = nn.Conv2d(4, 4, 3, groups=2).eval(), numbers(2, 4, 5, 5)
    path = tmp_path / "net.pte"
    groupconv.export(net, x, path, metadata={"groupconv_plan": "cafe"})
    method = Runtime.get().load_program(path).load_method("groupconv_plan")
    assert method is not None
    assert list(method.execute([])) == ["cafe"]
    with pytest.raises(ExportError, match="executorch can't run net"):
        verify(ExecuTorch(), path, net, [(numbers(2, 6, 5, 5),)])
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ExportError, match="executorch can't run net"):
        verify(ExecuTorch(), path, net, [(x,)])
