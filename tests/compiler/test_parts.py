"""Networks of which native code runs the parts before objects are found."""

import pytest
import torch
from compare import assert_close
from torch import Tensor, nn

import groupconv
from benchmarks.literature import SYSTEMS
from groupconv.compiler.compiled import Compiled
from groupconv.errors import ArgumentError, GroupConvError
from groupconv.targets import get_target


class Finder(nn.Module):
    """Positions where a map is large, and something run on them."""

    def __init__(self) -> None:
        super().__init__()
        self.map = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU())
        self.relu = nn.ReLU()
        self.shared = nn.Conv2d(4, 2, 1)
        self.head = nn.Linear(2, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(self.map(x))
        large, small = self.shared(y), self.shared(y[..., ::2, ::2])
        places = (large[:, 0] > small[:, 0].mean()).nonzero()
        return self.head(large[places[:, 0], :, places[:, 1], places[:, 2]])


def test_what_runs_before_is_native_code() -> None:
    torch.manual_seed(0)
    net, x = Finder().eval(), torch.randn(2, 3, 8, 8)
    with pytest.raises(GroupConvError, match="can't be recorded"):
        groupconv.compile(net, x)
    parts = groupconv.compile_parts(net, x)
    assert isinstance(parts, Finder)
    kinds = {name: type(module) for name, module in parts.named_children()}
    assert kinds == {"map": Compiled, "relu": nn.ReLU, "shared": Compiled, "head": nn.Linear}
    with torch.no_grad():
        for batch in (x, torch.randn(3, 3, 8, 6)):
            assert_close(parts(batch), net(batch), rtol=1e-4, atol=1e-5)
    assert type(net.map) is nn.Sequential


def test_a_detector_finds_the_same() -> None:
    system = SYSTEMS["mask_rcnn"]
    net, x = system.build(True), system.inputs(True, 2)
    parts = groupconv.compile_parts(net, x)
    assert isinstance(parts.backbone, Compiled)
    assert isinstance(parts.rpn.head.conv, Compiled)
    timed = get_target("native").build(net, (x,))
    with torch.no_grad():
        for returned in (parts(x), timed()):
            for found, expected in zip(returned, net(x), strict=True):
                for key in ("boxes", "labels", "scores", "masks"):
                    assert_close(found[key], expected[key], rtol=1e-3, atol=1e-3)


def test_what_can_not_be_compiled_in_parts() -> None:
    class Late(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(3, 5)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(x[x[:, 0] > 0])

    with pytest.raises(GroupConvError, match="no layer runs on tensors before objects are found"):
        groupconv.compile_parts(Late().eval(), torch.randn(4, 3))
    with pytest.raises(ArgumentError, match="is in training mode"):
        groupconv.compile_parts(Finder(), torch.randn(2, 3, 8, 8))
